"""One batch of training rows: noisy latents, conditioning, and the frozen base's predictions."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from spm_hub.training.conditioning import Conditioning


@dataclass(frozen=True)
class Batch:
    """Rows to train on.

    Target rows: latents (b, *latent_shape), times (b,), noise: the unit noise in the latents, led (b,): whether the
    concept led from that noise to them, the prompts trained on, the conditioning of these and of the surrogate (b rows
    each), and the frozen base's predictions for both: `concept`, and `neutral` without the concept, which is the
    surrogate's or that of `less_concept`.
    Anchor rows: the same, with the one prediction to keep.
    truth (b, *latent_shape): the prediction that gives back the picture and the noise which the latents were mixed of;
    None if they were sampled.  positive (b, *latent_shape): the base's prediction of `objective.positive`, if given.
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
    truth: Tensor | None = None
    positive: Tensor | None = None
