"""A method as one object: its texts, the part of a recipe that it reads, and its training.

All methods are imported to check a recipe and to list them. Therefore neither this module nor a method's file imports
torch or diffusers at its top: functions import what they compute with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from spm_hub.training.recipe.validation import check_prediction, is_separable

if TYPE_CHECKING:
    from torch import nn

    from spm_hub.training.loop.run import Run, Task
    from spm_hub.training.objective import Objective
    from spm_hub.training.recipe.fields import RecipeFields
    from spm_hub.training.recipe.schema import RecipePart

PREDICTION_KEYS = frozenset({
    "erase_from", "increment", "x_t", "anchoring", "adversary", "start_from", "start_sha256", "optimiser",
    "regulariser", "protection", "together", "stop", "steps", "batch_size", "templates",
})  # fmt: skip
"""The recipe keys that `PredictionRun` reads; an objective may read more."""
TARGET_KEYS = PREDICTION_KEYS | {"objective.eta", "objective.paired"}
"""Those, and the keys of objectives that pull the prediction to a target beyond the surrogate's."""


def compare_predictions(task: Task) -> Run:
    """Return the `PredictionRun` of a task."""
    from spm_hub.training.loop.prediction_run import PredictionRun

    return PredictionRun(task)


def join_predictions(runs: Sequence[Any]) -> Run:
    """Return the `JointRun` of several concepts' `PredictionRun`s."""
    from spm_hub.training.loop.joint_run import JointRun

    return JointRun(runs)


def check_prediction_model(recipe: RecipeFields, denoiser: nn.Module) -> None:
    """Raise RecipeError for a denoiser whose modules or inputs do not fit a `PredictionRun` of the recipe.

    denoiser: without weights, on the meta device.
    """
    from spm_hub.training.loop import prediction_run

    prediction_run.check_prediction_model(recipe, denoiser)


@dataclass(frozen=True, eq=False)
class Method:
    """A way to erase, for `spmhub train --method NAME`: one file in `methods/`, or a plug-in's.

    objective: recipe -> the loss, for a loop that compares predictions; None for any other.
    preset: values of recipe keys that differ from the defaults; a recipe may change each of them.
    name, title, paper: its name in commands, its name in words, and its publication.
    summary, cost, harm: one short sentence each: which eraser is it for, what does it take, what does it damage.
    trains: task -> run: by default a `PredictionRun`; `ClosedForm(solve)`, or a loop of its own.
    predicts: False if it reads text states and weights alone: then the denoiser need not be in memory.
    uses: the recipe keys that it reads, "part" or "part.key"; a recipe that sets any other is refused. Keys about the
    concept, the model, the seed, the name and the strength are read for every method.
    instead: reasons shown when a key that it does not read is set, by "part.key", "part", or "*" for all others.
    options: a `RecipePart` of keys of its own, under the recipe key `options`; None if it has none.
    together: recipe -> whether it can erase several concepts in one run, into erasers that do not affect each other.
    joins: the runs of several concepts, their trainables removed -> one run that steps all of them.
    check: raises ValueError for a recipe that the method cannot train.
    check_model: (recipe, the denoiser without weights, on the meta device); raises RecipeError for a model that the
    method cannot train.
    """

    objective: Callable[[Any], Objective] | None = None
    preset: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""
    title: str = ""
    paper: str = ""
    summary: str = ""
    cost: str = ""
    harm: str = ""
    trains: Callable[[Task], Run] = compare_predictions
    predicts: bool = True
    uses: frozenset[str] = TARGET_KEYS
    instead: Mapping[str, str] = field(default_factory=dict)
    options: type[RecipePart] | None = None
    together: Callable[[RecipeFields], bool] = is_separable
    joins: Callable[[Sequence[Any]], Run] = join_predictions
    check: Callable[[RecipeFields], None] = check_prediction
    check_model: Callable[[RecipeFields, nn.Module], None] = check_prediction_model

    @property
    def objective_name(self) -> str:
        """The recipe's `objective.name` for this method."""
        name: str = self.preset.get("objective", {}).get("name", self.name)
        return name

    def reads(self, key: str) -> bool:
        """Return whether the method reads a recipe key of the form "part.key" or "key"."""
        return key in self.uses or key.partition(".")[0] in self.uses

    def reason(self, key: str) -> str | None:
        """Return why the method does not read `key`, or None if it does not say."""
        reasons = (self.instead.get(name) for name in (key, key.partition(".")[0], "*"))
        return next((reason for reason in reasons if reason is not None), None)
