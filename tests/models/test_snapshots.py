"""Base models from the Hub: in which precision they come, and what a broken download leaves behind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import hf_api
from loopback import LoopbackHub
from pico import pico_pipeline

from spm_hub.errors import HubNotFoundError, ModelError
from spm_hub.io import hub_client as network
from spm_hub.models.aliases import ALIASES
from spm_hub.models.loading import load_pipeline
from spm_hub.models.references import local_files, parse_reference
from spm_hub.models.snapshots import is_whole

BASE = ALIASES["dreamshaper-8"]
UNET = "unet/diffusion_pytorch_model"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """The base in full precision, and in half under the names of the variant fp16."""
    found = {}
    for variant in ("full", "fp16"):
        folder = tmp_path_factory.mktemp(variant)
        half = variant == "fp16"
        pico_pipeline().to(torch.float16 if half else torch.float32).save_pretrained(
            folder, variant="fp16" * half or None
        )
        found[variant] = {
            path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
        }
    return found


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LoopbackHub]:
    with LoopbackHub("lfs") as served:
        served.adopt(monkeypatch, tmp_path)
        # diffusers asks through the client's functions, which have kept the address of their import.
        monkeypatch.setattr(hf_api.api, "endpoint", served.endpoint)
        monkeypatch.setattr(network, "_FIRST_PAUSE", 0.01)
        yield served


def publish(hub: LoopbackHub, content: dict[str, bytes]) -> None:
    hub.publish(str(BASE.hub_id), content, commit=BASE.revision)


def weight(pipe: Any) -> torch.Tensor:
    return next(iter(pipe.unet.parameters()))


def test_half_precision_alone_is_read_in_full(hub: LoopbackHub, files: dict[str, dict[str, bytes]]) -> None:
    publish(hub, files["fp16"])
    first = weight(load_pipeline(BASE.name))
    assert first.dtype is torch.float32
    assert torch.equal(first, weight(pico_pipeline()).half().float())
    hub.fail(".*", status=503, times=None)
    assert torch.equal(weight(load_pipeline(BASE.name)), first), "what is there does while the Hub is out of reach"


def test_half_precision_that_is_cached_does_not_pass_for_full(
    hub: LoopbackHub, files: dict[str, dict[str, bytes]]
) -> None:
    publish(hub, {**files["full"], **files["fp16"]})
    base = parse_reference(BASE.name)
    assert not local_files(base)
    load_pipeline(BASE.name, dtype=torch.bfloat16)
    assert not any(f"{UNET}.safetensors" in line for line in hub.requests)
    half = local_files(base)
    assert torch.equal(weight(load_pipeline(BASE.name)), weight(pico_pipeline()))
    assert {Path(name).name for name in local_files(base) - half} > {f"{Path(UNET).name}.safetensors"}
    hub.requests.clear()
    load_pipeline(BASE.name)
    load_pipeline(BASE.name, dtype=torch.bfloat16)
    assert hub.requests == []


def test_a_download_that_broke_off_is_finished_by_the_next(
    hub: LoopbackHub, files: dict[str, dict[str, bytes]]
) -> None:
    publish(hub, files["full"])
    hub.fail(rf".*/{UNET}", status=404, code="EntryNotFound", times=None)
    with pytest.raises(HubNotFoundError):
        load_pipeline(BASE.name)
    hub.mend()
    assert torch.equal(weight(load_pipeline(BASE.name)), weight(pico_pipeline()))


def test_a_model_of_which_one_file_is_missing_is_not_whole(tmp_path: Path) -> None:
    # As the client lays its cache out: blobs beside snapshots.
    folder = tmp_path / "snapshots" / "commit"
    pico_pipeline().save_pretrained(folder, max_shard_size="40KB")
    shards = sorted((folder / "unet").glob("*.safetensors"))
    assert len(shards) > 1
    assert is_whole(folder)
    content = shards[-1].read_bytes()
    shards[-1].unlink()
    assert not is_whole(folder)
    shards[-1].write_bytes(content)
    assert is_whole(folder)
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "etag.incomplete").touch()
    assert not is_whole(folder)


def test_pickles_are_named_and_nothing_is_downloaded(hub: LoopbackHub, files: dict[str, dict[str, bytes]]) -> None:
    content = {name.replace("vae/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.bin"): content
               for name, content in files["full"].items()}  # fmt: skip
    publish(hub, content)
    for _ in range(2):
        with pytest.raises(ModelError, match="weights of vae as pickles"):
            load_pipeline(BASE.name)
    assert not any("/resolve/" in line for line in hub.requests)
