"""How strong a change is that another program's file holds: alpha wherever it stands, and what a file cannot say."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file as load_tensors
from safetensors.torch import save_file
from topologies import output_with, predict, random_eraser, topology
from torch import Tensor

from spm_hub.adapters import conversion
from spm_hub.adapters.adapter import Adapter, increment_info, load_file
from spm_hub.adapters.conversion import Description
from spm_hub.adapters.increments import Increment, LowRank
from spm_hub.errors import AdapterFileError

NOBODY, SD1 = Description(), Description(family="sd1")
STEM = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
PATH = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"


def pair(rank: int, *, out: int = 40, width: int = 768, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """down, up"""
    random = torch.Generator().manual_seed(rank)
    return torch.randn(rank, width, generator=random).to(dtype), torch.randn(out, rank, generator=random).to(dtype)


def product(increment: Increment) -> Tensor:
    """What is added to the weight, (out, in), float64."""
    assert isinstance(increment, LowRank)
    return increment.up.double().flatten(1) @ increment.down.double().flatten(1)


def only(adapter: Adapter) -> Increment:
    (increment,) = adapter.increments.values()
    return increment


def with_lora(**config: Any) -> Any:
    """A denoiser in PEFT's hands, every number of its LoRA random."""
    random = torch.Generator().manual_seed(0)
    model: Any = get_peft_model(topology("sd1"), LoraConfig(target_modules=["attn2.to_k"], **config))
    return filled(model, random)


def filled(model: Any, random: torch.Generator) -> Any:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=random))
    return model


@pytest.mark.parametrize("pattern", [{}, {"mid_block.*to_k": 1}])
def test_a_models_own_lora_file_has_the_scale_that_it_has_in_diffusers(pattern: dict[str, int], tmp_path: Path) -> None:
    unet: Any = topology("sd1")
    unet.add_adapter(
        LoraConfig(r=4, lora_alpha=16, target_modules=["attn2.to_k"], alpha_pattern=pattern, init_lora_weights=False)
    )
    filled(unet, torch.Generator().manual_seed(0))
    unet.save_lora_adapter(tmp_path)
    file = tmp_path / "pytorch_lora_weights.safetensors"
    base = topology("sd1")
    assert (predict(unet) - predict(base)).abs().max() > 1e-2
    for adapter in (conversion.read(file, SD1)[0], load_file(file), load_file(file, lazy=True)):
        assert (output_with(base, adapter) - predict(unet)).abs().max() <= 1e-5


def test_a_header_that_scales_something_else_is_refused(tmp_path: Path) -> None:
    down, up = pair(4)
    tensors = {f"unet.{PATH}.lora_A.weight": down, f"unet.{PATH}.lora_B.weight": up}
    for packed in ({"text_encoder.lora_alpha": 16, "text_encoder.r": 4}, {"unet_2.lora_alpha": 16}, {}):
        save_file(tensors, tmp_path / "x.safetensors", {"lora_adapter_metadata": json.dumps(packed)})
        for read in (lambda path: conversion.read(path, NOBODY), load_file):
            with pytest.raises(AdapterFileError, match=r"not the denoiser's \(unet.lora_alpha") as refused:
                read(tmp_path / "x.safetensors")
            assert "unet_lora_adapter_metadata" in str(refused.value)


@pytest.mark.parametrize("begun", [True, "gaussian", "orthogonal", "eva", "mica"])
@pytest.mark.filterwarnings("ignore:lora with")
def test_beginnings_that_leave_the_base_alone_are_read(begun: bool | str, tmp_path: Path) -> None:
    model = with_lora(r=2, lora_alpha=3, init_lora_weights=begun)
    model.save_pretrained(tmp_path)
    adapter, _ = conversion.read(tmp_path, SD1)
    base = topology("sd1")
    assert (output_with(base, adapter) - predict(model.get_base_model())).abs().max() <= 1e-5
    assert (predict(base) - predict(model.get_base_model())).abs().max() > 1e-3


@pytest.mark.parametrize("begun", ["pissa", "pissa_niter_4", "olora"])
def test_beginnings_that_take_from_the_base_are_read_as_pefts_conversion_only(begun: str, tmp_path: Path) -> None:
    model: Any = get_peft_model(
        topology("sd1"), LoraConfig(r=2, lora_alpha=2, target_modules=["attn2.to_k"], init_lora_weights=begun)
    )
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "first")
    model.peft_config["default"].init_lora_weights = begun
    filled(model, torch.Generator().manual_seed(0))
    model.save_pretrained(tmp_path / "raw")
    with pytest.raises(AdapterFileError, match=f"init_lora_weights is '{begun}'") as refused:
        conversion.read(tmp_path / "raw", SD1)
    assert "path_initial_model_for_weight_conversion" in str(refused.value)
    model.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "first"))
    adapter, _ = conversion.read(tmp_path / "converted", SD1)
    base = topology("sd1")
    # To float32: what is added here is the difference of two products.
    assert (output_with(base, adapter) - predict(model.get_base_model())).abs().max() <= 1e-4
    assert (predict(base) - predict(model.get_base_model())).abs().max() > 1e-2


@pytest.mark.parametrize(
    "change",
    [
        {"init_lora_weights": "lora_ga"}, {"init_lora_weights": "loftq"}, {"init_lora_weights": "corda"},
        {"use_qalora": True}, {"alora_invocation_tokens": [1, 2]}, {"kasa_config": {"svd_alpha": 1}},
        {"monteclora_config": {"n": 2}}, {"use_bdlora": {"n": 2}}, {"arrow_config": {"top_k": 3}},
        {"layer_replication": [[0, 4], [2, 5]]}, {"target_parameters": ["proj.weight"]},
    ],
)  # fmt: skip
def test_what_is_more_than_a_product_is_refused_wherever_it_is_said(change: dict[str, Any], tmp_path: Path) -> None:
    down, up = pair(2)
    config = {"peft_type": "LORA", "lora_alpha": 2, **change}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    stem = f"base_model.model.{PATH}"
    save_file({f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}, tmp_path / "adapter_model.safetensors")
    (key,) = change
    with pytest.raises(AdapterFileError, match=f"adapter_config.json: {key} is"):
        conversion.read(tmp_path, SD1)
    packed = {f"unet.{name}": value for name, value in config.items()}
    save_file(
        {f"unet.{PATH}.lora_A.weight": down, f"unet.{PATH}.lora_B.weight": up},
        tmp_path / "x.safetensors",
        {"lora_adapter_metadata": json.dumps(packed)},
    )
    with pytest.raises(AdapterFileError, match=f"x.safetensors: {key} is"):
        load_file(tmp_path / "x.safetensors")


def test_every_variant_that_peft_has_is_known(tmp_path: Path) -> None:
    """A new one has to be looked at: whether the product of the two matrices is still all that is added."""
    variants = {field.name for field in dataclasses.fields(LoraConfig) if field.metadata.get("is_lora_variant")}
    looked_at = {"use_dora", "velora_config"}  # DoRA is read; VeLoRA changes the backward pass alone
    refused = set()
    for key in variants - looked_at:
        (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "lora_alpha": 1, key: [1]}))
        save_file({f"base_model.model.{PATH}.lora_A.weight": torch.ones(1, 1)}, tmp_path / "adapter_model.safetensors")
        with pytest.raises(AdapterFileError, match=key):
            conversion.read(tmp_path, SD1)
        refused.add(key)
    assert refused == variants - looked_at
    assert looked_at <= variants


@pytest.mark.parametrize("alpha", [1, 1.0, torch.tensor(1.0)])
@pytest.mark.parametrize("holder", [None, "unet"])
def test_a_plain_number_is_an_alpha_like_any_other(alpha: Any, holder: str | None, tmp_path: Path) -> None:
    down, up = pair(4)
    content: Any = {f"{STEM}.lora_down.weight": down, f"{STEM}.lora_up.weight": up, f"{STEM}.alpha": alpha}
    torch.save(content if holder is None else {holder: content, "epoch": 3}, tmp_path / "slider.pt")
    adapter, _ = conversion.read(tmp_path / "slider.pt", NOBODY)
    torch.testing.assert_close(product(only(adapter)), up.double() @ down.double() / 4, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        ({f"{STEM}.scale": 0.5}, rf"{STEM}\.scale' is of no known layout"),
        ({f"{STEM}.alpha": 10**400}, "alpha must be one finite number"),
        ({"alpha": 2}, "it holds alpha = 2 for all its modules"),
        ({"network_alpha": 1.0}, r"it holds network_alpha = 1\.0 for all"),
        ({"scale": 0.5}, r"it holds scale = 0\.5 for all"),
        ({"unet": {f"{STEM}2.lora_up.weight": torch.ones(1, 1)}}, "holds unet and tensors"),
    ],
)
def test_what_scales_a_pickle_is_never_dropped(more: dict[str, Any], complaint: str, tmp_path: Path) -> None:
    down, up = pair(4)
    torch.save({f"{STEM}.lora_down.weight": down, f"{STEM}.lora_up.weight": up, **more}, tmp_path / "x.pt")
    with pytest.raises(AdapterFileError, match=complaint):
        conversion.read(tmp_path / "x.pt", NOBODY)


def half(path: Path, alpha: float) -> tuple[Path, Tensor]:
    """A kohya file of float16 whose scale float16 cannot hold, and the change that it stands for."""
    down, up = pair(3, dtype=torch.float16)
    tensors = {f"{STEM}.lora_down.weight": down, f"{STEM}.lora_up.weight": up, f"{STEM}.alpha": torch.tensor(alpha)}
    save_file(tensors, path)
    return path, up.double() @ down.double() * alpha / 3


def test_lazily_or_not_a_half_precision_file_is_the_same_adapter(tmp_path: Path) -> None:
    file, exact = half(tmp_path / "x.safetensors", 1.0)
    eager = load_file(file)
    assert eager.manifest.increment.dtype == "float32"
    beside = tmp_path / "x.json"
    info = eager.manifest.increment.model_copy(
        update={"sha256": conversion.read(file, NOBODY)[0].manifest.recipe["converted"]["sha256"]}  # type: ignore[index,call-overload]
    )
    beside.write_text(eager.manifest.model_copy(update={"increment": info}).to_json())
    for manifest in (None, beside):
        for lazy in (False, True):
            adapter = load_file(file, manifest, lazy=lazy)
            torch.testing.assert_close(product(only(adapter)), exact, rtol=1e-6, atol=1e-6)


def test_what_a_lazily_loaded_file_saves_loads_again(tmp_path: Path) -> None:
    file, exact = half(tmp_path / "x.safetensors", 1.0)
    load_file(file, lazy=True).save(tmp_path / "saved.safetensors", tmp_path / "saved.json")
    conversion.write(load_file(file, lazy=True), conversion.writer_named("diffusers"), tmp_path / "written.safetensors")
    for name, beside in (("saved", tmp_path / "saved.json"), ("saved", None), ("written", None)):
        for lazy in (False, True):
            again = load_file(tmp_path / f"{name}.safetensors", beside, lazy=lazy)
            assert again.manifest.increment.dtype == "float32"
            torch.testing.assert_close(product(only(again)), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rank", [87, 129, 257])
def test_a_rank_that_the_dtype_cannot_hold_is_written_exactly(rank: int, tmp_path: Path) -> None:
    """Three of rank 87 stand side by side as one of 261, which bfloat16 rounds to 260."""
    increments: dict[str, Increment] = {
        f"transformer_blocks.0.attn.{layer}": LowRank(
            *(tensor + place for tensor in pair(rank, out=24, width=24, dtype=torch.bfloat16))
        )
        for place, layer in enumerate(("to_q", "to_k", "to_v"))
    }
    flux = random_eraser(topology("flux")).manifest
    adapter = Adapter(flux.model_copy(update={"increment": increment_info(increments)}), increments)
    conversion.write(adapter, conversion.writer_named("kohya"), tmp_path / "x.safetensors")
    alphas = {float(value) for key, value in load_tensors(tmp_path / "x.safetensors").items() if key.endswith("alpha")}
    assert alphas == {3.0 * rank}
    again = load_file(tmp_path / "x.safetensors")
    for path, increment in increments.items():
        assert torch.equal(product(again.increments[path]), product(increment))
        assert again.increments[path].dtype is torch.bfloat16
    unet = {PATH: LowRank(*pair(rank, dtype=torch.bfloat16))}
    sd1 = random_eraser(topology("sd1")).manifest
    Adapter(sd1.model_copy(update={"increment": increment_info(unet)}), unet).save(tmp_path / "own.safetensors")
    assert torch.equal(product(only(load_file(tmp_path / "own.safetensors"))), product(unet[PATH]))


def test_parts_of_a_fused_projection_keep_the_precision_of_the_most_precise(tmp_path: Path) -> None:
    """One alpha is a power of two of the rank's, and its part stays float16; the others have to be float32."""
    tensors: dict[str, Tensor] = {}
    for layer, alpha in (("to_q", 3.0), ("to_k", 4.0), ("to_v", 3.0)):
        down, up = pair(4, out=3072, width=3072, dtype=torch.float16)
        stem = f"transformer.transformer_blocks.0.attn.{layer}"
        tensors |= {f"{stem}.lora_A.weight": down + len(tensors), f"{stem}.lora_B.weight": up}
        tensors[f"{stem}.alpha"] = torch.tensor(alpha)
    save_file(tensors, tmp_path / "x.safetensors")
    adapter, _ = conversion.read(tmp_path / "x.safetensors", NOBODY)
    assert {one.dtype for one in adapter.increments.values()} == {torch.float16, torch.float32}
    conversion.write(adapter, conversion.writer_named("kohya"), tmp_path / "kohya.safetensors")
    again, _ = conversion.read(tmp_path / "kohya.safetensors", NOBODY)
    assert again.increments.keys() == adapter.increments.keys()
    for path, increment in adapter.increments.items():
        shape = torch.zeros(increment.weight_shape or ())
        torch.testing.assert_close(
            again.increments[path].delta_for(shape), increment.delta_for(shape), rtol=1e-6, atol=1e-5
        )
