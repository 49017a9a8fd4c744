"""Methods that predict nothing leave the denoiser in its file; what they make is the same to the bit."""

from __future__ import annotations

from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import torch
from ldm import single_file
from pico import pico_pipeline
from pico_families import family_pipeline
from test_single_file import pico_xl

import spm_hub
from spm_hub import Adapter
from spm_hub.models import loading
from spm_hub.models.architectures import denoiser_of
from spm_hub.models.loading import load_pipeline
from spm_hub.models.mapped import intended_dtype, is_mapped


@pytest.fixture(autouse=True)
def worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pico denoisers stay in their files too."""
    monkeypatch.setattr(loading, "WORTH_IT", 0)


FEW = {"sentences": 12, "held": 16, "hold": 4.0}


def erased(**given: Any) -> Adapter:
    made = spm_hub.train("snoopy", method="instant", options=FEW, progress=False, **given)
    assert isinstance(made, Adapter)
    return made


def assert_same(left: Adapter, right: Adapter) -> None:
    assert left.increments.keys() == right.increments.keys()
    for path, increment in left.increments.items():
        for name, tensor in increment.tensors().items():
            assert torch.equal(tensor, right.increments[path].tensors()[name]), (path, name)
    assert left.manifest.versions == right.manifest.versions, "the stamp of the base is that of a base in memory"


def in_memory(folder: Path, dtype: str = "wide", **given: Any) -> Any:
    pipe = load_pipeline(str(folder), device="cpu", dtype=dtype, **given)
    assert not is_mapped(denoiser_of(pipe))
    return pipe


@pytest.mark.parametrize(
    ("family", "stored"),
    [
        ("sd1", torch.float16), ("sd1", torch.float32), ("sdxl", torch.float16), ("sd3", torch.float16),
        ("flux-schnell", torch.bfloat16), ("pixart", torch.float16),
    ],
)  # fmt: skip
def test_a_folder_gives_the_same_eraser_from_its_files_as_from_memory(
    tmp_path: Path, family: str, stored: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    family_pipeline(family, dtype=stored).save_pretrained(tmp_path / "base")
    pipe = in_memory(tmp_path / "base")
    expected, kind = erased(pipe=pipe), type(denoiser_of(pipe))

    @wraps(kind.forward)
    def refused(*args: Any, **given: Any) -> None:
        pytest.fail("predicted with weights in a file")

    monkeypatch.setattr(kind, "forward", refused)
    assert_same(erased(model=str(tmp_path / "base"), device="cpu"), expected)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_single_file_gives_the_same_eraser_from_its_pages_as_from_memory(tmp_path: Path, family: str) -> None:
    pipe: Any = pico_xl() if family == "sdxl" else pico_pipeline()
    pipe.to(dtype=torch.float16)
    pipe.save_pretrained(tmp_path / "base")
    file = single_file(pipe, tmp_path / "pico.safetensors")
    given = {"config": str(tmp_path / "base")}
    expected = erased(pipe=in_memory(file, **given))
    assert_same(erased(model=str(file), device="cpu", **given), expected)


def test_weights_keep_the_precision_of_the_file_and_know_the_one_to_compute_in(tmp_path: Path) -> None:
    pico_pipeline(dtype=torch.float16).save_pretrained(tmp_path)
    pipe = loading.load_mapped(str(tmp_path), device="cpu", dtype="wide")
    assert is_mapped(pipe.unet)
    assert {parameter.dtype for parameter in pipe.unet.parameters()} == {torch.float16}
    assert {parameter.dtype for parameter in pipe.text_encoder.parameters()} == {torch.float32}
    assert intended_dtype(pipe.unet) == torch.float32


def test_a_method_that_protects_prompts_has_its_denoiser_in_memory(tmp_path: Path) -> None:
    """It tries out which modules read the text alone, with a prediction."""
    pico_pipeline(text_width=64).save_pretrained(tmp_path)
    protection = {"prompts": ["a dog"], "separable": True}
    made = erased(model=str(tmp_path), device="cpu", protection=protection)
    assert_same(made, erased(pipe=in_memory(tmp_path), protection=protection))
