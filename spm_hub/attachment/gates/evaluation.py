"""Computes gamma for each (prompt, eraser); caches encoded concepts; applies `threshold` and `top_k`."""

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from spm_hub.attachment.gates.apart import Encode, encode_apart
from spm_hub.attachment.gates.concept_index import ConceptIndex, EncodedConcept
from spm_hub.attachment.gates.gate import (
    ConstantGate,
    ExplainingGate,
    Explanation,
    Gate,
    GatedEraser,
    PreparedGate,
    PreparingGate,
    Prompts,
    TextEncoder,
    TransportGate,
    UnknownConceptGate,
)
from spm_hub.attachment.gates.spill_file import SpillFile
from spm_hub.attachment.options import Eraser, Gammas, Options
from spm_hub.attachment.text_encoding import (
    Settings,
    encode,
    encode_together,
    encoder_settings,
    encoders_digest,
    encoders_of,
    encoders_stamp,
    execution_device,
    read_prompts,
    tokens_by_position,
    tokens_of,
    vocabulary,
)
from spm_hub.errors import UsageError
from spm_hub.io.progress import ProgressCallback, Reporter, progress_if_long
from spm_hub.models.text_window import Cut, cut_text

_Group = tuple[Gate | PreparingGate, tuple[str, ...], ConceptIndex | PreparedGate | None]
"""A gate, the names of its erasers, and what it is asked about or prepared for; None for a constant gate."""

_SPILLED_ABOVE = 2**14
"""The states of a name are kept in a file if they have more elements: that is a good part of an eraser's own size."""


class GateEvaluation:
    """Asks the gates of erasers about texts, which it encodes as one pipeline does.

    Concepts are cached until the text encoders change.
    """

    def __init__(
        self, pipe: Any, reader: Any, options: Options, reporter: Reporter, digest: Callable[[], str] | None = None
    ) -> None:
        """Take a pipeline, which may go away before, and its `modular.reader_of`.

        reporter: shows how far a gate has come that encodes many texts first.  digest: gives a hash that tells the text
        encoders from others, the same in every process; None makes it of the pipeline's encoders.
        """
        self._pipe_ref = weakref.ref(pipe)
        self._digest = digest or (lambda: encoders_digest(self._pipe))
        self._reader, self._options, self._reporter = reader, options, reporter
        self._spill_files: dict[int, SpillFile] = {}
        self._erasers: list[Eraser] = []
        self._concepts: weakref.WeakKeyDictionary[Eraser, dict[Settings, EncodedConcept]] = weakref.WeakKeyDictionary()
        self._memos: weakref.WeakKeyDictionary[Eraser, dict[Settings, dict[str, Any]]] = weakref.WeakKeyDictionary()
        self._groups: dict[Settings, list[_Group]] = {}
        self._empty: dict[Settings, int] = {}
        self._of_empty: dict[Settings, Tensor] = {}
        self._stamp: tuple[object, ...] = ()

    @property
    def _pipe(self) -> Any:
        return self._pipe_ref()

    def read(self, text: str, options: Mapping[str, Any]) -> tuple[Prompts, Settings]:
        """Encode one prompt as the pipeline does with these options of its call.

        Raises UsageError for an unknown option, CannotEncodeError.
        """
        settings = encoder_settings(self._reader, options)
        states = encode(self._pipe, self._reader, text, settings)
        return read_prompts(self._pipe, {**dict(settings), "prompt": text}, states), settings

    def cut_off(self, text: str) -> Cut | None:
        """Return the part of a text that the text encoders do not read by default, None if they read all."""
        return cut_text(self._pipe, text, self._defaults)

    @cached_property
    def _defaults(self) -> dict[str, Any]:
        return dict(encoder_settings(self._reader, {}))

    @cached_property
    def why_unreadable(self) -> str | None:
        """Why no prompt of this pipeline can be known, None if they can be: an empty one is encoded to see it."""
        try:
            self.read("", {})
        except UsageError as error:
            return error.message
        except (RuntimeError, LookupError):
            return None  # not with the defaults of a call, or not with weights that are elsewhere now: a call shows it
        return None

    def reads_like(self, other: "GateEvaluation") -> bool:
        """Return whether the two pipelines share their text encoders, and encode a text alike."""
        if encoders_of(self._pipe) != encoders_of(other._pipe):
            return False
        try:
            (one, settings), (two, others) = (each.read("a photo", {}) for each in (self, other))
        except (UsageError, RuntimeError, LookupError):
            return False
        return settings == others and torch.equal(one.states, two.states)

    def ask(self, prompts: Prompts, settings: Settings, erasers: Mapping[str, Eraser]) -> Gammas:
        """Return the gamma of each prompt for every eraser, before `select`.

        settings: the arguments that these prompts were encoded with. Raises UsageError where a gate returns something
        else than gammas, CannotEncodeError where a concept cannot be encoded.
        """
        self._prepare(settings, erasers)
        found: Gammas = {}
        read = prompts.as_read()
        for index, (gate, members, known) in enumerate(self._groups[settings]):
            if isinstance(gate, ConstantGate):
                found.update({name: [gate.gamma] * len(prompts.states) for name in members})
                continue
            if isinstance(known, ConceptIndex):
                assert isinstance(gate, Gate)
                if not known.varying and self._encodes_by_length(prompts, known, settings):
                    known = replace(known, varying=True)
                    self._groups[settings][index] = gate, members, known
                gammas = torch.as_tensor(gate.gammas(read, known))
            else:
                assert known is not None
                gammas = torch.as_tensor(known.gammas(read))
            wanted = len(prompts.states), len(members)
            if tuple(gammas.shape) != wanted or not torch.isfinite(gammas).all():
                raise UsageError(
                    f"{type(gate).__name__}.gammas returned a tensor of shape {tuple(gammas.shape)}; it has to return "
                    f"finite numbers of shape {wanted}, one for each prompt and eraser"
                )
            found.update(zip(members, gammas.double().T.tolist(), strict=True))
        for name, eraser in erasers.items():
            protected = eraser.adapter.manifest.gate.protected
            for row, text in enumerate(prompts.texts or ()):
                if text in protected:
                    # The eraser's effect on a protected prompt is zero up to rounding; off, it is zero to the last bit.
                    found[name][row] = 0.0
        return found

    def explain(self, prompts: Prompts, settings: Settings, erasers: Mapping[str, Eraser]) -> dict[str, Explanation]:
        """Return for every eraser why its gamma for one prompt is as it is, `threshold` and `top_k` included.

        Raises as `ask` does.
        """
        asked = self.ask(prompts, settings, erasers)
        selected = self._options.select(asked)
        found: dict[str, Explanation] = {}
        for gate, members, known in self._groups[settings]:
            given: Sequence[Explanation | None] = [None] * len(members)
            if isinstance(known, ExplainingGate):
                given = known.explain(prompts.as_read())
            elif isinstance(gate, TransportGate) and isinstance(known, ConceptIndex):
                given = gate.explain(prompts.as_read(), known)
            term = type(gate).__name__.removesuffix("Gate").lower()
            for name, explanation in zip(members, given, strict=True):
                found[name] = explanation or Explanation(asked[name][0], term)
                if isinstance(gate, UnknownConceptGate):
                    found[name] = Explanation(asked[name][0], "unknown", "the eraser names no concept")
        found = self._with_tokens(found, prompts, settings)
        for name, eraser in erasers.items():
            if prompts.texts is not None and prompts.texts[0] in eraser.adapter.manifest.gate.protected:
                found[name] = Explanation(0.0, "protected", "the eraser was trained to leave this prompt alone")
            elif selected[name] != asked[name]:
                found[name] = Explanation(selected[name][0], "selection", f"gamma {asked[name][0]:.3g} was left out")
        return {name: found[name] for name in erasers}

    def _with_tokens(
        self, explanations: Mapping[str, Explanation], prompts: Prompts, settings: Settings
    ) -> dict[str, Explanation]:
        """Return explanations with the tokens at their positions."""
        if prompts.texts is None or all(one.position is None for one in explanations.values()):
            return dict(explanations)
        tokens = tokens_by_position(self._pipe, prompts.texts[0], prompts.states.shape[1], settings)
        return {
            name: replace(one, token=tokens[one.position]) if tokens and one.position is not None else one
            for name, one in explanations.items()
        }

    def gate_of(self, name: str, erasers: Mapping[str, Eraser]) -> Gate | PreparedGate:
        """Return the gate that is asked about an eraser: of a gate that prepares itself, the prepared one."""
        settings = encoder_settings(self._reader, {})
        self._prepare(settings, erasers)
        gate, _, known = next(group for group in self._groups[settings] if name in group[1])
        if isinstance(gate, PreparingGate):
            assert isinstance(known, PreparedGate)
            return known
        return gate

    def _prepare(self, settings: Settings, erasers: Mapping[str, Eraser]) -> None:
        """Group the erasers by gate, unless that is done, and discard the concepts of replaced text encoders."""
        stamp = encoders_stamp(self._pipe)
        if stamp != self._stamp:
            # States of concepts from other text encoders cannot be compared with those of the prompts.
            self._stamp = stamp
            self._groups.clear()
            self._empty.clear()
            self._of_empty.clear()
            self._concepts.clear()
            self._memos.clear()
        if (present := list(erasers.values())) != self._erasers:
            self._groups.clear()
            self._erasers = present
        if settings not in self._groups:
            self._groups[settings] = list(self._group(settings, erasers))

    def _encodes_by_length(self, prompts: Prompts, concepts: ConceptIndex, settings: Settings) -> bool:
        """Return whether the text encoder gives a longer text more states.

        An empty text shows it; one is encoded only where prompts and concepts differ in length.
        """
        lengths = {concept.shape[0] for concept in concepts.each}
        if lengths == {prompts.states.shape[1]}:
            return False
        if settings not in self._empty:
            self._empty[settings] = encode(self._pipe, self._reader, "", settings).shape[1]
        return lengths != {self._empty[settings]}

    def _group(self, settings: Settings, erasers: Mapping[str, Eraser]) -> Iterable[_Group]:
        """Yield each gate, the names of its erasers, and their concepts or the prepared gate."""
        gates: dict[int, list[str]] = {}
        for name, eraser in erasers.items():
            gates.setdefault(id(eraser.gate), []).append(name)
        for names in gates.values():
            gate = erasers[names[0]].gate
            if isinstance(gate, ConstantGate):
                yield gate, tuple(names), None
            elif isinstance(gate, PreparingGate):
                with progress_if_long(self._reporter, "encoding sentences to compare with") as progress:
                    encoder = self._text_encoder(settings, progress)
                    prepared = gate.prepare(encoder, [self._gated(name, erasers[name], settings) for name in names])
                yield gate, tuple(names), prepared
            else:
                yield gate, tuple(names), ConceptIndex(self._concepts_of([erasers[name] for name in names], settings))

    def _gated(self, name: str, eraser: Eraser, settings: Settings) -> GatedEraser:
        """Return what a gate may know of an eraser."""
        memo = self._memos.setdefault(eraser, {}).setdefault(settings, {})
        return GatedEraser(name, eraser.adapter.manifest.concept.names, eraser.increments, memo)

    def _text_encoder(self, settings: Settings, progress: ProgressCallback) -> TextEncoder:
        return TextEncoder(
            self._encode_texts(settings),
            lambda: f"{self._reader.__name__} {settings} {self._digest()}",
            vocabulary(self._pipe),
            progress,
        )

    def _encode_texts(self, settings: Settings) -> Encode:
        settings_there = (*settings, ("device", execution_device(self._pipe)))
        return lambda texts: encode_together(self._pipe, self._reader, texts, settings_there)

    def _concepts_of(self, erasers: Sequence[Eraser], settings: Settings) -> tuple[EncodedConcept, ...]:
        """Return the encoded concept of each eraser; encode those that are not known yet."""
        known = [self._concepts.setdefault(eraser, {}) for eraser in erasers]
        new = {id(kept): eraser for kept, eraser in zip(known, erasers, strict=True) if settings not in kept}
        if new:
            names = [eraser.adapter.manifest.concept.names for eraser in new.values()]
            for eraser, concept in zip(new.values(), self._encode(names, settings), strict=True):
                self._concepts[eraser][settings] = concept
        return tuple(kept[settings] for kept in known)

    def _encode(self, concepts: Sequence[tuple[str, ...]], settings: Settings) -> Iterator[EncodedConcept]:
        """Yield concepts, each given by its names; the states of few are in memory at a time."""
        texts = [name for names in concepts for name in names]
        each = encode_apart(self._encode_texts(settings), [[text] for text in texts])
        # What is read of a text may depend on how many states it has; most text encoders give all texts as many.
        tokens: dict[int, dict[str, frozenset[int]]] = {}
        for names in concepts:
            states = pad_sequence([next(each)[0] for _ in names], batch_first=True)
            length = states.shape[1]
            if length not in tokens:
                tokens[length] = dict(zip(texts, tokens_of(self._pipe, texts, settings, length), strict=True))
            known = names, tuple(tokens[length][name] for name in names), states.float().cpu()
            try:
                yield EncodedConcept(*known, self._spill_file(states[0].numel()))
            except OSError:
                # The temporary folder is full, or missing.
                yield EncodedConcept(*known)

    def target_states(self, eraser: Eraser, settings: Settings) -> Tensor:
        """Return the states of the name that an eraser's concept has first: (tokens, d_text).

        settings: the arguments that the prompts were encoded with. Raises CannotEncodeError.
        """
        return self._concepts_of([eraser], settings)[0].states[0]

    def empty_states(self, settings: Settings) -> Tensor:
        """Return the states of the empty prompt: (tokens, d_text). Raises CannotEncodeError."""
        if settings not in self._of_empty:
            self._of_empty[settings] = encode(self._pipe, self._reader, "", settings)[0].float().cpu()
        return self._of_empty[settings]

    def _spill_file(self, elements: int) -> SpillFile | None:
        """Return the file for states with so many elements a name, None for memory. Raises OSError."""
        if elements > _SPILLED_ABOVE and elements not in self._spill_files:
            self._spill_files[elements] = SpillFile()
        return self._spill_files.get(elements)
