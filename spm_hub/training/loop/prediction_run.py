"""The loop of everything that compares predictions at x_t: one batch, its losses, one step of the optimiser."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from spm_hub.adapters.adapter import Adapter
from spm_hub.errors import RecipeError
from spm_hub.training.base_model import BaseModel
from spm_hub.training.conditioning import GUIDANCE
from spm_hub.training.data.adversary import Attacker, drift
from spm_hub.training.data.anchors import AnchorSource
from spm_hub.training.data.prompts import PromptMaker
from spm_hub.training.data.q_sample import QSampleSource
from spm_hub.training.data.trajectories import StudentSource, TrajectorySource, generator_for
from spm_hub.training.loop.anchor_weight import Steering
from spm_hub.training.loop.early_stopping import Stopping
from spm_hub.training.loop.interrupts import uninterrupted
from spm_hub.training.loop.moving_average import MovingAverage
from spm_hub.training.loop.optimiser_state import restore, tensors_of
from spm_hub.training.methods import objective
from spm_hub.training.objective import Losses
from spm_hub.training.protection import space_left
from spm_hub.training.recipe.protected_prompts import protects
from spm_hub.training.recipe.recipe import Recipe
from spm_hub.training.trainable.dense import DenseInjection
from spm_hub.training.trainable.low_rank import Injection
from spm_hub.training.trainable.null_space import NullSpaceInjection
from spm_hub.training.trainable.peft import PeftInjection
from spm_hub.training.trainable.warm_start import begin_with


def nothing_to_erase(recipe: Recipe) -> RecipeError:
    """For a concept that the base itself draws as what is to take its place."""
    return RecipeError(
        f"{recipe.model} predicts the same for {recipe.target!r} as for its surrogate {recipe.surrogate!r}: there is "
        "nothing to erase",
        mend="another name for the concept, or another surrogate",
    )


def check_told(recipe: Recipe, denoiser: object, hears: bool) -> None:
    """Raises RecipeError where the recipe tells a denoiser its guidance that does not hear of it."""
    if recipe.x_t.told is not None and not hears:
        raise RecipeError(
            f"recipe key x_t.told: {recipe.x_t.told:g} is for models that are told their guidance (FLUX.1 dev), and "
            f"{type(denoiser).__name__} is not",
            mend="leave x_t.told out",
        )


class Run:
    """One eraser in the making: its increments, and all that training changes."""

    def __init__(
        self,
        recipe: Recipe,
        base: BaseModel,
        modules: Mapping[str, nn.Module],
        maker: PromptMaker,
        start: Adapter | None,
    ) -> None:
        """On `modules`, whose injection is in effect until it is removed. Raises RecipeError, ModelError."""
        self.recipe, self.base = recipe, base
        self.objective = objective(recipe)
        self.space = space_left(recipe, base, modules) if protects(recipe) else None
        anchors = AnchorSource(base, recipe.anchoring, recipe.target, maker, recipe.surrogate)
        self.attacker = Attacker(recipe.adversary, base, recipe.seed) if recipe.adversary.steps else None
        self.held: dict[str, Tensor] = {}  # what the increments were when the adversary began, where that is asked for
        self.injection = self._injected(modules)
        try:
            if start is not None:
                assert not isinstance(self.injection, NullSpaceInjection | PeftInjection)
                begin_with(self.injection, start)
            self._project()
            self.source = self._sourced(maker, anchors)
        except BaseException:
            self.injection.remove()
            raise
        self.steering = Steering(recipe)
        self.stopping = Stopping(recipe.stop)
        lr = recipe.optimiser.lr
        groups = self.injection.groups(lr, recipe.optimiser.scale_lr)
        # Hundreds of small parameters: one kernel for all of them, or the optimiser costs more than their gradients.
        self.optimiser = torch.optim.AdamW(groups, lr=lr, weight_decay=recipe.optimiser.weight_decay, fused=True)
        self.rates = [float(group["lr"]) for group in self.optimiser.param_groups]
        self.distance: Tensor | None = None
        self.taken = 0
        """Steps that are in the parameters, the optimiser and all else that `tensors` gives."""
        decay = recipe.optimiser.ema
        self.average = None if decay is None else MovingAverage(self.injection.state(), decay)

    def _injected(
        self, modules: Mapping[str, nn.Module]
    ) -> Injection | DenseInjection | NullSpaceInjection | PeftInjection:
        recipe = self.recipe
        generator = generator_for(recipe.seed, 2, 0)
        if recipe.increment.kind == "dense":
            return DenseInjection(modules)
        if recipe.increment.kind == "null_space":
            assert self.space is not None
            return NullSpaceInjection(modules, self.space.basis, recipe.increment.beta)
        if recipe.increment.kind == "low_rank":
            return Injection(self.base.denoiser, recipe.increment.rank, generator, modules)
        assert recipe.increment.kind != "mask"
        return PeftInjection(self.base.denoiser, recipe.increment.kind, recipe.increment.rank, generator, modules)

    def _sourced(self, maker: PromptMaker, anchors: AnchorSource) -> StudentSource | QSampleSource | TrajectorySource:
        check_told(self.recipe, self.base.denoiser, GUIDANCE in self.base.encode([""]).others)
        match self.recipe.x_t.source:
            case "student":
                return StudentSource(self.base, self.recipe, maker, anchors, self.injection)
            case "q_sample":
                return QSampleSource(self.base, self.recipe, maker, anchors, self.injection)
            case "trajectory":
                return TrajectorySource(self.base, self.recipe, maker, anchors, self.injection)

    @property
    def finished(self) -> bool:
        """Whether the early stop is due."""
        return self.stopping.due

    def step(self, step: int) -> dict[str, float]:
        """One optimiser step; returns the losses as shares of the distance the erasure has to go."""
        losses = self.losses(step)
        self.differentiate(self.total(step, losses))
        with uninterrupted():
            self.update(step)
            seen = self.note(step, losses)
            self.taken = step + 1
        return seen

    def losses(self, step: int) -> Losses:
        """Those of this step's batch."""
        # Trajectories are the frozen base's, whatever the increments are.
        average = None if isinstance(self.source, TrajectorySource) else self.average
        with nullcontext() if average is None else average.applied():
            batch = self.source.batch(step)
        if self.attacker is not None and step >= self.recipe.adversary_from:
            batch = self.attacker.harmed(batch, step)
        return self.objective.losses(self.base, batch)

    def total(self, step: int, losses: Losses, balance: float | Tensor = 1.0) -> Tensor:
        """What is minimised; `balance` weighs the erasure among those of several concepts."""
        total = self.objective.loss(balance * losses.erase, losses.anchor, self.steering.weight)
        if (l1 := self.recipe.regulariser.l1) > 0:
            assert not isinstance(self.injection, PeftInjection)
            deltas = self.injection.deltas()
            total = total + l1 * torch.stack([delta.abs().sum() for delta in deltas]).sum() / len(deltas)
        if self.recipe.adversary.hold and step >= self.recipe.adversary_from:
            now = self.injection.state()
            self.held = self.held or {key: value.detach().clone() for key, value in now.items()}
            total = total + self.recipe.adversary.hold * drift(now, self.held)
        if self.distance is None:
            if not losses.distance.any():
                raise nothing_to_erase(self.recipe)
            self.distance = losses.distance
        return total / self.distance if self.objective.relative else total

    def differentiate(self, total: Tensor) -> None:
        """The gradients of `total`, for `update`."""
        self.optimiser.zero_grad(set_to_none=True)
        total.backward()

    def update(self, step: int) -> None:
        """One step of the optimiser down the gradients."""
        factor = self.recipe.learning_rate(step)
        for group, rate in zip(self.optimiser.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        self.optimiser.step()
        self._project()
        if self.average is not None:
            self.average.update()

    def note(self, step: int, losses: Losses) -> dict[str, float]:
        """Takes down what a step has shown; returns the losses as shares of the distance."""
        assert self.distance is not None
        erase = float(losses.erase.detach())
        self.steering.note(step, erase, float(losses.distance), self.objective)
        self.stopping.note(step, erase)
        return {
            "erase": float(losses.erase.detach() / self.distance),
            "anchor": float(losses.anchor.detach() / self.distance),
        }

    def _project(self) -> None:
        """Training knows what it may not change: projected afterwards alone, much of the erasure could be lost."""
        if self.space is not None and not isinstance(self.injection, NullSpaceInjection | PeftInjection):
            self.injection.project(self.space.projector)

    def settle(self) -> None:
        """The parameters become what is to be saved: their average, where one is kept."""
        if self.average is not None:
            self.injection.load_state(self.average.state())

    def tensors(self) -> dict[str, Tensor]:
        tensors = tensors_of(self.injection, self.optimiser)
        tensors |= {f"held.{key}": value for key, value in self.held.items()}
        if self.distance is not None:
            tensors["distance"] = self.distance
        tensors["steering"] = self.steering.state()
        tensors["stopping"] = self.stopping.state()
        if self.average is not None:
            tensors |= {f"average.{key}": kept for key, kept in self.average.state().items()}
        return tensors

    def load(self, tensors: dict[str, Tensor]) -> None:
        restore(self.injection, self.optimiser, tensors)
        held = (key for key in tensors if key.startswith("held."))
        self.held = {key.removeprefix("held."): tensors[key].to(self.base.device) for key in held}
        self.distance = tensors["distance"].to(self.base.device)
        self.steering.load(tensors["steering"])
        self.stopping.load(tensors["stopping"])
        if self.average is not None:
            self.average.load({k.removeprefix("average."): v for k, v in tensors.items() if k.startswith("average.")})
