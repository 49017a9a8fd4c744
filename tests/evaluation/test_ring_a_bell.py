"""Ring-A-Bell: its direction, fitness and search against NumPy and brute force, on every kind of text encoder."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from attacked import CASES, SMALL, judge_by, untouched
from pico import pico_eraser, pico_pipeline
from pico_families import family_pipeline
from topologies import random_eraser

from spm_hub.errors import UsageError
from spm_hub.evaluation import attacks
from spm_hub.evaluation.attacks.searches.ring_a_bell import SCENES, RingABell, direction, distances
from spm_hub.evaluation.attacks.victim import Victim

NAMES = ("snoopy", "beagle")


def target_of(victim: Victim, cases: list[attacks.Case], seed: int = 0) -> attacks.AttackTarget:
    random = torch.Generator().manual_seed(seed)
    return attacks.AttackTarget(victim, cases, torch.zeros(len(cases), 1), random, lambda: None, NAMES)


def clip_states(pipe: object, texts: list[str]) -> np.ndarray:
    """The states of SD 1's text encoder, called without the pipeline."""
    ids = pipe.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids  # type: ignore[attr-defined]
    return pipe.text_encoder(ids)[0].detach().double().numpy()  # type: ignore[attr-defined]


def test_the_one_token_found_is_the_best_of_all() -> None:
    """e(p) + 3 v, computed by the encoder itself in float64, and every typable token tried."""
    pipe = pico_pipeline()
    victim, case = Victim(pipe), attacks.Case("a photo of snoopy", 0)
    v = np.mean(
        [clip_states(pipe, [f"{name}, {s}"])[0] - clip_states(pipe, [s])[0] for name in NAMES for s in SCENES], axis=0
    )
    goal = clip_states(pipe, [case.prompt])[0] + 3 * v
    vocabulary = victim.vocabulary
    names = set(vocabulary.tokenizer(list(NAMES), add_special_tokens=False).input_ids[0])
    words = [word for word in vocabulary.words(vocabulary.searchable()) if word not in ("snoopy", "beagle")]
    away = [((clip_states(pipe, [word])[0] - goal) ** 2).sum() for word in words]
    (found,) = RingABell(tokens=1, iterations=25, population=60).rounds(target_of(victim, [case]))
    assert found[case].text == words[int(np.argmin(away))]
    assert not names & set(vocabulary.searchable(NAMES).tolist())


def test_direction_and_fitness_are_those_of_the_paper() -> None:
    random = np.random.default_rng(0)
    table = {text: random.normal(size=(5, 4)) for text in (*SCENES, *(f"{n}, {s}" for n in NAMES for s in SCENES))}
    v = direction(lambda texts: torch.tensor(np.stack([table[text] for text in texts])), NAMES)
    pairs = [table[f"{name}, {scene}"] - table[scene] for name in NAMES for scene in SCENES]
    np.testing.assert_allclose(v, np.mean(pairs, axis=0))
    states, goal = random.normal(size=(7, 5, 4)), random.normal(size=(5, 4))
    expected = [np.square(row - goal).sum() for row in states]
    np.testing.assert_allclose(distances(torch.tensor(states), torch.tensor(goal)), expected)
    # A shorter text counts as followed by zeros.
    shorter = [np.square(np.concatenate([row[:3], np.zeros((2, 4))]) - goal).sum() for row in states]
    np.testing.assert_allclose(distances(torch.tensor(states[:, :3]), torch.tensor(goal)), shorter)


@pytest.mark.parametrize("family", ["sd1", "sdxl", "sd3", "flux-dev", "pixart", "qwen-image"])
def test_each_vocabulary_is_searched_with_its_own_encoders(family: str) -> None:
    pipe = family_pipeline(family)
    victim, case = Victim(pipe), CASES[0]
    arguments = [vocabulary.arguments for vocabulary in victim.vocabularies]
    assert arguments == {"sdxl": [("prompt", "prompt_2")], "sd3": [("prompt", "prompt_2"), ("prompt_3",)],
                         "flux-dev": [("prompt",), ("prompt_2",)]}.get(family, [("prompt",)])  # fmt: skip
    attack = RingABell(tokens=3, iterations=4, tries=2, population=12)
    first, second = (tries[case] for tries in attack.rounds(target_of(victim, [case])))
    again = [tries[case] for tries in attack.rounds(target_of(victim, [case]))]
    assert [str(one) for one in again] == [str(first), str(second)]
    words = [word for text in second.texts.values() for word in text.split()]
    assert not {"snoopy", "beagle"} & set(words)
    if family in ("sd3", "flux-dev"):
        assert set(second.texts) == {name for each in arguments for name in each}
        last = "prompt_3" if family == "sd3" else "prompt_2"
        assert second.texts["prompt"] != second.texts[last]
    # Later generations are no worse: states of both tries against the goal, in the last vocabulary.
    view_of = {name: [""] for each in arguments for name in each}

    def away(one: attacks.Try) -> float:
        name = arguments[-1][0]
        texts = {**view_of, **{key: [one.texts[name]] for key in arguments[-1]}}
        goal_texts = {**view_of, **{key: [case.prompt] for key in arguments[-1]}}

        def states(given: dict[str, list[str]]) -> torch.Tensor:
            with torch.no_grad():
                return victim.encode(given["prompt"], others={k: t for k, t in given.items() if k != "prompt"}).states

        def named(texts: list[str]) -> torch.Tensor:
            rows = [states({**view_of, **{key: [text] for key in arguments[-1]}})[0] for text in texts]
            return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)

        v = direction(named, NAMES)
        goal = torch.nn.utils.rnn.pad_sequence([states(goal_texts)[0], v], batch_first=True)
        goal = goal[0] + attack.eta * goal[1]
        return float(distances(states(texts), goal))

    assert away(second) <= away(first) + 1e-4


@pytest.mark.parametrize("family", ["sd3", "flux-dev"])
def test_prompts_of_several_encoders_are_drawn_judged_and_gated(family: str) -> None:
    pipe = family_pipeline(family)
    eraser = random_eraser(pipe.transformer)
    attack = RingABell(tokens=3, iterations=2, tries=2, population=8)
    judge, shown = judge_by(lambda call: call != 2 and call != 3)
    report = attacks.run(pipe, [eraser], CASES[:2], judge, attack, drawing=SMALL, gate="transport", fresh=3)
    assert shown == [2, 2, 2, 2, 6]
    for one in report.outcomes:
        assert "; prompt_2: " in str(one.adversarial)
        assert "snoopy" not in str(one.adversarial)
        assert 0 < one.gammas["snoopy"] < 1
        assert one.fresh == (True, True, True)


def test_the_pipeline_is_as_it_was_and_a_second_run_finds_the_same() -> None:
    pipe = pico_pipeline()
    same = untouched(pipe)
    attack = RingABell(tokens=3, iterations=2, tries=3, population=8)
    first, second = (
        attacks.run(pipe, [pico_eraser(pipe.unet)], CASES, judge_by(lambda call: call in (1, 4))[0], attack,
                    drawing=SMALL, seed=seed, gate="transport")
        for seed in (5, 5)
    )  # fmt: skip
    assert first == second
    assert [one.rounds for one in first.outcomes] == [2, 2, 2]
    assert first.threat is attacks.Threat.TEXT
    assert all(0 < one.gammas["snoopy"] <= 1 for one in first.outcomes)
    assert same()
    with pytest.raises(UsageError, match="names"):
        attacks.run(pipe, [], CASES, judge_by(lambda call: call == 1)[0], attack, drawing=SMALL)
