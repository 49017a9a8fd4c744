"""Gates without a pipeline: for programs that encode texts and draw on their own, such as ComfyUI."""

import hashlib
import threading
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from spm_hub.adapters.adapter import Adapter
from spm_hub.adapters.lookup import duplicate_error, remark_on_unknown_concepts, with_concepts
from spm_hub.attachment.gates.evaluation import GateEvaluation
from spm_hub.attachment.gates.gate import Explanation, Prompts, UnknownConceptGate
from spm_hub.attachment.options import Eraser, GateChoice, Options
from spm_hub.attachment.text_encoding import Settings, encoder_settings, read_prompts
from spm_hub.errors import UsageError
from spm_hub.io.progress import Bars, Reporter
from spm_hub.models.text_window import SUFFIXES, WINDOW

Encode = Callable[[Sequence[str]], Tensor]
"""Gives the text-encoder states of some texts as the denoiser receives them: (texts, tokens, d_text)."""

_PROBES = ("", "a photo", "two dogs in a red house", "the sea at night, painted by an old master")
"""Texts whose states tell one text encoder from another."""


class TextGates:
    """The gates of erasers for texts that another program encodes. Safe to use from several threads.

    They answer as `Attachment.gates` does where `encode` gives the states that the pipeline would. What a calibrated
    gate needs of the text encoder is computed at the first question and kept in the user's cache.
    """

    def __init__(
        self,
        erasers: Iterable[Adapter],
        encode: Encode,
        tokenizers: Sequence[Any] = (),
        *,
        gate: GateChoice | None = None,
        concept: Mapping[str, str] | str | None = None,
        threshold: float | None = None,
        top_k: int | None = None,
        max_sequence_length: int | None = None,
        progress: bool | Callable[[int, int, Mapping[str, float]], object] = True,
        reporter: Reporter | None = None,
    ) -> None:
        """Take erasers, which may be loaded lazily, and text encoders.

        encode: gives the states of texts as the denoiser receives them, without weights of words, (texts, tokens,
            d_text); where texts have states of different numbers, zeros at the end fill up the shorter ones.
        tokenizers: those of transformers, in the pipeline's order, at most four; None in place of one that is missing.
            Without any, the token overlap of "transport" is 0, and "calibrated" knows no rare words.
        max_sequence_length: how many tokens language models such as T5 read, as in the pipeline's call.
        gate, concept, threshold, top_k, progress, reporter: as for `spm_hub.attach`; "evidence" reads the text alone.

        Raises UsageError, NotFoundError for a concept of none of the erasers.
        """
        options = Options(gate, None, None, "auto", None, None, threshold, top_k)
        self._options = options
        self._given = {} if max_sequence_length is None else {WINDOW: max_sequence_length}
        self._erasers: dict[str, Eraser] = {}
        for adapter in with_concepts(list(erasers), concept):
            if (other := self._erasers.get(adapter.name)) is not None:
                raise duplicate_error(other.adapter, adapter)
            self._erasers[adapter.name] = options.eraser(adapter, {})
        unknown = [one.adapter for one in self._erasers.values() if isinstance(one.gate, UnknownConceptGate)]
        if unknown:
            warnings.warn(f"spm_hub: {remark_on_unknown_concepts(unknown)}", UserWarning, stacklevel=2)
        self._texts = _Texts(tokenizers)
        self._reader = _Reader(encode)
        self._gates = GateEvaluation(
            self._texts, self._reader, options, reporter or Bars(progress), digest=self._reader.digest
        )
        self._lock = threading.Lock()

    def gates(self, text: str, states: Tensor | None = None) -> dict[str, float]:
        """Return the gamma of every eraser for a text, by name, before the erasers' strengths.

        states: of the text as the denoiser receives them, (1, tokens, d_text); None, the default, encodes it. Raises
        UsageError for states of another shape, or where `encode` returns no states.
        """
        with self._lock:
            prompts, settings = self._read(text, states)
            gammas = self._options.select(self._gates.ask(prompts, settings, self._erasers))
            return {name: gammas[name][0] for name in self._erasers}

    def explain(self, text: str, states: Tensor | None = None) -> dict[str, Explanation]:
        """Return for every eraser why it acts on a text or does not. Arguments and errors: as for `gates`."""
        with self._lock:
            return self._gates.explain(*self._read(text, states), self._erasers)

    def _read(self, text: str, states: Tensor | None) -> tuple[Prompts, Settings]:
        if not isinstance(text, str):
            raise UsageError(f"gates takes one text, not {text!r}", mend="one call for each text")
        if states is None:
            prompts, settings = self._gates.read(text, self._given)
        else:
            if not isinstance(states, Tensor) or states.dim() != 3 or len(states) != 1:
                what = tuple(states.shape) if isinstance(states, Tensor) else repr(states)
                raise UsageError(
                    f"states of one text are (1, tokens, d_text), not {what}", mend="states=encode([text])"
                )
            settings = encoder_settings(self._reader, self._given)
            prompts = read_prompts(self._texts, {**dict(settings), "prompt": text}, states.detach())
        for message in prompts.cut:
            warnings.warn(f"spm_hub: {message}. The gates do not read it either", UserWarning, stacklevel=3)
        return prompts, settings


class _Texts:
    """The attributes of a pipeline that `text_encoding` reads: its tokenizers by their names."""

    def __init__(self, tokenizers: Sequence[Any]) -> None:
        if len(tokenizers) > len(SUFFIXES):
            raise UsageError(f"{len(tokenizers)} tokenizers are given; a pipeline has at most {len(SUFFIXES)}")
        for suffix, tokenizer in zip(SUFFIXES, tokenizers, strict=False):
            setattr(self, f"tokenizer{suffix}", tokenizer)


class _Reader:
    """Encodes texts with a function, as `text_encoding` asks a pipeline's class to."""

    __name__ = "encode function"

    def __init__(self, encode: Encode) -> None:
        self._encode = encode

        def encode_prompt(texts: _Texts, prompt: str | Sequence[str], max_sequence_length: int | None = None) -> Tensor:
            several = [prompt] if isinstance(prompt, str) else list(prompt)
            states = encode(several)
            if not isinstance(states, Tensor) or states.dim() != 3 or len(states) != len(several):
                what = tuple(states.shape) if isinstance(states, Tensor) else type(states).__name__
                raise UsageError(
                    f"encode returned {what} for {len(several)} texts; the states are (texts, tokens, d_text)",
                    mend="encode=lambda texts: pipe.encode_prompt(texts, device, 1, False)[0]",
                )
            return states

        self.encode_prompt = self.__call__ = encode_prompt

    def digest(self) -> str:
        """Return a hash that tells this text encoder from others: of its states of some texts."""
        found = hashlib.sha256()
        for text in _PROBES:
            states = self._encode([text]).detach().float().cpu().contiguous()
            found.update(repr(tuple(states.shape)).encode() + states.numpy().tobytes())
        return found.hexdigest()
