"""Workers train the same files as one process, also when one is killed in the middle."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
from killed import Killing
from pico import pico_pipeline

from spm_hub.errors import NotFoundError, UsageError
from spm_hub.io.progress import Bars
from spm_hub.io.runners.processes import Processes
from spm_hub.models.base_choice import BaseChoice
from spm_hub.registry.entry import EraserEntry
from spm_hub.registry.registry import Registry
from spm_hub.training import elsewhere
from spm_hub.training.elsewhere import train_elsewhere
from spm_hub.training.planning import plan_runs
from spm_hub.training.session import Session

SETS = ("steps=2", "batch_size=2", "x_t.steps=2", "x_t.trajectories=2", "x_t.chunks=1")


def found(reference: str) -> EraserEntry:
    raise NotFoundError(f"there is no {reference}")


def test_two_processes_one_killed_make_the_same_erasers_as_one_process(tmp_path: Path) -> None:
    pico_pipeline().save_pretrained(tmp_path / "base")
    concepts = ("snoopy", "mickey", "pikachu")
    plans = plan_runs(concepts, {"model": str(tmp_path / "base")}, sets=SETS)
    assert len(plans) == 3, "each concept is a piece of its own"
    base = BaseChoice(str(tmp_path / "base"))
    said: list[str] = []

    class Listening(Bars):
        def say(self, text: str) -> None:
            said.append(text)

    def files(name: str) -> dict[str, str]:
        registry = Registry(tmp_path / name)
        session = Session(plans, base, Listening(False), found, registry=registry, resume=True)
        session.check()
        entries = (
            train_elsewhere(session, Killing(Processes(2), tmp_path / "killed")) if name == "two" else session.train()
        )
        assert tuple(entry.name for entry in entries) == concepts
        return {one.name: hashlib.sha256(one.adapter_path.read_bytes()).hexdigest() for one in entries}

    assert files("two") == files("one")
    assert any("a worker was lost" in text for text in said), said
    nowhere = replace(Session(plans, base, Bars(False), found))
    with pytest.raises(UsageError, match="keep erasers in a registry"):
        elsewhere.train_elsewhere(nowhere, Processes(2))
