"""The loop that compares predictions at x_t: one batch, its losses, one step of the optimiser."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from spm_hub.adapters.increments import Increment
from spm_hub.errors import RecipeError
from spm_hub.training.conditioning import GUIDANCE
from spm_hub.training.data.adversary import Attacker, drift
from spm_hub.training.data.anchors import AnchorSource
from spm_hub.training.data.prompts import PromptMaker
from spm_hub.training.data.q_sample import QSampleSource
from spm_hub.training.data.sampling import generator_for
from spm_hub.training.data.student import StudentSource
from spm_hub.training.data.trajectories import TrajectorySource
from spm_hub.training.loop.anchor_weight import AnchorWeight
from spm_hub.training.loop.checkpoint import restore, tensors_of
from spm_hub.training.loop.early_stopping import EarlyStopping, HeldOut
from spm_hub.training.loop.fitting import split_for
from spm_hub.training.loop.interrupts import delay_interrupts
from spm_hub.training.loop.moving_average import EMA
from spm_hub.training.loop.run import Run, Task
from spm_hub.training.memory import Split
from spm_hub.training.objective import Losses
from spm_hub.training.protection import space_left
from spm_hub.training.recipe.fields import RecipeFields
from spm_hub.training.recipe.protected_prompts import protects
from spm_hub.training.trainable.kinds import make_trainable
from spm_hub.training.trainable.module_selection import select_modules
from spm_hub.training.trainable.peft import check_kind
from spm_hub.training.trainable.trainable import Trainable
from spm_hub.training.trainable.warm_start import begin_with


def nothing_to_erase(recipe: RecipeFields) -> RecipeError:
    """Return the error for a concept that the base draws exactly as its surrogate."""
    return RecipeError(
        f"{recipe.model} predicts the same for {recipe.target!r} as for its surrogate {recipe.surrogate!r}: there is "
        "nothing to erase",
        mend="another name for the concept, or another surrogate",
    )


def check_guidance_embedding(recipe: RecipeFields, denoiser: object, has_input: bool) -> None:
    """Raise RecipeError if `x_t.guidance_embedding` is set but the denoiser has no guidance input."""
    if recipe.x_t.guidance_embedding is not None and not has_input:
        raise RecipeError(
            f"recipe key x_t.guidance_embedding: {recipe.x_t.guidance_embedding:g} is for models with a guidance input "
            f"(FLUX.1 dev), and {type(denoiser).__name__} has none",
            mend="leave x_t.guidance_embedding out",
        )


def check_prediction_model(recipe: RecipeFields, denoiser: nn.Module) -> None:
    """Raise RecipeError for a denoiser whose modules or inputs do not fit the recipe.

    denoiser: without weights, on the meta device.
    """
    match recipe.increment.kind:
        case "loha" | "lokr" | "vera" | "dora" as kind:
            for path, module in select_modules(denoiser, recipe.increment.modules).items():
                check_kind(kind, path, module)
    config: Any = denoiser.config
    has_input = GUIDANCE in inspect.signature(type(denoiser).forward).parameters
    check_guidance_embedding(recipe, denoiser, has_input and bool(getattr(config, "guidance_embeds", True)))


class PredictionRun(Run):
    """The loop of all methods that compare the denoiser's predictions at x_t."""

    def __init__(self, task: Task, trainable: Trainable | None = None) -> None:
        """Put `trainable`, by default that of the recipe's `increment`, in effect until it is removed.

        Raises RecipeError, ModelError.
        """
        self.recipe, self.base = recipe, base = task.recipe, task.base
        if task.objective is None:
            raise RecipeError(
                f"method {recipe.method!r} compares predictions and has no objective", mend="--method spm"
            )
        self.objective = task.objective
        self.space = space_left(recipe, base, task.modules) if protects(recipe) else None
        anchors = AnchorSource(base, recipe.anchoring, recipe.target, task.prompts, recipe.surrogate)
        # Several concepts of a run share the base, and how their rows go through it.
        if self.objective.by_row and base.split == Split():
            base.split = split_for(task)
        self.attacker = Attacker(recipe.adversary, base, recipe.seed) if recipe.adversary.steps else None
        self.at_attack: dict[str, Tensor] = {}  # the parameters when the adversary began, if the recipe holds them
        if trainable is None:
            basis = None if self.space is None else self.space.basis
            generator = generator_for(recipe.seed, 2, 0)
            trainable = make_trainable(recipe.increment, base.denoiser, task.modules, generator, basis)
        self.trainable = trainable
        try:
            if task.start is not None:
                begin_with(trainable, task.start)
            self._project()
            self.source = self._make_source(task.prompts, anchors)
        except BaseException:
            trainable.remove()
            raise
        self.anchor_weight = AnchorWeight(recipe)
        self.stopping = EarlyStopping(recipe.stop)
        self.held_out = HeldOut(base, recipe, task.prompts, anchors, trainable)
        lr = recipe.optimiser.lr
        groups = trainable.parameters(lr, recipe.optimiser.scale_lr)
        # Hundreds of small parameters: one kernel for all of them, or the optimiser costs more than their gradients.
        self.optimiser = torch.optim.AdamW(groups, lr=lr, weight_decay=recipe.optimiser.weight_decay, fused=True)
        self.rates = [float(group["lr"]) for group in self.optimiser.param_groups]
        self.distance: Tensor | None = None
        decay = recipe.optimiser.ema
        self.average = None if decay is None else EMA(trainable.state(), decay)

    def _make_source(
        self, maker: PromptMaker, anchors: AnchorSource
    ) -> StudentSource | QSampleSource | TrajectorySource:
        check_guidance_embedding(self.recipe, self.base.denoiser, GUIDANCE in self.base.encode([""]).others)
        match self.recipe.x_t.source:
            case "student":
                return StudentSource(self.base, self.recipe, maker, anchors, self.trainable)
            case "q_sample":
                return QSampleSource(self.base, self.recipe, maker, anchors, self.trainable)
            case "trajectory":
                return TrajectorySource(self.base, self.recipe, maker, anchors, self.trainable)

    @property
    def finished(self) -> bool:
        """True once an early stop is due."""
        return self.stopping.due or self.held_out.due

    @property
    def reached(self) -> float | None:
        """The share of the way to the surrogate's prediction that the concept's predictions went.

        On states kept apart where the recipe stops by its reach, else by the losses of the last steps. Under an
        adversary: those of the prompts that it found.
        """
        if self.held_out.reached is not None:
            return self.held_out.reached
        left = self.anchor_weight.left
        return None if left is None else self.objective.reached(left)

    @property
    def goal(self) -> float | None:
        """The recipe's `stop.reach` or `anchoring.reach`, else where its early stop is due.

        None under an adversary: it searches for prompts that stay behind, and how far these should go is not known.
        """
        if self.attacker is not None and self.taken > self.recipe.adversary_from:
            return None
        if self.recipe.stop.reach is not None:
            return self.recipe.stop.reach
        anchoring, below = self.recipe.anchoring, self.recipe.stop.below
        if anchoring.weight > 0 and anchoring.reach is not None:
            return anchoring.reach
        if below is None or self.distance is None:
            return None
        return self.objective.reached(below / float(self.distance))

    def step(self, step: int) -> dict[str, float]:
        """One optimiser step; returns the losses as shares of the distance the erasure has to go."""
        losses = self.losses(step)
        self.differentiate(self.total(step, losses))
        with delay_interrupts():
            self.update(step)
            seen = self.note(step, losses)
            self.measure(step + 1)
            self.taken = step + 1
        return seen

    def losses(self, step: int) -> Losses:
        """Those of this step's batch."""
        # Trajectories are the frozen base's, whatever the increments are.
        average = None if isinstance(self.source, TrajectorySource) else self.average
        with nullcontext() if average is None else average.applied():
            batch = self.source.batch(step)
        if self.attacker is not None and step >= self.recipe.adversary_from:
            batch = self.attacker.attacked(batch, step)
        return self.objective.losses(self.base, batch)

    def total(self, step: int, losses: Losses, balance: float | Tensor = 1.0) -> Tensor:
        """Return the loss to minimise; `balance` weighs the erasure among those of several concepts."""
        total = self.objective.loss(balance * losses.erase, losses.anchor, self.anchor_weight.weight)
        if (l1 := self.recipe.regulariser.l1) > 0:
            deltas = self.trainable.deltas()
            total = total + l1 * torch.stack([delta.abs().sum() for delta in deltas]).sum() / len(deltas)
        if self.recipe.adversary.hold and step >= self.recipe.adversary_from:
            now = self.trainable.state()
            self.at_attack = self.at_attack or {key: value.detach().clone() for key, value in now.items()}
            total = total + self.recipe.adversary.hold * drift(now, self.at_attack)
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
        """Record a step; return the losses as shares of the distance."""
        assert self.distance is not None
        erase = float((losses.erase if losses.left is None else losses.left).detach())
        whole = losses.distance if self.objective.measures_distance else self.distance
        self.anchor_weight.note(step, erase, float(whole), self.objective)
        self.stopping.note(step, erase)
        return {
            "erase": erase / float(self.distance),
            "anchor": float(losses.anchor.detach() / self.distance),
        }

    def measure(self, taken: int) -> None:
        """Measure the reach, if it is due after `taken` steps, of what would be saved now."""
        if self.held_out.wanted(taken):
            with nullcontext() if self.average is None else self.average.applied():
                self.held_out.measure()

    def _project(self) -> None:
        """Project the increments into the null space at every step.

        Projected only at the end, much of the erasure could be lost.
        """
        if self.space is not None:
            self.trainable.project(self.space.projector)

    def increments(self) -> Mapping[str, Increment]:
        """Return the increments of now, or of the parameters' moving average, which then replaces them."""
        if self.average is not None:
            self.trainable.load_state(self.average.state())
        return self.trainable.increments()

    def snapshot(self) -> Mapping[str, Increment]:
        with nullcontext() if self.average is None else self.average.applied():
            return self.trainable.increments()

    def tensors(self) -> dict[str, Tensor]:
        tensors = tensors_of(self.trainable, self.optimiser)
        tensors |= {f"held.{key}": value for key, value in self.at_attack.items()}
        if self.distance is not None:
            tensors["distance"] = self.distance
        if (split := self.base.split) != Split():
            tensors["split"] = torch.tensor([split.rows or 0, int(split.checkpointing)])
        tensors["steering"] = self.anchor_weight.state()
        tensors["stopping"] = self.stopping.state()
        tensors["held_out"] = self.held_out.state()
        if self.average is not None:
            tensors |= {f"average.{key}": kept for key, kept in self.average.state().items()}
        return tensors

    def load(self, tensors: dict[str, Tensor]) -> None:
        restore(self.trainable, self.optimiser, tensors)
        # The bits of a sum depend on how it is split.
        rows, checkpointing = tensors["split"].tolist() if "split" in tensors else (0, 0)
        self.base.split = Split(rows or None, bool(checkpointing))
        kept = (key for key in tensors if key.startswith("held."))
        self.at_attack = {key.removeprefix("held."): tensors[key].to(self.base.device) for key in kept}
        self.distance = tensors["distance"].to(self.base.device)
        self.anchor_weight.load(tensors["steering"])
        self.stopping.load(tensors["stopping"])
        if "held_out" in tensors:  # checkpoints of earlier versions have none
            self.held_out.load(tensors["held_out"])
        if self.average is not None:
            self.average.load({k.removeprefix("average."): v for k, v in tensors.items() if k.startswith("average.")})
