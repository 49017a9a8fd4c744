"""Looks for erased concepts in finished pictures, which are then drawn again.

The denoiser itself is the judge, as in a diffusion classifier (Li et al., arXiv 2303.16203): noise is added to the
finished latents, and its prediction for the concept's name is compared with that for the empty prompt. The prompt has
no part in this look; what the eraser would change for the prompt is weighed with it (`gates.evidence`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from spm_hub.attachment.call import Call
from spm_hub.attachment.gates.evidence import Evidence, EvidenceGate
from spm_hub.attachment.options import Eraser
from spm_hub.attachment.planner import Planner
from spm_hub.attachment.watch.asking import Again, names_of, why_not

MOMENTS = (0.3, 0.4, 0.5, 0.6)
"""Where noise is added, as shares of the schedule: pictures of a concept and others differ most there."""

_SEEDS = (1, 2)
"""Of the noises. The second is asked about erasers only of which the first leaves a doubt."""

_DOUBT = 0.5
"""What the evidence weighs where the second noise is asked."""

_LEAST_EXPLAINED = 0.1
"""Least cosine of the noise and the prediction for the empty prompt, if the noise is added as the model expects."""

_LOOKS = "_spm_hub_looks"
"""An attribute of a scheduler's step that looks at its result."""

_UNSEEN = "finished pictures are not looked at for what the evidence gate watches"


class DrawAgainError(Exception):
    """A finished picture shows an erased concept: the pipeline draws it again."""


class PictureCheck:
    """Looks at the finished latents of a call, and records which prompts' pictures show an erased concept.

    Not thread-safe by itself: an `Attachment` calls it under its lock.
    """

    def __init__(self, denoiser: nn.Module, planner: Planner) -> None:
        self._denoiser, self._planner = denoiser, planner

    def needed(self, names: Iterable[str]) -> bool:
        """Return whether the gate of one of these erasers has pictures looked at."""
        erasers = [self._planner.erasers[name] for name in names if name in self._planner.erasers]
        return any(isinstance(eraser.gate, EvidenceGate) and eraser.strength for eraser in erasers)

    @contextmanager
    def last_steps(self, scheduler: Any, call: Call) -> Iterator[None]:
        """Look at the latents that the scheduler's last step returns, inside the block.

        Raises DrawAgainError out of this step if a picture has to be drawn again.
        """
        step = getattr(scheduler, "step", None)
        if step is None or hasattr(step, _LOOKS):
            yield
            return
        before, looked = vars(scheduler).get("step"), False

        @functools.wraps(step)
        def step_and_look(*args: Any, **kwargs: Any) -> Any:
            nonlocal looked
            result = step(*args, **kwargs)
            if _is_last(scheduler, kwargs.get("timestep", args[1] if len(args) > 1 else None)):
                looked = True
                found = result[0] if isinstance(result, tuple) else result.prev_sample
                if self._look(call, scheduler, found.detach()):
                    raise DrawAgainError
            return result

        setattr(step_and_look, _LOOKS, True)
        scheduler.step = step_and_look
        try:
            yield
        finally:
            del scheduler.step
            if before is not None:
                scheduler.step = before
        if not looked and any(one.gamma < 1 for each in call.evidence.values() for one in each):
            self._planner.warn_once(f"the drawing ended before its scheduler's last step: {_UNSEEN}")

    @torch.no_grad()
    def _look(self, call: Call, scheduler: Any, latents: Tensor) -> bool:
        """Record the evidence of finished pictures; return whether that asks for another drawing."""
        erasers = {
            name: eraser
            for name, eraser in self._planner.erasers.items()
            if isinstance(eraser.gate, EvidenceGate)
            and eraser.strength
            and self._planner.may_act(name)
            and any(map(eraser.gate.may_rise, call.evidence.get(name, ())))
        }
        if not erasers:
            return False
        again, states, part = call.last_asked or (None, None, slice(0))
        why = why_not(self._denoiser, states, len(latents)) or _why_unknown(scheduler)
        if why is not None or again is None or not isinstance(states, Tensor):
            self._planner.warn_once(f"{why}: {_UNSEEN}")
            return False
        risen = False
        for name, shown in self._shown(call, erasers, again, states, part, _Noising(scheduler, latents)).items():
            gate, before = erasers[name].gate, call.evidence[name]
            assert isinstance(gate, EvidenceGate)
            chosen = [name in each for each in self._planner.choice_for(len(before))]
            call.evidence[name] = tuple(
                # What another drawing shows is not what asked for it.
                replace(one, shown=each, gamma=_risen(gate, one, each)) if acts and gate.may_rise(one) else one
                for one, each, acts in zip(before, shown.tolist(), chosen, strict=True)
            )
            risen |= any(one.gamma < now.gamma for one, now in zip(before, call.evidence[name], strict=True))
        return risen

    def _shown(
        self, call: Call, erasers: Mapping[str, Eraser], again: Again, states: Tensor, part: slice, noising: _Noising
    ) -> dict[str, Tensor]:
        """Return for each eraser how far its name explains the pictures of each prompt, (prompts,), float64."""
        names, empty = names_of(call, erasers, states, self._planner)
        self._planner.put_alone(None)
        sums = {name: torch.zeros(2, len(states), dtype=torch.float64) for name in names}
        found: dict[str, Tensor] = {}
        for seed in _SEEDS:
            explained = []
            for moment in MOMENTS:
                noisy, target = noising.at(moment, seed)
                unnamed = again(part, empty, noisy, moment)[:, : target.shape[1]]
                explained.append(_cosine(target, unnamed))
                for name, (along, length) in sums.items():
                    way = again(part, names[name], noisy, moment)[:, : target.shape[1]] - unnamed
                    along += _dots(target - unnamed, way)
                    length += _dots(way, way)
            if max(explained) < _LEAST_EXPLAINED:
                self._planner.warn_once(f"the denoiser does not predict noise as its scheduler adds it: {_UNSEEN}")
                return {}
            for name, (along, length) in sums.items():
                share = along / length.clamp_min(torch.finfo(torch.float64).tiny)
                found[name] = share.view(-1, call.images).amax(1)
            sums = {name: each for name, each in sums.items() if self._is_doubtful(call, name, found[name])}
            if not sums:
                break
        return found

    def _is_doubtful(self, call: Call, name: str, shown: Tensor) -> bool:
        gate = self._planner.erasers[name].gate
        assert isinstance(gate, EvidenceGate)
        return any(
            gate.may_rise(one) and gate.weigh(one.share, each) >= _DOUBT
            for one, each in zip(call.evidence[name], shown.tolist(), strict=True)
        )


class _Noising:
    """Adds noise to finished latents as the model's training did."""

    def __init__(self, scheduler: Any, latents: Tensor) -> None:
        self._alphas = getattr(scheduler, "alphas_cumprod", None)
        self._predicts = getattr(scheduler.config, "prediction_type", "epsilon")
        self._latents = latents

    def at(self, moment: float, seed: int) -> tuple[Tensor, Tensor]:
        """Return the noisy latents and the prediction of a perfect model, both of the latents' shape."""
        clean = self._latents
        noise = torch.randn(clean.shape[1:], generator=torch.Generator().manual_seed(seed)).to(clean).expand_as(clean)
        if self._alphas is None:  # a flow
            return (1 - moment) * clean + moment * noise, noise - clean
        kept = float(self._alphas[round(moment * len(self._alphas))])
        alpha, sigma = kept**0.5, (1 - kept) ** 0.5
        targets: dict[str, Callable[[], Tensor]] = {
            "epsilon": lambda: noise, "v_prediction": lambda: alpha * noise - sigma * clean, "sample": lambda: clean,
        }  # fmt: skip
        return alpha * clean + sigma * noise, targets[self._predicts]()


def _risen(gate: EvidenceGate, one: Evidence, shown: float) -> float:
    return 1.0 if gate.weigh(one.share, shown) >= 1 else one.gamma


def _why_unknown(scheduler: Any) -> str | None:
    """Return why it is unknown how the model was trained to add noise, None if it is known."""
    name = type(scheduler).__name__
    if hasattr(scheduler, "alphas_cumprod"):
        predicts = scheduler.config.get("prediction_type", "epsilon")
        return None if predicts in ("epsilon", "v_prediction", "sample") else f"{name} predicts {predicts!r}"
    return None if "FlowMatch" in name else f"{name} is neither a diffusion's nor a flow's scheduler"


def _is_last(scheduler: Any, timestep: Any) -> bool:
    timesteps = getattr(scheduler, "timesteps", None)
    if timestep is None or timesteps is None or not len(timesteps):
        return False
    return float(torch.as_tensor(timestep).flatten()[0]) == float(timesteps[-1])


def _cosine(one: Tensor, other: Tensor) -> float:
    return float(_dots(one, other).sum() / (_dots(one, one).sum() * _dots(other, other).sum()).sqrt())


def _dots(one: Tensor, other: Tensor) -> Tensor:
    """Return the inner product of each row, (rows,), float64 on the CPU."""
    # Moved first: some devices have no float64.
    one, other = (each.to("cpu", torch.float64) for each in (one, other))
    return (one * other).flatten(1).sum(1)


def random_state(pipe: Any, given: Iterable[Any]) -> Callable[[], None]:
    """Return a function that restores the present state of the generators of a pipeline's call.

    given: the values of the call's arguments. Without a generator among them it is torch's own.
    """
    each = [one for value in given for one in (value if isinstance(value, list | tuple) else (value,))]
    states = [(one, one.get_state()) for one in each if isinstance(one, torch.Generator)]
    if not states:
        device = torch.device(getattr(pipe, "_execution_device", "cpu"))
        own, state = torch.get_rng_state(), None
        backend = getattr(torch, device.type, None)
        if device.type != "cpu" and backend is not None:
            state = backend.get_rng_state(device)

        def restore_own() -> None:
            torch.set_rng_state(own)
            if state is not None and backend is not None:
                backend.set_rng_state(state, device)

        return restore_own

    def restore() -> None:
        for one, before in states:
            one.set_state(before)

    return restore
