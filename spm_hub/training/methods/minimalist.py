"""Minimalist concept erasure: masks neurons so that the pictures drawn in the end lack the concept.

Zhang et al., Minimalist Concept Erasure in Generative Models, ICML 2025, arXiv 2507.13386. Its loop and its loss are in
`loop.mask_run`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from spm_hub.training.methods.method import Method

if TYPE_CHECKING:
    from torch import nn

    from spm_hub.training.loop.run import Run, Task
    from spm_hub.training.recipe.fields import RecipeFields


def train_masks(task: Task) -> Run:
    """Return the `MaskRun` of a task."""
    from spm_hub.training.loop.mask_run import MaskRun

    return MaskRun(task)


def check(recipe: RecipeFields) -> None:
    """Refuse several guidance scales, and batches that do not balance the concept with the rest."""
    if len(recipe.x_t.guidance) != 1 or recipe.x_t.guidance[0] < 1:
        raise ValueError(
            f"method {recipe.method!r} draws under one guidance of 1 or more, for instance x_t.guidance=[3.0] "
            f"(got {list(recipe.x_t.guidance)})"
        )
    if recipe.batch_size * recipe.masks.accumulate % 2:
        raise ValueError(
            f"method {recipe.method!r} trains on the concept and on anything else by turns: batch_size "
            f"{recipe.batch_size} times masks.accumulate {recipe.masks.accumulate} has to be even"
        )


def check_model(recipe: RecipeFields, denoiser: nn.Module) -> None:
    """Raise RecipeError for a denoiser without neurons of one of the groups."""
    from spm_hub.training.trainable.mask import neurons

    neurons(denoiser, recipe.masks.groups)


METHOD = Method(
    name="minimalist",
    title="Minimalist concept erasure",
    paper="Zhang et al., ICML 2025, arXiv 2507.13386",
    summary="Switches neurons off by the final picture alone: for few-step models and FLUX, in the smallest file.",
    cost="Each step draws whole pictures and back-propagates through them, in the memory of one step.",
    harm="Without a gate, some related concepts are lost; nudity mostly stayed.",
    preset={
        "objective": {"name": "minimalist"},
        "increment": {"kind": "mask"},
        "x_t": {"steps": 5, "guidance": (5.0,)},
        "masks": {"groups": ("linear",), "beta": 0.05},
        "optimiser": {"lr": 0.5, "schedule": "constant", "warmup": 10, "scale_lr": False},
        "steps": 50,
    },
    trains=train_masks,
    uses=frozenset({
        "masks", "x_t.steps", "x_t.guidance", "optimiser.lr", "optimiser.schedule", "optimiser.warmup",
        "optimiser.cycles", "optimiser.weight_decay", "steps", "batch_size", "templates",
    }),
    instead={
        "increment": "it switches neurons off, by kind 'mask'; methods 'spm' and 'esd-x' train other increments",
        "anchoring": "masks.beta is the weight of keeping everything else",
        "x_t": "it draws whole pictures: of x_t it reads steps and guidance",
        "objective.eta": "it goes to a drawn goal and not beyond",
        "objective.paired": "it draws the same sentence with and without the concept in any case",
        "optimiser.scale_lr": "it has one lr for all neurons",
        "optimiser.ema": "it keeps no moving average",
        "erase_from": "method 'esd-x' has it",
        "start_from": "method 'esd-x' has it",
        "adversary": "method 'race' has one",
        "regulariser": "method 'sepme' has one",
        "stop": "method 'sepme' has it",
        "together": "method 'sepme' has it",
        "protection": "method 'sepme' has it",
    },
    together=lambda recipe: False,
    check=check,
    check_model=check_model,
)  # fmt: skip
