"""The mask files of Minimalist's authors: read without running code in them, and in effect as they say."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from pico_families import family_pipeline
from test_families import apart, draw
from test_minimalist import masked_by_activations
from torch import Tensor

import spm_hub
from spm_hub.adapters.adapter import Adapter, increment_info, load_file
from spm_hub.adapters.compatibility import check
from spm_hub.adapters.formats.minimalist import mask_files, read_masks
from spm_hub.adapters.increments import Mask
from spm_hub.adapters.manifest import Base, Concept, Manifest
from spm_hub.errors import AdapterFileError, NotFoundError

OFFICIAL = Path(__file__).resolve().parents[4] / "shared" / "conformance"
FILES = [OFFICIAL / f"minimalist_flux_{group}.pt" for group in ("attn", "ff", "norm")]


def adapter_of(masks: Mapping[str, Mask]) -> Adapter:
    manifest = Manifest(
        name="masked", concept=Concept(target="nudity"), increment=increment_info(masks),
        base=Base(family="flux", id="flux-schnell", fingerprint=""), recipe={},
    )  # fmt: skip
    return Adapter(manifest, masks)


def saved(folder: Path, **groups: object) -> list[Path]:
    for name, rows in groups.items():
        torch.save(rows, folder / f"{name}.pt")
    return [folder / f"{name}.pt" for name in groups]


def rows(counts: int, length: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(length, generator=generator).bfloat16().requires_grad_() for _ in range(counts)]


@pytest.fixture
def pipe() -> FluxPipeline:
    """One double block and two single ones, 32 channels, 2 heads."""
    return family_pipeline("flux-schnell", dtype=torch.float64)


def test_a_reduced_flux_is_masked_as_its_activations_would_be(pipe: FluxPipeline, tmp_path: Path) -> None:
    attn, ff, norm = rows(3, 2, 0), rows(2, 128, 1), rows(1, 192, 2)
    attn[0] = torch.tensor([3.0, -1.0]).bfloat16()
    attn[2] = torch.tensor([0.0, 3.0]).bfloat16()  # zero is off
    adapter = adapter_of(read_masks(saved(tmp_path, attn=attn, ff=ff, norm=norm)))
    adapter.save(tmp_path / "masked.safetensors")
    off = {
        **{f"{block}.attn": row <= 0 for block, row in zip(
            ("transformer_blocks.0", "single_transformer_blocks.0", "single_transformer_blocks.1"), attn, strict=True
        )},
        "transformer_blocks.0.ff": ff[0] <= 0, "transformer_blocks.0.ff_context": ff[1] <= 0,
        "transformer_blocks.0.norm1_context": norm[0] <= 0,
    }  # fmt: skip
    bare = draw(pipe, ["snoopy"])
    expected = masked_by_activations(pipe.transformer, off, lambda: draw(pipe, ["snoopy"]), heads=2)
    for mode in ("fold", "branch"):
        with spm_hub.attach(pipe, [load_file(tmp_path / "masked.safetensors")], gate="always", mode=mode):
            assert apart(draw(pipe, ["snoopy"]), expected) <= 1e-6
    assert apart(expected, bare) > 1e-3
    assert torch.equal(draw(pipe, ["snoopy"]), bare)


@pytest.mark.skipif(not OFFICIAL.is_dir(), reason="no conformance files beside this checkout")
def test_the_authors_masks_fit_the_real_flux_and_switch_off_what_they_say() -> None:
    masks = read_masks(FILES)
    off = {"ff": 0, "norm": 0, "attn": 0}
    for path, mask in masks.items():
        group = "norm" if path.endswith("norm1_context.linear") else "ff" if ".ff" in path else "attn"
        off[group] += int((~mask.keep).sum())
    assert off == {"ff": 293_859, "norm": 62_143, "attn": 0}
    assert len(masks) == 38 + 19, "the heads all stay on, so that their layers are left alone"
    assert sum(len(mask.keep) for path, mask in masks.items() if ".ff" in path) == 466_944
    assert sum(len(mask.keep) for path, mask in masks.items() if ".norm" in path) == 350_208
    with torch.device("meta"):
        check(adapter_of(masks), FluxTransformer2DModel())
    first = torch.load(FILES[1], map_location="cpu", weights_only=True)
    assert torch.equal(masks["transformer_blocks.0.ff.net.2"].keep, first[0] > 0)
    assert torch.equal(masks["transformer_blocks.18.ff_context.net.2"].keep, first[37] > 0)


@pytest.mark.skipif(not OFFICIAL.is_dir(), reason="no conformance files beside this checkout")
def test_the_authors_heads_alone_reach_every_block() -> None:
    masks = read_masks(FILES[:1])
    assert len(masks) == 2 * 19 + 38
    assert all(bool(mask.keep.all()) for mask in masks.values())
    with torch.device("meta"):
        check(adapter_of(masks), FluxTransformer2DModel())


class Trap:
    """What an attacker would put into a pickle."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    with pytest.raises(AdapterFileError, match="holds more than tensors, or is damaged, and was not loaded"):
        read_masks(saved(tmp_path, ff=[Trap(tmp_path / "sprung")]))
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        ({"ff": {"a": 1}}, "no list of logits"),
        ({"ff": []}, "no list of logits"),
        ({"ff": [torch.zeros(2, 3)]}, "no list of logits"),
        ({"ff": [torch.tensor([1, 2])]}, "no list of logits"),
        ({"ff": [torch.tensor([1.0, float("nan")])]}, "0 holds numbers that are NaN or infinite"),
        ({"ff": [torch.zeros(0), torch.zeros(0)]}, "no list of logits"),
        ({"gates": [torch.zeros(3)]}, "name ends in attn, ff, norm"),
        ({"diff": [torch.zeros(3)]}, "name ends in attn, ff, norm"),
        ({"ff": rows(3, 128, 0)}, "numbers of blocks.*3 rows of ff"),
        ({"ff": rows(4, 128, 0), "norm": rows(1, 192, 0)}, "numbers of blocks.*4 rows of ff, 1 rows of norm"),
        ({"ff": rows(2, 128, 0), "norm": rows(1, 96, 0)}, r"different widths: \[16.0, 32.0\] channels"),
        ({"ff": rows(2, 128, 0), "attn": rows(3, 5, 0)}, r"different widths.*\[5\] heads"),
        ({"attn": rows(3, 2, 0)}, "numbers of blocks.*3 rows of attn"),
    ],
)
def test_what_is_no_set_of_masks_is_refused(groups: dict[str, object], words: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterFileError, match=words):
        read_masks(saved(tmp_path, **groups))


def test_only_a_last_word_makes_a_mask_file(tmp_path: Path) -> None:
    named = {name: tmp_path / f"{name}.pt" for name in ("ff", "flux_ff", "run-1.norm", "my-attn")}
    for path in (*named.values(), *(tmp_path / f"{name}.pt" for name in ("diff", "groupnorm", "ff_old", "xattn"))):
        path.touch()
    assert mask_files(tmp_path) == sorted(named.values())


def test_a_damaged_file_is_a_plain_error(tmp_path: Path) -> None:
    (path,) = saved(tmp_path, ff=rows(2, 128, 0))
    whole = path.read_bytes()
    for image in (
        b"",
        b"PK\x03\x04",
        whole[: len(whole) // 2],
        whole[:100] + b"\xff" * 40 + whole[140:],
        b"\x80\x02].",
    ):
        path.write_bytes(image)
        with pytest.raises(AdapterFileError):
            read_masks([path])
    with pytest.raises(NotFoundError, match="no such file"):
        read_masks([tmp_path / "norm.pt"])
    path.write_bytes(whole)
    with pytest.raises(AdapterFileError, match="each once"):
        read_masks([path, path])
