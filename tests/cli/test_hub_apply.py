"""The command of every README, as typed, against a Hub on this machine that holds the base and both erasers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from loopback import LoopbackHub
from pico import pico_eraser, pico_pipeline
from PIL import Image

import spm_hub
from spm_hub.adapters.adapter import Adapter
from spm_hub.hub.push import prepare
from spm_hub.models.aliases import ALIASES
from spm_hub.registry.registry import Registry

PROMPT = "snoopy on the beach"
COMMAND = ["apply", "--model", "dreamshaper-8", "--adapters", "nudity,snoopy", "--prompt", PROMPT]
COMMAND += ["--seed", "1", "--steps", "2", "--json"]
BASE = ALIASES["dreamshaper-8"]


def spmhub(hub: LoopbackHub, home: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    (home / "work").mkdir(parents=True, exist_ok=True)
    root = str(Path(__file__).resolve().parents[2])
    return subprocess.run(
        [sys.executable, "-m", "spm_hub.cli", *arguments],
        cwd=home / "work",
        env={**os.environ, **hub.environment(home, PYTHONPATH=root, **more)},
        capture_output=True,
        text=True,
        check=False,
    )


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


@pytest.mark.parametrize(("owner", "dtype", "mode"), [("spm-hub", "float32", "lfs"), ("studio", "bfloat16", "regular")])
def test_downloaded_once_pinned_and_nothing_asked_for_again(
    owner: str, dtype: str, mode: str, erasers: list[Adapter], tmp_path: Path
) -> None:
    command = [*COMMAND, "--dtype", dtype]
    more = {} if owner == "spm-hub" else {"SPMHUB_OWNER": owner}
    with LoopbackHub("lfs" if mode == "lfs" else "regular") as hub:
        stocked(hub, tmp_path / "made", erasers, owner)
        first = spmhub(hub, tmp_path, *command, **more)
        assert first.returncode == 0, first.stderr
        fetched = [line for line in hub.requests if line.startswith("GET") and line.endswith(".safetensors")]
        assert len(fetched) == len(set(fetched))
        # One precision of the base, not both.
        assert any(".fp16." in line for line in fetched) == (dtype == "bfloat16")
        # Which file came from where.
        commits = {name: hub.repositories[f"{owner}/{name}"].refs["main"] for name in ("nudity", "snoopy")}
        assert f"model: {BASE.hub_id}@{str(BASE.revision)[:12]}, downloaded just now to {tmp_path}" in first.stderr
        for name, commit in commits.items():
            assert f"{name}: {owner}/{name}@{commit[:12]}, downloaded just now to {tmp_path}" in first.stderr
        lock = json.loads((tmp_path / "data" / "spm-hub" / "spmhub-lock.json").read_text())
        assert {name: pin["commit"] for name, pin in lock["adapters"].items()} == commits

        # A newer commit changes nothing, and nothing is asked: the Hub might as well be switched off.
        hub.publish(f"{owner}/snoopy", {"README.md": b"newer"})
        hub.requests.clear()
        second = spmhub(hub, tmp_path, *command, "--out", "again", **more)
        assert second.returncode == 0, second.stderr
        assert hub.requests == []
    assert f"snoopy: {owner}/snoopy@{commits['snoopy'][:12]}, kept in {tmp_path}" in second.stderr
    assert f"model: {BASE.hub_id}@{str(BASE.revision)[:12]}, kept in {tmp_path}" in second.stderr

    pictures = [
        np.asarray(Image.open(tmp_path / "work" / json.loads(done.stdout)["files"]["with"][0]))
        for done in (first, second)
    ]
    pipe = pico_pipeline().to(torch.float32 if dtype == "float32" else torch.bfloat16)
    with spm_hub.attach(pipe, erasers):
        expected = pipe(PROMPT, num_inference_steps=2, generator=torch.Generator("cpu").manual_seed(1)).images[0]
    if dtype == "float32":
        assert all(np.array_equal(picture, np.asarray(expected)) for picture in pictures)
    assert all(np.array_equal(picture, pictures[0]) for picture in pictures)


def test_one_clear_error_where_an_eraser_is_nowhere(erasers: list[Adapter], tmp_path: Path) -> None:
    with LoopbackHub() as hub:
        stocked(hub, tmp_path / "made", erasers[:1], "spm-hub")
        done = spmhub(hub, tmp_path, *COMMAND)
    assert done.returncode == 2
    assert "no eraser 'snoopy' in" in done.stderr
    assert "nor on the Hub as spm-hub/snoopy" in done.stderr
    assert "Traceback" not in done.stderr
