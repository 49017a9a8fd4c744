"""Every method, killed by SIGKILL in the middle of its run and resumed, ends in the bytes of an undisturbed run."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from pico import pico_pipeline
from processes import fork_server

from spm_hub.training import Recipe, train
from spm_hub.training.trainer import TrainingInterruptedError

pytestmark = pytest.mark.slow

SMALL = {"target": "snoopy", "steps": 6, "batch_size": 2, "x_t": {"steps": 3, "trajectories": 2, "chunks": 2}}
THREE = [{"target": "mickey"}, {"target": "picasso", "kind": "style"}]
CASES: dict[str, dict[str, Any]] = {
    "spm": {},
    "sepme": {"method": "sepme", "templates": False, "stop": {"below": None}},
    "three": {"method": "sepme", "templates": False, "stop": {"below": None}, "together": THREE},
    "minimalist": {
        "method": "minimalist",
        "x_t": {"steps": 3},
        "optimiser": {"warmup": 1},
        "masks": {"prompts": 3, "groups": ("ff", "attn"), "accumulate": 2},
    },
    "ca": {"method": "ca", "stop": {"reach": None}},
    "sdd": {"method": "sdd", "x_t": {"steps": 3, "source": "student"}, "stop": {"reach": None}},
    "measured": {"method": "sdd", "x_t": {"steps": 3, "source": "student"}, "stop": {"reach": 50.0, "every": 3}},
    "fmn": {"method": "fmn", "templates": False},
    "esd-u": {"method": "esd-u", "stop": {"reach": None}},
    "loha": {"increment": {"kind": "loha", "rank": 2}},
    "lokr": {"increment": {"kind": "lokr", "rank": 2}},
    "vera": {"increment": {"kind": "vera", "rank": 2, "modules": "esd-x"}},
    "dora": {"increment": {"kind": "dora", "rank": 2}},
}


def plan_of(case: str) -> Recipe:
    return Recipe.make(**{**SMALL, **CASES[case]})


def pipeline() -> StableDiffusionPipeline:
    """Its states are wide enough for a null space beside three concepts."""
    return pico_pipeline(text_width=64)


def killed(case: str, folder: Path) -> None:
    """Its last checkpoint is that of step 4; it dies after step 5 without a chance to tidy up."""

    def die(step: int, total: int, losses: dict[str, float]) -> None:
        if step == 5:
            os.kill(os.getpid(), signal.SIGKILL)

    train(plan_of(case), pipe=pipeline(), checkpoint_dir=folder, checkpoint_every=2, progress=die)


def whole_and_resumed(case: str, folder: Path) -> None:
    steps: list[int] = []
    train(plan_of(case), pipe=pipeline()).save(folder / "whole.safetensors")
    train(
        plan_of(case), pipe=pipeline(), checkpoint_dir=folder, resume=True,
        progress=lambda step, total, losses: steps.append(step),
    ).save(folder / "resumed.safetensors")  # fmt: skip
    assert steps == [5, 6]


@pytest.mark.parametrize("method", ["spm", "sepme"])
def test_ctrl_c_in_the_middle_of_a_step_of_the_optimiser(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some parameters have moved by then, Adam's moments too: what is saved must be this step whole, or not at all."""
    together = [{"target": "mickey"}] if method == "sepme" else []
    recipe = Recipe.make(**SMALL, method=method, together=together)
    train(recipe, pipe=pipeline()).save(tmp_path / "whole.safetensors")
    step, calls = torch.optim.AdamW.step, []

    def interrupted(self: torch.optim.AdamW, *arguments: Any) -> Any:
        done = step(self, *arguments)
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return done

    # A shell's background jobs begin with the signal ignored, and so do tests run in one.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with monkeypatch.context() as patched:
        patched.setattr(torch.optim.AdamW, "step", interrupted)
        with pytest.raises(TrainingInterruptedError, match=r"step \d+ of \d+ is saved"):
            train(recipe, pipe=pipeline(), checkpoint_dir=tmp_path)
    signal.signal(signal.SIGINT, before)
    assert len(calls) in (3, 4), "the second of two erasers is finished too"
    resumed = train(recipe, pipe=pipeline(), checkpoint_dir=tmp_path, resume=True)
    resumed.save(tmp_path / "resumed.safetensors")
    assert (tmp_path / "resumed.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


@pytest.mark.parametrize("case", CASES)
def test_killed_and_resumed_is_the_identical_file(case: str, tmp_path: Path) -> None:
    context = fork_server()
    first = context.Process(target=killed, args=(case, tmp_path))
    first.start()
    first.join(120)
    assert first.exitcode == -signal.SIGKILL
    assert (tmp_path / "training.safetensors").is_file()
    second = context.Process(target=whole_and_resumed, args=(case, tmp_path))
    second.start()
    second.join(120)
    assert second.exitcode == 0
    assert (tmp_path / "resumed.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
