"""Two workers of a Ray cluster, one of them killed in the middle, leave the same files as one process."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from killed import Killing
from pico import pico_eraser, pico_pipeline
from recorded import DEFAULTS, QUIET, ROWS, RUN, contents

from spm_hub.errors import NotFoundError
from spm_hub.evaluation import attacks
from spm_hub.evaluation.attacks.records.recording import record_attacks
from spm_hub.evaluation.attacks.settings import AttackSettings
from spm_hub.evaluation.protocols.conditions import DrawingElsewhere
from spm_hub.evaluation.records.drawing import draw_missing
from spm_hub.evaluation.records.folder import RunFolder
from spm_hub.io.runners.on_ray import OnRay
from spm_hub.io.runners.runner import Runner, Serial
from spm_hub.models.base_choice import BaseChoice
from spm_hub.registry.entry import EraserEntry
from spm_hub.registry.registry import Registry
from spm_hub.training.elsewhere import train_elsewhere
from spm_hub.training.planning import plan_runs
from spm_hub.training.session import Session

ray = pytest.importorskip("ray", reason="the extra ray is not installed: pip install 'spm-hub[ray]'")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BaseChoice]:
    """A base of these tests, and a cluster that they share: each would start one of its own."""
    folder = tmp_path_factory.mktemp("base") / "base"
    pico_pipeline().save_pretrained(folder)
    paths = os.pathsep.join(path for path in sys.path if path)
    ray.init(
        address="local", num_cpus=2, include_dashboard=False, log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": paths}},
    )  # fmt: skip
    yield BaseChoice(str(folder))
    ray.shutdown()


def runners(path: Path) -> dict[str, Runner]:
    return {"serial": Serial(), "ray": Killing(OnRay(2), path / "killed")}


def test_pictures(base: BaseChoice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # the cluster's workers do not see it
    eraser = pico_eraser(pico_pipeline().unet)

    def drawn(name: str, runner: Runner) -> dict[str, str]:
        folder = RunFolder.start(tmp_path / name, RUN, ROWS, resume=False)
        draw_missing(folder, DrawingElsewhere(base, (eraser,), {"gate": "always"}, folder.path, DEFAULTS), runner)
        return contents(folder.path)

    serial, on_ray = (drawn(name, runner) for name, runner in runners(tmp_path).items())
    assert on_ray == serial
    assert (tmp_path / "killed").exists()


def test_attacks(base: BaseChoice, tmp_path: Path) -> None:
    eraser = pico_eraser(pico_pipeline().unet)
    cases = [attacks.Case(text, 10 + seed) for seed, text in enumerate(("snoopy", "a dog", "snoopy in town", "a cat"))]
    how = attacks.AttackDrawingOptions(steps=1, guidance=2.0, at_once=2)

    def attacked(name: str, runner: Runner) -> dict[str, str]:
        record_attacks(
            base, eraser, cases, [AttackSettings("random", tries=2, tokens=2)], tmp_path / name, QUIET,
            judge="judged:odd", drawing=how, seed=3, fresh=1, runner=runner,
        )  # fmt: skip
        return contents(tmp_path / name)

    serial, on_ray = (attacked(name, runner) for name, runner in runners(tmp_path).items())
    assert on_ray == serial
    assert (tmp_path / "killed").exists()


def test_trainings(base: BaseChoice, tmp_path: Path) -> None:
    sets = ("steps=2", "batch_size=2", "x_t.steps=2", "x_t.trajectories=2", "x_t.chunks=1")
    plans = plan_runs(("snoopy", "mickey", "pikachu"), {"model": base.reference}, sets=sets)

    def none_known(reference: str) -> EraserEntry:
        raise NotFoundError(f"there is no {reference}")

    def trained(name: str, runner: Runner) -> dict[str, str]:
        session = Session(plans, base, QUIET, none_known, registry=Registry(tmp_path / name), resume=True)
        session.check()
        _ = session.train() if isinstance(runner, Serial) else train_elsewhere(session, runner)
        return contents(tmp_path / name / "adapters")

    serial, on_ray = (trained(name, runner) for name, runner in runners(tmp_path).items())
    assert len(serial) == 3
    assert on_ray == serial
    assert (tmp_path / "killed").exists()
