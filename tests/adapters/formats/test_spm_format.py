"""Layouts of keys: official and foreign files, exact names and shapes, and what plain diffusers makes of ours."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from pico import pico_pipeline
from torch import Tensor, nn

from spm_hub.adapters.adapter import Adapter, increment_info, load_file
from spm_hub.adapters.formats import diffusers_lora, spm
from spm_hub.adapters.formats.module_names import flat
from spm_hub.adapters.formats.reading import read_increments
from spm_hub.adapters.formats.slots import Slot
from spm_hub.adapters.increments import Dense, Increment, LowRank, Mask
from spm_hub.adapters.manifest import Base, Concept, Manifest
from spm_hub.errors import AdapterFileError

CONFORMANCE = Path(__file__).resolve().parents[4] / "shared" / "conformance"
needs_conformance = pytest.mark.skipif(
    not CONFORMANCE.is_dir(), reason="the official files are not beside this checkout"
)

ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
FAMILIES = {"transformer_blocks": "sd3", "single_transformer_blocks": "flux"}


def adapter_of(increments: dict[str, Increment], family: str = "sd1") -> Adapter:
    manifest = Manifest(
        name="snoopy",
        concept=Concept(target="snoopy", aliases=("beagle",)),
        increment=increment_info(increments),
        base=Base(family=family, id="pico", fingerprint="0" * 64),
        recipe={},
    )
    return Adapter(manifest, increments)


def low_rank(weight_shape: tuple[int, ...], rank: int, random: torch.Generator) -> LowRank:
    kernel = [1] * (len(weight_shape) - 2)
    return LowRank(
        torch.randn(rank, *weight_shape[1:], generator=random),
        torch.randn(weight_shape[0], rank, *kernel, generator=random),
    )


@pytest.mark.parametrize(
    ("key", "slot"),
    [
        ("lora_unet_mid_block_attentions_0_proj_in.lora_down.weight", Slot("mid_block_attentions_0_proj_in", "down")),
        ("lora_unet_mid_block_attentions_0_proj_in.lora_up.weight", Slot("mid_block_attentions_0_proj_in", "up")),
        ("lora_unet_mid_block_attentions_0_proj_in.alpha", Slot("mid_block_attentions_0_proj_in", "alpha")),
        (
            "lora_unet_unet_mid_block_attentions_0_proj_in_lora_down.weight",
            Slot("mid_block_attentions_0_proj_in", "down"),
        ),
        ("lora_unet_conv_in.diff", Slot("conv_in", "delta")),
        ("lora_unet_conv_in.diff_b", Slot("conv_in", "delta_bias")),
        ("transformer.transformer_blocks.0.attn.to_k.lora_A.weight", Slot("transformer_blocks.0.attn.to_k", "down")),
        ("transformer.transformer_blocks.0.ff.net.2.keep_in", Slot("transformer_blocks.0.ff.net.2", "keep_in")),
        ("lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", None),
        ("lora_unet_mid_block_attentions_0_proj_in.lora_mid.weight", None),
    ],
)
def test_keys_of_our_layout(key: str, slot: Slot | None) -> None:
    assert spm.parse_key(key) == slot


@pytest.mark.parametrize(
    ("key", "slot"),
    [
        ("mid_block.attn1.processor.to_q_lora.down.weight", Slot("mid_block.attn1.to_q", "down")),
        ("unet.mid_block.attn1.processor.to_out_lora.up.weight", Slot("mid_block.attn1.to_out.0", "up")),
        ("unet.mid_block.attn1.to_out.0.lora_B.weight", Slot("mid_block.attn1.to_out.0", "up")),
        ("unet.mid_block.attn1.to_k.lora.down.weight", Slot("mid_block.attn1.to_k", "down")),
        ("mid_block.attn1.to_k.weight", None),
    ],
)
def test_keys_of_diffusers(key: str, slot: Slot | None) -> None:
    assert diffusers_lora.parse_key(key) == slot


@needs_conformance
def test_an_sd14_adapter_has_exactly_the_official_keys_and_shapes() -> None:
    official = {
        key: tuple(shape) for key, shape in json.loads((CONFORMANCE / "spm_sd14_keys.json").read_text()).items()
    }
    text = 768
    random = torch.Generator().manual_seed(0)
    increments: dict[str, Increment] = {}
    for block, width, count in [
        *((f"down_blocks.{i}", (320, 640, 1280)[i], 2) for i in range(3)),
        ("mid_block", 1280, 1),
        *((f"up_blocks.{i}", (0, 1280, 640, 320)[i], 3) for i in range(1, 4)),
    ]:
        for number in range(count):
            root = f"{block}.attentions.{number}"
            inner = f"{root}.transformer_blocks.0"
            shapes: dict[str, tuple[int, ...]] = {
                f"{root}.proj_in": (width, width, 1, 1),
                f"{root}.proj_out": (width, width, 1, 1),
                f"{inner}.ff.net.0.proj": (8 * width, width),
                f"{inner}.ff.net.2": (width, 4 * width),
            }
            for attention, source in (("attn1", width), ("attn2", text)):
                shapes |= {
                    f"{inner}.{attention}.to_q": (width, width),
                    f"{inner}.{attention}.to_k": (width, source),
                    f"{inner}.{attention}.to_v": (width, source),
                    f"{inner}.{attention}.to_out.0": (width, width),
                }
            increments |= {path: low_rank(shape, 1, random) for path, shape in shapes.items()}
    assert len(increments) == 192
    assert {key: tuple(tensor.shape) for key, tensor in spm.to_tensors(increments).items()} == official
    assert sum(parameter.numel() for i in increments.values() for parameter in i.tensors().values()) == 423_936


@needs_conformance
@pytest.mark.parametrize("name", ["snoopy", "nudity"])
def test_official_spm_files_load_as_they_are(name: str) -> None:
    adapter = load_file(CONFORMANCE / "spm_official" / f"{name}.safetensors")
    assert (adapter.name, adapter.manifest.concept.target) == (name, name)
    assert adapter.manifest.base.family == "sd1"
    assert (adapter.manifest.increment.kind, adapter.manifest.increment.rank) == ("low_rank", 1)
    assert len(adapter.increments) == 48
    proj_in = adapter.increments["down_blocks_0_attentions_0_proj_in"]
    assert proj_in.weight_shape == (32, 32, 1, 1)


@needs_conformance
def test_diffusers_processor_keys_load() -> None:
    adapter = load_file(CONFORMANCE / "lora" / "catundchat.safetensors")
    assert len(adapter.increments) == 128
    assert adapter.increments["mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0"].weight_shape == (1280, 1280)
    assert adapter.increments["mid_block.attentions.0.transformer_blocks.0.attn2.to_k"].weight_shape == (1280, 768)
    assert adapter.manifest.licence == "unknown"


@needs_conformance
@pytest.mark.parametrize("name", ["cloneofsimo_analog_svd_rank4", "cloneofsimo_lora_disney"])
def test_layers_known_by_number_only_are_refused_by_name(name: str) -> None:
    with pytest.raises(AdapterFileError, match="of a text encoder"):
        load_file(CONFORMANCE / "lora" / f"{name}.safetensors")


@pytest.mark.parametrize("alpha", [1.0, 0.5, 3.0, -4.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_alpha_is_folded_into_up(alpha: float, dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(0)
    pair = low_rank((5, 4), 3, random).to(dtype=dtype)
    tensors = {
        f"lora_unet_{flat(ATTENTION)}.lora_down.weight": pair.down,
        f"lora_unet_{flat(ATTENTION)}.lora_up.weight": pair.up,
    }
    bare = read_increments(Path("x"), tensors)[flat(ATTENTION)]
    scaled = read_increments(Path("x"), {**tensors, f"lora_unet_{flat(ATTENTION)}.alpha": torch.tensor(alpha)})
    weight = torch.zeros(5, 4)
    expected = pair.up.double() @ pair.down.double()
    torch.testing.assert_close(bare.delta_for(weight).double(), expected, rtol=1e-5, atol=1e-5)
    found = scaled[flat(ATTENTION)].delta_for(weight).double()
    torch.testing.assert_close(found, expected * alpha / 3, rtol=1e-5, atol=1e-5)


def test_ranks_that_differ_are_padded_to_one_alpha() -> None:
    random = torch.Generator().manual_seed(0)
    increments = {ATTENTION: low_rank((5, 4), 1, random), "mid_block.conv": low_rank((3, 2, 3, 3), 4, random)}
    tensors = spm.to_tensors(increments)
    assert {float(tensor) for key, tensor in tensors.items() if key.endswith("alpha")} == {4.0}
    assert {tensor.shape[0] for key, tensor in tensors.items() if "down" in key and "lora_down" in key} == {4}
    again = read_increments(Path("x"), tensors)
    for path, increment in increments.items():
        weight = torch.zeros(increment.weight_shape)
        torch.testing.assert_close(again[flat(path)].delta_for(weight), increment.delta_for(weight))


@pytest.mark.parametrize(
    "increments",
    [
        {
            ATTENTION.replace("to_q", "to_out.0"): Dense(torch.randn(4, 4), torch.randn(4)),
            "conv_in": Dense(torch.randn(4, 2, 3, 3)),
        },
        {ATTENTION: Mask(torch.tensor([True, False]), 0), "conv_in": Mask(torch.tensor([False, True, True]), 1)},
        {"transformer_blocks.0.attn.to_k": LowRank(torch.randn(2, 4), torch.randn(5, 2))},
        {"single_transformer_blocks.0.proj_out": Mask(torch.tensor([True, False]), 1)},
    ],
    ids=["dense", "mask", "transformer", "transformer mask"],
)
def test_every_kind_comes_back_bit_for_bit(increments: dict[str, Increment], tmp_path: Path) -> None:
    family = next((name for start, name in FAMILIES.items() if next(iter(increments)).startswith(start)), "sd1")
    adapter_of(increments, family).save(tmp_path / "a.safetensors")
    again = load_file(tmp_path / "a.safetensors").increments
    assert again.keys() == increments.keys()
    for path, increment in increments.items():
        tensors = again[path].tensors()
        assert tensors.keys() == increment.tensors().keys()
        assert all(torch.equal(tensors[part], tensor) for part, tensor in increment.tensors().items())


@pytest.mark.parametrize(
    ("tensors", "complaint"),
    [
        ({}, "no tensors"),
        ({"lora_unet_a.lora_down.weight": torch.ones(1, 4)}, "a: down is no increment"),
        ({"lora_unet_a.lora_down.weight": torch.ones(1, 4), "lora_unet_a.lora_up.weight": torch.ones(4, 2)}, "rank"),
        ({"lora_unet_a.lora_down.weight": torch.ones(1, 4), "lora_unet_a.diff": torch.ones(4, 4)}, "delta"),
        ({"lora_unet_a.diff": torch.ones(4, 4, dtype=torch.int32)}, "torch.int32"),
        ({"lora_unet_a.keep_out": torch.tensor([0, 2], dtype=torch.uint8)}, "zeros and ones"),
        (
            {
                "lora_unet_a.lora_down.weight": torch.ones(1, 4),
                "lora_unet_a.lora_up.weight": torch.ones(4, 1),
                "lora_unet_a.alpha": torch.ones(2),
            },
            "alpha",
        ),
        ({"lora_te1_a.lora_down.weight": torch.ones(1, 4)}, "text encoder"),
        ({"lora_unet_a.hada_w1_a": torch.ones(1, 4)}, "spmhub convert x.safetensors"),
        ({"lora_unet_a.hada_t1": torch.ones(1, 4)}, "LyCORIS"),
        ({"conv_in.weight": torch.ones(4, 4)}, "spmhub convert x.safetensors"),
        ({"conv_in.scale": torch.ones(4, 4)}, "'conv_in.scale' is of no known layout"),
        (
            {"lora_unet_a.lora_down.weight": torch.ones(1, 4), "lora_unet_unet_a_lora_down.weight": torch.ones(1, 4)},
            "two tensors for down",
        ),
    ],
)
def test_what_is_no_eraser_is_refused(tensors: dict[str, Tensor], complaint: str) -> None:
    with pytest.raises(AdapterFileError) as caught:
        read_increments(Path("x.safetensors"), tensors)
    assert complaint in str(caught.value)
    assert "x.safetensors" in str(caught.value)


def unet_targets(unet: nn.Module) -> dict[str, nn.Module]:
    return {
        path: module
        for path, module in unet.named_modules()
        if ".attentions." in path and isinstance(module, nn.Linear | nn.Conv2d)
    }


def unet_output(pipe: StableDiffusionPipeline) -> Tensor:
    random = torch.Generator().manual_seed(5)
    states = torch.randn(2, 6, pipe.unet.config.cross_attention_dim, generator=random)
    with torch.no_grad():
        output = pipe.unet(torch.randn(2, 4, 8, 8, generator=random), 500, encoder_hidden_states=states)
    return output.sample.clone()


@pytest.mark.parametrize("ranks", [(1, 1), (4, 4), (1, 3)], ids=["rank 1", "rank 4", "ranks that differ"])
def test_plain_diffusers_loads_our_low_rank_files(ranks: tuple[int, int], tmp_path: Path) -> None:
    pipe = pico_pipeline()
    random = torch.Generator().manual_seed(1)
    targets = unet_targets(pipe.unet)
    assert {type(module) for module in targets.values()} == {nn.Linear, nn.Conv2d}
    increments: dict[str, Increment] = {
        path: low_rank(tuple(module.weight.shape), ranks[index % 2], random)
        for index, (path, module) in enumerate(sorted(targets.items()))
    }
    scaled = {path: Dense(0.02 * increment.delta_for(targets[path].weight)) for path, increment in increments.items()}
    increments = {path: LowRank(i.down, 0.02 * i.up) for path, i in increments.items() if isinstance(i, LowRank)}
    adapter_of(increments).save(tmp_path / "pytorch_lora_weights.safetensors")

    base = unet_output(pipe)
    pipe.load_lora_weights(tmp_path / "pytorch_lora_weights.safetensors")
    through_diffusers = unet_output(pipe)
    pipe.unload_lora_weights()
    assert torch.equal(unet_output(pipe), base)
    with torch.no_grad():
        for path, module in unet_targets(pipe.unet).items():
            module.weight += scaled[path].delta
    folded = unet_output(pipe)
    assert (folded - base).abs().max() > 1e-2
    assert (through_diffusers - folded).abs().max() < 1e-5
