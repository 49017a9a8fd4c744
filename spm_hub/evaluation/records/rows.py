"""Prompt rows, and the batches into which a run cuts them before anything is drawn or shared out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from spm_hub.errors import UsageError
from spm_hub.evaluation.pictures import BUDGET_OF_PIXELS, SEEDS

Role = Literal["target", "neighbour", "unrelated"]
"""The erased concept, something close to it, or anything else."""

SMALLEST_SIDE = 8
MOST_AT_ONCE = 50


@dataclass(frozen=True)
class PromptRow:
    """One picture to draw under every condition.

    id: unique in a run. subject: the name that a judge looks for. group: what the row has in common with others of its
    subject, such as a language; reports count each group by itself. negative, guidance, width and height (pixels): None
    for those of the run. seed: of the noise, 0 to 2^64 - 1.
    Raises UsageError for values that draw nothing.
    """

    id: str
    prompt: str
    seed: int
    subject: str
    role: Role = "target"
    negative: str | None = None
    guidance: float | None = None
    width: int | None = None
    height: int | None = None
    group: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.seed < SEEDS:
            raise UsageError(f"row {self.id}: seed is {self.seed}, not a number from 0 to 2^64 - 1")
        if self.role not in get_args(Role):
            raise UsageError(f"row {self.id}: role is {self.role!r}, not {', '.join(get_args(Role))}")
        if self.guidance is not None and not math.isfinite(self.guidance):
            raise UsageError(f"row {self.id}: guidance is {self.guidance}, not a finite number")
        if (self.width is None) != (self.height is None):
            raise UsageError(f"row {self.id}: width is {self.width} and height {self.height}: give both, or neither")
        for name, side in (("width", self.width), ("height", self.height)):
            if side is not None and (side < SMALLEST_SIDE or side % SMALLEST_SIDE):
                raise UsageError(f"row {self.id}: {name} is {side}, not a multiple of {SMALLEST_SIDE} pixels")

    def as_dict(self) -> dict[str, Any]:
        """Return the row for JSON, without the values that are those of the run."""
        return {key: value for key, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class Batch:
    """Rows that are drawn in one call of the pipeline, which has one size and one guidance."""

    number: int
    rows: tuple[PromptRow, ...]


def cut(rows: Sequence[PromptRow], at_once: int) -> tuple[Batch, ...]:
    """Cut rows into batches of at most `at_once`, in order.

    A picture depends on the pictures of its batch by rounding, so a batch is drawn whole, by whatever process, and
    resumed whole. Rows that differ in size, guidance or in having a negative prompt are never in one batch.
    """
    groups: dict[tuple[object, ...], list[PromptRow]] = {}
    for row in rows:
        groups.setdefault((row.width, row.height, row.guidance, row.negative is None), []).append(row)
    parts = [group[at : at + at_once] for group in groups.values() for at in range(0, len(group), at_once)]
    return tuple(Batch(number, tuple(part)) for number, part in enumerate(parts))


def pictures_at_once(width: int, height: int) -> int:
    """Return how many pictures of this size, in pixels, a batch has unless its size is chosen.

    It depends on the size alone, not on this machine's memory, so that another machine draws the same batches.
    """
    return max(1, min(MOST_AT_ONCE, BUDGET_OF_PIXELS // (width * height)))
