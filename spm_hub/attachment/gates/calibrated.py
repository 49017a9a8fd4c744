"""The calibrated gate: 0 on prompts that do not concern the concept, 1 on those that do.

The greatest of three terms counts. Words: the concept's names in the text (`NameMatcher`). State: the product of each
of the prompt's text-encoder states with the direction that separates the states of a name from those of other
sentences (Fisher's linear discriminant), the greatest over all states. Sentence: the mean of two scores, the root mean
square of these products over the states, and the product of the prompt's mean state with its own such direction. The
terms of states are 0 up to the score that other sentences reach, and rise to 1 on a ramp beyond it.

Many erasers would act on many prompts if each acted on few. The ramps of more than ten therefore begin at the scores
that fewer sentences reach: all erasers together act about as often as ten. Words count the same for any number.

Where the text is known its words show the name, and the ramps of states begin further away: few other prompts are
taken for the concept's. Without a text, of `prompt_embeds` alone, they are all there is, and begin earlier.
"""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from itertools import islice

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from spm_hub.attachment.gates.apart import Encode, encode_apart
from spm_hub.attachment.gates.bank import (
    Bank,
    kept_states,
    lengths_of,
    plan_bank,
    positions_of,
    root_mean_square,
    sentences,
    unit_rows,
)
from spm_hub.attachment.gates.gate import Explanation, GatedEraser, Prompts, TextEncoder
from spm_hub.attachment.gates.kept_bytes import KeptBytes
from spm_hub.attachment.gates.name_matcher import Match, NameMatcher, words_of
from spm_hub.attachment.gates.vocabulary import rarity_of, whole_words
from spm_hub.io.environment import user_folder

_CALIBRATION = "calibration"
_VERSION = 1
"""Raise it with every change of this file that changes a calibration: kept ones of another version do not count."""
_TERMS = ("state", "sentence")

FRAMES = (
    "{}", "a photo of {}", "{} in the park", "a big {} and a house", "the {} with a house", "{}, drawing", "cat and {}",
    "my {}",
)  # fmt: skip
"""Sentences in which a concept's states are looked for."""
_ACTING = {"state": (0.001, 0.0, 0.001), "sentence": (0.015, 0.0, 0.002)}
"""Share of the bank's sentences on which each term of an eraser may act: of the general ones, of those of one word of
the tokenizer, and of those of several.

Sentences that mention the concept do not count.
"""
_CROWDS = (10, 16, 25, 40, 63, 100, 160, 250, 400, 1000)
"""Numbers of erasers for which ramps are kept.

The shares of `_ACTING` are those of ten or fewer. Among more erasers, each acts on a share that is smaller by as much.
"""
_MARGINS = {"state": (0.0, 0.1, 0.04), "sentence": (0.0, 0.18, 0.04)}
_BLIND_MARGINS = {"state": (0.0, 0.06, 0.0), "sentence": (0.0, 0.06, 0.0)}
"""How far beyond the scores that the bank's sentences reach a ramp begins, for the same three kinds of sentences: with
a text, and without one.

A word scores higher in a sentence than alone, the more so the smaller the text encoder. With a text, ten times as many
erasers have twice the margin: the bank has too few sentences to show what one in a thousand reaches.
"""
_SAME = 0.9
"""A word with at least this score reads like the name itself: its sentences do not count either."""
_RAMP = 0.02
"""Where the ramp ends: a share of the way from its beginning to the score of the name itself."""
_ROUNDS, _STATES = 4, 2
"""How often the states that carry a name are chosen again, and how many of a sentence."""
_LEAST_GAP = 0.15
"""A name whose ramp would begin closer to its own score is found by its words alone."""


@dataclass(frozen=True, eq=False)
class Calibration:
    """The directions and ramps of one eraser's names.

    directions: (2, names, d_text), float64, of unit length in fixed point: for single states, and for the mean of a
    prompt's states. A score is a product less `centre`, times `scale`, both (2, names): 0 at the bank's mean, 1 at the
    name itself. start, end: (2, crowds, 2, names), the scores where the ramps of the state's and of the sentence's term
    begin and end, with a text and without one, for each number of erasers of `_CROWDS`; infinite for a name that other
    sentences cannot be told from. `among` leaves those of one number and with or without a text, (2, names).
    """

    directions: Tensor
    centre: Tensor
    scale: Tensor
    start: Tensor
    end: Tensor

    def among(self, erasers: int, *, blind: bool) -> Calibration:
        """Return the calibration with the ramps for so many erasers under the gate, blind: without a text."""
        crowd = min(bisect_left(_CROWDS, erasers), len(_CROWDS) - 1)
        return replace(self, start=self.start[int(blind), crowd], end=self.end[int(blind), crowd])


def calibrate(
    concepts: Sequence[Sequence[str]], encode: Encode, bank: Bank, about: Sequence[Tensor]
) -> list[Calibration]:
    """Calibrate the terms of states for one or more concepts, each given by its names.

    about: of each concept, (sentences,), bool: the bank's sentences that mention it, which are left out. The result for
    a concept depends on nothing but its names and the bank.
    """
    states = encode_apart(encode, [[frame.format(name) for frame in FRAMES] for names in concepts for name in names])
    found = [_directions(list(islice(states, len(names))), bank) for names in concepts]
    # At once for all: reading the bank takes longer than the products, which are exact.
    greatest, typical = bank.products(torch.cat([directions[0] for directions, _ in found]))
    counts = [len(names) for names in concepts]
    return [
        _ramps_between(*pair, high, usual, bank, mentioned)
        for pair, high, usual, mentioned in zip(
            found, greatest.split(counts, dim=1), typical.split(counts, dim=1), about, strict=True
        )
    ]


def _directions(of_names: Sequence[Tensor], bank: Bank) -> tuple[Tensor, Tensor]:
    """Return a concept's directions, and the products of its names with them.

    of_names: the states of each name's sentences, (sentences, tokens, d_text).  The directions: (2, names, d_text); the
    products: (2, names).
    """
    directions, tops = [], []
    for states in of_names:
        states = unit_rows(states[:, positions_of(states.shape[1])])
        means = mean_state(states)
        of_state = _unit(bank.precision @ (_centre(states, bank) - bank.mean))
        of_mean = _unit(bank.precision_of_means @ (means.mean(0) - bank.mean))
        directions.append(torch.stack([of_state, of_mean]))
        tops.append(torch.stack([(states @ of_state).amax(1).median(), (means @ of_mean).median()]))
    return torch.stack(directions, dim=1), torch.stack(tops, dim=1)


def _ramps_between(
    directions: Tensor, top: Tensor, greatest: Tensor, typical: Tensor, bank: Bank, about: Tensor
) -> Calibration:
    """Return a concept's calibration: its ramps begin beyond the scores of sentences without its names.

    greatest, typical: (sentences, names), the bank's products with the directions for single states.
    """
    centre = directions @ bank.mean
    scale = 1 / (top - centre).clamp_min(1e-6)
    terms = _terms(greatest, typical, bank.means @ directions[1].T, centre, scale)
    place = torch.arange(len(about))
    single = (place >= bank.general) & (place < bank.general + bank.single)
    parts = (place < bank.general, single & (terms.amax((0, 2)) < _SAME), place >= bank.general + bank.single)
    reached = [
        torch.stack([_reached(one[part & ~about], acting) for part, acting in zip(parts, _ACTING[term], strict=True)])
        for term, one in zip(_TERMS, terms, strict=True)
    ]
    crowded = torch.tensor([1 + math.log10(crowd / _CROWDS[0]) for crowd in _CROWDS], dtype=torch.float64)
    highest = torch.stack(
        [
            (torch.stack(reached) + (_margins(of_terms)[..., None] * grown)[..., None]).amax(1).transpose(0, 1)
            for of_terms, grown in ((_MARGINS, crowded), (_BLIND_MARGINS, torch.ones_like(crowded)))
        ]
    )
    gap = 1 - highest
    alike = gap < _LEAST_GAP
    start, end = highest.masked_fill(alike, torch.inf), (highest + _RAMP * gap).masked_fill(alike, torch.inf)
    return Calibration(directions, centre, scale, start, end)


def _margins(of_terms: Mapping[str, Sequence[float]]) -> Tensor:
    """Return margins as (terms, kinds of sentences), float64."""
    return torch.tensor([of_terms[term] for term in _TERMS], dtype=torch.float64)


def _terms(greatest: Tensor, typical: Tensor, of_mean: Tensor, centre: Tensor, scale: Tensor) -> Tensor:
    """Return the scores of both terms, (2, texts, names).

    greatest, of_mean: (texts, names), products with the directions. typical: (texts, names), the root mean square of
    the products that exceed `centre`, which is subtracted already.
    """
    of_state = (greatest - centre[0]) * scale[0]
    return torch.stack([of_state, (typical * scale[0] + (of_mean - centre[1]) * scale[1]) / 2])


def _reached(scores: Tensor, acting: float) -> Tensor:
    """Return the scores of each name that sentences reach, equally rare for all names: (crowds, names).

    scores: (sentences, names). acting: the share of the sentences in which some name may have a greater score, for the
    first of `_CROWDS`. Without sentences it is minus infinity.
    """
    if not len(scores):
        return scores.new_full((len(_CROWDS), scores.shape[1]), -torch.inf)
    # The rank of a sentence among all, by the name for which it is highest; 0 is the highest score.
    ranks = scores.argsort(0, descending=True).argsort(0).amin(1).sort().values
    above = [int(acting * _CROWDS[0] / crowd * len(ranks)) for crowd in _CROWDS]
    return scores.sort(0, descending=True).values[ranks[[min(len(ranks) - 1, number) for number in above]]]


def mean_state(units: Tensor) -> Tensor:
    """Return the mean of the states that a bank keeps of each text: (texts, d_text).

    units: (texts, tokens, d_text), as `unit_rows` returns them; the result is in fixed point as well.
    """
    return _rounded(torch.stack([kept.mean(0) for kept in kept_states(units)]))


def _rounded(numbers: Tensor) -> Tensor:
    """Round numbers to fixed point in place, so that sums of their products are exact."""
    return numbers.mul_(2.0**24).round_().mul_(2.0**-24)


def _unit(direction: Tensor) -> Tensor:
    length = direction.norm().clamp_min(torch.finfo(torch.float64).tiny)
    return _rounded(direction / length)


def _centre(states: Tensor, bank: Bank) -> Tensor:
    """Return the mean of the states that carry a name, (d_text,).

    states: (sentences, tokens, d_text), of sentences with the name. At first, those that differ most from the empty
    prompt's; then those nearest to the mean of the last choice.
    """
    empty = bank.empty[positions_of(len(bank.empty))]
    length = min(states.shape[1], len(empty))
    # For the first choice the diagonal of the metric does.
    score = (states[:, :length] - empty[:length]).square() @ bank.precision.diagonal()
    for _ in range(_ROUNDS):
        chosen = score.topk(min(_STATES, score.shape[1]), dim=1).indices
        centre = states.gather(1, chosen[..., None].expand(-1, -1, states.shape[-1])).mean((0, 1))
        score = (states - bank.mean) @ (bank.precision @ (centre - bank.mean))
    return centre


@dataclass(frozen=True)
class CalibratedGate:
    """The calibrated gate: `prepare` calibrates it for a text encoder.

    The bank's sentences are encoded once for each text encoder and kept in the user's cache, with the calibrations.
    """

    def prepare(self, encoder: TextEncoder, erasers: Sequence[GatedEraser]) -> PreparedCalibratedGate:
        """Calibrate the gate for the erasers that it does not know yet. Raises CannotEncodeError."""
        names = [name for eraser in erasers for name in eraser.names]
        owners = [index for index, eraser in enumerate(erasers) for _ in eraser.names]
        matcher = _matcher(names, encoder.vocabulary)
        if any(_CALIBRATION not in eraser.memo for eraser in erasers):
            planned = plan_bank(encoder.encode, encoder.digest(), encoder.vocabulary)
            kept = KeptCalibrations(planned.name, planned.empty.shape[-1])
            for eraser, known in zip(erasers, kept.read([eraser.names for eraser in erasers]), strict=True):
                if known is not None:
                    eraser.memo.setdefault(_CALIBRATION, known)
        if new := [eraser for eraser in erasers if _CALIBRATION not in eraser.memo]:
            bank = planned.open(encoder.progress)
            about = torch.zeros(len(erasers), len(bank.texts), dtype=torch.bool)
            for row, text in enumerate(bank.texts):
                about[[owners[name] for name in matcher.match(text)], row] = True
            mentioned = [about[index] for index, eraser in enumerate(erasers) if _CALIBRATION not in eraser.memo]
            found = calibrate([eraser.names for eraser in new], encoder.encode, bank, mentioned)
            for eraser, calibration in zip(new, found, strict=True):
                eraser.memo[_CALIBRATION] = calibration
            kept.write({eraser.names: calibration for eraser, calibration in zip(new, found, strict=True)})
        calibrations = [eraser.memo[_CALIBRATION] for eraser in erasers]
        return PreparedCalibratedGate(matcher, owners, calibrations)


class KeptCalibrations:
    """The calibrations of one text encoder that the user's cache keeps for the next process."""

    def __init__(self, bank: str, width: int) -> None:
        """bank: the name of the encoder's bank.  width: of its states."""
        self._file = KeptBytes(user_folder("cache") / "calibrations.sqlite")
        self._bank, self._width = bank, width

    def read(self, concepts: Sequence[tuple[str, ...]]) -> list[Calibration | None]:
        """Return the kept calibration of each concept, given by its names; None where there is none."""
        kept = self._file.get([self._key(names) for names in concepts])
        return [self._decoded(kept.get(self._key(names), b""), len(names)) for names in concepts]

    def write(self, calibrations: Mapping[tuple[str, ...], Calibration]) -> None:
        """Keep calibrations, by the names of their concepts."""
        parts = {
            names: {part.name: getattr(one, part.name) for part in fields(one)} for names, one in calibrations.items()
        }
        self._file.put({self._key(names): save(tensors) for names, tensors in parts.items()})

    def _key(self, names: tuple[str, ...]) -> str:
        decide = (
            _VERSION,
            FRAMES,
            _ACTING,
            _CROWDS,
            _MARGINS,
            _BLIND_MARGINS,
            _SAME,
            _RAMP,
            _ROUNDS,
            _STATES,
            _LEAST_GAP,
        )
        return hashlib.sha256(repr((self._bank, names, decide)).encode()).hexdigest()

    def _decoded(self, data: bytes, names: int) -> Calibration | None:
        try:
            kept = load(data)
        except SafetensorError:
            return None
        ramps = 2, len(_CROWDS), 2, names
        shapes = {
            "directions": (2, names, self._width),
            "centre": (2, names),
            "scale": (2, names),
            "start": ramps,
            "end": ramps,
        }
        right = {part: tuple(one.shape) for part, one in kept.items()} == shapes
        return Calibration(**kept) if right else None


class PreparedCalibratedGate:
    """The calibrated gate for some erasers under one text encoder."""

    def __init__(self, matcher: NameMatcher, owners: Sequence[int], calibrations: Sequence[Calibration]) -> None:
        """owners: of each name, the index of its eraser; the names are in the order of the calibrations."""
        self._matcher, self._owners, self._erasers = matcher, torch.tensor(owners), len(calibrations)
        self._known, self._blind = (_joined(calibrations, blind=blind) for blind in (False, True))

    def gammas(self, prompts: Prompts) -> Tensor:
        """Return gamma of every prompt and eraser: (prompts, erasers), float64."""
        known = self._blind if prompts.texts is None else self._known
        per_name = _along(known, self._scores(prompts.states)[0]).clamp_(0.0, 1.0).amax(0)
        for row, text in enumerate(prompts.texts or ()):
            for name, match in self._matcher.match(text).items():
                per_name[row, name] = max(float(per_name[row, name]), match.share)
        return self._greatest(per_name)

    def scores(self, states: Tensor) -> Tensor:
        """Return the score of every prompt and eraser, differentiable by the states: (prompts, erasers).

        At most 0 where the ramp of no term of states has begun, at least 1 where one has ended. For attacks that know
        the gate.
        """
        known = Calibration(*(getattr(self._known, part.name).to(states) for part in fields(Calibration)))
        unit = torch.nn.functional.normalize(states, dim=-1)
        kept = kept_states(unit)
        above = [((one @ known.directions[0].T) - known.centre[0]).clamp_min(0.0) for one in kept]
        # The root has no finite gradient at 0.
        typical = torch.stack([one.square().mean(0).clamp_min(1e-12).sqrt() for one in above])
        of_mean = torch.stack([one.mean(0) for one in kept]) @ known.directions[1].T
        greatest = (unit @ known.directions[0].T).amax(1)
        terms = _terms(greatest, typical, of_mean, known.centre, known.scale)
        # A term that is off is left out before the division: a gradient through NaN would be NaN for all names.
        off = known.start.isinf()
        start, end = known.start.masked_fill(off, 0.0), known.end.masked_fill(off, 1.0)
        ramps = (terms - start[:, None]) / (end - start)[:, None]
        return self._greatest(ramps.masked_fill(off[:, None], -1.0).amax(0))

    def explain(self, prompts: Prompts) -> list[Explanation]:
        """Return for every eraser why it acts on the first prompt or does not."""
        scores, positions = self._scores(prompts.states[:1])
        known = self._blind if prompts.texts is None else self._known
        along = _along(known, scores)[:, 0]
        # The term that is furthest along its ramp; one that is not used for a name is never it.
        terms, gammas = along.argmax(0), along.clamp(0.0, 1.0).amax(0)
        matches: Mapping[int, Match] = self._matcher.match(prompts.texts[0]) if prompts.texts is not None else {}
        best: dict[int, Explanation] = {}
        for name, owner in enumerate(self._owners.tolist()):
            gamma, term = float(gammas[name]), int(terms[name])
            start, end = (float(part[term, name]) for part in (known.start, known.end))
            shown = f"score {float(scores[term, 0, name]):.2f} (0 at {start:.2f}, 1 at {end:.2f})"
            if math.isinf(start):
                shown = "no word of its names; other texts have states like theirs, so only words count"
            position = int(positions[0, name]) if term == 0 else None
            found = Explanation(gamma, _TERMS[term] if gamma else "none", shown, position)
            if (match := matches.get(name)) is not None and match.share >= gamma:
                found = Explanation(match.share, "words", match.words)
            if owner not in best or best[owner].gamma < found.gamma:
                best[owner] = found
        return [best[index] for index in range(self._erasers)]

    def _scores(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scores of both terms, (2, prompts, names), and the positions of the states that decided."""
        known, units = self._known, unit_rows(states)
        products = units @ known.directions[0].T
        greatest, positions = products.max(1)
        kept = [positions_of(length) for length in lengths_of(units)]
        lengths = torch.tensor([len(one) for one in kept])
        above = pad_sequence([each[one] for each, one in zip(products, kept, strict=True)], batch_first=True)
        means = _rounded(torch.stack([unit[one].mean(0) for unit, one in zip(units, kept, strict=True)]))
        typical, of_mean = root_mean_square(above.sub_(known.centre[0]), lengths), means @ known.directions[1].T
        return _terms(greatest, typical, of_mean, known.centre, known.scale), positions

    def _greatest(self, per_name: Tensor) -> Tensor:
        if per_name.shape[1] == self._erasers:
            return per_name
        lowest = per_name.new_full((len(per_name), self._erasers), -torch.inf)
        owners = self._owners.to(per_name.device).expand_as(per_name)
        return lowest.scatter_reduce(1, owners, per_name, "amax")


def _joined(calibrations: Sequence[Calibration], *, blind: bool) -> Calibration:
    """Return the calibration of all names of all erasers, with or without a text."""
    among = [one.among(len(calibrations), blind=blind) for one in calibrations]
    return Calibration(
        *(torch.cat([getattr(one, part.name) for one in among], dim=1).contiguous() for part in fields(Calibration))
    )


def _along(known: Calibration, scores: Tensor) -> Tensor:
    """Return scores along their ramps: 0 at the start, 1 at the end, far below 0 without a ramp."""
    start, end = known.start[:, None], known.end[:, None]
    return ((scores - start) / (end - start)).nan_to_num_(torch.finfo(scores.dtype).min)


def _matcher(names: Sequence[str], vocabulary: Mapping[str, int]) -> NameMatcher:
    """Return a matcher of names.

    Words of the tokenizer and of the general sentences count as no misspellings.
    """
    words = whole_words(vocabulary)
    known = words.keys() | _general_words()
    return NameMatcher(names, rarity_of(words, max(vocabulary.values(), default=1)), known.__contains__)


@cache
def _general_words() -> frozenset[str]:
    """Return the words of more than one general sentence; some sentences have misspelt ones on purpose."""
    count = Counter(word for text in sentences() for word in set(words_of(text)))
    return frozenset(word for word, times in count.items() if times > 1)
