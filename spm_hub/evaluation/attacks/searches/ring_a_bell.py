"""Ring-A-Bell: a genetic search for a prompt that has the concept's direction in its text states.

Tsai et al., Ring-A-Bell! How Reliable are Concept Removal Methods for Diffusion Models?, ICLR 2024, arXiv 2310.10012.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from spm_hub.errors import ModelError, UsageError
from spm_hub.evaluation.attacks.attack import AttackTarget
from spm_hub.evaluation.attacks.outcome import Case, Threat
from spm_hub.evaluation.attacks.tries import Try
from spm_hub.evaluation.attacks.victim import Victim
from spm_hub.evaluation.attacks.vocabulary import Vocabulary

SCENES = (
    "a photo", "a person", "a man on a chair", "a woman at the beach", "a dog in a meadow", "a house under a tree",
    "a picture in a room", "a town in the snow", "a car on the road", "a poster on a wall", "a sketch of a cat",
    "a card with a flower", "a bright morning", "a view of the sea", "a table with food", "a bird in the sky",
)  # fmt: skip
"""Sentences that the names of a concept are put before, to see what they change."""
_AT_ONCE = 256
_SEEDS = 2**62


@dataclass(frozen=True)
class RingABell:
    """argmin over the tokens of a prompt p* of || e(p*) - (e(p) + eta v) ||^2.

    e: the states of the text encoder, p the case's prompt; the concept's direction v is the mean over sentences s of
    e("name, s") - e(s) (Eq. 1). No token of the concept's names is searched, and neither the eraser nor the denoiser is
    asked. Where text encoders do not share one vocabulary (FLUX, SD3), each vocabulary is searched on its own, and
    every encoder is given the prompt found for it; an encoder whose states the denoiser does not get is searched by its
    pooled state.
    The best prompt after each `iterations` generations is tried, `tries` times in all. Defaults are those of the
    authors' code.
    """

    tokens: int = 16
    iterations: int = 3000
    tries: int = 1
    eta: float = 3.0
    population: int = 200
    crossover: float = 0.5
    mutation: float = 0.25
    threat: ClassVar[Threat] = Threat.TEXT
    asks_erasers: ClassVar[bool] = False

    @property
    def steps(self) -> int:
        """Generations in all, for progress."""
        return self.iterations * self.tries

    def check(self, victim: Victim) -> None:
        """Raise ModelError for a pipeline without a text encoder."""
        if not victim.vocabularies:
            raise ModelError(
                f"{type(victim.pipe).__name__} has no text encoder and tokenizer to search in",
                mend="load it with its text encoders and tokenizers",
            )

    def rounds(self, target: AttackTarget) -> Iterator[dict[Case, Try]]:
        """Yield prompts to try, one for every remaining case of `target`."""
        every_case = tuple(target.cases)
        if not target.names:
            raise UsageError(
                "Ring-A-Bell needs a concept's names, and no eraser is attacked", mend="give at least one eraser"
            )
        seeds = torch.randint(_SEEDS, (len(every_case),), generator=target.generator).tolist()
        views = [_View.of(target.victim, vocabulary) for vocabulary in target.victim.vocabularies]
        for view in views:
            view.vocabulary.check_room(self.tokens, [""])
        shared = [
            (
                view,
                view.vocabulary.searchable(target.names, printable=True),
                self.eta * direction(view.states, target.names),
            )
            for view in views
        ]
        searches = {
            case: [self._search(*one, case, seed + number) for number, one in enumerate(shared)]
            for case, seed in zip(every_case, seeds, strict=True)
        }
        for _ in range(self.tries):
            if not target.cases:
                return
            for _ in range(self.iterations):
                for place, view in enumerate(views):
                    _evolve(view, [searches[case][place] for case in target.cases])
                target.on_step()
            yield {case: self._try(views, searches[case]) for case in target.cases}

    def _search(self, view: _View, ids: Tensor, move: Tensor, case: Case, seed: int) -> _Search:
        goal = _summed(view.states([case.prompt])[0], move)
        random = torch.Generator().manual_seed(seed)
        people = ids[torch.randint(len(ids), (self.population, self.tokens), generator=random)]
        return _Search(self, ids, goal, random, people)

    def _try(self, views: Sequence[_View], searches: Sequence[_Search]) -> Try:
        texts = {
            argument: view.vocabulary.write(search.best[None], [""])[0]
            for view, search in zip(views, searches, strict=True)
            for argument in view.vocabulary.arguments
        }
        others = {} if len(views) == 1 else {name: text for name, text in texts.items() if name != "prompt"}
        return Try(texts["prompt"], options=others)


@dataclass(frozen=True, eq=False)
class _View:
    """The text states of the encoders of one vocabulary, the others given the empty text.

    pooled: whether these encoders change the pooled states alone.
    """

    victim: Victim
    vocabulary: Vocabulary
    pooled: bool

    @classmethod
    def of(cls, victim: Victim, vocabulary: Vocabulary) -> _View:
        """Ask the pipeline whether the denoiser gets the states of these encoders."""
        one, other = (cls(victim, vocabulary, pooled=False).states([scene]) for scene in SCENES[:2])
        return cls(victim, vocabulary, pooled=torch.equal(one, other))

    @torch.no_grad()
    def states(self, texts: Sequence[str]) -> Tensor:
        """Return e(.) of n texts: (n, tokens, d_text), or (n, 1, d_pooled)."""
        arguments = [name for vocabulary in self.victim.vocabularies for name in vocabulary.arguments]
        found = []
        for start in range(0, len(texts), _AT_ONCE):
            part = texts[start : start + _AT_ONCE]
            given = {name: part if name in self.vocabulary.arguments else [""] * len(part) for name in arguments}
            conditioning = self.victim.encode(given.pop("prompt"), others=given)
            pooled = conditioning.pooled if self.pooled else None
            found.append(conditioning.states if pooled is None else pooled[:, None])
        longest = max(part.shape[1] for part in found)
        return torch.cat([F.pad(part, (0, 0, 0, longest - part.shape[1])) for part in found]).float()


@dataclass(eq=False)
class _Search:
    """The population of one case, and the best one seen.

    goal: (tokens, d_text), the states to come near to.
    people: (n, tokens).  scores: (n,), NaN for new ones until they are computed.  best: (tokens,).
    """

    settings: RingABell
    ids: Tensor
    goal: Tensor
    random: torch.Generator
    people: Tensor
    scores: Tensor = field(init=False)
    best: Tensor = field(init=False)
    least: float = field(default=float("inf"), init=False)

    def __post_init__(self) -> None:
        self.scores = torch.full((len(self.people),), torch.nan)

    def evolve(self, new: Tensor) -> None:
        """Rank the population, keep its better half, cross and mutate it: one generation.

        new: the scores of the people that have none, in order.
        """
        self.scores[self.scores.isnan()] = new
        order = self.scores.argsort(stable=True)
        if float(self.scores[order[0]]) < self.least:
            self.least, self.best = float(self.scores[order[0]]), self.people[order[0]].clone()
        kept = order[: self.settings.population // 2]
        self.people = self._crossed(self.people[kept])
        unknown = torch.full((len(self.people) - len(kept),), torch.nan)
        self.scores = torch.cat([self.scores[kept], unknown])
        self._mutate()

    def _crossed(self, parents: Tensor) -> Tensor:
        """Return the parents, and for a share of them two children each.

        The children exchange the ends of the parent and of a random other one, from a random token on.
        """
        chosen = torch.rand(len(parents), generator=self.random) < self.settings.crossover
        ones = parents[chosen]
        others = parents[torch.randint(len(parents), (len(ones),), generator=self.random)]
        length = parents.shape[1]
        cuts = torch.randint(length, (len(ones), 1), generator=self.random)
        before = torch.arange(length)[None] < cuts
        return torch.cat([parents, torch.where(before, ones, others), torch.where(before, others, ones)])

    def _mutate(self) -> None:
        """Replace one token by a random one in a share of the population, parents included."""
        chosen = (torch.rand(len(self.people), generator=self.random) < self.settings.mutation).nonzero()[:, 0]
        places = torch.randint(self.people.shape[1], (len(chosen),), generator=self.random)
        self.people[chosen, places] = self.ids[torch.randint(len(self.ids), (len(chosen),), generator=self.random)]
        self.scores[chosen] = torch.nan


def _evolve(view: _View, searches: Sequence[_Search]) -> None:
    """Bring every search one generation further; the new people of all of them are encoded together."""
    asked = [search.people[search.scores.isnan()] for search in searches]
    owners = [search for search, people in zip(searches, asked, strict=True) for _ in people]
    texts = view.vocabulary.write(torch.cat(asked), [""] * len(owners))
    # A search often has the same prompt twice.
    known: dict[tuple[int, str], float] = {}
    wanted = list({(id(owner), text): (owner, text) for owner, text in zip(owners, texts, strict=True)}.items())
    for start in range(0, len(wanted), _AT_ONCE):
        part = wanted[start : start + _AT_ONCE]
        states = view.states([text for _, (_, text) in part])
        away = torch.stack([_away(row, owner.goal) for row, (_, (owner, _)) in zip(states, part, strict=True)])
        known |= zip([key for key, _ in part], away.tolist(), strict=True)
    scores = torch.tensor([known[id(owner), text] for owner, text in zip(owners, texts, strict=True)])
    for search, new in zip(searches, scores.split([len(people) for people in asked]), strict=True):
        search.evolve(new)


def direction(states: Callable[[Sequence[str]], Tensor], names: Sequence[str]) -> Tensor:
    """Return v = mean over names and `SCENES` s of e("name, s") - e(s): (tokens, d_text)."""
    both = states([*(f"{name}, {scene}" for name in names for scene in SCENES), *SCENES])
    return both[: -len(SCENES)].mean(dim=0) - both[-len(SCENES) :].mean(dim=0)


def distances(states: Tensor, goal: Tensor) -> Tensor:
    """Return the sums of squares between states (n, tokens, d_text) and a goal (tokens, d_text); (n,)."""
    return torch.stack([_away(row, goal) for row in states])


def _away(states: Tensor, goal: Tensor) -> Tensor:
    return _summed(states, -goal).pow(2).sum()


def _summed(one: Tensor, other: Tensor) -> Tensor:
    """Add two states, the shorter one followed by zeros.

    Some encoders give a longer text more states (Qwen-Image).
    """
    tokens = max(len(one), len(other))
    return F.pad(one, (0, 0, 0, tokens - len(one))) + F.pad(other, (0, 0, 0, tokens - len(other)))
