"""One batch of training rows: noisy latents, what the denoiser is told, and the frozen base's predictions."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from spm_hub.training.conditioning import Conditioning


@dataclass(frozen=True)
class Batch:
    """Rows to train on.

    Target rows: latents (b, *latent_shape), times (b,), the unit noise in them, as latents, whether the concept has led
    from that noise there (b,), the prompts trained on and what the denoiser is told of them and of the surrogate (b
    rows each), and the frozen base's predictions for what is trained on and for the same without the concept: the
    surrogate's, or `less_concept`'s.
    Anchor rows: the same, with the one prediction to keep.
    """

    latents: Tensor
    times: Tensor
    noise: Tensor
    led: Tensor
    prompts: tuple[str, ...]
    states: Conditioning
    neutral_states: Conditioning
    concept: Tensor
    neutral: Tensor
    anchor_latents: Tensor
    anchor_times: Tensor
    anchor_states: Conditioning
    anchor_predictions: Tensor
