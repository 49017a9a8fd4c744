"""Where and in which precision a base is loaded unless the caller says so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pico import pico_pipeline

from spm_hub.errors import UsageError
from spm_hub.models.architectures import denoiser_of
from spm_hub.models.base_choice import BaseChoice
from spm_hub.models.loading import load_pipeline
from spm_hub.models.placement import automatic_dtype, choose_device

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("stored", "on_cpu", "on_gpu", "for_gradients"),
    [
        (torch.float64, torch.float32, torch.float32, torch.float32),
        (torch.float32, torch.float32, torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float32, torch.float16, torch.float32),
    ],
)
def test_the_precision_follows_from_the_files(
    stored: torch.dtype, on_cpu: torch.dtype, on_gpu: torch.dtype, for_gradients: torch.dtype, tmp_path: Path
) -> None:
    assert automatic_dtype(stored, CPU) == on_cpu
    assert automatic_dtype(stored, GPU) == on_gpu
    assert automatic_dtype(stored, GPU, wide=True) == for_gradients
    pico_pipeline().to(stored).save_pretrained(tmp_path)
    for base in (BaseChoice(str(tmp_path)), BaseChoice(str(tmp_path), device="cpu", dtype="auto")):
        base.check()
        parts = base.open().components.values()
        found = {next(part.parameters()).dtype for part in parts if isinstance(part, torch.nn.Module)}
        assert found == {on_cpu if choose_device(base.device).type == "cpu" else on_gpu}


def test_the_sketchbook_is_float32_anywhere() -> None:
    assert {parameter.dtype for parameter in denoiser_of(load_pipeline("sketchbook")).parameters()} == {torch.float32}


def test_an_accelerator_that_does_not_compute_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    for found in (None, torch.device("meta")):  # none, and one whose numbers cannot be read
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available, found=found: found)
        assert choose_device("auto") == choose_device(None) == CPU
    with pytest.raises(UsageError, match="warp"):
        choose_device("warp")


@pytest.mark.parametrize("dtype", ["float16", "half", torch.float16])
def test_float16_on_a_cpu_is_refused_before_anything_is_loaded(
    dtype: str | torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spm_hub.models.loading.load_pipeline", None)
    with pytest.raises(UsageError, match="float16 on a CPU") as refused:
        BaseChoice("sketchbook", device="cpu", dtype=dtype).check()
    assert "--dtype bfloat16" in str(refused.value.mend)
    with pytest.raises(UsageError, match="float16 on a CPU"):
        BaseChoice(None, pipe=pico_pipeline().to(torch.float16)).check()
    BaseChoice(None, pipe=pico_pipeline(), dtype="auto", device="auto").check()
