"""The keys of a training recipe, and values that follow from them alone.

Presets are in `methods`, checks in `validation` and `recipe`.
"""

from __future__ import annotations

import math

from pydantic import Field, SerializeAsAny

from spm_hub.adapters.manifest import slug
from spm_hub.training.recipe.schema import (
    Adversary,
    Anchoring,
    ClosedForm,
    Companion,
    ConceptKind,
    EarlyStop,
    IncrementRecipe,
    Masks,
    NonBlank,
    Objective,
    Optimiser,
    Protection,
    RecipePart,
    Regulariser,
    XtSource,
)


class RecipeFields(RecipePart):
    """All keys of a recipe; `Recipe` adds presets, checks, reading and writing."""

    target: NonBlank
    aliases: tuple[NonBlank, ...] = ()
    kind: ConceptKind = "other"
    surrogate: str = Field(
        default="",
        description="drawn in the concept's place; empty: nothing; auto: a general word for its kind",
    )
    erase_from: NonBlank | None = Field(
        default=None, description="erase the target out of this prompt only, which is trained on in its place (ESD)"
    )
    name: str | None = Field(default=None, description="of the eraser; made from the target unless given")
    model: NonBlank = "sketchbook"
    method: str = Field(default="spm", description="a preset of the parts below; each key may be changed")
    objective: Objective = Objective()
    increment: IncrementRecipe = IncrementRecipe()
    x_t: XtSource = XtSource()
    anchoring: Anchoring = Anchoring()
    adversary: Adversary = Adversary()
    start_from: NonBlank | None = Field(
        default=None, description="an eraser that the training begins with, in place of nothing erased"
    )
    start_sha256: str | None = Field(
        default=None, description="of that eraser's tensors; checked where given, and recorded"
    )
    optimiser: Optimiser = Optimiser()
    regulariser: Regulariser = Regulariser()
    protection: Protection = Protection()
    together: tuple[Companion, ...] = Field(
        default=(), description="concepts erased in the same run, into erasers of their own"
    )
    stop: EarlyStop = EarlyStop()
    closed_form: ClosedForm = ClosedForm()
    masks: Masks = Masks()
    options: SerializeAsAny[RecipePart] | None = Field(
        default=None, validate_default=True, description="the keys of the method's own, if it has any"
    )
    steps: int = Field(default=300, ge=1)
    batch_size: int = Field(default=8, ge=1)
    templates: bool = Field(
        default=True, description="train on the concept in many sentences, not on its bare name alone"
    )
    resolution: int | None = Field(
        default=None, ge=8, multiple_of=8, description="pixels; the model's own unless given"
    )
    seed: int = Field(default=0, ge=0, lt=2**31)
    strength: float = Field(
        default=1.0, description="gamma's factor when the eraser is attached (the paper doubles it for styles)"
    )

    @property
    def slug(self) -> str:
        """The eraser's name."""
        return self.name or slug(self.target)

    @property
    def adversary_from(self) -> int:
        """The first step that is attacked; `steps` if there is no adversary."""
        if self.adversary.steps == 0:
            return self.steps
        begins = self.adversary.begins
        if begins is None:
            begins = 0.5 if self.start_from is None else 0.0
        return int(begins * self.steps)

    def learning_rate(self, step: int) -> float:
        """Return the factor of the learning rate at `step` (from 0)."""
        warmup = min(self.optimiser.warmup, self.steps - 1)
        if step < warmup:
            return (step + 1) / (warmup + 1)
        progress = (step - warmup) / max(1, self.steps - warmup)
        match self.optimiser.schedule:
            case "constant":
                return 1.0
            case "cosine":
                return 0.5 * (1 + math.cos(math.pi * progress))
            case "cosine_restarts":
                return 0.5 * (1 + math.cos(math.pi * ((progress * self.optimiser.cycles) % 1.0)))
