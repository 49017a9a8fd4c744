"""Measure what erasers do: how often each concept is drawn without them and with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from PIL import Image

from spm_hub.adapters.adapter import Adapter
from spm_hub.adapters.manifest import Evaluation
from spm_hub.attachment.attachment import attach
from spm_hub.evaluation import sketchbook
from spm_hub.evaluation.base_pictures import base_key, kept_or_drawn
from spm_hub.evaluation.judging import table_of
from spm_hub.evaluation.pictures import DrawingOptions
from spm_hub.evaluation.sketchbook import DetectionRow
from spm_hub.io.progress import Reporter
from spm_hub.models.base_choice import BaseChoice

if TYPE_CHECKING:
    from spm_hub.attachment.options import GateChoice


@dataclass(frozen=True)
class Effect:
    """Share of pictures that show each concept, without erasers and with them, on the same cases.

    base, erasers: their names. erased: names and aliases of the erased concepts, in lower case. steps, guidance:
    denoising steps and guidance scale of all pictures.
    """

    base: str
    erasers: tuple[str, ...]
    erased: frozenset[str]
    without: tuple[DetectionRow, ...]
    given: tuple[DetectionRow, ...]
    seed: int
    steps: int
    guidance: float

    def rows(self) -> list[dict[str, Any]]:
        """Return a row for each concept, for JSON.

        The erased ones come first; among others, those with the largest loss in percentage points.
        """
        rows = [
            {"kind": new.kind, "name": new.name, "erased": new.name.lower() in self.erased, "without": old.detected,
             "with": new.detected, "change_points": round(100 * (new.detected - old.detected), 1)}
            for old, new in zip(self.without, self.given, strict=True)
        ]  # fmt: skip
        return sorted(rows, key=lambda row: (not row["erased"], row["change_points"]))

    def summary(self) -> dict[str, float]:
        """Return the worst and the mean change of concepts that are not erased, in percentage points.

        Empty if all concepts are erased ones.
        """
        others = [row["change_points"] for row in self.rows() if not row["erased"]]
        if not others:
            return {}
        return {"others_worst_points": min(others), "others_mean_points": round(sum(others) / len(others), 2)}

    def evaluations(self, gate: str) -> tuple[Evaluation, ...]:
        """Return the numbers as entries of a manifest, measured under this gate."""
        return sketchbook.evaluations(
            self.without,
            self.given,
            base=self.base,
            seed=self.seed,
            steps=self.steps,
            guidance=self.guidance,
            gate=gate,
        )


def measure(
    erasers: Sequence[Adapter],
    base: BaseChoice,
    reporter: Reporter,
    *,
    samples: int,
    seed: int,
    steps: int,
    guidance: float,
    judge: str | None = None,
    gate: GateChoice | None = None,
    strength: Mapping[str, float] | float | None = None,
    force: bool = False,
) -> Effect:
    """Draw the same cases without and with the erasers, from the same noise, and count the concepts.

    The pictures of a base without erasers are kept in the user's cache, for the next eraser.
    samples: pictures of each concept. steps, guidance: denoising steps and guidance scale.
    judge: "package.module:function"; None for the sketchbook's probe, which counts all concepts that it knows.
    gate, strength, force: as for `attach`.
    Raises NotFoundError for a concept that the probe does not know, UsageError for numbers that draw nothing, for an
    eraser of an unknown concept and for a judge that cannot be imported, before the base is loaded; ModelError,
    CompatibilityError.
    """
    DrawingOptions(seed=seed, number=samples, steps=steps, guidance=guidance)  # refuses such numbers
    concepts = [eraser.manifest.concept for eraser in erasers]
    for eraser, concept in zip(erasers, concepts, strict=True):
        concept.require_target(eraser.source)
    wanted, count = table_of(concepts, judge, samples, seed)
    pipe = base.open()

    def drawn(label: str) -> list[Image.Image]:
        with reporter.progress(label) as progress:
            return sketchbook.paint(pipe, wanted, steps=steps, guidance_scale=guidance, progress=progress)

    # First with them, as erasers that do not go together are refused here.
    with attach(pipe, erasers, gate=gate, strength=strength, force=force, reporter=reporter):
        given = tuple(count(drawn("drawing with")))
    if base.pipe is None:
        how = wanted, steps, guidance, sketchbook.BATCH_SIZE
        without = tuple(count(kept_or_drawn(base_key(pipe), how, len(wanted), lambda: drawn("drawing without"))))
    else:
        # What its caller has done to a pipeline may not show in its weights.
        without = tuple(count(drawn("drawing without")))
    erased = frozenset(name.lower() for concept in concepts for name in concept.names)
    return Effect(
        base.name(pipe), tuple(eraser.name for eraser in erasers), erased, without, given, seed, steps, guidance
    )
