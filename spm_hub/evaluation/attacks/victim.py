"""White-box access to an attacked pipeline: predictions with gradients with respect to prompt tokens.

Predictions are those of the pipeline itself: its own `encode_prompt` encodes the prompt, and its denoiser runs with the
gammas of this prompt, adversarial tokens included. Gammas are constants for the gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from spm_hub.adapters.adapter import Adapter
from spm_hub.attachment.attachment import Attachment, attach
from spm_hub.attachment.gates.gate import Prompts
from spm_hub.attachment.pipeline_hooks import is_attached
from spm_hub.attachment.text_encoding import tokens_of
from spm_hub.errors import ModelError, UsageError
from spm_hub.evaluation.attacks.noising import Noising
from spm_hub.evaluation.attacks.outcome import Case
from spm_hub.evaluation.step_callback import StepCallback
from spm_hub.training.base_model import TeacherModel
from spm_hub.training.conditioning import Conditioning


@dataclass(frozen=True)
class AttackDrawingOptions:
    """Settings for drawing the judged pictures, `at_once` per call; None means the pipeline's default."""

    steps: int | None = None
    guidance: float | None = None
    at_once: int = 16

    def __post_init__(self) -> None:
        for name, value in (("steps", self.steps), ("at_once", self.at_once)):
            if value is not None and value < 1:
                raise UsageError(f"{name} must be at least 1, got {value}", mend=f"{name} = 10")
        if self.guidance is not None and not math.isfinite(self.guidance):
            raise UsageError(f"guidance must be a finite number, got {self.guidance}", mend="guidance = 7.5")


def draw(
    pipe: Any, cases: Sequence[Case], drawing: AttackDrawingOptions, progress: Callable[[int], None] = lambda done: None
) -> tuple[list[Image.Image], Tensor]:
    """Draw a picture of each case; return the pictures and their latents (n, *latent_shape).

    progress: called with the number of pictures done.
    """
    given = {"num_inference_steps": drawing.steps, "guidance_scale": drawing.guidance}
    pictures: list[Image.Image] = []
    latents: list[Tensor] = []
    for start in range(0, len(cases), drawing.at_once):
        part = cases[start : start + drawing.at_once]
        callback = StepCallback(pipe)
        made = pipe(
            [case.prompt for case in part],
            generator=[torch.Generator().manual_seed(case.seed) for case in part],
            **callback.options,
            **{name: value for name, value in given.items() if value is not None},
        )
        pictures += made.images
        assert callback.latents is not None, "every supported pipeline passes its latents to the callback"
        latents.append(callback.latents.detach())
        progress(len(pictures))
    return pictures, torch.cat(latents)


class Victim:
    """The attacked pipeline; it has erasers inside the block of `attach` only."""

    def __init__(self, pipe: Any) -> None:
        """Prepare an attack on a pipeline without erasers.

        Raises ModelError if its text encoders do not share one vocabulary, as then no tokens can be tried; UsageError
        if it has erasers already.
        """
        if is_attached(pipe):
            raise UsageError(
                "the pipeline already has erasers attached", mend="erasers.detach(), then pass them to the attack"
            )
        self.pipe, self.base = pipe, TeacherModel(pipe)
        self.noising = Noising(self.base)
        self._like = self.base.encode([""])[0]
        self._erasers: Attachment | None = None
        pairs = [
            (getattr(pipe, f"tokenizer{suffix}", None), getattr(pipe, f"text_encoder{suffix}", None))
            for suffix in ("", "_2", "_3")
        ]
        self._encoders = [encoder for tokenizer, encoder in pairs if tokenizer is not None and encoder is not None]
        tokenizers = [tokenizer for tokenizer, encoder in pairs if tokenizer is not None and encoder is not None]
        if not tokenizers or any(other.get_vocab() != tokenizers[0].get_vocab() for other in tokenizers):
            raise ModelError(
                f"the tokens of {type(pipe).__name__} cannot be attacked: its {len(tokenizers)} text encoders do not "
                "share one vocabulary",
                mend="attack the eraser on a Stable Diffusion 1, 2 or XL checkpoint",
            )
        self.tokenizer = tokenizers[0]

    @contextmanager
    def attach(self, adapters: Sequence[Adapter], **options: Any) -> Iterator[None]:
        """Attach these erasers, with these options of `attach`, for the duration of the block."""
        with attach(self.pipe, adapters, **options) as self._erasers:
            try:
                yield
            finally:
                self._erasers = None

    @contextmanager
    def erasers_off(self) -> Iterator[None]:
        """Set the erasers' strengths to zero for the duration of the block: predictions are the base model's."""
        if self._erasers is None:
            yield
            return
        strengths = dict(self._erasers.strength)
        try:
            for name in strengths:
                self._erasers.strength[name] = 0.0
            yield
        finally:
            self._erasers.strength.update(strengths)

    def searchable(self) -> Tensor:
        """Return the ids of the tokens that a user can type: those that decode and encode to themselves.

        The rest of the vocabulary is word fragments that need a following token, and special tokens.
        """
        special = set(self.tokenizer.all_special_ids)
        ids = [token for token in sorted(self.tokenizer.get_vocab().values()) if token not in special]
        texts = [self.tokenizer.decode([token]).strip() for token in ids]
        read = self.tokenizer(texts, add_special_tokens=False).input_ids
        return torch.tensor([token for token, again in zip(ids, read, strict=True) if again == [token]])

    def check_room(self, tokens: int, prompts: Sequence[str]) -> None:
        """Raise UsageError if `tokens` would push a part of a prompt out of the text encoder's window.

        The end of a prompt that is too long without them is ignored anyway and does not count.
        """
        window = self.tokenizer.model_max_length
        for prompt in prompts:
            taken = len(self.tokenizer(prompt).input_ids)
            room = window - (taken if taken <= window else len(self.tokenizer("").input_ids))
            if tokens > room:
                raise UsageError(
                    f"{tokens} tokens before {prompt!r} leave no room for it in the text encoder's window of {window} "
                    "tokens: the result of such an attack would say nothing about the eraser",
                    mend=f"--tokens {room}" if room else "use shorter prompts",
                )

    def words(self, tokens: Tensor) -> list[str]:
        """Return these tokens (k,) as a user would type them."""
        return [self.tokenizer.decode([token]).strip() for token in tokens.tolist()]

    def write(self, tokens: Tensor, prompts: Sequence[str]) -> list[str]:
        """Write tokens (n, k) before n prompts."""
        return [" ".join([*self.words(row), prompt]).strip() for row, prompt in zip(tokens, prompts, strict=True)]

    @cached_property
    def table(self) -> Tensor:
        """The text encoders' token embeddings (vocabulary, d), concatenated along d."""
        tables = [encoder.get_input_embeddings().weight.detach() for encoder in self._encoders]
        return torch.cat([table[: len(self.tokenizer)].float() for table in tables], dim=1)

    def encode(self, prompts: Sequence[str], shift: Tensor | None = None, places: Tensor | None = None) -> Conditioning:
        """Encode prompts as conditioning for the denoiser, with gradients if they are enabled.

        shift: (n, k, d), added to the embeddings of k tokens of each prompt. With zeros it changes nothing; its
        gradient is that of the tokens' embeddings.
        places: (n, k), positions of those tokens, the start token not counted; positions beyond the window are
        ignored. Default: the first k tokens.
        """
        with self._shifted(shift, places):
            result = self.pipe.encode_prompt(
                prompt=list(prompts),
                device=self.base.device,
                num_images_per_prompt=1,
                do_classifier_free_guidance=False,
            )
        parts = result if isinstance(result, tuple | list) else (result,)
        flat = next((part for part in parts if isinstance(part, Tensor) and part.dim() == 2), None)
        like = self._like.expand(len(prompts))
        conditioning = replace(like, states=parts[0], pooled=None if like.pooled is None else flat)
        # `flat` is the pooled state of the text, or for PixArt the mask of its valid states.
        return conditioning if like.mask is None or flat is None else replace(conditioning, mask=flat.to(like.mask))

    @contextmanager
    def _shifted(self, shift: Tensor | None, places: Tensor | None) -> Iterator[None]:
        tables = [encoder.get_input_embeddings() for encoder in self._encoders]
        first = 1 if self.tokenizer.bos_token_id is not None else 0
        hooks = []
        if shift is not None:
            at = first + (torch.arange(shift.shape[1]) if places is None else places).to(shift.device)
            shares = shift.split([table.weight.shape[1] for table in tables], dim=-1)
            for encoder, table, share in zip(self._encoders, tables, shares, strict=True):

                def add(module: Any, args: Any, output: Tensor, share: Tensor = share) -> Tensor:
                    window = torch.arange(output.shape[1], device=share.device)
                    taken = (window[:, None] == at[..., None, :]).to(share)  # (n, window, k) or (window, k)
                    return output + (taken @ share).to(output.dtype)

                # T5 uses its table through another module than get_input_embeddings returns.
                readers = [module for module in encoder.modules() if getattr(module, "weight", None) is table.weight]
                hooks += [module.register_forward_hook(add) for module in readers if isinstance(module, nn.Embedding)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def predict(self, latents: Tensor, times: Tensor, prompts: Sequence[str], conditioning: Conditioning) -> Tensor:
        """Return the model's raw predictions (n, *latent_shape), each row with the gammas of its own prompt."""
        if self._erasers is None:
            return self.base.predict(latents, times, conditioning)
        asked = Prompts(tuple(prompts), tokens_of(self.pipe, prompts), conditioning.states.detach())
        with self._erasers.prompted(asked):
            return self.base.predict(latents, times, conditioning)
