"""Random tokens, seed search and noise: as many judged pictures as the attack, nothing learnt, nothing left behind."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from attacked import CASES, SMALL, Planted, judge_by, untouched
from pico import pico_eraser, pico_pipeline

from spm_hub.evaluation import attacks
from spm_hub.evaluation.attacks.victim import Victim


class Hopeless(Planted):
    """An attack that tries the same word again and again."""

    steps = tries = 3

    def rounds(self, target: attacks.AttackTarget) -> Iterator[dict[attacks.Case, attacks.Try]]:
        for _ in range(self.tries):
            yield dict.fromkeys(target.cases, attacks.Try("dog"))


def test_controls_have_as_many_pictures_judged_as_the_attack() -> None:
    pipe = pico_pipeline()
    judge, shown = judge_by(lambda call: call == 1)
    asked = [Hopeless(), attacks.RandomTokens(tokens=2, tries=3), attacks.SeedSearch(tries=3)]
    reports = attacks.run_all(pipe, [pico_eraser(pipe.unet)], CASES, judge, asked, drawing=SMALL)
    assert [report.judged for report in reports] == [9, 9, 9]
    assert shown == [3, 3, *[3] * 9]
    assert [report.threat for report in reports] == [
        attacks.Threat.TEXT, attacks.Threat.TEXT, attacks.Threat.SEEDS,
    ]  # fmt: skip


@pytest.mark.parametrize(
    "attack",
    [
        attacks.RandomTokens(tokens=2, tries=4), attacks.SeedSearch(tries=4), attacks.NoiseProbing(most=4),
        attacks.Completion(share=0.5, tries=1),
    ],
    ids=["random", "seeds", "noise", "completion"],
)  # fmt: skip
def test_they_restore_the_pipeline_and_find_the_same_again(attack: attacks.Attack) -> None:
    pipe = pico_pipeline()
    same, scheduler, config = untouched(pipe), pipe.scheduler, dict(pipe.config)

    def found() -> attacks.Report:
        judge = judge_by(lambda call: call in (1, 3))[0]
        return attacks.run(pipe, [pico_eraser(pipe.unet)], CASES, judge, attack, drawing=SMALL, seed=8, fresh=2)

    first = found()
    assert found() == first
    assert first.asr == 1.0
    assert same()
    assert pipe.scheduler is scheduler
    assert dict(pipe.config) == config


def tried(attack: attacks.Attack, stop: int | None = None) -> list[dict[attacks.Case, attacks.Try]]:
    """All rounds of an attack; the second case leaves after `stop` of them."""
    victim, cases = Victim(pico_pipeline()), list(CASES[:2])
    random = torch.Generator().manual_seed(0)
    rounds = []
    for tries in attack.rounds(attacks.AttackTarget(victim, cases, torch.zeros(2, 1), random, lambda: None)):
        rounds.append(tries)
        if len(rounds) == stop:
            cases.remove(CASES[1])
    return rounds


def test_seeds_and_tokens_differ_and_do_not_depend_on_who_is_left() -> None:
    seeds = tried(attacks.SeedSearch(tries=5))
    assert len({one.seed for tries in seeds for one in tries.values()}) == 10
    assert all(one.text == case.prompt for tries in seeds for case, one in tries.items())
    fewer = tried(attacks.SeedSearch(tries=5), stop=2)
    assert [len(tries) for tries in fewer] == [2, 2, 1, 1, 1]
    assert [tries[CASES[0]].seed for tries in fewer] == [tries[CASES[0]].seed for tries in seeds]
    texts = tried(attacks.RandomTokens(tokens=3, tries=5))
    every = [str(one.text).removesuffix(case.prompt).split() for tries in texts for case, one in tries.items()]
    assert [len(words) for words in every] == [3] * 10
    assert len({tuple(words) for words in every}) == 10


def test_noise_probing_visits_the_settings_of_the_paper_in_order() -> None:
    attack = attacks.NoiseProbing()
    assert (attack.tries, attack.steps) == (24, 24)
    settings = [tries[CASES[0]].sampler for tries in tried(attack)]
    assert settings[:2] == [{"eta": 1.0, "variance": 1.0}, {"eta": 1.0, "variance": 1.02}]
    assert settings[-1] == {"eta": 1.85, "variance": 1.04}
    assert len({tuple(one.items()) for one in settings}) == 24
    few = [tries[CASES[0]].sampler for tries in tried(attacks.NoiseProbing(most=6))]
    assert few == [{"eta": eta, "variance": 1.0} for eta in attack.etas]
    assert attacks.NoiseProbing(most=99).tries == 24


@pytest.mark.parametrize(
    ("steps", "share", "tries", "expected"),
    [(50, 0.1, 3, [5, 10, 15]), (4, 0.5, 3, [2]), (3, 0.1, 9, [1, 2]), (None, 0.1, 2, [5, 10]), (1, 0.1, 3, [])],
)
def test_completion_leaves_the_erased_model_a_step(
    steps: int | None, share: float, tries: int, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`steps` of None are the pipeline's own 50."""
    asked: list[int] = []

    def draw(pipe: object, given: list[tuple[attacks.Case, attacks.Try]], drawing: object) -> tuple[None, torch.Tensor]:
        asked.append(given[0][1].options["until"])
        return None, torch.zeros(len(given), 4, 8, 8)

    monkeypatch.setattr("spm_hub.evaluation.attacks.searches.completion.draw", draw)
    drawing = attacks.AttackDrawingOptions(steps=steps)
    target = attacks.AttackTarget(
        Victim(pico_pipeline()), list(CASES), torch.zeros(3, 1), torch.Generator(), lambda: None, drawing=drawing
    )
    rounds = list(attacks.Completion(share=share, tries=tries).rounds(target))
    assert asked == expected
    assert [tries[CASES[0]].start for tries in rounds] == expected
