"""Prints data to stdout, remarks and progress to stderr, as text, JSON or brief lines."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from spm_hub.cli.terminal import INTERRUPTED, printable, speaks_unicode
from spm_hub.errors import SpmHubError
from spm_hub.io.progress import Progress, no_progress
from spm_hub.io.untrusted_text import escape_hidden, escape_hidden_in_json, one_line

if TYPE_CHECKING:
    from rich.console import RenderableType

SECONDS_BETWEEN_LINES = 10.0
WARNING = "spm_hub: "
"""Prefix of our own warnings."""

_OUT_OF_MEMORY = re.compile(r"bad_alloc|out of memory|can't allocate memory|not enough memory", re.IGNORECASE)
"""Words in the RuntimeError of torch, or of a device, that has no memory left."""

LONG = 100
"""Rows above which a table is printed as plain lines: rich would take longer than reading the registry."""


PLAIN_LINES = "    \n    \n -- \n    \n    \n    \n    \n    \n"
"""The lines of a table in ASCII, as `rich.box.Box` reads them: one below the heading."""


class InterruptedByUserError(SpmHubError):
    """Ctrl-C."""

    exit_code = INTERRUPTED


@dataclass(frozen=True)
class Output:
    """Prints a command's results and remarks according to its flags --json and --quiet."""

    json: bool = False
    quiet: bool = False

    def data(self, value: Any, human: RenderableType, brief: Sequence[str] = ()) -> None:
        """Print a result: `value` as JSON with --json, the lines of `brief` with -q, else `human`."""
        if self.json:
            sys.stdout.write(_json(value))
        elif self.quiet:
            sys.stdout.writelines(f"{printable(one_line(line), sys.stdout)}\n" for line in brief)
        elif isinstance(human, str):
            sys.stdout.write(printable(human, sys.stdout) + "\n" * bool(human))
        else:
            _console(sys.stdout).print(human)
        sys.stdout.flush()

    def say(self, text: str) -> None:
        """Print a remark to stderr, unless -q is given."""
        if not self.quiet:
            sys.stderr.write(_indented(text) + "\n")

    def fail(self, error: SpmHubError) -> None:
        """Print an error to stderr and, with --json, as an object to stdout, so that stdout always parses."""
        if self.json:
            described = {"type": type(error).__name__, "message": error.message, "try": error.mend}
            with suppress(OSError):  # the error may be that stdout is full
                sys.stdout.write(_json({"error": described}))
                sys.stdout.flush()
        sys.stderr.write(f"error: {_indented(error.message)}\n")
        if error.mend is not None:
            sys.stderr.write(f"  try: {one_line(error.mend)}\n")

    @contextmanager
    def progress(self, label: str) -> Iterator[Progress]:
        """Show progress: a bar on a terminal, otherwise a line every ten seconds, nothing with -q.

        Yields the callback that moves it.
        """
        if self.quiet:
            yield no_progress
        elif sys.stderr.isatty():
            with _bar(label) as move:
                yield move
        else:
            yield _lines(label)


@contextmanager
def exit_on_error(out: Output, interrupted: str = "") -> Iterator[None]:
    """Turn our errors, those of disk and memory, and Ctrl-C into a message and an exit code.

    interrupted: what is left behind at Ctrl-C, as a sentence.
    """
    try:
        yield
    except SpmHubError as error:
        out.fail(error)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.stderr.write("\n")
        out.fail(InterruptedByUserError("interrupted" + (f"; {interrupted}" if interrupted else "")))
        sys.exit(INTERRUPTED)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not _OUT_OF_MEMORY.search(str(error)):
            raise
        first = str(error).strip().partition("\n")[0]
        out.fail(
            SpmHubError(
                "there is not enough memory" + (f": {first}" if first else ""),
                mend="fewer pictures at once, --dtype bfloat16 (on a GPU also --dtype float16), or another --device",
            )
        )
        sys.exit(1)
    except BrokenPipeError:
        # The reader of the pipe (head, less) has ended. Closing stderr prevents a message of the interpreter at exit.
        sys.stderr.close()
        sys.exit(0)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        out.fail(SpmHubError(f"{where}{error.strerror or error}"))
        sys.exit(1)


@contextmanager
def silence_libraries() -> Iterator[None]:
    """Hide the progress bars, remarks and warnings of libraries; print our own warnings as lines.

    Errors of the libraries are exceptions and still reach the user.
    """
    import warnings

    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for logging in (diffusers_logging, transformers_logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    silence_hub()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", message=re.escape(WARNING))
        shown: set[str] = set()

        def show(message: Warning | str, *_: Any, **__: Any) -> None:
            # A command may attach the same erasers several times; each warning is one line all the same.
            if str(message) not in shown:
                shown.add(str(message))
                sys.stderr.write(f"warning: {_indented(str(message).removeprefix(WARNING))}\n")

        warnings.showwarning = show
        yield


def silence_hub() -> None:
    """Hide the remarks of the Hub's client; unlike `silence_libraries` this imports nothing slow."""
    from logging import ERROR

    from huggingface_hub.utils import logging as hub_logging

    hub_logging.set_verbosity(ERROR)


def literal(text: str) -> RenderableType:
    """Make a rich text that is printed literally, square brackets included."""
    from rich.text import Text

    return Text(printable(text, sys.stdout))


def table(columns: Sequence[str], rows: Sequence[Sequence[object]], *, title: str | None = None) -> RenderableType:
    """Make a table; cells are printed literally and numbers are aligned to the right.

    A table of more than LONG rows is returned as plain lines.
    """
    if len(rows) > LONG:
        return _aligned([list(columns), *([_cell(value) for value in row] for row in rows)])
    from rich import box
    from rich.table import Table
    from rich.text import Text

    heading = None if title is None else Text(printable(title, sys.stdout))
    lines = box.SIMPLE_HEAD if speaks_unicode(sys.stdout) else box.Box(PLAIN_LINES, ascii=True)
    grid = Table(box=lines, title=heading, title_justify="left", pad_edge=False)
    for index, column in enumerate(columns):
        numeric = bool(rows) and all(isinstance(row[index], int | float) for row in rows)
        grid.add_column(Text(printable(column, sys.stdout)), justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        grid.add_row(*(Text(_cell(value)) for value in row))
    return grid


def _indented(text: str) -> str:
    """Escape hidden characters and indent all lines but the first, so that none looks like one of ours."""
    return escape_hidden(text).replace("\n", "\n    ")


def _json(value: Any) -> str:
    """Write a JSON document, in ASCII where stdout could not encode all of it."""
    document = json.dumps(value, indent=2, ensure_ascii=not speaks_unicode(sys.stdout), default=str)
    return escape_hidden_in_json(document) + "\n"


def size(n_bytes: int) -> str:
    """Format a number of bytes: 412 B, 1.7 MB."""
    value = float(n_bytes)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} GB"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """Align rows in columns as wide as their widest cell, two spaces apart."""
    from rich.cells import cell_len

    widths = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(cell + " " * (width - cell_len(cell)) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
    return "\n".join(lines)


def _cell(value: object) -> str:
    return (
        f"{value:.3f}"
        if isinstance(value, float)
        else ""
        if value is None
        else printable(one_line(str(value)), sys.stdout)
    )


def _console(stream: Any) -> Any:
    from rich.console import Console

    # Output to a pipe gets a large width: grep cannot search a table whose rows wrap at 80 columns.
    return Console(file=stream, width=None if stream.isatty() else 200, soft_wrap=False, highlight=False)


def _figures(info: Mapping[str, float] | None) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in (info or {}).items())


_displays: list[Any] = []
"""The display that is open, if any. A bar opened meanwhile gets a line in it, as two displays overwrite each other."""


@contextmanager
def _bar(label: str) -> Iterator[Progress]:
    inside = bool(_displays)
    with nullcontext(_displays[0]) if inside else _display() as bars:
        # Unseen until there is something to count: "0/?" says nothing.
        task = bars.add_task(label, total=None, figures="", visible=False)

        def move(step: int, total: int, info: Mapping[str, float] | None = None, text: str = "") -> None:
            bars.update(task, completed=step, total=total, figures=text or _figures(info), visible=True)

        try:
            yield move
        finally:
            if inside:
                bars.refresh()  # a short phase is seen at all
                bars.remove_task(task)


@contextmanager
def _display() -> Iterator[Any]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}"),
    )
    with RichProgress(*columns, console=Console(stderr=True)) as bars:
        _displays.append(bars)
        try:
            yield bars
        finally:
            _displays.clear()


def _lines(label: str) -> Progress:
    last = time.monotonic()

    def move(step: int, total: int, info: Mapping[str, float] | None = None, text: str = "") -> None:
        nonlocal last
        if time.monotonic() - last >= SECONDS_BETWEEN_LINES or step == total:
            last = time.monotonic()
            sys.stderr.write(f"{label} {step}/{total}  {text or _figures(info)}".rstrip() + "\n")

    return move
