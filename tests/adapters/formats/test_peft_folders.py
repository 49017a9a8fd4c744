"""PEFT's other kinds, and tensors that it saves whole beside its own: what PEFT computes with them is what is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import BOFTConfig, IA3Config, LoHaConfig, LoKrConfig, LoraConfig, OFTConfig, get_peft_model
from safetensors.torch import load_file as load_tensors
from safetensors.torch import save_file
from topologies import output_with, predict, topology

from spm_hub.adapters import conversion
from spm_hub.adapters.conversion import BaseModel, Description
from spm_hub.adapters.formats.module_names import flat
from spm_hub.errors import AdapterFileError, NotFoundError

LAYERS = ["attn2.to_v", "attn1.to_out.0", "proj_in"]
SD1 = Description(family="sd1")
KINDS: dict[str, Any] = {
    "loha": LoHaConfig(r=3, alpha=5, target_modules=LAYERS, init_weights=False, alpha_pattern={"to_v": 2}),
    "lokr": LoKrConfig(r=2, alpha=3, target_modules=LAYERS, init_weights=False, rank_pattern={"to_v": 1}),
    "lokr, both factors whole": LoKrConfig(r=64, alpha=16, target_modules=LAYERS, init_weights=False),
    "ia3": IA3Config(target_modules=[*LAYERS, "ff.net.2"], feedforward_modules=["ff.net.2", "proj_in"]),
    "oft": OFTConfig(oft_block_size=4, target_modules=LAYERS, init_weights=False, use_cayley_neumann=False),
    "oft by a series": OFTConfig(oft_block_size=2, target_modules=LAYERS, init_weights=False, use_cayley_neumann=True),
    "oft by three terms": OFTConfig(
        oft_block_size=4, target_modules=LAYERS, init_weights=False, use_cayley_neumann=True,
        num_cayley_neumann_terms=3, block_share=True,
    ),
    "biases too": LoraConfig(r=2, lora_alpha=3, target_modules=LAYERS, init_lora_weights=False, bias="all"),
    "a layer saved whole": LoraConfig(
        r=2, lora_alpha=3, target_modules=LAYERS, init_lora_weights=False, modules_to_save=["ff.net.2", "norm1"]
    ),
}  # fmt: skip


def saved(config: Any, folder: Path) -> torch.Tensor:
    """Save an adapter of random numbers in PEFT's way; return what PEFT predicts with it."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = get_peft_model(topology("sd1"), config)
        for name, parameter in model.named_parameters():
            if "ia3_l" in name or "oft_R" in name:
                parameter += 0.1 * torch.randn_like(parameter)
            elif "modules_to_save" in name or (name.endswith("bias") and getattr(config, "bias", None) == "all"):
                parameter += 0.05 * torch.randn_like(parameter)
    model.eval().save_pretrained(folder)
    return predict(model.get_base_model())


@pytest.mark.parametrize("kind", KINDS)
def test_a_conversion_is_what_peft_makes_of_the_base(kind: str, tmp_path: Path) -> None:
    expected, base = saved(KINDS[kind], tmp_path), BaseModel(topology("sd1"), "here")
    adapter, read_as = conversion.read(tmp_path, SD1, base)
    assert read_as == "peft"
    assert (output_with(base.denoiser, adapter) - expected).abs().max() <= 2e-5
    assert (predict(base.denoiser) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["ia3", "oft", "biases too", "a layer saved whole"])
def test_what_depends_on_the_base_asks_for_it(kind: str, tmp_path: Path) -> None:
    saved(KINDS[kind], tmp_path)
    with pytest.raises(AdapterFileError, match="--model M"):
        conversion.read(tmp_path, SD1)


def test_other_kinds_and_missing_configs_are_refused_with_what_helps(tmp_path: Path) -> None:
    saved(BOFTConfig(boft_block_size=2, target_modules=LAYERS), tmp_path / "boft")
    with pytest.raises(AdapterFileError, match=r"boft_R.* is of another kind of PEFT's") as refused:
        conversion.read(tmp_path / "boft", SD1, BaseModel(topology("sd1"), "here"))
    assert "spmhub convert MERGED --model M" in str(refused.value)
    saved(KINDS["oft"], tmp_path / "oft")
    config = json.loads((tmp_path / "oft" / "adapter_config.json").read_text())
    for change in (
        {"coft": True},
        {"peft_type": "ADALORA"},
        {"num_cayley_neumann_terms": "x", "use_cayley_neumann": 1},
    ):
        (tmp_path / "oft" / "adapter_config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(AdapterFileError, match="merge_and_unload"):
            conversion.read(tmp_path / "oft", SD1, BaseModel(topology("sd1"), "here"))
    (tmp_path / "oft" / "adapter_config.json").unlink()
    with pytest.raises(NotFoundError, match=r"adapter_config\.json, which is missing"):
        conversion.read(tmp_path / "oft", SD1, BaseModel(topology("sd1"), "here"))


def test_a_whole_state_dict_of_peft_is_its_changes(tmp_path: Path) -> None:
    """With every weight of the base, and the adapter's name in each key, as `state_dict()` gives them."""
    config = LoraConfig(r=2, lora_alpha=2, target_modules=LAYERS, init_lora_weights=False)
    expected = saved(config, tmp_path)
    model = get_peft_model(topology("sd1"), config)
    pairs = load_tensors(tmp_path / "adapter_model.safetensors")
    for key, tensor in pairs.items():
        model.state_dict()[key.replace(".weight", ".default.weight")].copy_(tensor)
    whole = {key.removeprefix("base_model.model."): tensor for key, tensor in model.state_dict().items()}
    save_file({f"unet.{key}": tensor.contiguous() for key, tensor in whole.items()}, tmp_path / "x.safetensors")
    base = BaseModel(topology("sd1"), "here")
    adapter, _ = conversion.read(tmp_path / "x.safetensors", SD1, base)
    assert adapter.manifest.increment.kind == "low_rank"
    assert (output_with(base.denoiser, adapter) - expected).abs().max() <= 2e-5


def test_a_bias_on_the_keys_of_an_attention_changes_nothing(tmp_path: Path) -> None:
    """diffusers' own attention with and without it: a softmax takes away what all scores of a query share."""
    path = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    denoiser = topology("sd1")
    layer = denoiser.get_submodule(path)
    before = predict(denoiser)
    random = torch.Generator().manual_seed(0)
    layer.bias = torch.nn.Parameter(torch.randn(len(layer.weight), generator=random))
    assert (predict(denoiser) - before).abs().max() <= 1e-5
    base = topology("sd1")
    pair = {
        f"unet.{path}.lora_A.weight": torch.randn(2, layer.weight.shape[1], generator=random),
        f"unet.{path}.lora_B.weight": torch.randn(len(layer.weight), 2, generator=random),
        f"unet.{path}.lora_B.bias": torch.randn(len(layer.weight), generator=random),
    }
    save_file(pair, tmp_path / "x.safetensors")
    adapter, _ = conversion.read(tmp_path / "x.safetensors", SD1)
    assert adapter.manifest.increment.kind == "low_rank"
    output_with(base, adapter)  # attaches: nothing is left for a bias that the layer does not have
    for other in ("to_q", "to_v"):
        save_file({key.replace("to_k", other): one for key, one in pair.items()}, tmp_path / "x.safetensors")
        with pytest.raises(AdapterFileError, match=f"{other} has the change of a bias, and that layer has no bias"):
            conversion.read(tmp_path / "x.safetensors", SD1)
    save_file({f"lora_unet_{flat(path)}.diff_b": torch.ones(len(layer.weight))}, tmp_path / "x.safetensors")
    with pytest.raises(AdapterFileError, match="biases of keys alone"):
        conversion.read(tmp_path / "x.safetensors", SD1)
