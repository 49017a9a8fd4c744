"""The command of every README, as typed, against a Hub on this machine that holds the base and both erasers."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import test_cli
import torch
from loopback import LoopbackHub
from pico import pico_eraser, pico_pipeline
from PIL import Image
from test_cli import Done, Spmhub

import spm_hub
from spm_hub.adapters.adapter import Adapter
from spm_hub.hub.push import prepare
from spm_hub.models.aliases import ALIASES
from spm_hub.registry.registry import Registry

pytestmark = pytest.mark.slow

PROMPT = "snoopy on the beach"
COMMAND = ["apply", "--model", "dreamshaper-8", "--adapters", "nudity,snoopy", "--prompt", PROMPT]
COMMAND += ["--seed", "1", "--steps", "2", "--json"]
BASE = ALIASES["dreamshaper-8"]
spmhub = test_cli.spmhub


def typed(hub: LoopbackHub, home: Path, *arguments: str) -> Done:
    """The command in a process of its own, which reads all that it knows of the Hub from its environment."""
    root = str(Path(__file__).resolve().parents[2])
    done = subprocess.run(
        [sys.executable, "-m", "spm_hub.cli", *arguments],
        cwd=home / "work", env={**os.environ, **hub.environment(home, PYTHONPATH=root, SPMHUB_OWNER="spm-hub")},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return Done(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def erasers() -> list[Adapter]:
    return [pico_eraser(pico_pipeline().unet, name, seed) for seed, name in enumerate(("nudity", "snoopy"))]


def stocked(hub: LoopbackHub, folder: Path, erasers: list[Adapter], owner: str) -> None:
    """The base under the alias's own id and commit, in full and in half precision, and the erasers of an owner."""
    pipe = pico_pipeline()
    pipe.save_pretrained(folder / "base")
    pipe.to(torch.float16).save_pretrained(folder / "base", variant="fp16")
    files = {path.relative_to(folder / "base").as_posix(): path for path in (folder / "base").rglob("*")}
    content = {name: path.read_bytes() for name, path in files.items() if path.is_file()}
    assert {"unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.fp16.safetensors"} <= set(content)
    hub.publish(str(BASE.hub_id), content, commit=BASE.revision)
    kept = Registry(folder / "kept")
    for eraser in erasers:
        release = prepare(kept.add(eraser), f"{owner}/{eraser.name}", (), folder)
        hub.publish(release.repo, {
            name: one.read_bytes() if isinstance(one, Path) else one for name, one in release.files.items()
        })  # fmt: skip


def run_twice(
    run: Callable[..., Done], hub: LoopbackHub, home: Path, erasers: list[Adapter], dtype: str, owner: str
) -> None:
    """Run the command on an empty machine and once more; check what was fetched, what was said and what was drawn."""
    stocked(hub, home / "made", erasers, owner)
    command = [*COMMAND, "--dtype", dtype]
    first = run(*command)
    assert first.code == 0, first.err
    fetched = [line for line in hub.requests if line.startswith("GET") and line.endswith(".safetensors")]
    assert len(fetched) == len(set(fetched))
    # One precision of the base, not both.
    assert any(".fp16." in line for line in fetched) == (dtype == "bfloat16")
    # Which file came from where.
    commits = {name: hub.repositories[f"{owner}/{name}"].refs["main"] for name in ("nudity", "snoopy")}
    assert f"model: {BASE.hub_id}@{str(BASE.revision)[:12]}, downloaded just now to {home}" in first.err
    for name, commit in commits.items():
        assert f"{name}: {owner}/{name}@{commit[:12]}, downloaded just now to {home}" in first.err
    lock = json.loads((home / "data" / "spm-hub" / "spmhub-lock.json").read_text())
    assert {name: pin["commit"] for name, pin in lock["adapters"].items()} == commits

    # A newer commit changes nothing, and nothing is asked: the Hub might as well be switched off.
    hub.publish(f"{owner}/snoopy", {"README.md": b"newer"})
    hub.requests.clear()
    second = run(*command, "--out", "again")
    assert second.code == 0, second.err
    assert hub.requests == []
    assert f"snoopy: {owner}/snoopy@{commits['snoopy'][:12]}, kept in {home}" in second.err
    assert f"model: {BASE.hub_id}@{str(BASE.revision)[:12]}, kept in {home}" in second.err

    pictures = [
        np.asarray(Image.open(home / "work" / json.loads(done.out)["files"]["with"][0])) for done in (first, second)
    ]
    pipe = pico_pipeline().to(torch.float32 if dtype == "float32" else torch.bfloat16)
    with spm_hub.attach(pipe, erasers):
        expected = pipe(PROMPT, num_inference_steps=2, generator=torch.Generator("cpu").manual_seed(1)).images[0]
    if dtype == "float32":
        assert all(np.array_equal(picture, np.asarray(expected)) for picture in pictures)
    assert all(np.array_equal(picture, pictures[0]) for picture in pictures)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "work").mkdir()
    return tmp_path


def test_as_typed_downloaded_once_pinned_and_nothing_asked_for_again(erasers: list[Adapter], home: Path) -> None:
    with LoopbackHub("lfs") as hub:
        run_twice(partial(typed, hub, home), hub, home, erasers, "float32", "spm-hub")


def test_of_another_owner_and_in_half_precision(
    erasers: list[Adapter], home: Path, spmhub: Spmhub, monkeypatch: pytest.MonkeyPatch
) -> None:
    with LoopbackHub("regular") as hub:
        hub.adopt(monkeypatch, home)
        monkeypatch.setenv("SPMHUB_OWNER", "studio")
        monkeypatch.chdir(home / "work")
        run_twice(spmhub, hub, home, erasers, "bfloat16", "studio")


def test_one_clear_error_where_an_eraser_is_nowhere(
    erasers: list[Adapter], home: Path, spmhub: Spmhub, monkeypatch: pytest.MonkeyPatch
) -> None:
    with LoopbackHub() as hub:
        hub.adopt(monkeypatch, home)
        monkeypatch.chdir(home / "work")
        stocked(hub, home / "made", erasers[:1], "spm-hub")
        done = spmhub(*COMMAND, "--pull")
        assert done.code == 2
        assert "no eraser 'snoopy' in" in done.err
        assert "nor on the Hub as spm-hub/snoopy" in done.err
        hub.requests.clear()
        done = spmhub(*COMMAND)
        assert done.code == 2
        assert "no eraser 'snoopy' in" in done.err
        assert "--pull" in done.err
        assert hub.requests == [], "nobody configured an account, or asked for one"
