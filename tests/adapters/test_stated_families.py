"""A manifest that states another family than its tensors are certainly of is refused when the file is read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from spm_hub.adapters.adapter import Adapter, increment_info, load_file
from spm_hub.adapters.increments import LowRank
from spm_hub.adapters.manifest import Base, Concept, Manifest
from spm_hub.errors import ManifestError

TEXT = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
PROJECTION = "down_blocks.1.attentions.0.proj_in"
SMALL = "up_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
DOUBLE, SINGLE = "transformer_blocks.0.attn.to_q", "single_transformer_blocks.0.attn.to_q"


def eraser(family: str, *modules: tuple[str, tuple[int, ...]]) -> Adapter:
    """Return an eraser of this stated family with modules of these paths and input shapes."""
    increments = {
        path: LowRank(torch.ones(1, *shape), torch.ones(8, 1, *[1] * (len(shape) - 1))) for path, shape in modules
    }
    about = Manifest(
        name="snoopy", concept=Concept(target="snoopy"), increment=increment_info(increments),
        base=Base(family=family, id="", fingerprint=""), recipe={},
    )  # fmt: skip
    return Adapter(about, increments)


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize(
    ("stated", "modules", "shown"),
    [
        ("sdxl", ((TEXT, (768,)),), "sd1"),
        ("sd1", ((TEXT, (2048,)), (SMALL, (320,))), "sdxl"),
        ("sd1", ((TEXT, (1024,)),), "sd2"),
        ("sdxl", ((PROJECTION, (320, 1, 1)),), "sd1"),
        ("sd2", ((PROJECTION, (320, 1, 1)), (SMALL, (320,))), "sd1"),
        ("sd1", ((SINGLE, (3072,)),), "flux"),
        ("sd3", ((SINGLE, (3072,)), (DOUBLE, (3072,))), "flux"),
        ("flux", ((TEXT, (768,)),), "sd1"),
        ("sdxl", ((DOUBLE, (1536,)),), "sd3"),
    ],
)
def test_both_families_are_named(
    stated: str, modules: tuple[tuple[str, tuple[int, ...]], ...], shown: str, lazy: bool, tmp_path: Path
) -> None:
    eraser(stated, *modules).save(tmp_path / "a.safetensors", tmp_path / "a.json")
    for manifest in (None, tmp_path / "a.json"):
        with pytest.raises(ManifestError, match=f"says base.family '{stated}', and its tensors are of '{shown}'"):
            load_file(tmp_path / "a.safetensors", manifest, lazy=lazy)


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize(
    ("stated", "modules"),
    [
        ("sd1", ((TEXT, (768,)), (PROJECTION, (320, 1, 1)))),
        ("sdxl", ((TEXT, (2048,)), (PROJECTION, (640,)))),
        ("sd1", ((PROJECTION, (320,)), (SMALL, (320,)))),  # a convolution's factors as matrices
        ("sd1", ((SMALL, (320,)),)),  # SD1 with fewer blocks has attention where else only SDXL has
        ("sd1", ((TEXT, (96,)), (PROJECTION, (32, 1, 1)))),  # the sketchbook's widths
        ("flux", ((DOUBLE, (64,)),)),  # a small FLUX
        ("generic", ((DOUBLE, (3072,)), (SINGLE, (3072,)))),  # FLUX.2
        ("mine", ((TEXT, (768,)),)),  # a plug-in's
    ],
)
def test_what_is_only_unusual_is_read(
    stated: str, modules: tuple[tuple[str, tuple[int, ...]], ...], lazy: bool, tmp_path: Path
) -> None:
    eraser(stated, *modules).save(tmp_path / "a.safetensors", tmp_path / "a.json")
    assert load_file(tmp_path / "a.safetensors", tmp_path / "a.json", lazy=lazy).manifest.base.family == stated
