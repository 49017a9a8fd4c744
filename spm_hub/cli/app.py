"""Registers commands: adds --json and -q, examples in the help text, and error handling to each."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, get_type_hints

import typer

from spm_hub.cli.output import Output, exit_on_error

app = typer.Typer(
    name="spmhub",
    help="Small, removable concept erasers for text-to-image models.",
    epilog="Start here:\n  spmhub train snoopy\n  spmhub apply --adapters snoopy --prompt snoopy --compare",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from spm_hub import __version__

        print(f"spmhub {__version__}")
        raise typer.Exit


@app.callback()
def _spmhub(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and exit.")
    ] = False,
) -> None:
    """Small, removable concept erasers for text-to-image models."""


JsonFlag = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
QuietFlag = Annotated[bool, typer.Option("--quiet", "-q", help="Print only names and paths; no remarks, no progress.")]


@dataclass(frozen=True)
class Example:
    """An example for a command's help: a complete command line, and its purpose."""

    line: str
    does: str


EXAMPLES: dict[str, tuple[Example, ...]] = {}


def command(name: str, *examples: Example, panel: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register `f(out: Output, ...)` as the command `name`, in the help panel `panel`.

    The function's docstring is the command's help text. Its first argument is an Output made from --json and --quiet,
    which are added here. `output.exit_on_error` turns its exceptions into a message and an exit code.
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
            with exit_on_error(out):
                body(out, **given)

        del run.__wrapped__  # typer must read the signature set below, not that of the body
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        EXAMPLES[name] = examples
        app.command(name, epilog=_epilog(examples), rich_help_panel=panel)(run)
        return body

    return register


def _epilog(examples: tuple[Example, ...]) -> str:
    shown = (f"  [dim]# {_escape_markup(example.does)}[/dim]\n  {_escape_markup(example.line)}" for example in examples)
    return "\n".join(("Examples:", *shown))


def _escape_markup(text: str) -> str:
    """Escape square brackets, which would be read as markup."""
    return text.replace("[", r"\[")
