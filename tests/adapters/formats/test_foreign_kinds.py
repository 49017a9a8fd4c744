"""Files whose change has to be worked out: numbered layers, magnitudes, cores; and parts that are no denoiser's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file as load_tensors
from safetensors.torch import save_file
from topologies import output_with, predict, topology
from torch import Tensor, nn

from spm_hub.adapters import conversion
from spm_hub.adapters.adapter import load_file
from spm_hub.adapters.conversion import BaseModel, Description
from spm_hub.adapters.formats.module_names import flat
from spm_hub.adapters.increments import Dense, LowRank
from spm_hub.errors import AdapterFileError

CONFORMANCE = Path(__file__).resolve().parents[4] / "shared" / "conformance"
needs_conformance = pytest.mark.skipif(not CONFORMANCE.is_dir(), reason="no conformance files beside this checkout")
NOBODY = Description()
DENOISER_ONLY = Description(without_text_encoder=True)
BLOCK = "mid_block.attentions.0.transformer_blocks.0"


def walked(classes: set[str]) -> list[str]:
    """The linear layers of SD1 as cloneofsimo/lora walks them, on the diffusers of today."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768)
    return [
        f"{root}.{name}"
        for root, module in unet.named_modules()
        if type(module).__name__ in classes
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear)
    ]


def numbered(paths: list[str]) -> dict[str, Tensor]:
    """A file of rank 1 with these layers, each with numbers of its own."""
    with torch.device("meta"):
        layers = dict(UNet2DConditionModel(cross_attention_dim=768).named_modules())
    tensors = {}
    for number, path in enumerate(paths):
        out, width = layers[path].weight.shape  # type: ignore[union-attr,misc]
        tensors[f"unet:{number}:up"] = torch.full((int(out), 1), float(number + 1))
        tensors[f"unet:{number}:down"] = torch.ones(1, int(width))
    return tensors


@pytest.mark.parametrize("classes", [{"Attention", "GEGLU"}, {"Attention"}, {"GEGLU"}])
@pytest.mark.parametrize("stated", [True, False])
def test_numbered_layers_are_those_that_their_numbers_walk_to(classes: set[str], stated: bool, tmp_path: Path) -> None:
    paths = walked(classes)
    header = {"unet": json.dumps(sorted(classes))} if stated else None
    save_file(numbered(paths), tmp_path / "x.safetensors", header)
    adapter, read_as = conversion.read(tmp_path / "x.safetensors", Description(family="sd1"))
    assert (read_as, len(adapter.increments)) == ("cloneofsimo", len(paths))
    found = {path: float(one.up[0, 0]) for path, one in adapter.increments.items() if isinstance(one, LowRank)}
    assert found == {path: float(number + 1) for number, path in enumerate(paths)}
    with pytest.raises(AdapterFileError, match="spmhub convert"):
        load_file(tmp_path / "x.safetensors")


def test_numbers_that_walk_nowhere_are_refused(tmp_path: Path) -> None:
    whole = numbered(walked({"Attention", "GEGLU"}))
    wrong_shape = whole | {"unet:9:up": torch.ones(640, 1)}
    without_one = {key: value for key, value in whole.items() if not key.startswith("unet:9:")}
    half = {key: value for key, value in whole.items() if key != "unet:9:up"}
    for tensors in (wrong_shape, without_one, half):
        save_file(tensors, tmp_path / "x.safetensors")
        with pytest.raises(AdapterFileError, match=r"14[34] numbered layers fit no U-Net"):
            conversion.read(tmp_path / "x.safetensors", NOBODY)
    save_file(whole, tmp_path / "x.safetensors", {"unet": '["ResnetBlock2D", "Attention"]'})
    with pytest.raises(AdapterFileError, match="ResnetBlock2D"):
        conversion.read(tmp_path / "x.safetensors", NOBODY)


@needs_conformance
@pytest.mark.parametrize(("name", "left_out"), [("cloneofsimo_analog_svd_rank4", 96), ("cloneofsimo_lora_disney", 98)])
def test_the_real_numbered_files(name: str, left_out: int) -> None:
    file = CONFORMANCE / "lora" / f"{name}.safetensors"
    with pytest.raises(AdapterFileError, match="text encoder") as refused:
        conversion.read(file, NOBODY)
    assert "--without-text-encoder" in str(refused.value)
    adapter, _ = conversion.read(file, DENOISER_ONLY)
    assert (adapter.manifest.base.family, len(adapter.increments)) == ("sd1", 144)
    assert adapter.manifest.recipe["converted"]["text_encoder_tensors_left_out"] == left_out  # type: ignore[index,call-overload]
    with torch.device("meta"):
        layers = dict(UNet2DConditionModel(cross_attention_dim=768).named_modules())
    tensors = load_tensors(file)
    products = {float(t.double().sum()) for key, t in tensors.items() if key.startswith("unet:") and key.endswith("up")}
    for path, one in adapter.increments.items():
        assert isinstance(one, LowRank)
        assert one.weight_shape == tuple(layers[path].weight.shape)  # type: ignore[union-attr,arg-type]
        assert float(one.up.double().sum()) in products
    # The first block of the file: one attention, feed-forward, the other attention, as diffusers had it in 2023.
    root = "down_blocks.0.attentions.0.transformer_blocks.0"
    for number, path in {0: "attn1.to_q", 3: "attn1.to_out.0", 4: "ff.net.0.proj", 6: "attn2.to_k"}.items():
        assert torch.equal(adapter.increments[f"{root}.{path}"].tensors()["up"], tensors[f"unet:{number}:up"])


def test_parts_of_text_encoders_are_left_out_only_when_asked(tmp_path: Path) -> None:
    random = torch.Generator().manual_seed(0)
    denoiser = {
        f"lora_unet_{flat(BLOCK)}_attn2_to_k.lora_down.weight": torch.randn(2, 768, generator=random),
        f"lora_unet_{flat(BLOCK)}_attn2_to_k.lora_up.weight": torch.randn(1280, 2, generator=random),
    }
    stems = ["lora_te_text_model_encoder_layers_0_mlp_fc1", "lora_te2_text_model_encoder_layers_0_mlp_fc1"]
    stems += ["text_encoder.text_model.encoder.layers.0.self_attn.q_proj"]
    texts = {f"{stem}.lora_{side}.weight": torch.ones(2, 2) for stem in stems for side in ("down", "up")}
    texts |= {"bundle_emb.x.string_to_param.*": torch.ones(2, 2)}
    save_file({**denoiser, **texts}, tmp_path / "x.safetensors")
    with pytest.raises(AdapterFileError, match="--without-text-encoder"):
        conversion.read(tmp_path / "x.safetensors", NOBODY)
    with pytest.raises(AdapterFileError, match="--without-text-encoder"):
        load_file(tmp_path / "x.safetensors")
    adapter, _ = conversion.read(tmp_path / "x.safetensors", DENOISER_ONLY)
    assert list(adapter.increments) == [f"{BLOCK}.attn2.to_k"]
    assert adapter.manifest.recipe["converted"]["text_encoder_tensors_left_out"] == len(texts)  # type: ignore[index,call-overload]
    torch.save({"unet": denoiser, "text_encoder": {"a.weight": torch.ones(2)}}, tmp_path / "x.pt")
    with pytest.raises(AdapterFileError, match="--without-text-encoder"):
        conversion.read(tmp_path / "x.pt", NOBODY)
    assert list(conversion.read(tmp_path / "x.pt", DENOISER_ONLY)[0].increments) == [f"{BLOCK}.attn2.to_k"]
    save_file(texts, tmp_path / "x.safetensors")
    with pytest.raises(AdapterFileError, match="nothing but parts of a text encoder"):
        conversion.read(tmp_path / "x.safetensors", DENOISER_ONLY)


@pytest.mark.parametrize("spelling", ["peft", "diffusers", "lycoris"])
def test_dora_is_the_dense_change_that_peft_makes_of_it(spelling: str, tmp_path: Path) -> None:
    denoiser = topology("sd1")
    base = BaseModel(topology("sd1"), "here")
    config = LoraConfig(
        r=3, lora_alpha=2, target_modules=["attn2.to_k", "proj_in", "conv1"], use_dora=True, init_lora_weights=False
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = get_peft_model(denoiser, config)
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter *= 1 + 0.3 * torch.rand_like(parameter)
    expected = predict(model.get_base_model())
    model.save_pretrained(tmp_path / "lora")
    place = tmp_path / "lora" / "adapter_model.safetensors"
    tensors = load_tensors(place)
    about = Description(family="sd1")
    if spelling != "peft":
        stems = {key: key.removeprefix("base_model.model.") for key in tensors}
        place = tmp_path / "x.safetensors"
        if spelling == "diffusers":
            config_text = json.dumps({"unet.lora_alpha": 2, "unet.use_dora": True})
            save_file(
                {f"unet.{stem}": tensors[key] for key, stem in stems.items()}, place,
                {"lora_adapter_metadata": config_text},
            )  # fmt: skip
        else:
            named: dict[str, Tensor] = {}
            for key, stem in stems.items():
                module, part = stem.split(".lora_")
                theirs = {"A.weight": "lora_down.weight", "B.weight": "lora_up.weight"}.get(part, "dora_scale")
                value = tensors[key].flatten()[:, None] if theirs == "dora_scale" else tensors[key]
                kernel = [1, 1] if ".conv1" in f".{module}" or "proj_in" in module else []
                named[f"lora_unet_{flat(module)}.{theirs}"] = (
                    value.reshape(len(value), 1, *kernel) if theirs == "dora_scale" else value
                )
                named[f"lora_unet_{flat(module)}.alpha"] = torch.tensor(2.0)
            save_file(named, place)
    with pytest.raises(AdapterFileError, match="--model M"):
        conversion.read(place, about)
    adapter, _ = conversion.read(place, about, base)
    assert adapter.manifest.increment.kind == "dense"
    assert (output_with(base.denoiser, adapter) - expected).abs().max() <= 1e-5
    assert (predict(base.denoiser) - expected).abs().max() > 1e-3


def test_dora_without_its_magnitudes_is_refused(tmp_path: Path) -> None:
    stem = f"unet.{BLOCK}.attn2.to_k"
    tensors = {f"{stem}.lora_A.weight": torch.ones(1, 768), f"{stem}.lora_B.weight": torch.ones(1280, 1)}
    header = {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 2, "unet.use_dora": True})}
    save_file(tensors, tmp_path / "x.safetensors", header)
    for read in (lambda path: conversion.read(path, NOBODY), load_file):
        with pytest.raises(AdapterFileError, match="no lora_magnitude_vector"):
            read(tmp_path / "x.safetensors")


def test_magnitudes_of_the_inputs(tmp_path: Path) -> None:
    """LyCORIS' other axis: the columns have lengths of their own, not the rows."""
    unet = topology("sd1")
    path = f"{BLOCK}.attn2.to_k"
    weight = unet.state_dict()[f"{path}.weight"].double()
    random = torch.Generator().manual_seed(0)
    down, up = torch.randn(2, weight.shape[1], generator=random), torch.randn(len(weight), 2, generator=random)
    lengths = 1 + torch.rand(1, weight.shape[1], generator=random)
    stem = f"lora_unet_{flat(path)}"
    save_file(
        {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.dora_scale": lengths},
        tmp_path / "x.safetensors",
    )
    adapter, _ = conversion.read(tmp_path / "x.safetensors", Description(family="sd1"), BaseModel(unet, "here"))
    moved = weight + up.double() @ down.double()
    exact = moved / moved.norm(dim=0, keepdim=True) * lengths.double() - weight
    found = adapter.increments[path].delta_for(weight).double()
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-6)
    save_file(
        load_tensors(tmp_path / "x.safetensors") | {f"{stem}.dora_scale": torch.ones(1, 7)}, tmp_path / "x.safetensors"
    )
    with pytest.raises(AdapterFileError, match=r"\(1, 7\) lengths"):
        conversion.read(tmp_path / "x.safetensors", Description(family="sd1"), BaseModel(unet, "here"))


@pytest.mark.parametrize("kind", ["locon", "loha", "lokr", "loha without core"])
def test_convolutions_with_a_core(kind: str, tmp_path: Path) -> None:
    """Against the convolutions one behind the other, which is how LyCORIS trains them."""
    random = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random)

    def by_convolving(core: Tensor, first: Tensor, last: Tensor) -> Tensor:
        """The kernel (out, in, 3, 3) that the three have together: what they make of single pixels."""
        width = first.shape[1]
        pixels = torch.zeros(width, width, 5, 5, dtype=torch.float64)
        pixels[range(width), range(width), 2, 2] = 1.0
        seen = nn.functional.conv2d(pixels, first.double()[:, :, None, None])
        seen = nn.functional.conv2d(nn.functional.conv2d(seen, core.double()), last.double()[:, :, None, None])
        return seen.permute(1, 0, 2, 3).flip(2, 3)

    out, width, rank = 6, 4, 2
    match kind:
        case "locon":
            parts = {"lora_down.weight": noise(rank, width, 1, 1), "lora_mid.weight": noise(rank, rank, 3, 3)}
            parts["lora_up.weight"] = noise(out, rank, 1, 1)
            down, mid, up = parts.values()
            exact = by_convolving(mid, down[:, :, 0, 0], up[:, :, 0, 0]) / 2
        case "loha":
            parts = {f"hada_t{i}": noise(rank, rank, 3, 3) for i in (1, 2)}
            parts |= {f"hada_w{i}_a": noise(rank, out) for i in (1, 2)} | {
                f"hada_w{i}_b": noise(rank, width) for i in (1, 2)
            }
            each = [by_convolving(parts[f"hada_t{i}"], parts[f"hada_w{i}_b"], parts[f"hada_w{i}_a"].T) for i in (1, 2)]
            exact = each[0] * each[1] / 2
        case "lokr":
            parts = {"lokr_w1": noise(2, 2), "lokr_t2": noise(rank, rank, 3, 3)}
            parts |= {"lokr_w2_a": noise(rank, out // 2), "lokr_w2_b": noise(rank, width // 2)}
            second = by_convolving(parts["lokr_t2"], parts["lokr_w2_b"], parts["lokr_w2_a"].T)
            exact = torch.einsum("ab,cdkl->acbdkl", parts["lokr_w1"].double(), second).reshape(out, width, 3, 3) / 2
        case _:
            parts = {f"hada_w{i}_a": noise(out, rank) for i in (1, 2)} | {
                f"hada_w{i}_b": noise(rank, width * 9) for i in (1, 2)
            }
            each = [parts[f"hada_w{i}_a"].double() @ parts[f"hada_w{i}_b"].double() for i in (1, 2)]
            exact = (each[0] * each[1] / 2).reshape(out, width, 3, 3)
    stem = "lora_unet_down_blocks_0_resnets_0_conv1"
    tensors = {f"{stem}.{part}": one.contiguous() for part, one in parts.items()} | {f"{stem}.alpha": torch.tensor(1.0)}
    save_file(tensors, tmp_path / "x.safetensors")
    adapter, _ = conversion.read(tmp_path / "x.safetensors", Description(family="sd1"))
    (increment,) = adapter.increments.values()
    assert isinstance(increment, LowRank if kind == "locon" else Dense)
    assert increment.weight_shape == (out, width, 3, 3)
    found = increment.delta_for(torch.zeros(out, width, 3, 3)).double()
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-5)


def test_what_is_still_unknown_is_refused_whole(tmp_path: Path) -> None:
    stem = f"lora_unet_{flat(BLOCK)}_attn2_to_k"
    pair = {
        f"{stem}.lora_down.weight": torch.ones(2, 768),
        f"{stem}.lora_up.weight": torch.ones(1280, 2),
    }
    for part in ("bm.weight", "hra_u", "lokr_t1", "absmax"):
        save_file({**pair, f"{stem}2.{part}": torch.ones(2, 2)}, tmp_path / "x.safetensors")
        with pytest.raises(AdapterFileError, match=part):
            conversion.read(tmp_path / "x.safetensors", NOBODY)


ALONE = {
    "kohya's text encoder": {
        f"lora_te_text_model_encoder_layers_0_self_attn_q_proj.{part}": torch.ones(2, 2)
        for part in ("lora_down.weight", "lora_up.weight", "alpha")
    },
    "kohya's second one": {"lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.ones(2, 2)},
    "PEFT's folder of a text encoder": {
        "base_model.model.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 2)
    },
    "diffusers' text encoder": {"text_encoder.text_model.encoder.layers.0.mlp.fc1.lora.down.weight": torch.ones(2, 2)},
    "transformers' whole text encoder": {"text_model.encoder.layers.0.mlp.fc1.weight": torch.ones(2, 2)},
    "a whole T5": {"encoder.block.0.layer.0.SelfAttention.q.weight": torch.ones(2, 2)},
    "cloneofsimo's embedding": {"<s1>": torch.ones(4), "<s2>": torch.ones(4)},
    "A1111's embedding": {"emb_params": torch.ones(2, 4)},
    "SDXL's embedding": {"clip_l": torch.ones(2, 4), "clip_g": torch.ones(2, 6)},
    "kohya's bundle": {"bundle_emb.cat.string_to_param.*": torch.ones(2, 4)},
    "a ControlNet": {"control_model.input_hint_block.0.weight": torch.ones(2, 2)},
    "a VAE": {"decoder.conv_in.weight": torch.ones(2, 2), "encoder.conv_in.weight": torch.ones(2, 2)},
}
NAMED = dict.fromkeys(("embedding", "bundle"), "textual-inversion") | {"ControlNet": "ControlNet", "VAE": "autoencoder"}


@pytest.mark.parametrize("kind", ALONE)
@pytest.mark.parametrize("ending", ["safetensors", "pt"])
def test_files_without_a_denoiser_are_named(kind: str, ending: str, tmp_path: Path) -> None:
    """Nothing that is named as a remedy fails in its turn."""
    file = tmp_path / f"x.{ending}"
    save_file(ALONE[kind], file) if ending == "safetensors" else torch.save(ALONE[kind], file)
    words = next((words for word, words in NAMED.items() if word in kind), "nothing but parts of a text encoder")
    readers = [lambda: conversion.read(file, NOBODY), lambda: conversion.read(file, DENOISER_ONLY)]
    readers += [lambda: load_file(file)] if ending == "safetensors" else []
    for read in readers:
        with pytest.raises(AdapterFileError, match=words) as refused:
            read()
        assert "--without-text-encoder" not in str(refused.value)
        assert refused.value.mend


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"string_to_token": {"*": 265}, "string_to_param": {"*": torch.ones(2, 4)}, "name": "x"}, "textual-inversion"),
        ({320: [{"linear.0.weight": torch.ones(2, 2)}], "layer_structure": [1, 2, 1]}, "hypernetwork"),
    ],
)
def test_pickles_of_another_kind_are_named(content: dict[Any, Any], words: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "x.pt")
    for said in (NOBODY, DENOISER_ONLY):
        with pytest.raises(AdapterFileError, match=words):
            conversion.read(tmp_path / "x.pt", said)


def test_the_command_for_a_denoisers_part_can_be_typed(tmp_path: Path) -> None:
    stem = f"lora_unet_{flat(BLOCK)}_attn2_to_k"
    pair = {f"{stem}.lora_down.weight": torch.ones(2, 768), f"{stem}.lora_up.weight": torch.ones(1280, 2)}
    file = tmp_path / "my style.safetensors"
    save_file({**pair, **ALONE["kohya's text encoder"]}, file)
    with pytest.raises(AdapterFileError) as refused:
        conversion.read(file, NOBODY)
    assert f"spmhub convert '{file}' --without-text-encoder" in str(refused.value)
    assert len(conversion.read(file, DENOISER_ONLY)[0].increments) == 1
