"""The base model in training: encodes prompts, and predicts from noisy latents.

Losses compare raw predictions (noise, v or velocity, whatever the model was trained to give), so nothing here depends
on which. Nor is there a case for each family: the arguments of the denoiser (pooled embeddings, time ids, packed
latents and their positions, embedded guidance, shifted timesteps) are learnt from its own pipeline, which is started,
and stopped at its first call of the denoiser.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from spm_hub.errors import ModelError
from spm_hub.models.architectures import FEW_STEPS, body_of, denoiser_of, family_of
from spm_hub.models.mapped import intended_dtype, is_mapped
from spm_hub.training.conditioning import Conditioning, DenoiserCall
from spm_hub.training.memory import Split, block_inputs_alone

_ENCODED_AT_ONCE = 64  # prompts


class _ReachedError(Exception):
    """Stops a pipeline from within, once it has shown the call that is asked for."""


class TeacherModel:
    """A pipeline's text encoder, denoiser and schedule; the denoiser may carry trainable increments."""

    def __init__(self, pipe: DiffusionPipeline, resolution: int | None = None) -> None:
        """`resolution` in pixels, the pipeline's own unless given.

        Raises ModelError for a pipeline that cannot draw at it, or whose denoiser training does not know how to call.
        """
        # diffusers does not annotate pipelines.
        self.pipe: Any = pipe
        self.denoiser: nn.Module = denoiser_of(pipe)
        self.family = family_of(pipe)
        config: Any = self.denoiser.config
        self.device, self.dtype = next(self.denoiser.parameters()).device, intended_dtype(self.denoiser)
        self._few_steps = self.family.few_steps(config)
        self.resolution = resolution
        self.split = Split()
        self._prompts: dict[str, Conditioning] = {}
        self._probe = _knowing_its_device(self.pipe)
        self._schedule = self._memoryless()
        one, scheduler = self._called(["a"], 2)
        two, _ = self._called(["a", "a"], 2)
        self._call = DenoiserCall.learnt(one, two, float(scheduler.timesteps[0]))
        self.latent_shape = tuple(one[self._call.latents].shape[1:])
        self._raw = None if is_mapped(self.denoiser) else self._learn_raw()

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], *, literally: bool = False) -> Conditioning:
        """Return the conditioning of n prompts, as the pipeline itself encodes them.

        literally: also of the empty prompt, for which some pipelines (SDXL) use zeros under guidance.
        """
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._prompts]
        for start in range(0, len(missing), _ENCODED_AT_ONCE):
            part = missing[start : start + _ENCODED_AT_ONCE]
            rows = self._call.conditioning(self._called(part, 2)[0])
            self._prompts.update({prompt: rows[row : row + 1] for row, prompt in enumerate(part)})
        encoded = self._prompts.__getitem__ if literally else self._with_zeros
        return Conditioning.cat([encoded(prompt) for prompt in prompts])

    def _with_zeros(self, prompt: str) -> Conditioning:
        row = self._prompts[prompt]
        if prompt or not self.pipe.config.get("force_zeros_for_empty_prompt"):
            return row
        # SDXL was trained with zeros in place of no prompt, and that is what guidance is given there.
        pooled = None if row.pooled is None else torch.zeros_like(row.pooled)
        return replace(row, states=torch.zeros_like(row.states), pooled=pooled)

    def forget(self) -> None:
        """Drops cached prompts; a long training draws new ones for ever."""
        self._prompts.clear()

    def steps(self, wanted: int) -> int:
        """Return `wanted`, or fewer for a few-step model.

        It learns nothing from an x_t that it never visits.
        """
        return min(wanted, FEW_STEPS) if self._few_steps else wanted

    def scheduler(self, steps: int) -> Any:
        """Return a new scheduler, set to `steps` as the pipeline sets its own.

        Its timesteps are shifted by the picture's size. It keeps no state between steps and has the model's own
        schedule: DDIM for diffusion, Euler for flows.
        """
        return self._called([""], steps)[1]

    def bytes_of_weights(self) -> int:
        """Return the bytes of the pipeline's weights in the precision to compute in."""
        parts = [part for part in self.pipe.components.values() if isinstance(part, nn.Module)]
        return sum(one.numel() * intended_dtype(part).itemsize for part in parts for one in part.parameters())

    def noise(self, count: int, generator: torch.Generator) -> Tensor:
        """Standard normal latents (count, *latent_shape), packed where the denoiser takes packed ones.

        They are drawn on the CPU, so that a seed means the same anywhere.
        """
        return torch.randn((count, *self.latent_shape), generator=generator).to(self.device)

    def predict(self, latents: Tensor, times: Tensor, conditioning: Conditioning) -> Tensor:
        """The denoiser's prediction for latents (n, *latent_shape), times (n,) as the scheduler has them.

        It is float32; float64 where the model is. `split` says how many rows are predicted at once; with gradients each
        group of them is predicted again when its gradient is due.
        """
        rows = len(latents) if self.split.rows is None else self.split.rows
        if rows >= len(latents):
            return self._predicted(latents, times, conditioning)
        parts = []
        for start in range(0, len(latents), rows):
            part = slice(start, start + rows)
            given = latents[part], times[part], conditioning[part]
            if torch.is_grad_enabled():
                parts.append(checkpoint(self._predicted, *given, use_reentrant=False, preserve_rng_state=False))
            else:
                parts.append(self._predicted(*given))
        return torch.cat(parts)

    def _predicted(self, latents: Tensor, times: Tensor, conditioning: Conditioning) -> Tensor:
        assert self._raw is not None, "a method that predicts has the denoiser's weights loaded"
        arguments = self._call.arguments(latents.to(self.dtype), times, conditioning)
        keeps_less = self.split.checkpointing and torch.is_grad_enabled()
        with block_inputs_alone(body_of(self.denoiser)) if keeps_less else nullcontext():
            output = self.denoiser(**arguments)
        return self._raw(_tensor(output)).to(torch.promote_types(self.dtype, torch.float32))

    def arguments_without_values(self, rows: int) -> dict[str, Any]:
        """Return the arguments of a call of the denoiser with that many rows, on the meta device."""
        given = self.encode(["a"])[0].expand(rows)
        given = given.map(lambda part: part.to(self.dtype) if part.is_floating_point() else part)
        latents = torch.empty((rows, *self.latent_shape), dtype=self.dtype, device="meta")
        arguments = self._call.arguments(latents, torch.ones(rows, device="meta"), given)
        return {name: _on_meta(value) for name, value in arguments.items()}

    def guide(self, empty: Tensor, given: Tensor, scale: Tensor) -> Tensor:
        """Return the guided prediction: `empty` pushed by scale (n,) towards `given`.

        A guidance-distilled model gives a guided prediction for the prompt itself (FLUX.1 dev at the scale that it
        receives, FLUX.1 schnell at the one that it was trained for): pushed further, nobody draws with it. Its scales
        therefore end at 1, where the prompt alone drives; the rest is its guidance input, `Conditioning.under`.
        """
        if self.family.distilled:
            scale = scale.clamp_max(1.0)
        return empty + scale.to(empty).view(-1, *[1] * (empty.dim() - 1)) * (given - empty)

    def _memoryless(self) -> Any:
        own = self.pipe.scheduler
        if str(own.config.get("prediction_type", "")).startswith("flow"):
            return FlowMatchEulerDiscreteScheduler.from_config(
                own.config, shift=own.config.get("flow_shift", 1.0), stochastic_sampling=False
            )
        if "beta_schedule" in own.config:
            # Latents have no range to be clipped to, whatever DDIM's default says.
            return DDIMScheduler.from_config(own.config, clip_sample=False)
        return copy.deepcopy(own)

    @torch.no_grad()
    def _called(
        self,
        prompts: Sequence[str],
        steps: int,
        *,
        door: Callable[[Any], None] | None = None,
    ) -> tuple[dict[str, Any], Any]:
        """Return the arguments of the denoiser's first call for `prompts` without guidance, and the scheduler.

        door: receives the pipeline, to stop it later than at that call.
        """
        probe = copy.copy(self._probe)  # the caller's keeps its scheduler and its progress bar
        probe.scheduler = copy.deepcopy(self._schedule)
        probe.set_progress_bar_config(disable=True)
        wanted = {
            "prompt": list(prompts),
            "num_inference_steps": steps,
            "guidance_scale": 1.0,
            "true_cfg_scale": 1.0,
            "output_type": "latent",
            "generator": torch.Generator(),  # the noise is not used, and global random state not touched
            "use_resolution_binning": False,
            **({} if self.resolution is None else {"height": self.resolution, "width": self.resolution}),
        }
        known = inspect.signature(type(probe).__call__).parameters
        signature = inspect.signature(body_of(self.denoiser).forward)
        seen: dict[str, Any] = {}

        def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.update(signature.bind(*args, **kwargs).arguments)
            if door is None:
                raise _ReachedError

        hook = self.denoiser.register_forward_pre_hook(look, with_kwargs=True)
        try:
            if door is not None:
                door(probe)
            probe(**{name: value for name, value in wanted.items() if name in known})
        except _ReachedError:
            pass
        except (ValueError, TypeError) as error:
            raise ModelError(
                f"{type(self.pipe).__name__} cannot be trained on: {str(error).strip()}",
                mend=None if self.resolution is None else "another resolution",
            ) from error
        finally:
            hook.remove()
        latents = next(iter(seen.values()), None)
        if not isinstance(latents, Tensor) or len(latents) != len(prompts):
            raise ModelError(f"training does not know how {type(self.pipe).__name__} calls its denoiser")
        return seen, probe.scheduler

    def _learn_raw(self) -> Callable[[Tensor], Tensor]:
        """Return the function that the pipeline applies to the denoiser's output before its scheduler.

        It is the identity for most. PixArt drops learnt variances, and some flows are trained backwards in time. Raises
        ModelError for anything else, as our trajectories would then differ from the pipeline's.
        """
        outputs: list[Tensor] = []
        steps: list[Tensor] = []

        def step(model_output: Tensor, *args: Any, **kwargs: Any) -> None:
            steps.append(model_output)
            raise _ReachedError

        def watch(probe: Any) -> None:
            probe.scheduler.step = step

        hook = self.denoiser.register_forward_hook(lambda module, args, output: outputs.append(_tensor(output)))
        try:
            self._called(["a"], 2, door=watch)
        finally:
            hook.remove()
        ways: tuple[Callable[[Tensor], Tensor], ...] = (lambda raw: raw, lambda raw: -raw, _without_variance)
        for way in ways:
            if outputs and steps and torch.equal(way(outputs[0]).float(), steps[0].float()):
                return way
        raise ModelError(
            f"training does not know what {type(self.pipe).__name__} makes of its denoiser's predictions",
            mend="spmhub models",
        )


def _knowing_its_device(pipe: Any) -> Any:
    """A copy of a pipeline that is not asked where it runs again.

    diffusers looks through the hooks of all modules for that, several times a call: longer than a prompt is encoded.
    """
    kind, device = type(pipe), pipe._execution_device
    probe = copy.copy(pipe)
    probe.__class__ = type(kind.__name__, (kind,), {"__module__": kind.__module__, "_execution_device": device})
    return probe


def _on_meta(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _on_meta(part) for name, part in value.items()}
    return value.to("meta") if isinstance(value, Tensor) else value


def _without_variance(raw: Tensor) -> Tensor:
    return raw.chunk(2, dim=1)[0]


def _tensor(output: Any) -> Tensor:
    tensor: Tensor = output[0] if isinstance(output, tuple) else output.sample
    return tensor
