"""CCE: learns the embedding of a new word with which the erased model draws the concept.

Pham et al., Circumventing Concept Erasure Methods For Text-to-Image Generative Models, ICLR 2024, arXiv 2308.01508;
by textual inversion, Gal et al., ICLR 2023, arXiv 2208.01618.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from spm_hub.errors import UsageError
from spm_hub.evaluation.attacks.attack import AttackTarget
from spm_hub.evaluation.attacks.outcome import Case, Threat
from spm_hub.evaluation.attacks.tries import Try
from spm_hub.evaluation.attacks.victim import Victim
from spm_hub.evaluation.attacks.vocabulary import NOWHERE, Vocabulary
from spm_hub.training.conditioning import Conditioning


@dataclass(frozen=True)
class ConceptInversion:
    """argmin over the embedding w of a word of || n - eps(x_t, prompt with w in place of the name) ||^2.

    x_0 are the base's pictures of all cases, t and n random; one word of `tokens` embeddings is learnt for all cases,
    beginning as the word `initial`, which the gates never see: they are given the text states alone. AdamW at
    lr * batch, as the authors' code scales it, whose numbers the defaults are. The states of the prompt with the word
    are tried after every `iterations` steps, `tries` times in all.
    """

    tokens: int = 1
    initial: str = "thing"
    iterations: int = 100
    tries: int = 50
    batch: int = 16
    lr: float = 5e-3
    weight_decay: float = 1e-2
    threat: ClassVar[Threat] = Threat.EMBEDDINGS

    @property
    def steps(self) -> int:
        """Gradient steps in all, for progress."""
        return self.iterations * self.tries

    def check(self, victim: Victim) -> None:
        """Raise ModelError unless the encoders share one vocabulary, UsageError unless `initial` is one token."""
        if victim.vocabulary.count(self.initial) != 1:
            raise UsageError(
                f"{self.initial!r} is {victim.vocabulary.count(self.initial)} tokens; a new word begins as one token",
                mend='ConceptInversion(initial="photo")',
            )

    def rounds(self, target: AttackTarget) -> Iterator[dict[Case, Try]]:
        """Yield the states of prompts with the learnt word, one try for every remaining case of `target`."""
        victim, generator, every_case = target.victim, target.generator, tuple(target.cases)
        word = Word.of(victim.vocabulary, self.initial, self.tokens)
        learnt = nn.Parameter(word.begin.clone())
        adam = torch.optim.AdamW([learnt], lr=self.lr * self.batch, weight_decay=self.weight_decay)
        prompts = [case.prompt for case in every_case]
        for _ in range(self.tries):
            if not target.cases:
                return
            for _ in range(self.iterations):
                rows = torch.randint(len(every_case), (self.batch,), generator=generator)
                times = victim.noising.random_times(self.batch, generator).to(victim.base.device)
                noise = victim.base.noise(self.batch, generator)
                x_t, goal = victim.noising.add_noise(target.pictures[rows.to(target.pictures.device)], noise, times)
                states = word.encode(victim, [prompts[row] for row in rows], target.names, learnt)
                loss = (victim.predict(x_t, times, None, states) - goal).pow(2).mean()
                (learnt.grad,) = torch.autograd.grad(loss, learnt)
                adam.step()
                target.on_step()
            left = tuple(target.cases)
            with torch.no_grad():
                states = word.encode(victim, [case.prompt for case in left], target.names, learnt)
            yield {case: Try(states=states[row : row + 1]) for row, case in enumerate(left)}


@dataclass(frozen=True, eq=False)
class Word:
    """A new word, whose embeddings replace those of known words.

    text: these words.  begin: (k, d), their embeddings, as which the new word begins.
    """

    text: str
    begin: Tensor
    vocabulary: Vocabulary

    @classmethod
    def of(cls, vocabulary: Vocabulary, initial: str, tokens: int) -> Word:
        """Make a word of so many tokens that begins as the token `initial`, repeated."""
        (token,) = vocabulary.tokenizer(initial, add_special_tokens=False).input_ids
        return cls(" ".join([initial] * tokens), vocabulary.table[token].expand(tokens, -1), vocabulary)

    def put(self, prompt: str, names: Sequence[str]) -> tuple[str, list[int]]:
        """Return the prompt with the word in place of the names, and the positions of its tokens.

        A prompt without a name gets the word at its end.
        """
        longest_first = sorted(names, key=len, reverse=True)
        pattern = "|".join(rf"\b{re.escape(name)}\b" for name in longest_first) or r"(?!)"
        parts = re.split(pattern, prompt, flags=re.IGNORECASE)
        if len(parts) == 1:
            parts = [f"{prompt} ", ""]
        places: list[int] = []
        counted = 0
        for part in parts[:-1]:
            counted += self.vocabulary.count(part.strip())
            places += range(counted, counted + len(self.begin))
            counted += len(self.begin)
        return self.text.join(parts), places

    def encode(self, victim: Victim, prompts: Sequence[str], names: Sequence[str], learnt: Tensor) -> Conditioning:
        """Encode prompts with the embeddings `learnt` (k, d) at the places of the word."""
        texts, places = zip(*(self.put(prompt, names) for prompt in prompts), strict=True)
        most = max(map(len, places))
        padded = torch.tensor([[*own, *[NOWHERE] * (most - len(own))] for own in places])
        shift = (learnt - self.begin).repeat(most // len(self.begin), 1)
        return victim.encode(texts, shift.expand(len(texts), -1, -1), padded)
