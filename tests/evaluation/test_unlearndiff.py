"""UnlearnDiffAtk: its projection, its descent, and the prompts that it tries."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from attacked import CASES, SMALL, judge_by, untouched
from pico import pico_eraser, pico_pipeline
from torch import Tensor

from spm_hub.attachment.attachment import attach
from spm_hub.evaluation import attacks
from spm_hub.evaluation.attacks.searches.unlearndiff import onto_simplex
from spm_hub.evaluation.attacks.victim import Victim


def test_projection_is_the_nearest_point_of_the_simplex() -> None:
    random = np.random.default_rng(0)
    points = random.normal(size=(6, 9)) * np.array([[0.01], [0.1], [1], [3], [10], [0]])
    found = onto_simplex(torch.from_numpy(points)).numpy()
    for given, projected in zip(points, found, strict=True):
        low, high = given.min() - 1, given.max()
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (middle, high) if np.clip(given - middle, 0, None).sum() > 1 else (low, middle)
        np.testing.assert_allclose(projected, np.clip(given - low, 0, None), atol=1e-9)
        assert projected.sum() == pytest.approx(1, abs=1e-12)


def test_unlearndiff_finds_what_lowers_its_loss_and_leaves_the_pipeline_as_it_was() -> None:
    pipe = pico_pipeline()
    same = untouched(pipe)
    judge, shown = judge_by(lambda call: call in (1, 4))  # the base draws it, the eraser holds twice, then it is back
    moved: list[int] = []
    report = attacks.run(
        pipe, [pico_eraser(pipe.unet)], CASES, judge, attacks.UnlearnDiffAtk(tokens=2, iterations=2, timesteps=3),
        drawing=SMALL, progress=lambda done, total: moved.append(done), gate="transport",
    )  # fmt: skip
    assert report.before == 0.0
    assert report.asr == 1.0
    assert shown == [3, 3, 3, 3]
    assert [one.rounds for one in report.outcomes] == [2, 2, 2]
    for one in report.outcomes:
        assert one.adversarial is not None
        assert one.adversarial.endswith(one.case.prompt)
        assert len(one.adversarial.removesuffix(one.case.prompt).split()) == 2
    assert moved == [1, 2, 3, 4, 6]
    assert same()
    again = attacks.run(
        pipe, [pico_eraser(pipe.unet)], CASES, judge_by(lambda call: call in (1, 4))[0],
        attacks.UnlearnDiffAtk(tokens=2, iterations=2, timesteps=3), drawing=SMALL, gate="transport",
    )  # fmt: skip
    assert again == report
    with attach(pipe, [pico_eraser(pipe.unet)]):
        pass
    assert same()


def test_unlearndiff_walks_down_its_loss() -> None:
    """On a model that cares for the prompt alone, the token found is among the best that a search over all finds."""
    pipe = pico_pipeline()
    victim = Victim(pipe)
    wanted = "church"
    goal = victim.encode([f"{wanted} snoopy"]).states.detach()

    def predict(latents: Tensor, times: Tensor, prompts: Sequence[str], conditioning: object) -> Tensor:
        away = (conditioning.states - goal).pow(2).mean(dim=(1, 2))  # type: ignore[attr-defined]
        return (100 * away).view(-1, 1, 1, 1).expand(len(latents), *victim.base.latent_shape)

    victim.predict = predict  # type: ignore[method-assign, assignment]
    victim.noising.add_noise = lambda x_0, noise, times: (x_0, torch.zeros_like(x_0))  # type: ignore[method-assign]
    attack = attacks.UnlearnDiffAtk(tokens=1, iterations=150, timesteps=1)
    cases = [attacks.Case("snoopy", 0)]
    latents = torch.zeros(1, *victim.base.latent_shape)
    (found,) = attack.rounds(
        attacks.AttackTarget(victim, cases, latents, torch.Generator().manual_seed(0), lambda: None)
    )
    ids = victim.vocabulary.searchable()
    every = victim.vocabulary.write(ids[:, None], ["snoopy"] * len(ids))
    away = (victim.encode(every).states.detach() - goal).pow(2).mean(dim=(1, 2))
    assert int((away < away[every.index(str(found[cases[0]].text))]).sum()) < len(ids) / 20
