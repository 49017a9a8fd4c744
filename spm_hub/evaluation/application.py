"""Draw prompts with erasers attached and, for comparison, without them, on a chosen base model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    PromptPictures,
    check_prompts,
    grid_of,
    save_grid,
    save_one,
    show,
)
from spm_hub.io.atomic import check_writable
from spm_hub.io.progress import Reporter
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
    compare: bool = True,
    out: Path | None = None,
    grid: bool = True,
) -> Applied:
    """Draw every prompt with the erasers and, if `compare`, from the same noise without them.

    base: after its `check`. gate to top_k: as for `attach`. out: a folder for the pictures as PNG files, each written
    as soon as it is drawn, and for `grid.png` if `grid`.
    Raises UsageError for prompts, names and options that are wrong, RegistryError for a folder that cannot be written,
    before the base is loaded; NetworkError, ModelError, CompatibilityError.
    """
    check_prompts(prompts)
    if out is not None:
        check_writable(out)
    adapters = [one if isinstance(one, Adapter) else one.load() for one in erasers]
    check_names(adapters, strength if isinstance(strength, Mapping) else ())
    pipe, origin = base.open_and_describe()
    sources = {"model": origin}
    sources |= {one.name: one.source if isinstance(one, Adapter) else one.describe_source() for one in erasers}
    for what, place in sources.items():
        reporter.say(f"{what}: {place}")
    names = tuple(adapter.name for adapter in adapters)
    described = {
        "model": base.name(pipe), "adapters": names, "steps": drawing.steps, "guidance": drawing.guidance,
    }  # fmt: skip
    files: dict[str, list[Path]] = {}

    def keep(index: int, one: PromptPictures) -> None:
        # At once, so that a run that is interrupted leaves what it has drawn.
        for condition, made in save_one(index, one, out, drawing, described).items() if out is not None else ():
            files.setdefault(condition, []).extend(made)

    with reporter.progress("drawing") as progress:
        shown = show(
            pipe, adapters, prompts, drawing,
            gate=gate, strength=strength, rows=rows, mode=mode, threshold=threshold, top_k=top_k,
            compare=compare, reporter=reporter, progress=progress, each=keep,
        )  # fmt: skip
    if out is not None and grid:
        files["grid"] = [save_grid(shown, out, ", ".join(names), described)]
    return Applied(shown, names, {condition: tuple(paths) for condition, paths in files.items()}, sources)
