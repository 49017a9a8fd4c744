"""Registers commands: adds --json and -q, examples in the help text, and error handling to each."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer
from typer.core import TyperCommand

from spm_hub.cli.output import Output, exit_on_error

app = typer.Typer(
    name="spmhub",
    help="Small, removable concept erasers for text-to-image models.",
    epilog="Start here:\n  spmhub demo\n  spmhub train church\n  spmhub apply -a church -p church --compare",
    no_args_is_help=True,
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


def command(
    name: str,
    *examples: Example,
    panel: str,
    interrupted: str = "",
    help_values: Callable[[], Mapping[str, str]] | None = None,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register `f(out: Output, ...)` as the command `name`, in the help panel `panel`.

    The function's docstring is the command's help text. Its first argument is an Output made from --json and --quiet,
    which are added here. `output.exit_on_error` turns its exceptions into a message and an exit code.
    interrupted: what Ctrl-C leaves behind, for the message about it.
    help_values: computes the values of `{name}` in the options' help texts, when the help of this command is shown.
    """

    def register(body: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(body, include_extras=True)
        parameters = [
            parameter.replace(annotation=_with_literal_help(hints[parameter.name]))
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
            with exit_on_error(out, interrupted):
                body(out, **given)

        run.__doc__ = _escape_markup(body.__doc__ or "")
        del run.__wrapped__  # typer must read the signature set below, not that of the body
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        EXAMPLES[name] = examples
        kind = None if help_values is None else type("LateHelp", (_LateHelp,), {"values": staticmethod(help_values)})
        app.command(name, cls=kind, epilog=_epilog(examples), rich_help_panel=panel)(run)
        return body

    return register


class _LateHelp(TyperCommand):
    """A command that completes its options' help texts when its help is shown."""

    values: Callable[[], Mapping[str, str]]

    def format_help(self, ctx: Any, formatter: Any) -> None:
        values = self.values()
        options: list[Any] = [parameter for parameter in self.params if getattr(parameter, "help", None)]
        texts = [option.help for option in options]
        for option, text in zip(options, texts, strict=True):
            option.help = text.format(**values)
        try:
            super().format_help(ctx, formatter)
        finally:
            for option, text in zip(options, texts, strict=True):
                option.help = text


def _epilog(examples: tuple[Example, ...]) -> str:
    shown = (f"  [dim]# {_escape_markup(example.does)}[/dim]\n  {_escape_markup(example.line)}" for example in examples)
    return "\n".join(("Examples:", *shown))


def _with_literal_help(annotation: Any) -> Any:
    """Return an annotation whose help text is shown as it is written, with its square brackets."""
    kind, *details = get_args(annotation) if get_origin(annotation) is Annotated else (annotation,)
    shown = [copy.copy(one) for one in details]
    for one in shown:
        if getattr(one, "help", None):
            one.help = _escape_markup(one.help)
    return Annotated[kind, *shown] if shown else annotation


def _escape_markup(text: str) -> str:
    """Escape square brackets, which would be read as markup."""
    return text.replace("[", r"\[")
