"""Draw prompts with erasers attached and, for comparison, without them, on a chosen base model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from spm_hub.adapters.adapter import Adapter
from spm_hub.adapters.lookup import check_names
from spm_hub.evaluation.pictures import (
    WITH,
    WITHOUT,
    DrawingOptions,
    PictureFolder,
    PromptPictures,
    check_prompts,
    grid_of,
    show,
)
from spm_hub.evaluation.sketchbook import remark_on_words
from spm_hub.hub.making.on_demand import erasers_for
from spm_hub.io.atomic import check_writable
from spm_hub.io.progress import Reporter
from spm_hub.io.wording import counted
from spm_hub.models.base_choice import BaseChoice
from spm_hub.registry.entry import EraserEntry

if TYPE_CHECKING:
    from spm_hub.attachment.options import GateChoice, Mode, Rows


@dataclass(frozen=True)
class Applied:
    """Pictures of prompts with erasers attached, and without them if they were compared.

    shown: for each prompt its gammas and its pictures by condition. names: of the erasers. files: the paths of the
    pictures by condition ("with", "without", "grid"), empty unless they were saved. sources: where the base ("model")
    and each eraser come from.
    """

    shown: tuple[PromptPictures, ...]
    names: tuple[str, ...]
    files: Mapping[str, tuple[Path, ...]]
    sources: Mapping[str, str]

    @property
    def gammas(self) -> tuple[Mapping[str, float], ...]:
        """For each prompt the gamma of each eraser by name: 0 does nothing, 1 erases fully."""
        return tuple(one.gates for one in self.shown)

    @property
    def with_erasers(self) -> tuple[tuple[Image.Image, ...], ...]:
        """For each prompt its pictures with the erasers, one for each seed."""
        return tuple(one.pictures[WITH] for one in self.shown)

    @property
    def without(self) -> tuple[tuple[Image.Image, ...], ...]:
        """For each prompt its pictures without the erasers, from the same noise; empty if not compared."""
        return tuple(one.pictures[WITHOUT] for one in self.shown if WITHOUT in one.pictures)

    @cached_property
    def grid(self) -> Image.Image:
        """All pictures as one labelled picture: a row for each prompt, a column for each condition."""
        return grid_of(self.shown, ", ".join(self.names))


def apply(
    erasers: Sequence[Adapter | EraserEntry],
    prompts: Sequence[str],
    base: BaseChoice,
    drawing: DrawingOptions,
    reporter: Reporter,
    *,
    gate: GateChoice | None = None,
    strength: Mapping[str, float] | float | None = None,
    rows: Rows | None = None,
    mode: Mode = "auto",
    threshold: float | None = None,
    top_k: int | None = None,
    force: bool = False,
    compare: bool = True,
    out: Path | None = None,
    grid: bool = True,
    erase: Sequence[str] = (),
    look: bool = True,
    registry: Path | None = None,
) -> Applied:
    """Draw every prompt with the erasers and, if `compare`, from the same noise without them.

    base: after its `check`. gate to force: as for `attach`. out: a folder for the pictures as PNG files, each written
    as soon as it is drawn under a name that no file there has, and for a grid if `grid`.
    erase: concepts to erase too, by erasers of `registry` that fit the base or, where it has none, by new ones.
    look: whether a quick look says what each new one does, where that takes seconds.
    Raises UsageError for prompts, names and options that are wrong, RegistryError for a folder that cannot be written,
    before the base is loaded; NetworkError, ModelError, CompatibilityError.
    """
    check_prompts(prompts)
    if out is not None:
        check_writable(out)
    adapters = [one if isinstance(one, Adapter) else one.load() for one in erasers]
    check_names(adapters, strength if isinstance(strength, Mapping) and not erase else ())
    if remark := remark_on_words(base, prompts):
        reporter.say(remark)
    pipe, origin = base.open_and_describe()
    if erase:
        made = erasers_for(erase, pipe, base.reference, reporter, registry, look=look)
        erasers = [*erasers, *made]
        adapters += [one.load() for one in made]
        check_names(adapters, strength if isinstance(strength, Mapping) else ())
    sources = {"model": origin}
    sources |= {one.name: one.source if isinstance(one, Adapter) else one.describe_source() for one in erasers}
    for what, place in sources.items():
        reporter.say(f"{what}: {place}")
    names = tuple(adapter.name for adapter in adapters)
    described = {
        "model": base.name(pipe), "adapters": names, "steps": drawing.steps, "guidance": drawing.guidance,
        "strength": dict(strength) if isinstance(strength, Mapping) else strength,
    }  # fmt: skip
    folder = None if out is None else PictureFolder(out, drawing, described)
    with _saying_what_is_kept(folder, reporter):
        with reporter.progress("drawing") as progress:
            shown = show(
                pipe, adapters, prompts, drawing,
                gate=gate, strength=strength, rows=rows, mode=mode, threshold=threshold, top_k=top_k,
                force=force, compare=compare, reporter=reporter, progress=progress,
                each=_keep_nothing if folder is None else folder.keep,
            )  # fmt: skip
        if folder is not None and grid:
            folder.keep_grid(shown, ", ".join(names))
    files = {} if folder is None else {condition: tuple(paths) for condition, paths in folder.files.items()}
    return Applied(shown, names, files, sources)


def _keep_nothing(index: int, one: PromptPictures) -> None:
    """Take a prompt's pictures of a run without a folder."""


@contextmanager
def _saying_what_is_kept(folder: PictureFolder | None, reporter: Reporter) -> Iterator[None]:
    """Say, when a run stops early, which of its pictures exist: each is written as soon as it is drawn."""
    try:
        yield
    except BaseException as error:
        if folder is not None and folder.files:
            kept = sum(map(len, folder.files.values()))
            reporter.say(f"stopped early: {counted(kept, 'picture')} of this run kept in {folder.folder}")
        elif isinstance(error, KeyboardInterrupt):
            reporter.say("stopped early: no picture was drawn")
        raise
