"""Repeatable kernels while training, as far as that can be seen without a GPU; test_accelerator.py sees the rest."""

from __future__ import annotations

import os

import pytest
import torch
from pico import pico_pipeline

from spm_hub.training import Recipe, train
from spm_hub.training.loop.prediction_run import PredictionRun

SMALL = {"target": "snoopy", "steps": 3, "batch_size": 2, "x_t": {"steps": 3, "trajectories": 2, "chunks": 1}}


def switches() -> tuple[object, ...]:
    return (
        torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.backends.cudnn.benchmark, os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kernel", [True, False], ids=["with a repeatable kernel", "without one"])
def test_switched_on_for_the_training_and_for_nothing_else(kernel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = train(Recipe.make(**SMALL), pipe=pico_pipeline())
    step, seen = PredictionRun.step, []

    def watched(self: PredictionRun, number: int) -> dict[str, float]:
        seen.append(torch.are_deterministic_algorithms_enabled())
        if seen[-1] and not kernel:
            raise RuntimeError("grid_sampler_2d_backward_cuda does not have a deterministic implementation")
        return step(self, number)

    before = switches()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(PredictionRun, "step", watched)
    if kernel:
        found = train(Recipe.make(**SMALL), pipe=pico_pipeline())
    else:
        with pytest.warns(UserWarning, match="cannot be trained to the same bits twice .* grid_sampler"):
            found = train(Recipe.make(**SMALL), pipe=pico_pipeline())
    assert seen == ([True] * 3 if kernel else [True, False, False, False])
    assert switches() == before
    for path, increment in plain.increments.items():
        for part, tensor in increment.tensors().items():
            assert torch.equal(found.increments[path].tensors()[part], tensor)


def test_other_errors_are_not_taken_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: PredictionRun, number: int) -> dict[str, float]:
        raise RuntimeError("CUDA out of memory")

    before = switches()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(PredictionRun, "step", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        train(Recipe.make(**SMALL), pipe=pico_pipeline())
    assert switches() == before
