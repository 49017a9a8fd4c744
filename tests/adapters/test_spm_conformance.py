"""The released implementation's own files and outputs: they load as they are, and act as they did."""

from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from pico import pico_pipeline
from safetensors.torch import load_file as load_tensors

from spm_hub.adapters.adapter import load_file
from spm_hub.attachment.attachment import attach

OFFICIAL = Path(__file__).resolve().parents[3] / "shared" / "conformance" / "spm_official"
pytestmark = pytest.mark.skipif(not OFFICIAL.is_dir(), reason="no conformance files beside this checkout")


@pytest.fixture(scope="module")
def golden():
    return load_tensors(OFFICIAL / "golden.safetensors")


@pytest.fixture
def pipe():
    return pico_pipeline(text_width=32, unet=UNet2DConditionModel.from_pretrained(OFFICIAL / "unet"))


def predict(unet, golden, dtype=torch.float32):
    with torch.no_grad():
        return unet(
            golden["sample"].to(dtype),
            golden["timestep"],
            encoder_hidden_states=golden["encoder_hidden_states"].to(dtype),
        ).sample


@pytest.mark.parametrize("mode", ["fold", "branch"])
@pytest.mark.parametrize("multiplier", ["1", "0.4"])
@pytest.mark.parametrize("name", ["snoopy", "nudity"])
def test_one_official_file_gives_the_official_output(pipe, golden, name, multiplier, mode):
    adapter = load_file(OFFICIAL / f"{name}.safetensors")
    assert len(adapter.increments) == 48
    with attach(pipe, [adapter], mode=mode, strength=float(multiplier)):
        output = predict(pipe.unet, golden)
    assert (output - golden[f"output_{name}_multiplier_{multiplier}"]).abs().max() <= 1e-5
    assert (predict(pipe.unet, golden) - golden["output_base"]).abs().max() <= 1e-5


def official_sum(unet, multipliers):
    """W + sum of multiplier * up @ down, in float64, straight from the files."""
    modules = {path.replace(".", "_"): module for path, module in unet.named_modules()}
    unet.double()
    for name, multiplier in multipliers.items():
        tensors = load_tensors(OFFICIAL / f"{name}.safetensors")
        for key in tensors:
            if key.endswith(".alpha"):
                stem = key.removesuffix(".alpha")
                up, down = (tensors[f"{stem}.lora_{side}.weight"].double().flatten(1) for side in ("up", "down"))
                weight = modules[stem.removeprefix("lora_unet_")].weight
                scale = multiplier * tensors[key].double() / len(down)
                weight.data += scale * (up @ down).reshape(weight.shape)
    return unet


@pytest.mark.parametrize("mode", ["fold", "branch"])
def test_two_official_files_at_their_own_gammas_sum_up(pipe, golden, mode):
    multipliers = {"snoopy": 0.7, "nudity": 0.35}
    reference = official_sum(UNet2DConditionModel.from_pretrained(OFFICIAL / "unet"), multipliers)
    expected = predict(reference, golden, torch.float64)
    adapters = [load_file(OFFICIAL / f"{name}.safetensors") for name in multipliers]
    with attach(pipe, adapters, mode=mode, strength=multipliers):
        output = predict(pipe.unet, golden)
    assert (output - expected).abs().max() <= 1e-5
