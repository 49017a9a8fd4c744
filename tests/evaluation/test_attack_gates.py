"""Attacks under several gates at once: what each gate alone would report, and nothing computed twice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from attacked import CASES, SMALL, Planted, untouched
from pico import pico_eraser, pico_pipeline
from PIL import Image

from spm_hub.evaluation import attacks
from spm_hub.evaluation.attacks.memory import Memory, key_of
from spm_hub.evaluation.attacks.victim import Victim

GATES = ("always", 1.0, 0.25, "transport")


class Looking:
    """A judge that goes by the picture alone, and counts those that it is shown."""

    def __init__(self, base: Sequence[Image.Image]) -> None:
        self._base = {picture.tobytes() for picture in base}
        self.shown = 0

    def __call__(self, pictures: Sequence[Image.Image]) -> list[bool]:
        self.shown += len(pictures)
        return [picture.tobytes() in self._base or int(np.asarray(picture).sum()) % 5 == 0 for picture in pictures]


def looking(pipe: object) -> Looking:
    given = {"num_inference_steps": SMALL.steps, "guidance_scale": SMALL.guidance}
    seeds = [torch.Generator().manual_seed(case.seed) for case in CASES]
    return Looking(pipe([case.prompt for case in CASES], generator=seeds, **given).images)  # type: ignore[operator]


@pytest.mark.parametrize(
    "attack",
    [
        attacks.P4D(tokens=3, iterations=2, tries=3), attacks.P4D(every=2, iterations=2, tries=3),
        attacks.UnlearnDiffAtk(tokens=2, iterations=2, timesteps=3), attacks.RandomTokens(tokens=2, tries=3),
        attacks.RingABell(tokens=3, iterations=2, tries=3, population=8), attacks.NoiseProbing(most=3),
        attacks.PEZ(tokens=3, iterations=2, tries=3),
        attacks.ConceptInversion(initial="dog", iterations=1, tries=2, batch=3),
    ],
    ids=lambda attack: type(attack).__name__,
)  # fmt: skip
def test_each_gate_reports_what_it_would_alone(attack: attacks.Attack) -> None:
    # So that pictures of one gamma are equal to the last bit, in whatever batch they are drawn.
    pipe = pico_pipeline(dtype=torch.float64)
    same, eraser = untouched(pipe), pico_eraser(pipe.unet)
    together, alone = looking(pipe), looking(pipe)
    # Branched: a folded weight is rounded, so that pictures at one gamma would differ in their last bits.
    given = {"drawing": SMALL, "seed": 3, "fresh": 2, "mode": "branch"}
    reports = attacks.run_gates(pipe, [eraser], CASES, together, [attack], GATES, **given)
    for gate, (found,) in zip(GATES, reports, strict=True):
        assert found == attacks.run(pipe, [eraser], CASES, alone, attack, gate=gate, **given)
    assert together.shown < alone.shown
    assert same()


def test_a_search_without_the_erasers_runs_once_until_no_gate_has_a_case_left() -> None:
    pipe, searched, left = pico_pipeline(), [], []

    class Once(Planted):
        asks_erasers = False

        def rounds(self, target: attacks.AttackTarget) -> Iterator[dict[attacks.Case, attacks.Try]]:
            assert not target.victim.attached
            searched.append(list(target.cases))
            for number in range(4):
                left.append(len(target.cases))
                yield {case: attacks.Try(case.prompt, seed=100 + number) for case in target.cases}

    # The base, before under both gates; then the first gate succeeds at once, the other at the third round.
    answers = iter([[True] * 3, [False] * 3, [False] * 3, [True] * 3, [False] * 3, [False] * 3, [True] * 3])
    first, second = attacks.run_gates(
        pipe, [pico_eraser(pipe.unet)], CASES, lambda pictures: next(answers), [Once()], ["always", 0.5], drawing=SMALL
    )
    assert searched == [CASES]
    assert left == [3, 3, 3]
    assert [one.rounds for one in first[0].outcomes] == [1, 1, 1]
    assert [one.rounds for one in second[0].outcomes] == [3, 3, 3]
    assert [one.gammas for one in second[0].outcomes] == [{"snoopy": 0.5}] * 3


def test_rows_of_gradients_are_those_that_each_has_alone_under_its_own_gate() -> None:
    pipe = pico_pipeline(dtype=torch.float32)
    victim, texts = Victim(pipe), ["dog cat snoopy", "church a dog", "cat"]
    random = torch.Generator().manual_seed(0)
    x_t, goal = (torch.randn(3, 4, 8, 8, generator=random) for _ in range(2))
    noised = x_t, torch.tensor([100, 500, 900]), goal
    asked = []
    predict = victim.base.predict

    def counted(latents: torch.Tensor, *given: object) -> torch.Tensor:
        asked.append(len(latents))
        return predict(latents, *given)  # type: ignore[arg-type]

    victim.base.predict = counted  # type: ignore[method-assign, assignment]
    found = {}
    for gate in ("always", 0.25):
        with victim.attach([pico_eraser(pipe.unet)], gate=gate):
            found[gate] = victim.token_gradients(noised, texts, 2)
            shift = torch.zeros_like(found[gate], requires_grad=True)
            for row, text in enumerate(texts):
                given = victim.encode([text], shift[row : row + 1])
                away = victim.predict(x_t[row : row + 1], noised[1][row : row + 1], [text], given) - goal[row]
                (alone,) = torch.autograd.grad(away.pow(2).mean(), shift)
                torch.testing.assert_close(found[gate][row], alone[row], rtol=2e-3, atol=1e-6)
    assert not torch.allclose(found["always"], found[0.25], rtol=1e-2)
    asked.clear()
    with victim.attach([pico_eraser(pipe.unet)], gate=1.0):
        assert torch.equal(victim.token_gradients(noised, texts, 2), found["always"]), "gamma 1 under either gate"
        assert not asked
        other = victim.token_gradients(noised, [*texts[:2], "dog"], 2)
    assert asked == [1], "the one text that is new"
    assert torch.equal(other[:2], found["always"][:2])


def test_what_a_case_draws_does_not_depend_on_the_others() -> None:
    victim = Victim(pico_pipeline())
    pictures = torch.randn(3, *victim.base.latent_shape, generator=torch.Generator().manual_seed(1))
    searches = attacks.P4D(tokens=3, iterations=2, tries=2), attacks.UnlearnDiffAtk(tokens=2, iterations=2, timesteps=2)
    for attack in searches:
        tried = []
        for places in ([0, 1, 2], [1]):
            random = torch.Generator().manual_seed(6)
            cases, x_0 = [CASES[place] for place in places], pictures[places]
            rounds = attack.rounds(attacks.AttackTarget(victim, cases, x_0, random, lambda: None))
            tried.append([tries[CASES[1]].text for tries in rounds])
        assert tried[0] == tried[1]


def test_the_memory_computes_what_is_new_and_never_outgrows_its_bytes() -> None:
    memory, computed = Memory(most_bytes=5 * 8), []

    def compute(keys: Sequence[bytes]) -> torch.Tensor:
        def rows(places: list[int]) -> torch.Tensor:
            computed.append([keys[place] for place in places])
            return torch.tensor([[float(keys[place][0])] for place in places], dtype=torch.float64)

        return memory.rows(keys, rows)

    assert compute([b"\1", b"\2"]).tolist() == [[1.0], [2.0]]
    assert compute([b"\2", b"\3", b"\1"]).tolist() == [[2.0], [3.0], [1.0]]
    assert compute([b"\4", b"\5", b"\6"]).tolist() == [[4.0], [5.0], [6.0]], "the sixth does not fit: all are forgotten"
    assert compute([b"\6", b"\1"]).tolist() == [[6.0], [1.0]]
    assert computed == [[b"\1", b"\2"], [b"\3"], [b"\4", b"\5", b"\6"], [b"\1"]]


def test_keys_tell_apart_whatever_differs() -> None:
    one, other = torch.tensor([1.0, 2.0]), torch.tensor([[1.0], [2.0]])
    keys = [key_of(one, "a"), key_of(one, "b"), key_of(one), key_of("a", one), key_of(one + 1e-6, "a"), key_of(None)]
    assert len(set(keys)) == len(keys)
    assert key_of(one, "a") == key_of(one.clone(), "a")
    assert key_of("ab", "c") != key_of("a", "bc")
    assert key_of(other.half()) == key_of(other), "a number is the same in any precision"
