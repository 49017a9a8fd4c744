"""PEZ: its projection against brute force, its descent, and that it asks neither eraser nor denoiser."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from attacked import CASES, SMALL, judge_by, untouched
from pico import pico_eraser, pico_pipeline
from pico_families import family_pipeline

from spm_hub.errors import ModelError
from spm_hub.evaluation import attacks
from spm_hub.evaluation.attacks.victim import Victim
from spm_hub.evaluation.attacks.vocabulary import nearest_by_angle


def test_a_point_is_read_as_the_token_at_the_least_angle() -> None:
    random = np.random.default_rng(0)
    points, table = random.normal(size=(12, 6)), random.normal(size=(40, 6)) * random.uniform(0.1, 9, size=(40, 1))
    units = table / np.linalg.norm(table, axis=1, keepdims=True)
    found = nearest_by_angle(torch.tensor(points), torch.tensor(units)).tolist()
    for point, row in zip(points, found, strict=True):
        angles = [np.arccos(point @ one / np.linalg.norm(point) / np.linalg.norm(one)) for one in table]
        assert row == int(np.argmin(angles))


def test_tokens_found_are_among_the_best_of_all() -> None:
    """One token, from six random ones: most of them end among the tenth of all tokens that are nearest."""
    victim, case = Victim(pico_pipeline()), attacks.Case("church snoopy", 0)
    words = victim.vocabulary.words(victim.vocabulary.searchable())
    words.remove("snoopy")
    with torch.no_grad():
        every = victim.encode([case.prompt, *words]).states.flatten(1).double().numpy()
    goal, rows = every[0], every[1:]
    cosines = dict(zip(words, rows @ goal / np.linalg.norm(rows, axis=1) / np.linalg.norm(goal), strict=True))
    ranked = sorted(words, key=lambda word: -cosines[word])
    ranks = []
    for seed in range(6):
        random = torch.Generator().manual_seed(seed)
        target = attacks.AttackTarget(victim, [case], torch.zeros(1, 1), random, lambda: None, ("snoopy",))
        (found,) = attacks.PEZ(tokens=1, iterations=60, token_free=True).rounds(target)
        ranks.append(ranked.index(str(found[case].text)))
    assert sum(rank < len(words) / 10 for rank in ranks) >= 4, ranks


def test_it_asks_neither_eraser_nor_denoiser_and_leaves_the_pipeline_as_it_was() -> None:
    pipe = pico_pipeline()
    same = untouched(pipe)
    calls: list[int] = []
    hook = pipe.unet.register_forward_hook(lambda *_: calls.append(1))
    Victim(pipe)
    to_learn = len(calls)
    judge, shown = judge_by(lambda call: call == 1)
    attack = attacks.PEZ(tokens=3, iterations=4, tries=2)
    report = attacks.run(pipe, [pico_eraser(pipe.unet)], CASES, judge, attack, drawing=SMALL)
    hook.remove()
    assert shown == [3, 3, 3, 3]
    # Four drawings of two steps are all that the denoiser is asked for, learning how it is called aside.
    assert len(calls) == 2 * to_learn + 4 * 2
    assert (report.asr, report.threat) == (0.0, attacks.Threat.TEXT)
    assert [one.rounds for one in report.outcomes] == [2, 2, 2]
    assert same()
    again = attacks.run(pipe, [pico_eraser(pipe.unet)], CASES, judge_by(lambda call: call in (1, 3))[0], attack,
                        drawing=SMALL)  # fmt: skip
    third = attacks.run(pipe, [pico_eraser(pipe.unet)], CASES, judge_by(lambda call: call in (1, 3))[0], attack,
                        drawing=SMALL)  # fmt: skip
    assert again == third
    assert all(one.adversarial for one in again.outcomes)


def test_encoders_of_several_vocabularies_are_refused_before_anything_is_drawn() -> None:
    with pytest.raises(ModelError, match="have 2") as refused:
        attacks.run(family_pipeline("sd3"), [], CASES, judge_by(lambda call: True)[0], attacks.PEZ(), drawing=SMALL)
    assert "ring-a-bell" in str(refused.value.mend)
