"""White-box access to an attacked pipeline: predictions with gradients with respect to prompt tokens.

Predictions are those of the pipeline itself: its own `encode_prompt` encodes the prompt, and its denoiser runs with the
gammas of this prompt, adversarial tokens included. Gammas are constants for the gradient.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import MappingProxyType
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from spm_hub.adapters.adapter import Adapter
from spm_hub.attachment.attachment import Attachment, attach
from spm_hub.attachment.gates.evidence import PreparedEvidenceGate
from spm_hub.attachment.gates.gate import Prompts
from spm_hub.attachment.pipeline_hooks import is_attached
from spm_hub.attachment.text_encoding import read_prompts, tokens_of
from spm_hub.errors import ModelError, UsageError
from spm_hub.evaluation.attacks.memory import Memory, key_of
from spm_hub.evaluation.attacks.noising import Noising
from spm_hub.evaluation.attacks.tries import Try
from spm_hub.evaluation.attacks.vocabulary import Vocabulary
from spm_hub.training.base_model import TeacherModel
from spm_hub.training.conditioning import Conditioning

LEAST_SCORE = 1e-6
"""Scores of a gate below this count as this: their logarithm is finite, and nothing is gained below."""


@runtime_checkable
class ScoringGate(Protocol):
    """A gate that an adaptive attack can take into its loss."""

    def scores(self, states: Tensor) -> Tensor:
        """Return a score of each prompt and eraser, (prompts, erasers), differentiable; gammas grow with it.

        states: (prompts, tokens, d_text).
        """


class Victim:
    """The attacked pipeline; it has erasers inside the block of `attach` only."""

    def __init__(self, pipe: Any) -> None:
        """Prepare an attack on a pipeline without erasers.

        Raises UsageError if it has erasers already.
        """
        if is_attached(pipe):
            raise UsageError(
                "the pipeline already has erasers attached", mend="erasers.detach(), then pass them to the attack"
            )
        self.pipe, self.base = pipe, TeacherModel(pipe)
        self.noising = Noising(self.base)
        self._like = self.base.encode([""])[0]
        self._erasers: Attachment | None = None
        self._memory = Memory()
        self.vocabularies = _vocabularies(pipe)

    @property
    def attached(self) -> bool:
        """True inside the block of `attach`, where the pipeline has erasers."""
        return self._erasers is not None

    @property
    def vocabulary(self) -> Vocabulary:
        """The one vocabulary of all text encoders.

        Raises ModelError if there are several: the gradient of a token in one is none of a token in another.
        """
        if len(self.vocabularies) != 1:
            raise ModelError(
                f"the tokens of {type(self.pipe).__name__} cannot be attacked by gradients: its text encoders do not "
                f"share one vocabulary, they have {len(self.vocabularies)}",
                mend="--with ring-a-bell, or attack the eraser on a Stable Diffusion 1, 2 or XL checkpoint",
            )
        return self.vocabularies[0]

    @property
    def watched(self) -> bool:
        """True if gammas depend on more than a prompt's text and states: on what the denoiser makes of it."""
        erasers = self._erasers
        return erasers is not None and any(
            isinstance(erasers.gate_of(name), PreparedEvidenceGate) for name in erasers.names
        )

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

    def gammas(self, one: Try) -> dict[str, float]:
        """Return the gamma of each eraser for a try, as the pipeline that draws it computes them."""
        assert self._erasers is not None, "gammas are those of attached erasers"
        conditioning, given = one.states, {name: [text] for name, text in one.texts.items()}
        if conditioning is None:
            others = dict(given)
            with torch.no_grad():
                conditioning = self.encode(others.pop("prompt"), others=others)
        with self._erasers.prompted(read_prompts(self.pipe, given, conditioning.states)) as gammas:
            return {name: each[0] for name, each in gammas.items()}

    def scores(self, states: Tensor) -> Tensor:
        """Return the scores of the erasers' gates, (prompts, gates), differentiable with respect to states.

        states: (prompts, tokens, d_text). Raises UsageError if a gate has no method `scores`.
        """
        assert self._erasers is not None, "scores are those of attached erasers"
        gates = {id(gate): gate for gate in map(self._erasers.gate_of, self._erasers.names)}.values()
        for gate in gates:
            if not isinstance(gate, ScoringGate):
                raise UsageError(
                    f"the gate of these erasers ({type(gate).__name__}) has no method scores(states), so that no "
                    "attack can take it into its loss",
                    mend="leave --adaptive out, or give a gate with scores(states)",
                )
        return torch.cat([gate.scores(states) for gate in gates if isinstance(gate, ScoringGate)], dim=1)

    def encode(
        self,
        prompt: Sequence[str],
        shift: Tensor | None = None,
        places: Tensor | None = None,
        others: Mapping[str, Sequence[str]] = MappingProxyType({}),
    ) -> Conditioning:
        """Encode prompts as conditioning for the denoiser, with gradients if they are enabled.

        shift: (n, k, d), added to the embeddings of k tokens of each prompt. With zeros it changes nothing; its
        gradient is that of the tokens' embeddings.
        places: (n, k), positions of those tokens, the start token not counted; positions beyond the window are
        ignored. Default: the first k tokens.
        others: the prompts of further text encoders, "prompt_2" and "prompt_3"; the same ones unless given.
        """
        known = inspect.signature(type(self.pipe).encode_prompt).parameters
        required = {name: None for name in ("prompt_2", "prompt_3") if name in known}
        given = {
            "prompt": list(prompt),
            **required,
            **{name: list(texts) for name, texts in others.items()},
            "device": self.base.device,
            "num_images_per_prompt": 1,
            "do_classifier_free_guidance": False,
        }
        with self._shifted(shift, places):
            result = self.pipe.encode_prompt(**{name: value for name, value in given.items() if name in known})
        parts = result if isinstance(result, tuple | list) else (result,)
        rows = (part for part in parts[1:] if isinstance(part, Tensor) and part.dim() == 2)
        flat = next((part for part in rows if len(part) == len(prompt)), None)
        like = self._like.expand(len(prompt))
        conditioning = replace(like, states=parts[0], pooled=None if like.pooled is None else flat)
        # `flat` is the pooled state of the text, or for PixArt the mask of its valid states.
        return conditioning if like.mask is None or flat is None else replace(conditioning, mask=flat.to(like.mask))

    @contextmanager
    def _shifted(self, shift: Tensor | None, places: Tensor | None) -> Iterator[None]:
        hooks = []
        if shift is not None:
            vocabulary = self.vocabulary
            encoders: tuple[Any, ...] = vocabulary.encoders
            tables = [encoder.get_input_embeddings() for encoder in encoders]
            first = 1 if vocabulary.tokenizer.bos_token_id is not None else 0
            at = first + (torch.arange(shift.shape[1]) if places is None else places).to(shift.device)
            shares = shift.split([table.weight.shape[1] for table in tables], dim=-1)
            for encoder, table, share in zip(encoders, tables, shares, strict=True):

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

    def predict(
        self, latents: Tensor, times: Tensor, prompts: Sequence[str] | None, conditioning: Conditioning
    ) -> Tensor:
        """Return the model's raw predictions (n, *latent_shape), each row with the gammas of its own prompt.

        prompts: the texts that the gates see; None where the pipeline is given embeddings alone.
        """
        if self._erasers is None:
            return self.base.predict(latents, times, conditioning)
        with self._erasers.prompted(self._asked(prompts, conditioning)):
            return self.base.predict(latents, times, conditioning)

    @torch.no_grad()
    def base_predictions(
        self, latents: Tensor, times: Tensor, prompts: Sequence[str], conditioning: Conditioning
    ) -> Tensor:
        """Return what `predict` returns without erasers; predictions that were computed before are remembered."""
        keys = [key_of(*row) for row in zip(latents, times, prompts, strict=True)]

        def compute(rows: list[int]) -> Tensor:
            with self.erasers_off():
                return self.predict(latents[rows], times[rows], [prompts[row] for row in rows], conditioning[rows])

        return self._memory.rows(keys, compute)

    def token_gradients(
        self,
        noised: tuple[Tensor, Tensor, Tensor],
        texts: Sequence[str],
        tokens: int,
        places: Tensor | None = None,
        adaptive: float = 0.0,
    ) -> Tensor:
        """Return the gradient of each text's loss by its tokens' embeddings: (n, tokens, d).

        The loss is the mean square of prediction - goal, plus `adaptive` times the sum of the logarithms of the gates'
        scores. Each row is as if it were alone; those that were computed before, under whatever gate, are remembered.
        noised: x_t (n, *latent_shape), times (n,) and goal (n, *latent_shape).  places: as for `encode`.
        """
        x_t, times, goal = noised
        shift = torch.zeros((len(texts), tokens, self.vocabulary.table.shape[1]), device=self.base.device)
        conditioning = self.encode(texts, shift.requires_grad_(), places)

        def compute(rows: list[int]) -> Tensor:
            part = conditioning[rows]
            prediction = self.predict(x_t[rows], times[rows], [texts[row] for row in rows], part)
            loss = (prediction - goal[rows]).pow(2).flatten(1).mean(dim=1).sum()
            if adaptive:
                loss = loss + adaptive * self.scores(part.states).clamp_min(LEAST_SCORE).log().sum()
            return torch.autograd.grad(loss, shift)[0][rows]

        if adaptive or self._erasers is None:  # a score is the gate's own
            return compute(list(range(len(texts))))
        with self._erasers.prompted(self._asked(texts, conditioning)) as gammas:
            each = list(zip(*gammas.values(), strict=True))
        # The text tells where its tokens are, but for P4D-K, in whose prompts the same words may be the sentence's own.
        at = [None] * len(texts) if places is None else places.tolist()
        keys = [key_of(*row) for row in zip(x_t, times, goal, texts, at, each, strict=True)]
        return self._memory.rows(keys, compute)

    def _asked(self, prompts: Sequence[str] | None, conditioning: Conditioning) -> Prompts:
        texts = None if prompts is None else tuple(prompts)
        tokens = None if texts is None else tokens_of(self.pipe, texts)
        return Prompts(texts, tokens, conditioning.states.detach())


def _vocabularies(pipe: Any) -> tuple[Vocabulary, ...]:
    """Return the vocabularies of a pipeline's text encoders; encoders of equal tokens share one."""
    found: list[Vocabulary] = []
    for suffix in ("", "_2", "_3"):
        tokenizer, encoder = getattr(pipe, f"tokenizer{suffix}", None), getattr(pipe, f"text_encoder{suffix}", None)
        if tokenizer is None or encoder is None:
            continue
        for place, other in enumerate(found):
            if other.tokenizer.get_vocab() == tokenizer.get_vocab():
                arguments = (*other.arguments, f"prompt{suffix}")
                found[place] = Vocabulary(other.tokenizer, (*other.encoders, encoder), arguments)
                break
        else:
            found.append(Vocabulary(tokenizer, (encoder,), (f"prompt{suffix}",)))
    return tuple(found)
