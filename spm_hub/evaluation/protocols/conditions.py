"""The conditions of a run, and the work of drawing them in a process that loads the base itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spm_hub.adapters.adapter import Adapter
from spm_hub.attachment.attachment import Attachment, attach
from spm_hub.evaluation.pictures import RESTORED, WITH, WITHOUT
from spm_hub.evaluation.records.drawing import BatchToDraw, Conditions, Drawing, RowDefaults
from spm_hub.evaluation.records.folder import RunFolder
from spm_hub.io.runners.runner import Place
from spm_hub.models.base_choice import BaseChoice

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def at_strength(strength: float) -> str:
    """Return the name of the condition with all erasers at one strength."""
    return f"strength {strength:g}"


def conditions_of(
    pipe: DiffusionPipeline, erasers: Sequence[Adapter], options: Mapping[str, Any], strengths: Sequence[float] = ()
) -> Conditions:
    """Return all conditions by name.

    options: those of `attach`. strengths: of all erasers; more conditions, one for each.
    """
    return {
        **{at_strength(one): partial(attach, pipe, erasers, **{**options, "strength": one}) for one in strengths},
        WITHOUT: nullcontext,
        WITH: lambda: attach(pipe, erasers, **options),
        RESTORED: lambda: _without_the_first(pipe, erasers, options),
    }


@contextmanager
def _without_the_first(
    pipe: DiffusionPipeline, erasers: Sequence[Adapter], options: Mapping[str, Any]
) -> Iterator[Attachment]:
    """Attach all erasers, and take the first one away again, for the duration of the block."""
    with attach(pipe, erasers, **options) as attached:
        attached.recover(erasers[0].name)
        yield attached


@dataclass(frozen=True)
class DrawingElsewhere:
    """The work of drawing for workers: each loads the base once, and opens the run's folder.

    base: to be loaded by name. options, strengths: as for `conditions_of`. folder: under this path for every worker.
    """

    base: BaseChoice
    erasers: tuple[Adapter, ...]
    options: Mapping[str, Any]
    folder: Path
    defaults: RowDefaults
    strengths: tuple[float, ...] = ()

    @contextmanager
    def open(self, place: Place) -> Iterator[Callable[[BatchToDraw], str]]:
        """Load the base on the worker's device; yield what `Drawing` does."""
        pipe = replace(self.base, device=place.device(self.base.device)).open()
        conditions = conditions_of(pipe, self.erasers, self.options, self.strengths)
        work = Drawing(RunFolder.open(self.folder), pipe, conditions, self.defaults, as_loaded=True)
        with work.open(place) as draw:
            yield draw
