"""Computes gamma for each (prompt, eraser); caches encoded concepts; applies `threshold` and `top_k`."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

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
from spm_hub.attachment.options import Eraser, Options
from spm_hub.attachment.text_encoding import (
    Settings,
    encode,
    encode_together,
    encoders_digest,
    encoders_stamp,
    execution_device,
    tokens_by_position,
    tokens_of,
    vocabulary,
)
from spm_hub.errors import UsageError
from spm_hub.io.progress import ProgressCallback, Reporter, progress_if_long

Gammas = dict[str, list[float]]
"""The gammas of each eraser, by name: one for each prompt."""

_Group = tuple[Gate | PreparingGate, tuple[str, ...], ConceptIndex | PreparedGate | None]
"""A gate, the names of its erasers, and what it is asked about or prepared for; None for a constant gate."""

_SPILLED_ABOVE = 2**14
"""The states of a name are kept in a file if they have more elements: that is a good part of an eraser's own size."""


class GateEvaluation:
    """Asks the gates of a pipeline's erasers; caches concepts until the text encoders change."""

    def __init__(self, pipe: Any, pipeline_class: type[Any], options: Options, reporter: Reporter) -> None:
        """reporter: shows how far a gate has come that encodes many texts first."""
        self._pipe, self._pipeline_class, self._options, self._reporter = pipe, pipeline_class, options, reporter
        self._spill_files: dict[int, SpillFile] = {}
        self._groups: dict[Settings, list[_Group]] = {}
        self._empty: dict[Settings, int] = {}
        self._stamp: tuple[object, ...] = ()

    def invalidate(self) -> None:
        """Discard the grouping of erasers by gate, after erasers were added or removed."""
        self._groups.clear()

    def ask(self, prompts: Prompts, settings: Settings, erasers: Mapping[str, Eraser]) -> Gammas:
        """Return the gamma of each prompt for every eraser, before `select`.

        settings: the arguments that these prompts were encoded with. Raises UsageError where a gate returns something
        else than gammas, CannotEncodeError where a concept cannot be encoded.
        """
        self._prepare(settings, erasers)
        found: Gammas = {}
        for index, (gate, members, known) in enumerate(self._groups[settings]):
            if isinstance(gate, ConstantGate):
                found.update({name: [gate.gamma] * len(prompts.states) for name in members})
                continue
            if isinstance(known, ConceptIndex):
                assert isinstance(gate, Gate)
                if not known.varying and self._encodes_by_length(prompts, known, settings):
                    known = replace(known, varying=True)
                    self._groups[settings][index] = gate, members, known
                gammas = torch.as_tensor(gate.gammas(prompts, known))
            else:
                assert known is not None
                gammas = torch.as_tensor(known.gammas(prompts))
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
        selected = self.select(asked)
        found: dict[str, Explanation] = {}
        for gate, members, known in self._groups[settings]:
            given: Sequence[Explanation | None] = [None] * len(members)
            if isinstance(known, ExplainingGate):
                given = known.explain(prompts)
            elif isinstance(gate, TransportGate) and isinstance(known, ConceptIndex):
                given = gate.explain(prompts, known)
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

    def gate_of(self, name: str, settings: Settings, erasers: Mapping[str, Eraser]) -> Gate | PreparedGate:
        """Return the gate that is asked about an eraser: of a gate that prepares itself, the prepared one."""
        self._prepare(settings, erasers)
        gate, _, known = next(group for group in self._groups[settings] if name in group[1])
        if isinstance(gate, PreparingGate):
            assert isinstance(known, PreparedGate)
            return known
        return gate

    def select(self, gammas: Gammas) -> Gammas:
        """Apply `threshold` and `top_k`: return the gammas with those of all other erasers set to 0.

        Of the gammas that reach `threshold`, the `top_k` greatest of each prompt are kept; among equal ones, those of
        the first names in alphabetical order.
        """
        threshold, top_k = self._options.threshold, self._options.top_k
        if threshold is None and top_k is None:
            return gammas
        chosen: Gammas = {name: [0.0] * len(each) for name, each in gammas.items()}
        for prompt in range(max(map(len, gammas.values()), default=0)):
            left = [
                (-each[prompt], name) for name, each in gammas.items() if threshold is None or each[prompt] >= threshold
            ]
            for gamma, name in sorted(left)[:top_k]:
                chosen[name][prompt] = -gamma
        return chosen

    def _prepare(self, settings: Settings, erasers: Mapping[str, Eraser]) -> None:
        """Group the erasers by gate, unless that is done, and discard the concepts of replaced text encoders."""
        stamp = encoders_stamp(self._pipe)
        if stamp != self._stamp:
            # States of concepts from other text encoders cannot be compared with those of the prompts.
            self._stamp = stamp
            self._groups.clear()
            self._empty.clear()
            for eraser in erasers.values():
                eraser.concepts.clear()
                eraser.memos.clear()
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
            self._empty[settings] = encode(self._pipe, self._pipeline_class, "", settings).shape[1]
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
                with progress_if_long(self._reporter, "encoding general sentences") as progress:
                    encoder = self._text_encoder(settings, progress)
                    prepared = gate.prepare(encoder, _gated(names, erasers, settings))
                yield gate, tuple(names), prepared
            else:
                yield gate, tuple(names), ConceptIndex(tuple(self._encode(erasers[name], settings) for name in names))

    def _text_encoder(self, settings: Settings, progress: ProgressCallback) -> TextEncoder:
        pipe, base = self._pipe, self._pipeline_class
        settings_there = (*settings, ("device", execution_device(pipe)))
        return TextEncoder(
            lambda texts: encode_together(pipe, base, texts, settings_there),
            lambda: f"{base.__name__} {settings} {encoders_digest(pipe)}",
            vocabulary(pipe),
            progress,
        )

    def _encode(self, eraser: Eraser, settings: Settings) -> EncodedConcept:
        if settings not in eraser.concepts:
            texts = eraser.adapter.manifest.concept.names
            each = [encode(self._pipe, self._pipeline_class, text, settings)[0] for text in texts]
            states = pad_sequence(each, batch_first=True)
            known = texts, tokens_of(self._pipe, texts), states.float().cpu()
            try:
                eraser.concepts[settings] = EncodedConcept(*known, self._spill_file(states[0].numel()))
            except OSError:
                # The temporary folder is full, or missing.
                eraser.concepts[settings] = EncodedConcept(*known)
        return eraser.concepts[settings]

    def _spill_file(self, elements: int) -> SpillFile | None:
        """Return the file for states with so many elements a name, None for memory. Raises OSError."""
        if elements > _SPILLED_ABOVE and elements not in self._spill_files:
            self._spill_files[elements] = SpillFile()
        return self._spill_files.get(elements)


def _gated(names: Iterable[str], erasers: Mapping[str, Eraser], settings: Settings) -> list[GatedEraser]:
    """Return what a gate may know of the erasers with these names."""
    found = []
    for name in names:
        eraser = erasers[name]
        memo = eraser.memos.setdefault(settings, {})
        found.append(GatedEraser(name, eraser.adapter.manifest.concept.names, eraser.increments, memo))
    return found
