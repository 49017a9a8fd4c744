"""Ctrl-C, a real SIGINT to a process of its own, in every phase: what there is is kept, and the message is true."""

from __future__ import annotations

import os
import signal
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from pico import pico_pipeline
from processes import fork_server

import spm_hub
from spm_hub.registry.registry import Registry

pytestmark = pytest.mark.slow

SMALL: dict[str, Any] = {"steps": 4, "batch_size": 2, "x_t": {"steps": 2, "trajectories": 2, "chunks": 2}}
RECIPES: dict[str, dict[str, Any]] = {
    "spm": SMALL,
    "sepme": {**SMALL, "method": "sepme", "protection": {"prompts": ["a dog"]}},
    "minimalist": {"method": "minimalist", "steps": 4, "batch_size": 2, "x_t": {"steps": 2}, "masks": {"prompts": 2}},
    "uce": {"method": "uce"},
}
PHASES: dict[str, tuple[str, str, int, str, int]] = {
    # A function, the call of it during which Ctrl-C is pressed, what the message says, and the steps that are kept.
    "loading": ("spm", "spm_hub.models.loading.load_pipeline", 1, "while loading the base; no training had begun", 0),
    "base": ("spm", "spm_hub.training.base_model.TeacherModel._learn_raw", 1, "while trying out the base; nothing", 0),
    "trajectories": (
        "spm", "spm_hub.training.data.trajectories.TrajectorySource._visit", 2,
        "while drawing trajectories to learn from; nothing was saved", 0,
    ),
    "later trajectories": (
        "spm", "spm_hub.training.data.trajectories.TrajectorySource._run", 2, "; step 2 of 4 is saved in", 2,
    ),
    "a step": ("spm", "spm_hub.training.loop.prediction_run.PredictionRun.losses", 4, "stopped; step 3 of 4 is", 3),
    "finishing": (
        "spm", "spm_hub.training.loop.prediction_run.PredictionRun.increments", 1,
        "while finishing the increments; step 4 of 4 is saved", 4,
    ),
    "keeping": (
        "spm", "spm_hub.registry.registry.Registry.add", 1, "while keeping the eraser; step 4 of 4 is saved", 4,
    ),
    "kept": ("spm", "spm_hub.training.session.Session._forget", 1, "after the training; the eraser is kept in", 4),
    "null space": ("sepme", "spm_hub.training.protection._triangle", 2, "while protecting prompts; nothing was", 0),
    "pictures": (
        "minimalist", "spm_hub.training.loop.mask_run.sample_latents", 1,
        "while drawing pictures to learn from; nothing was saved", 0,
    ),
    "closed form": (
        "uce", "spm_hub.training.methods.uce.edit", 1, "while computing the closed form; nothing was saved", 0,
    ),
}  # fmt: skip


def train_until_ctrl_c(method: str, place: str, at: int, folder: Path, heard: Connection) -> None:
    """Train, say "here" in the at-th call of the function `place` and wait there; send the error's text."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")  # the server that this is a fork of has another one
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - until the process ends
    owner_path, _, name = place.rpartition(".")
    owner = _found(owner_path)
    whole, calls = getattr(owner, name), 0

    def waiting(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at:
            heard.send("here")
            time.sleep(120)
        return whole(*args, **kwargs)

    setattr(owner, name, waiting)
    try:
        spm_hub.train("snoopy", model=str(folder / "pico"), registry=folder / "kept", resume=True, **RECIPES[method])
        heard.send("it ended")
    except spm_hub.TrainingInterruptedError as error:
        heard.send(str(error))


def _found(path: str) -> Any:
    """Return the module or class at a dotted path."""
    from importlib import import_module

    try:
        return import_module(path)
    except ModuleNotFoundError:
        module, _, name = path.rpartition(".")
        return getattr(import_module(module), name)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The eraser of each recipe from an undisturbed training."""
    folder = tmp_path_factory.mktemp("whole")
    pico_pipeline(text_width=64).save_pretrained(folder / "pico")
    files = {}
    for method, recipe in RECIPES.items():
        spm_hub.train("snoopy", model=str(folder / "pico"), registry=folder / method, progress=False, **recipe)
        files[method] = (folder / method / "adapters" / "snoopy.safetensors").read_bytes()
    return files


@pytest.mark.parametrize("phase", PHASES)
def test_ctrl_c_keeps_what_there_is_and_says_how_to_go_on(
    phase: str, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, place, at, says, done = PHASES[phase]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    pico_pipeline(text_width=64).save_pretrained(tmp_path / "pico")
    ours, theirs = fork_server().Pipe()
    process = fork_server().Process(target=train_until_ctrl_c, args=(method, place, at, tmp_path, theirs))
    process.start()
    assert ours.poll(300)
    assert ours.recv() == "here"
    assert process.pid is not None
    os.kill(process.pid, signal.SIGINT)
    assert ours.poll(60)
    said = ours.recv()
    process.join(60)
    assert says in said
    kept = Registry(tmp_path / "kept").find("snoopy") is not None
    states = list((tmp_path / "cache").rglob("training.safetensors"))
    assert kept == ("the eraser is kept" in said)
    assert bool(states) == (done > 0)
    if "is saved in" in said:
        assert str(states[0].parent) in said
        assert "--resume" in said
    steps: list[int] = []
    spm_hub.train(
        "snoopy", model=str(tmp_path / "pico"), registry=tmp_path / "kept", resume=True, progress=False,
        callbacks=[lambda step: steps.append(step.step)], **RECIPES[method],
    )  # fmt: skip
    assert steps == ([] if method == "uce" else list(range(done + 1, 5)))
    assert (tmp_path / "kept" / "adapters" / "snoopy.safetensors").read_bytes() == whole[method]
