"""Opens a base model with erasers for the commands that draw for others: serve and ui."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spm_hub.cli import options
from spm_hub.cli.output import Output
from spm_hub.errors import UsageError
from spm_hub.io.progress import progress_if_long

if TYPE_CHECKING:
    from spm_hub.adapters.adapter import Adapter
    from spm_hub.attachment.attachment import Attachment
    from spm_hub.models.base_choice import BaseChoice
    from spm_hub.serving.requests import Menu


@dataclass(frozen=True)
class Opened:
    """A pipeline with erasers.

    model: the base's name for other people.  side: of its pictures by default, in pixels.  required: names of erasers
    that act on every picture.
    """

    pipe: Any
    erasers: Attachment
    adapters: tuple[Adapter, ...]
    model: str
    side: int
    required: frozenset[str]

    def menu(self, limits: tuple[int, int, int, int], steps: int | None, guidance: float | None) -> Menu:
        """Return the offer of a server. limits: side, pictures, steps and prompt, as in `Limits`."""
        from spm_hub.serving.requests import Limits, Menu

        return Menu(self.model, Limits(*limits), steps, guidance, self.required)


def check_installed(extra: str, *modules: str) -> None:
    """Raise UsageError if a module of an extra is missing."""
    if missing := [name for name in modules if find_spec(name) is None]:
        raise UsageError(f"spmhub {extra} needs {' and '.join(missing)}", mend=f'pip install "spm-hub[{extra}]"')


@contextmanager
def attached(
    out: Output,
    base: BaseChoice,
    references: Sequence[str] | None,
    registry: Path | None,
    *,
    pull: bool,
    gate: str | None,
    strength: list[str] | None,
    force: bool,
    required: Sequence[str] = (),
) -> Iterator[Opened]:
    """Open the base with the erasers that the options of a command name; they are detached in the end.

    Raises UsageError, NotFoundError, ModelError, CompatibilityError; names are checked before the base is loaded.
    """
    from spm_hub.adapters.lookup import check_names, find_name
    from spm_hub.attachment.attachment import attach
    from spm_hub.hub.resolve import resolve
    from spm_hub.models.architectures import is_modular, native_side

    wanted, acting, strengths = options.names(list(references or [])), options.gate(gate), options.strengths(strength)
    if remark := base.check():
        out.say(remark)
    with progress_if_long(out, "downloading erasers", after=0.0) as progress:
        adapters = [resolve(name, registry, pull=pull, progress=progress, say=out.say).load() for name in wanted]
    check_names(adapters, strengths or ())
    always = frozenset(find_name(name, [adapter.name for adapter in adapters]) for name in required)
    pipe = base.open()
    if is_modular(type(pipe)):
        raise UsageError(f"{type(pipe).__name__} is a modular pipeline, which draws no batches of different prompts")
    with attach(pipe, adapters, gate=acting, strength=strengths, force=force, reporter=out) as erasers:
        yield Opened(pipe, erasers, tuple(adapters), base.public_name, native_side(pipe), always)
