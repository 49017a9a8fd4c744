"""Options of the code released with R.A.C.E.: the adversary's 1-norm, and its choices of trained modules."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel

from spm_hub.errors import RecipeError
from spm_hub.training import Recipe
from spm_hub.training.base_model import TeacherModel
from spm_hub.training.conditioning import Conditioning
from spm_hub.training.data.adversary import Attacker
from spm_hub.training.data.batch import Batch
from spm_hub.training.data.sampling import generator_for
from spm_hub.training.trainable.module_selection import select_modules


class Linear:
    """A base whose prediction is a matrix times the text states, float64."""

    def __init__(self, matrix: np.ndarray) -> None:
        self.pipe = SimpleNamespace(scheduler=SimpleNamespace(config={"prediction_type": "epsilon"}))
        self._matrix = torch.from_numpy(matrix)

    def predict(self, latents: Any, times: Any, given: Conditioning) -> torch.Tensor:
        return torch.tanh(given.states.flatten(1) @ self._matrix).view(len(given), 1, 7, 1)


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_the_adversary_is_sign_descent_on_either_norm_in_float64(norm: str) -> None:
    """Given the same random start, pgd_attack of the authors' script moved the states to the same numbers, to 1e-16."""
    random = np.random.default_rng(3)
    states, matrix, noise = random.normal(size=(2, 5, 4)), random.normal(size=(20, 7)) / 4, random.normal(size=(2, 7))
    plan = Recipe.make(target="snoopy", method="race", adversary={"steps": 10, "unit": "absolute", "norm": norm})
    rows, latents = Conditioning(torch.from_numpy(states)), torch.from_numpy(noise).view(2, 1, 7, 1)
    batch = Batch(
        latents, torch.tensor([1, 2]), latents, torch.ones(2, dtype=torch.bool), ("snoopy",) * 2, rows, rows,
        0 * latents, 0 * latents, latents[:0], torch.tensor([]), rows[:0], latents[:0],
    )  # fmt: skip
    attacker = Attacker(plan.adversary, cast(TeacherModel, Linear(matrix)), plan.seed)
    found = attacker.attacked(batch, 4).states.states.numpy()
    start = torch.rand(states.shape, generator=generator_for(0, 5, 4), dtype=torch.float64).numpy() * 2 - 1
    for row, clean in enumerate(states):
        now = np.clip(clean + 0.1 * start[row], clean.min(), clean.max())
        for _ in range(10):
            y = np.tanh(now.ravel() @ matrix)
            away = y - noise[row]
            slope = np.sign(away) if norm == "l1" else 2 * away
            sign = np.sign(matrix @ (slope * (1 - y**2))).reshape(clean.shape)
            now = np.clip(clean + np.clip(now - 0.025 * sign - clean, -0.1, 0.1), clean.min(), clean.max())
        np.testing.assert_allclose(found[row], now, rtol=1e-12, atol=1e-12)


def test_the_norms_are_different_attacks() -> None:
    assert Recipe.make(target="snoopy", method="race").adversary.norm == "l2"
    with pytest.raises(RecipeError, match="steps is 0, there is no adversary"):
        Recipe.make(target="snoopy", adversary={"norm": "l1"})


# What --train_method chose of the authors' CompVis U-Net of Stable Diffusion 1.4, its norms left out: tensors, numbers.
# By name they were the same tensors, all of them, in diffusers' layout.
@pytest.mark.parametrize(
    ("choice", "tensors", "numbers"),
    [
        ("esd-x", 80, 43_962_560),
        ("esd-selfattn", 80, 49_574_080),
        ("esd-all", 468, 859_320_644),
        ("esd-noxattn", 382, 813_296_000),
        ("esd-notime", 462, 857_258_560),
        ("esd-xlayer", 10, 3_605_760),
        ("esd-selflayer", 10, 8_193_920),
    ],
)
def test_modules_are_those_of_train_method(choice: str, tensors: int, numbers: int) -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768)
    chosen = [one for module in select_modules(unet, choice).values() for one in module.parameters()]
    assert len(chosen) == tensors
    assert sum(one.numel() for one in chosen) == numbers


@pytest.mark.parametrize("choice", ["esd-noxattn", "esd-notime", "esd-xlayer", "esd-selflayer"])
def test_a_model_without_such_modules_is_refused(choice: str) -> None:
    with torch.device("meta"):
        flux = FluxTransformer2DModel(num_layers=1, num_single_layers=1)
    with pytest.raises(RecipeError, match=re.escape(f"has no modules of {choice!r}")):
        select_modules(flux, choice)
