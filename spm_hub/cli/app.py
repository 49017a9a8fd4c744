"""How a verb becomes a command: --json and -q for each, examples in its help, and one guard around its body."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, get_type_hints

import typer

from spm_hub.cli.output import Output, guarded

app = typer.Typer(
    name="spmhub",
    help="Small, removable concept erasers for text-to-image models.",
    epilog="Start here:\n  spmhub train snoopy\n  spmhub apply --adapters snoopy --prompt snoopy --compare",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _told(asked: bool) -> None:
    if asked:
        from spm_hub import __version__

        print(f"spmhub {__version__}")
        raise typer.Exit


@app.callback()
def _spmhub(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_told, help="Print the version and leave.")
    ] = False,
) -> None:
    """Small, removable concept erasers for text-to-image models."""


JsonFlag = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
QuietFlag = Annotated[bool, typer.Option("--quiet", "-q", help="No prose and no progress; only names and paths.")]


@dataclass(frozen=True)
class Example:
    """One line that works as it stands, and what it is for."""

    line: str
    does: str


EXAMPLES: dict[str, tuple[Example, ...]] = {}


def command(name: str, *examples: Example, panel: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a function `f(out: Output, ...)` as the verb `name`, shown under `panel` in `spmhub --help`.

    The function's docstring is its help. It gets an Output made from the flags --json and --quiet, which it does not
    declare itself; whatever it raises is turned into a message and an exit code in `output.guarded`.
    """

    def register(body: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(body, include_extras=True)
        parameters = [
            parameter.replace(annotation=hints[parameter.name])
            for parameter in list(inspect.signature(body).parameters.values())[1:]
        ]
        keyword_only = inspect.Parameter.KEYWORD_ONLY
        parameters += [
            inspect.Parameter("json", keyword_only, default=False, annotation=JsonFlag),
            inspect.Parameter("quiet", keyword_only, default=False, annotation=QuietFlag),
        ]

        @functools.wraps(body)
        def run(*, json: bool, quiet: bool, **given: Any) -> None:
            out = Output(json=json, quiet=quiet)
            with guarded(out):
                body(out, **given)

        del run.__wrapped__  # typer must see the signature below, not that of the body
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        EXAMPLES[name] = examples
        app.command(name, epilog=_epilog(examples), rich_help_panel=panel)(run)
        return body

    return register


def _epilog(examples: tuple[Example, ...]) -> str:
    shown = (f"  [dim]# {_plain(example.does)}[/dim]\n  {_plain(example.line)}" for example in examples)
    return "\n".join(("Examples:", *shown))


def _plain(text: str) -> str:
    """Keep square brackets from being read as markup."""
    return text.replace("[", r"\[")
