"""The attacked pipeline as somebody sees it who holds its weights: gradients down to the tokens of its prompts.

Whatever is computed here for a prompt is what the pipeline itself would compute for it: the prompt is encoded by the
pipeline's own `encode_prompt`, and its denoiser runs with the gammas that facilitated transport gives to this very
prompt, its adversarial tokens included. Gammas are constants to the gradient.
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
from spm_hub.attachment.gate import Prompts
from spm_hub.attachment.pipeline_hooks import is_attached
from spm_hub.attachment.text_encoding import tokens_of
from spm_hub.errors import ModelError, UsageError
from spm_hub.evaluation.attacks.noising import Noising
from spm_hub.evaluation.attacks.outcome import Case
from spm_hub.evaluation.step_callback import Watch
from spm_hub.training.base_model import BaseModel
from spm_hub.training.conditioning import Conditioning


@dataclass(frozen=True)
class Drawing:
    """How pictures are drawn for the judge; None leaves the pipeline's own defaults."""

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
    pipe: Any, cases: Sequence[Case], drawing: Drawing, told: Callable[[int], None] = lambda done: None
) -> tuple[list[Image.Image], Tensor]:
    """Pictures of the cases by the pipeline's own call, and their last latents (n, *latent_shape).

    told: is given the number of pictures done.
    """
    given = {"num_inference_steps": drawing.steps, "guidance_scale": drawing.guidance}
    pictures: list[Image.Image] = []
    latents: list[Tensor] = []
    for start in range(0, len(cases), drawing.at_once):
        part = cases[start : start + drawing.at_once]
        watch = Watch(pipe)
        made = pipe(
            [case.prompt for case in part],
            generator=[torch.Generator().manual_seed(case.seed) for case in part],
            **watch.options,
            **{name: value for name, value in given.items() if value is not None},
        )
        pictures += made.images
        assert watch.latents is not None, "every pipeline that can be trained on tells its latents"
        latents.append(watch.latents.detach())
        told(len(pictures))
    return pictures, torch.cat(latents)


class Victim:
    """A pipeline, bare at first; inside of `attached`, with erasers."""

    def __init__(self, pipe: Any) -> None:
        """Raises ModelError for a pipeline whose text encoders do not share one vocabulary: there are no tokens to try.

        UsageError for one that holds erasers already.
        """
        if is_attached(pipe):
            raise UsageError(
                "the pipeline already has erasers attached", mend="erasers.detach(), and name them to the attack"
            )
        self.pipe, self.base = pipe, BaseModel(pipe)
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
                f"{type(pipe).__name__} cannot be attacked by its tokens: its {len(tokenizers)} text encoders do "
                "not read one vocabulary",
                mend="attack the same eraser on a Stable Diffusion 1, 2 or XL checkpoint",
            )
        self.tokenizer = tokenizers[0]

    @contextmanager
    def attached(self, adapters: Sequence[Adapter], **options: Any) -> Iterator[None]:
        """Inside, the pipeline holds these erasers, under these options of `attach`; afterwards it is as it was."""
        with attach(self.pipe, adapters, **options) as self._erasers:
            try:
                yield
            finally:
                self._erasers = None

    @contextmanager
    def bare(self) -> Iterator[None]:
        """Inside, predictions are those of the model that nothing was erased from."""
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
        """Ids of the tokens that a person could type: written out and read again, each is itself.

        The rest of the vocabulary are parts of words, which only make sense before others, and special tokens.
        """
        special = set(self.tokenizer.all_special_ids)
        ids = [token for token in sorted(self.tokenizer.get_vocab().values()) if token not in special]
        texts = [self.tokenizer.decode([token]).strip() for token in ids]
        read = self.tokenizer(texts, add_special_tokens=False).input_ids
        return torch.tensor([token for token, again in zip(ids, read, strict=True) if again == [token]])

    def check_room(self, tokens: int, prompts: Sequence[str]) -> None:
        """Raises UsageError where `tokens` before a prompt would push what the text encoder reads of it out of sight.

        Of a prompt that is too long by itself the end is not read in any case, and has no say.
        """
        window = self.tokenizer.model_max_length
        for prompt in prompts:
            taken = len(self.tokenizer(prompt).input_ids)
            room = window - (taken if taken <= window else len(self.tokenizer("").input_ids))
            if tokens > room:
                raise UsageError(
                    f"{tokens} tokens before {prompt!r} leave no room for it among the {window} that the text encoder "
                    "reads: whatever such an attack finds says nothing of the eraser",
                    mend=f"--tokens {room}" if room else "shorter prompts",
                )

    def words(self, tokens: Tensor) -> list[str]:
        """These tokens (k,) as a person would type them."""
        return [self.tokenizer.decode([token]).strip() for token in tokens.tolist()]

    def write(self, tokens: Tensor, prompts: Sequence[str]) -> list[str]:
        """Prompts with these tokens before them: tokens (n, k), n prompts."""
        return [" ".join([*self.words(row), prompt]).strip() for row, prompt in zip(tokens, prompts, strict=True)]

    @cached_property
    def table(self) -> Tensor:
        """What the text encoders read for each token: (vocabulary, d), of several encoders side by side."""
        tables = [encoder.get_input_embeddings().weight.detach() for encoder in self._encoders]
        return torch.cat([table[: len(self.tokenizer)].float() for table in tables], dim=1)

    def encode(self, prompts: Sequence[str], shift: Tensor | None = None, places: Tensor | None = None) -> Conditioning:
        """What the denoiser is told of prompts, with gradients where they are on.

        shift: (n, k, d), added to what the encoders read for k tokens of each prompt: those at `places` (n, k) among
        its own, those beyond the window left out, or unless given the first. At zero it changes nothing, and its
        gradient says where these tokens should go.
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
        told = replace(like, states=parts[0], pooled=None if like.pooled is None else flat)
        # A pipeline has either: a text's pooled state, or (PixArt) a mask of which of its states count.
        return told if like.mask is None or flat is None else replace(told, mask=flat.to(like.mask))

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

                # T5 reads its table through another module than the one that it calls its own.
                readers = [module for module in encoder.modules() if getattr(module, "weight", None) is table.weight]
                hooks += [module.register_forward_hook(add) for module in readers if isinstance(module, nn.Embedding)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def predict(self, latents: Tensor, times: Tensor, prompts: Sequence[str], told: Conditioning) -> Tensor:
        """The model's raw predictions, each row under the gammas of its own prompt."""
        if self._erasers is None:
            return self.base.predict(latents, times, told)
        asked = Prompts(tuple(prompts), tokens_of(self.pipe, prompts), told.states.detach())
        with self._erasers.prompted(asked):
            return self.base.predict(latents, times, told)
