"""What a picture is asked for: its prompts, learnt from what is encoded and from what the denoiser is given."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from spm_hub.attachment.gate import Prompts
from spm_hub.attachment.text_encoding import _OTHER_PROMPT, Settings, _as_texts, _settings, tokens_of


@dataclass(eq=False)
class Call:
    """What is known of one call of a pipeline: nothing until it has encoded its prompts.

    images: pictures for each prompt.  guided: whether unconditional rows precede the prompts' own.
    negatives: what was encoded beside the prompts: states that some pipelines (FLUX, Qwen-Image) give the denoiser in a
    call of their own.  gammas: by eraser, one for each prompt.
    unconditional: of the denoiser's present batch, for each block of rows whether it is the negative prompts'.
    plain: whether the denoiser is given states as they were encoded, as its first call in this picture tells.
    others: prompts of this picture that are not its present ones.
    """

    prompts: Prompts | None = None
    settings: Settings = ()
    images: int = 1
    guided: bool = False
    negatives: list[Tensor] = field(default_factory=list)
    gammas: dict[str, list[float]] = field(default_factory=dict)
    unconditional: tuple[bool, ...] = ()
    plain: bool | None = None
    others: list[Prompts] = field(default_factory=list)
    _heard: tuple[Any, int | None] = field(default=(None, None), init=False)

    def learn(self, pipe: Any, bound: Mapping[str, Any], result: Any) -> None:
        """Note the prompts from the first `encode_prompt` of this call.

        What is encoded after them is negative prompts; once the denoiser was called, prompts that may replace them.
        """
        states, *beside = result if isinstance(result, tuple | list) and result else [result]
        if not isinstance(states, Tensor) or states.dim() != 3:
            return
        if self.prompts is not None and self.plain is None:
            self.negatives.append(states)
            return
        images = int(bound.get("num_images_per_prompt") or bound.get("num_videos_per_prompt") or 1)
        texts = tokens = None
        if bound.get("prompt") is not None:
            texts = _as_texts(bound["prompt"])
            if len(texts) * images != len(states):
                return
            tokens = tokens_of(pipe, texts)
            for other in (_as_texts(value) for key, value in bound.items() if _OTHER_PROMPT.fullmatch(key) and value):
                # What another encoder is told is as much of the prompt: of FLUX it is what the denoiser attends to.
                each = other * len(texts) if len(other) == 1 else other
                tokens = tuple(map(frozenset.union, tokens, tokens_of(pipe, each)))
                texts = tuple(one if one == two else f"{one}\n{two}" for one, two in zip(texts, each, strict=True))
        prompts = Prompts(texts, tokens, states[::images].detach())
        if self.prompts is not None:
            self.others.append(prompts)
            return
        self.images, self.guided = images, bool(bound.get("do_classifier_free_guidance"))
        self.settings = _settings(bound)
        self.negatives = [one for one in beside if isinstance(one, Tensor) and one.shape[2:] == states.shape[2:]]
        self.prompts = prompts

    @property
    def block(self) -> int:
        """Rows of the denoiser's batch for all prompts once: prompts in order, the pictures of each side by side."""
        return 0 if self.prompts is None else len(self.prompts.states) * self.images

    def hear(self, rows: int | None, states: Any) -> bool:
        """Note what the denoiser is called with; whether that is other prompts than before, now those of this call.

        A callback may replace them in the middle of a picture. The last block of rows tells, being the prompts' own,
        but not where the pipeline makes something else of what it encoded before the denoiser gets it.
        """
        if self.prompts is None or (self._heard[0] is states and self._heard[1] == rows):
            return False
        self._heard = states, rows
        whole = rows is not None and rows % self.block == 0
        given = list(states.split(self.block)) if whole and isinstance(states, Tensor) and len(states) == rows else []
        known = bool(given) and (self._are(self.prompts, given[-1]) or self._negative(given[-1]))
        if self.plain is None:
            self.plain = known
        replaced = bool(given) and self.plain and not known
        if replaced:
            before = self.prompts
            self.prompts = next(
                (other for other in self.others if self._are(other, given[-1])),
                Prompts(None, None, given[-1][:: self.images].detach()),
            )
            self.others = [before, *(other for other in self.others if other is not self.prompts)]
            self.gammas = {}
        if rows == 2 * self.block:
            # Under classifier-free guidance diffusers puts the unconditional rows first.
            self.unconditional = self.guided, False
        else:
            self.unconditional = tuple(map(self._negative, given))
        return replaced

    def _negative(self, rows: Tensor) -> bool:
        """Whether these are the states of the negative prompts, and not those of the prompts beside them.

        States that are neither count as the prompts': an eraser is never silently off.
        """
        assert self.prompts is not None
        at = rows.data_ptr()
        if at in {each.data_ptr() for each in (self.prompts.states, *self.negatives)}:
            # The very tensor, which tells even a negative prompt that is the prompt itself.
            return at != self.prompts.states.data_ptr()
        return any(_equal(rows, each.to(rows)) for each in self.negatives) and not self._are(self.prompts, rows)

    def _are(self, prompts: Prompts, rows: Tensor) -> bool:
        """Whether these are the states of `prompts`."""
        own = prompts.states
        if own.data_ptr() == rows.data_ptr() and (len(own) * self.images, *own.shape[1:]) == rows.shape:
            return True  # the very tensor that was encoded
        return _equal(rows, own.to(rows).repeat_interleave(self.images, dim=0))


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other)
