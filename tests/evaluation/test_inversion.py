"""CCE: where the learnt word goes, its gradient against finite differences, and what the gates see of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attacked import CASES, SMALL, judge_by, untouched
from pico import pico_eraser, pico_pipeline
from torch import Tensor

from spm_hub.errors import UsageError
from spm_hub.evaluation import attacks
from spm_hub.evaluation.attacks.searches.inversion import ConceptInversion, Word
from spm_hub.evaluation.attacks.victim import Victim

NAMES = ("snoopy", "van gogh")


def test_the_word_takes_the_place_of_every_name() -> None:
    victim = Victim(pico_pipeline())
    word = Word.of(victim.vocabulary, "photo", 2)
    for prompt, text, places in (
        ("a dog by van gogh", "a dog by photo photo", [3, 4]),
        ("Snoopy and snoopy", "photo photo and photo photo", [0, 1, 3, 4]),
        ("a church", "a church photo photo", [2, 3]),
    ):
        assert word.put(prompt, NAMES) == (text, places)
        ids = victim.vocabulary.tokenizer(text, add_special_tokens=False).input_ids
        assert [victim.vocabulary.tokenizer.decode([ids[place]]).strip() for place in places] == ["photo"] * len(places)
    prompts = ["a dog by van gogh", "snoopy and snoopy"]
    with torch.no_grad():
        begun = word.encode(victim, prompts, NAMES, word.begin).states
        plain = victim.encode(["a dog by photo photo", "photo photo and photo photo"]).states
        assert torch.equal(begun, plain)
        # Learnt to be two other words, it reads as these.
        dog, cat = (victim.vocabulary.tokenizer(w, add_special_tokens=False).input_ids[0] for w in ("dog", "cat"))
        other = word.encode(victim, prompts, NAMES, victim.vocabulary.table[[dog, cat]]).states
        meant = victim.encode(["a dog by dog cat", "dog cat and dog cat"]).states
    torch.testing.assert_close(other, meant, rtol=1e-5, atol=1e-5)


def test_the_gradient_of_the_embedding_is_the_slope_of_the_loss() -> None:
    """In float64, through an attached eraser, by central differences along random directions."""
    pipe = pico_pipeline(dtype=torch.float64)
    victim = Victim(pipe)
    random = torch.Generator().manual_seed(3)
    x_t = torch.randn(2, 4, 8, 8, generator=random, dtype=torch.float64)
    times, goal = torch.tensor([300, 700]), torch.randn(2, 4, 8, 8, generator=random, dtype=torch.float64)
    word = Word.of(victim.vocabulary, "photo", 2)
    prompts = ["a dog by van gogh", "snoopy and snoopy"]

    def loss(learnt: Tensor) -> Tensor:
        states = word.encode(victim, prompts, NAMES, learnt)
        return (victim.predict(x_t, times, None, states) - goal).pow(2).mean()

    with victim.attach([pico_eraser(pipe.unet)], gate="always"):
        learnt = word.begin.double().clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(learnt), learnt)
        for _ in range(3):
            way = torch.randn(learnt.shape, generator=random, dtype=torch.float64)
            with torch.no_grad():
                slope = float(loss(learnt + 1e-4 * way) - loss(learnt - 1e-4 * way)) / 2e-4
            assert float((gradient * way).sum()) == pytest.approx(slope, rel=1e-4)
            assert slope != 0


def test_it_learns_by_its_loss_alone_and_the_gates_see_embeddings_only() -> None:
    pipe = pico_pipeline()
    same = untouched(pipe)
    texts: list[Any] = []

    class Watching:
        def gammas(self, prompts: Any, concepts: Any) -> Tensor:
            texts.append(prompts.texts)
            return torch.ones(len(prompts.states), 1, dtype=torch.float64)

    losses: list[float] = []
    judge = judge_by(lambda call: call in (1, 4))[0]
    attack = ConceptInversion(initial="photo", iterations=30, tries=2, batch=4, lr=2e-3)
    predict = Victim.predict

    def watched(self: Victim, x_t: Tensor, times: Tensor, prompts: Any, states: Any) -> Tensor:
        found = predict(self, x_t, times, prompts, states)
        losses.append(float(found.detach().pow(2).mean()))
        assert prompts is None
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Victim, "predict", watched)
        patch.setattr("spm_hub.evaluation.attacks.noising.Noising.add_noise", lambda self, x, n, t: (x, 0 * x))
        report = attacks.run(pipe, [pico_eraser(pipe.unet)], CASES, judge, attack, drawing=SMALL, gate=Watching())
    assert sum(losses[-5:]) < sum(losses[:5]), "without noise its target is zero, and predictions shrink"
    assert texts[0] is not None
    assert texts[2:] == [None] * len(texts[2:])
    assert report.threat is attacks.Threat.EMBEDDINGS
    assert [one.adversarial for one in report.outcomes] == ["(learnt embeddings)"] * 3
    assert same()


def test_a_word_begins_as_one_token() -> None:
    judge, attack = judge_by(lambda call: True)[0], ConceptInversion(initial="dog cat")
    with pytest.raises(UsageError, match="'dog cat' is 2 tokens"):
        attacks.run(pico_pipeline(), [], CASES, judge, attack, drawing=SMALL)
