"""Whole denoisers and pipelines in the original code's layout, files of several kinds, headers that went stale."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from ldm import single_file, unet_to_ldm
from pico import pico_pipeline
from safetensors.torch import load_file as load_tensors
from safetensors.torch import save_file
from topologies import output_with, predict, topology
from torch import Tensor, nn

from spm_hub.adapters import conversion
from spm_hub.adapters.adapter import load_file
from spm_hub.adapters.conversion import BaseModel, Description
from spm_hub.adapters.formats.module_names import flat
from spm_hub.errors import AdapterFileError
from spm_hub.io.safetensors_file import PAYLOAD_HASH_KEY

NOBODY, DENOISER_ONLY = Description(), Description(without_text_encoder=True)
BLOCK = "mid_block.attentions.0.transformer_blocks.0"
TRAINED = (f"{BLOCK}.attn2.to_k", "down_blocks.0.resnets.0.conv1", "time_embedding.linear_1", "conv_out")


def trained(denoiser: nn.Module, paths: tuple[str, ...] = TRAINED) -> nn.Module:
    """The same denoiser with other weights in these layers."""
    random = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for path in paths:
            weight: Any = denoiser.get_submodule(path).weight
            weight += 0.1 * torch.randn(weight.shape, generator=random)
    return denoiser


@pytest.mark.parametrize("model", ["sd1", "sd2", "sdxl"])
def test_a_whole_unet_by_its_original_names(model: str, tmp_path: Path) -> None:
    """Every key that diffusers' own converter maps, norms included."""
    base, other = topology(model), trained(topology(model))
    state = {key: value.clone() for key, value in unet_to_ldm(other).items()}
    config: Any = other.config
    mapped = convert_ldm_unet_checkpoint(dict(state), config)
    assert mapped.keys() == other.state_dict().keys()
    assert all(torch.equal(mapped[key], value) for key, value in other.state_dict().items())
    save_file(state, tmp_path / "x.safetensors")
    adapter, read_as = conversion.read(tmp_path / "x.safetensors", NOBODY, BaseModel(base, "here"))
    assert (read_as, set(adapter.increments)) == ("full-weights", set(TRAINED))
    assert (output_with(base, adapter) - predict(other)).abs().max() <= 1e-6
    # ESD of 2023 trained norms too: all of them, and every bias.
    random = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter += 0.1 * torch.randn(parameter.shape, generator=random)
    save_file({key: value.clone() for key, value in unet_to_ldm(other).items()}, tmp_path / "x.safetensors")
    adapter, _ = conversion.read(tmp_path / "x.safetensors", NOBODY, BaseModel(base, "here"))
    assert any(increment.weight_shape == (8,) for increment in adapter.increments.values())
    assert (output_with(base, adapter) - predict(other)).abs().max() <= 1e-5
    assert (predict(base) - predict(other)).abs().max() > 1e-3


def test_a_whole_pipeline_is_its_denoiser_only_when_asked(tmp_path: Path) -> None:
    pipe: Any = pico_pipeline()
    layer = f"{BLOCK}.attn2.to_k"
    pipe.register_modules(unet=trained(topology("sd1"), (layer,)))
    base = BaseModel(topology("sd1"), "here")
    extra: dict[str, Any] = {
        "betas": torch.ones(4), "sqrt_one_minus_alphas_cumprod": torch.ones(4), "posterior_mean_coef1": torch.ones(4),
        "model_ema.decay": torch.ones(1), "model_ema.diffusion_modelout2weight": torch.ones(4, 4),
    }  # fmt: skip
    file = single_file(pipe, tmp_path / "x.safetensors", **extra)
    parts = [key.split(".")[0] for key in load_tensors(file)]
    with pytest.raises(AdapterFileError, match=r"'cond_stage_model.*of a text encoder") as refused:
        conversion.read(file, NOBODY, base)
    assert "--without-text-encoder" in str(refused.value)
    adapter, _ = conversion.read(file, DENOISER_ONLY, base)
    assert list(adapter.increments) == [layer]
    about: Any = adapter.manifest.recipe["converted"]
    assert {key: count for key, count in about.items() if key.endswith("left_out")} == {
        "text_encoder_tensors_left_out": parts.count("cond_stage_model"),
        "autoencoder_tensors_left_out": parts.count("first_stage_model"),
        "moving_average_tensors_left_out": 2,
        "schedule_tensors_left_out": 3,
    }
    single_file(pipe, file, without=["text_encoder"])
    with pytest.raises(AdapterFileError, match=r"'first_stage_model.*of an autoencoder"):
        conversion.read(file, NOBODY, base)
    single_file(pipe, file, without=["text_encoder", "vae"])
    assert list(conversion.read(file, NOBODY, base)[0].increments) == [layer]


def test_a_mix_of_kinds_is_converted_as_a_dense_change(tmp_path: Path) -> None:
    random = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random)

    stems = {layer: f"lora_unet_{flat(BLOCK)}_attn2_{layer}" for layer in ("to_q", "to_k", "to_v")}
    down, up, delta = noise(2, 768), noise(64, 2), noise(64, 768)
    left, right = noise(4, 4), noise(16, 192)
    tensors = {
        f"{stems['to_q']}.lora_down.weight": down, f"{stems['to_q']}.lora_up.weight": up,
        f"{stems['to_q']}.alpha": torch.tensor(1.0), f"{stems['to_k']}.diff": delta,
        f"{stems['to_v']}.lokr_w1": left, f"{stems['to_v']}.lokr_w2": right,
    }  # fmt: skip
    save_file(tensors, tmp_path / "x.safetensors")
    adapter, read_as = conversion.read(tmp_path / "x.safetensors", NOBODY)
    assert (read_as, adapter.manifest.increment.kind) == ("lycoris", "dense")
    exact = {"to_q": up.double() @ down.double() / 2, "to_k": delta.double(), "to_v": torch.kron(left, right).double()}
    for layer, change in exact.items():
        found = adapter.increments[f"{BLOCK}.attn2.{layer}"].delta_for(delta).double()
        torch.testing.assert_close(found, change, rtol=1e-6, atol=1e-5)
    thin = {f"{stems['to_q']}.lora_down.weight": noise(1, 20_000), f"{stems['to_q']}.lora_up.weight": noise(20_000, 1)}
    save_file({**tensors, **thin}, tmp_path / "x.safetensors")
    with pytest.raises(AdapterFileError, match="400000000 numbers"):
        conversion.read(tmp_path / "x.safetensors", NOBODY)
    save_file({key: value for key, value in tensors.items() if "lokr" not in key}, tmp_path / "x.safetensors")
    for lazy in (False, True):
        with pytest.raises(AdapterFileError, match="one kind; these are of dense and low_rank") as refused:
            load_file(tmp_path / "x.safetensors", lazy=lazy)
        assert str(refused.value).startswith(str(tmp_path / "x.safetensors"))
        assert f"spmhub convert {tmp_path / 'x.safetensors'}" in str(refused.value)


def test_another_programs_stale_hash_is_no_damage(tmp_path: Path) -> None:
    """A program that merges or rounds copies the header of what it read; ours are altered where they differ."""
    stem = f"lora_unet_{flat(BLOCK)}_attn2_to_k"
    tensors = {f"{stem}.lora_down.weight": torch.ones(1, 768), f"{stem}.lora_up.weight": torch.ones(4, 1)}
    save_file(tensors, tmp_path / "x.safetensors", {PAYLOAD_HASH_KEY: "0x" + "ab" * 32})
    foreign = conversion.read(tmp_path / "x.safetensors", NOBODY)[0]
    assert foreign.increments.keys() == {f"{BLOCK}.attn2.to_k"}
    for lazy in (False, True):
        (one,) = load_file(tmp_path / "x.safetensors", lazy=lazy).increments.values()
        assert torch.equal(one.delta_for(torch.zeros(4, 768)), torch.ones(4, 768))
    foreign.save(tmp_path / "own.safetensors")
    data = bytearray((tmp_path / "own.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "own.safetensors").write_bytes(data)
    with pytest.raises(AdapterFileError, match="tensors were altered"):
        load_file(tmp_path / "own.safetensors")
