"""What the attached erasers make of a call's prompts: gates asked together, their answers selected from."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from spm_hub.attachment.concept_index import Concept, Concepts, Shelf
from spm_hub.attachment.gate import ConstantGate, Gate, Prompts
from spm_hub.attachment.options import Eraser, Options
from spm_hub.attachment.text_encoding import Settings, encode, encoders_stamp, tokens_of
from spm_hub.errors import UsageError

Gammas = dict[str, list[float]]
"""By eraser: one for each prompt."""

_LONG = 2**14
"""Numbers of a name's states beyond which they are kept in a file, being a good part of what an eraser itself takes."""


class GateEvaluation:
    """Asks the gates of a pipeline's erasers; what it knows of their concepts is kept until `forget`."""

    def __init__(self, pipe: Any, pipeline_class: type[Any], options: Options) -> None:
        self._pipe, self._pipeline_class, self._options = pipe, pipeline_class, options
        self._shelves: dict[int, Shelf] = {}
        self._groups: dict[Settings, list[tuple[Gate, tuple[str, ...], Concepts | None]]] = {}
        self._empty: dict[Settings, int] = {}
        self._stamp: tuple[object, ...] = ()

    def forget(self) -> None:
        """Other erasers than before: whom to ask together has to be found anew."""
        self._groups.clear()

    def ask(self, prompts: Prompts, settings: Settings, erasers: Mapping[str, Eraser]) -> Gammas:
        """The gamma of each of these prompts for every eraser.

        Raises UsageError where a gate gives no such thing, CannotEncodeError.
        """
        stamp = encoders_stamp(self._pipe)
        if stamp != self._stamp:
            # What other text encoders made of the concepts is nothing to compare with.
            self._stamp = stamp
            self._groups.clear()
            self._empty.clear()
            for eraser in erasers.values():
                eraser.concepts.clear()
        if settings not in self._groups:
            self._groups[settings] = list(self._grouped(settings, erasers))
        found: Gammas = {}
        for index, (gate, members, concepts) in enumerate(self._groups[settings]):
            if concepts is None:
                assert isinstance(gate, ConstantGate)
                found.update({name: [gate.gamma] * len(prompts.states) for name in members})
                continue
            if not concepts.varying and self._varying(prompts, concepts, settings):
                concepts = replace(concepts, varying=True)
                self._groups[settings][index] = gate, members, concepts
            gammas = torch.as_tensor(gate.gammas(prompts, concepts))
            wanted = len(prompts.states), len(members)
            if tuple(gammas.shape) != wanted or not torch.isfinite(gammas).all():
                raise UsageError(
                    f"{type(gate).__name__}.gammas gave {tuple(gammas.shape)}; wanted are finite numbers of shape "
                    f"{wanted}, one for each prompt and eraser"
                )
            found.update(zip(members, gammas.double().T.tolist(), strict=True))
        for name, eraser in erasers.items():
            protected = eraser.adapter.manifest.gate.protected
            for row, text in enumerate(prompts.texts or ()):
                if text in protected:
                    # Its effect there is zero but for rounding: without it the picture is the base's to the last bit.
                    found[name][row] = 0.0
        return found

    def selected(self, gammas: Gammas) -> Gammas:
        """Gammas under `threshold` become 0; of the others of a prompt the `top_k` greatest stay, ties by name."""
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

    def _varying(self, prompts: Prompts, concepts: Concepts, settings: Settings) -> bool:
        """Whether the text encoder gives a longer text more states; told by an empty one, where it matters at all."""
        lengths = {concept.shape[0] for concept in concepts.each}
        if lengths == {prompts.states.shape[1]}:
            return False
        if settings not in self._empty:
            self._empty[settings] = encode(self._pipe, self._pipeline_class, "", settings).shape[1]
        return lengths != {self._empty[settings]}

    def _grouped(
        self, settings: Settings, erasers: Mapping[str, Eraser]
    ) -> Iterable[tuple[Gate, tuple[str, ...], Concepts | None]]:
        """Erasers that share a gate are asked about together; a constant gate needs to know no concept."""
        gates: dict[int, list[str]] = {}
        for name, eraser in erasers.items():
            gates.setdefault(id(eraser.gate), []).append(name)
        for names in gates.values():
            gate = erasers[names[0]].gate
            concepts = None
            if not isinstance(gate, ConstantGate):
                concepts = Concepts(tuple(self._concept(erasers[name], settings) for name in names))
            yield gate, tuple(names), concepts

    def _concept(self, eraser: Eraser, settings: Settings) -> Concept:
        if settings not in eraser.concepts:
            concept = eraser.adapter.manifest.concept
            texts = (concept.target, *concept.aliases)
            each = [encode(self._pipe, self._pipeline_class, text, settings)[0] for text in texts]
            states = pad_sequence(each, batch_first=True)
            known = texts, tokens_of(self._pipe, texts), states.float().cpu()
            try:
                eraser.concepts[settings] = Concept(*known, self._shelf(states[0].numel()))
            except OSError:
                # The temporary folder is full, or there is none.
                eraser.concepts[settings] = Concept(*known)
        return eraser.concepts[settings]

    def _shelf(self, numbers: int) -> Shelf | None:
        """Where states of so many numbers for each name are kept; None for memory. Raises OSError."""
        if numbers > _LONG and numbers not in self._shelves:
            self._shelves[numbers] = Shelf()
        return self._shelves.get(numbers)
