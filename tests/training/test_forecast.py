"""`--plan` and `memory`: what a training takes is known before it begins, and kept to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import test_cli
import torch
from pico import pico_pipeline
from test_cli import PICO_TRAINING, Spmhub

import spm_hub
from spm_hub import Adapter
from spm_hub.adapters.increments import LowRank
from spm_hub.errors import RecipeError
from spm_hub.registry.registry import Registry

registry, spmhub = test_cli.registry, test_cli.spmhub
SMALL = {"steps": 2, "batch_size": 4, "x_t": {"steps": 3, "trajectories": 2, "chunks": 1}}


def test_a_plan_has_rows_memory_and_time_and_trains_nothing(spmhub: Spmhub, registry: Registry, tmp_path: Path) -> None:
    pico_pipeline().save_pretrained(tmp_path / "base")
    arguments = ("train", "church", "--model", tmp_path / "base", "--plan", *PICO_TRAINING)
    done = spmhub(*arguments, "--json")
    assert done.code == 0, done.err
    (plan,) = json.loads(done.out)
    assert (plan["concepts"], plan["steps"], plan["rows_at_once"]) == (["church"], 2, None)
    assert plan["rows"] == 2 + 2 * 1 + 1, "two of the concept, an anchor each, and the empty prompt"
    assert 0 < plan["kept_bytes"] < plan["room_bytes"]
    assert plan["seconds"] >= 0
    said = spmhub(*arguments, "--memory", 2).out
    assert "church: 2 steps of 5 rows with gradient (all at once)" in said
    assert "of 1.50 GiB; about 0 s" in said
    assert registry.find("church") is None


def trained(memory: float | None) -> tuple[Adapter, int]:
    """The eraser, and the most rows that the denoiser saw at once with gradients on."""
    pipe, seen = pico_pipeline(), [0]

    def look(module: object, args: object, given: dict[str, torch.Tensor]) -> None:
        if torch.is_grad_enabled() and not given["sample"].is_meta:
            seen.append(len(given["sample"]))

    pipe.unet.register_forward_pre_hook(look, with_kwargs=True)
    made = spm_hub.train("snoopy", pipe=pipe, memory=memory, progress=False, **SMALL)
    assert isinstance(made, Adapter)
    return made, max(seen)


def test_a_training_keeps_to_its_memory() -> None:
    whole, rows = trained(None)
    made, at_once = trained(0.006)
    assert 1 <= at_once < rows == 4 * 2 + 1
    for path, increment in made.increments.items():
        other = whole.increments[path]
        assert isinstance(increment, LowRank)
        assert isinstance(other, LowRank)
        assert float((increment.down - other.down).norm() / other.down.norm()) < 1e-2, "Adam makes more of rounding"


def test_a_training_that_cannot_fit_is_refused_before_it_begins() -> None:
    with pytest.raises(RecipeError, match=r"one row of UNet2DConditionModel in float32 keeps (.|\n)*--method instant"):
        trained(0.0001)
