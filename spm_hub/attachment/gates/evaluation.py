"""Computes gamma for each (prompt, eraser); caches encoded concepts; applies `threshold` and `top_k`."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from spm_hub.attachment.gates.concept_index import ConceptIndex, EncodedConcept
from spm_hub.attachment.gates.gate import ConstantGate, Gate, Prompts
from spm_hub.attachment.gates.spill_file import SpillFile
from spm_hub.attachment.options import Eraser, Options
from spm_hub.attachment.text_encoding import Settings, encode, encoders_stamp, tokens_of
from spm_hub.errors import UsageError

Gammas = dict[str, list[float]]
"""The gammas of each eraser, by name: one for each prompt."""

_SPILLED_ABOVE = 2**14
"""The states of a name are kept in a file if they have more elements: that is a good part of an eraser's own size."""


class GateEvaluation:
    """Asks the gates of a pipeline's erasers; caches concepts until the text encoders change."""

    def __init__(self, pipe: Any, pipeline_class: type[Any], options: Options) -> None:
        self._pipe, self._pipeline_class, self._options = pipe, pipeline_class, options
        self._spill_files: dict[int, SpillFile] = {}
        self._groups: dict[Settings, list[tuple[Gate, tuple[str, ...], ConceptIndex | None]]] = {}
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
        stamp = encoders_stamp(self._pipe)
        if stamp != self._stamp:
            # States of concepts from other text encoders cannot be compared with those of the prompts.
            self._stamp = stamp
            self._groups.clear()
            self._empty.clear()
            for eraser in erasers.values():
                eraser.concepts.clear()
        if settings not in self._groups:
            self._groups[settings] = list(self._group(settings, erasers))
        found: Gammas = {}
        for index, (gate, members, concepts) in enumerate(self._groups[settings]):
            if concepts is None:
                assert isinstance(gate, ConstantGate)
                found.update({name: [gate.gamma] * len(prompts.states) for name in members})
                continue
            if not concepts.varying and self._encodes_by_length(prompts, concepts, settings):
                concepts = replace(concepts, varying=True)
                self._groups[settings][index] = gate, members, concepts
            gammas = torch.as_tensor(gate.gammas(prompts, concepts))
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

    def _group(
        self, settings: Settings, erasers: Mapping[str, Eraser]
    ) -> Iterable[tuple[Gate, tuple[str, ...], ConceptIndex | None]]:
        """Yield each gate with the names of its erasers and their concepts, None for a constant gate."""
        gates: dict[int, list[str]] = {}
        for name, eraser in erasers.items():
            gates.setdefault(id(eraser.gate), []).append(name)
        for names in gates.values():
            gate = erasers[names[0]].gate
            concepts = None
            if not isinstance(gate, ConstantGate):
                concepts = ConceptIndex(tuple(self._encode(erasers[name], settings) for name in names))
            yield gate, tuple(names), concepts

    def _encode(self, eraser: Eraser, settings: Settings) -> EncodedConcept:
        if settings not in eraser.concepts:
            concept = eraser.adapter.manifest.concept
            texts = (concept.target, *concept.aliases)
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
