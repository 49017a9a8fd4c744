"""What the modules of another program's file are: of which part of a pipeline, of which family, and each only once."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from safetensors.torch import load_file as load_tensors
from safetensors.torch import save_file
from test_conversion import load_without_complaint, pipeline
from test_families import EXACT, SD35_MEDIUM
from topologies import output_with, predict, random_eraser, topology
from torch import Tensor, nn

from spm_hub.adapters import conversion
from spm_hub.adapters.adapter import Adapter, increment_info, load_file
from spm_hub.adapters.conversion import BaseModel, Description
from spm_hub.adapters.formats import module_names as names
from spm_hub.adapters.formats.module_names import flat
from spm_hub.adapters.increments import Dense, Increment, LowRank
from spm_hub.adapters.low_rank_approximation import truncate
from spm_hub.errors import AdapterFileError
from spm_hub.models.architectures import changeable, matrices, shape_of

NOBODY, DENOISER_ONLY = Description(), Description(without_text_encoder=True)
PATH = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
KOHYA = ("lora_down.weight", "lora_up.weight")
PEFT = ("lora_A.weight", "lora_B.weight")


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pair(stem: str, ends: tuple[str, str], out: int = 640, width: int = 768, seed: int = 0) -> dict[str, Tensor]:
    return {f"{stem}.{ends[0]}": noise(2, width, seed=seed), f"{stem}.{ends[1]}": noise(out, 2, seed=seed + 1)}


DENOISER = pair(f"unet.{PATH}", PEFT)
SPELLINGS = [
    f"lora_unet_{flat(PATH)}.lora_down.weight",
    "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k.lora_down.weight",
    "diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.lora_A.weight",
    f"model.diffusion_model.{PATH}.lora_A.weight",
    f"unet.{PATH}.lora_A.weight",
    f"{PATH}.lora_A.weight",
    f"unet.{PATH.replace('.to_k', '.processor.to_k_lora')}.down.weight",
]


@pytest.mark.parametrize(("first", "second"), [*pairwise(SPELLINGS), (SPELLINGS[0], SPELLINGS[4])])
def test_two_spellings_of_one_module_are_refused(first: str, second: str, tmp_path: Path) -> None:
    others = {"lora_down.": "lora_up.", "lora_A.": "lora_B.", "_lora.down.": "_lora.up."}
    tensors: dict[str, Tensor] = {}
    for seed, down in enumerate((first, second)):
        here = next(part for part in others if part in down)
        tensors |= {down: noise(2, 768, seed=seed), down.replace(here, others[here]): noise(640, 2, seed=seed)}
    assert len(tensors) == 4
    save_file(tensors, tmp_path / "x.safetensors")
    for read in (lambda path: conversion.read(path, NOBODY), load_file, lambda path: load_file(path, lazy=True)):
        with pytest.raises(AdapterFileError, match=r"twice|two tensors") as refused:
            read(tmp_path / "x.safetensors")
        for key in (first, second):
            assert key.rpartition(".lora_" if ".lora_" in key else "_lora.")[0] in str(refused.value)


def test_whole_weights_of_one_module_under_two_names_are_refused(tmp_path: Path) -> None:
    base = topology("sd1")
    weight = base.state_dict()[f"{PATH}.weight"]
    save_file({f"unet.{PATH}.weight": weight + 1, f"{PATH}.weight": weight + 2}, tmp_path / "x.safetensors")
    with pytest.raises(AdapterFileError, match=f"'{PATH}.weight' and 'unet.{PATH}.weight'"):
        conversion.read(tmp_path / "x.safetensors", NOBODY, BaseModel(base, "here"))


@pytest.mark.parametrize("ends", [PEFT, ("lora.down.weight", "lora.up.weight"), KOHYA])
@pytest.mark.parametrize(
    "root",
    [
        "text_encoder.text_model.encoder", "text_encoder_2.text_model.encoder", "text_model.encoder",
        "text_encoders.clip_l.transformer.text_model.encoder", "base_model.model.text_model.encoder",
        "cond_stage_model.transformer.text_model.encoder", "te1.text_model.encoder", "text_projection",
    ],
)  # fmt: skip
def test_a_text_encoders_layers_are_never_a_denoisers(root: str, ends: tuple[str, str], tmp_path: Path) -> None:
    texts = pair(f"{root}.layers.0.self_attn.q_proj", ends, 768)
    save_file({**DENOISER, **texts}, tmp_path / "x.safetensors")
    for read in (lambda path: conversion.read(path, NOBODY), load_file, lambda path: load_file(path, lazy=True)):
        with pytest.raises(AdapterFileError, match="of a text encoder") as refused:
            read(tmp_path / "x.safetensors")
        assert "--without-text-encoder" in str(refused.value)
    adapter, _ = conversion.read(tmp_path / "x.safetensors", DENOISER_ONLY)
    assert list(adapter.increments) == [PATH]
    assert adapter.manifest.recipe["converted"]["text_encoder_tensors_left_out"] == 2  # type: ignore[index,call-overload]


@pytest.mark.parametrize("model", [name for name, (_, _, family, *_) in EXACT.items() if family != "generic"])
def test_a_familys_modules_begin_as_its_class_does(model: str) -> None:
    make, config, family, *_ = EXACT[model]
    with torch.device("meta"):
        paths = changeable(make(**config))
    names.check_roots("x", family, paths)
    assert [names.dotted(flat(path)) for path in paths] == list(paths)
    names.check_roots("x", family, map(flat, paths))
    for wrong in ("joint_blocks.0.attn", "unet." + next(iter(paths)), "down_blocksy", "_orig_mod.proj_out", ""):
        with pytest.raises(AdapterFileError, match=f"is no module of {family}"):
            names.check_roots("x", family, [*paths, wrong])
    names.check_roots("x", "generic", ["anything"])


@pytest.mark.parametrize("said", [NOBODY, Description(family="sd1")])
@pytest.mark.parametrize("stem", ["model.", "unet.unet.", "unet.model.", "lora_unet_model_"])
def test_names_that_no_family_has_are_not_stored(stem: str, said: Description, tmp_path: Path) -> None:
    spelled = flat(PATH) if stem.endswith("_") else PATH
    other = spelled.replace("to_k", "to_q").replace("attn2", "attn1")
    ends = KOHYA if stem.endswith("_") else PEFT
    save_file({**DENOISER, **pair(stem + other, ends)}, tmp_path / "x.safetensors")
    with pytest.raises(AdapterFileError, match="is no module of sd1"):
        conversion.read(tmp_path / "x.safetensors", said)
    with pytest.raises(AdapterFileError, match="is no module of sd1"):
        load_file(tmp_path / "x.safetensors")


@pytest.mark.parametrize("prefix", ["unet.", "transformer.", ""])
def test_pefts_name_within_a_components_is_pefts(prefix: str, tmp_path: Path) -> None:
    tensors = pair(f"{prefix}base_model.model.{PATH}", PEFT)
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(AdapterFileError, match="PEFT's, whose scale is in another file"):
        load_file(tmp_path / "x.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "lora_alpha": 6}))
    adapter, read_as = conversion.read(tmp_path / "x.safetensors", NOBODY)
    assert (read_as, list(adapter.increments)) == ("peft", [PATH])
    down, up = (value.double() for value in tensors.values())
    (one,) = adapter.increments.values()
    torch.testing.assert_close(one.delta_for(torch.zeros(640, 768)).double(), 3 * up @ down, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prefix", ["unet._orig_mod.", "_orig_mod.", "model.diffusion_model."])
def test_names_that_programs_wrap_around_a_denoiser_are_taken_off(prefix: str, tmp_path: Path) -> None:
    save_file(pair(f"{prefix}{PATH}", PEFT), tmp_path / "x.safetensors")
    assert list(conversion.read(tmp_path / "x.safetensors", NOBODY)[0].increments) == [PATH]
    save_file(
        pair("transformer._orig_mod.transformer_blocks.0.attn.to_q", PEFT, 3072, 3072), tmp_path / "y.safetensors"
    )
    adapter, _ = conversion.read(tmp_path / "y.safetensors", NOBODY)
    assert list(adapter.increments) == ["transformer_blocks.0.attn.to_q"]


@pytest.mark.parametrize("dots", [False, True])
def test_stable_diffusion_3_by_its_original_names(dots: bool, tmp_path: Path) -> None:
    """Against diffusers' own conversion of a checkpoint whose weights are the changes."""
    width = 32
    config: dict[str, Any] = {
        **SD35_MEDIUM, "num_layers": 2, "dual_attention_layers": (0,), "attention_head_dim": 8,
        "num_attention_heads": 4, "sample_size": 8, "pos_embed_max_size": 8, "caption_projection_dim": width,
        "joint_attention_dim": 24, "pooled_projection_dim": 24, "in_channels": 4, "out_channels": 4,
    }  # fmt: skip
    model = SD3Transformer2DModel(**config)
    shapes = {"context_embedder": (width, 24), "final_layer.linear": (16, width)}
    shapes |= {"final_layer.adaLN_modulation.1": (2 * width, width), "x_embedder.proj": (width, 4)}
    for embedder, inputs in (("t_embedder", 256), ("y_embedder", 24)):
        shapes |= {f"{embedder}.mlp.0": (width, inputs), f"{embedder}.mlp.2": (width, width)}
    for block in range(2):
        for side in ("x_block", "context_block"):
            root, last = f"joint_blocks.{block}.{side}", block == 1 and side == "context_block"
            modulations = 9 if (block, side) == (0, "x_block") else 2 if last else 6
            shapes |= {f"{root}.adaLN_modulation.1": (modulations * width, width)}
            shapes |= {f"{root}.attn.qkv": (3 * width, width)}
            if not last:
                shapes |= {f"{root}.attn.proj": (width, width), f"{root}.mlp.fc1": (4 * width, width)}
                shapes |= {f"{root}.mlp.fc2": (width, 4 * width)}
    shapes |= {
        "joint_blocks.0.x_block.attn2.qkv": (3 * width, width),
        "joint_blocks.0.x_block.attn2.proj": (width, width),
    }
    tensors: dict[str, Tensor] = {}
    checkpoint = {"pos_embed": torch.zeros(1, 64, width)}
    for seed, (name, (out, inputs)) in enumerate(shapes.items()):
        down, up = noise(2, inputs, seed=seed), noise(out, 2, seed=seed + 100)
        delta = up.double() @ down.double()
        if name == "x_embedder.proj":
            down, up = noise(2, inputs, 2, 2, seed=seed), up[:, :, None, None]
            delta = (up.double().flatten(1) @ down.double().flatten(1)).reshape(out, inputs, 2, 2)
        stem = f"diffusion_model.{name}" if dots else f"lora_unet_{flat(name)}"
        tensors |= {f"{stem}.{end}": part for end, part in zip(PEFT if dots else KOHYA, (down, up), strict=True)}
        checkpoint |= {f"{name}.weight": delta, f"{name}.bias": torch.zeros(out)}
    save_file(tensors, tmp_path / "x.safetensors")
    adapter, read_as = conversion.read(tmp_path / "x.safetensors", Description(family="sd3"), BaseModel(model, "here"))
    assert (read_as, adapter.manifest.base.family) == ("kohya", "sd3")
    exact = convert_sd3_transformer_checkpoint_to_diffusers(checkpoint)
    weights = {key.removesuffix(".weight"): value for key, value in exact.items() if key.endswith(".weight")}
    assert adapter.increments.keys() == weights.keys() == matrices(model).keys()
    for path, increment in adapter.increments.items():
        found = increment.delta_for(weights[path]).double()
        torch.testing.assert_close(found, weights[path], rtol=1e-5, atol=1e-5)


def test_stable_diffusion_3s_names_that_are_none_are_refused(tmp_path: Path) -> None:
    save_file(pair("lora_unet_joint_blocks_0_x_block_norm", KOHYA, 1536, 1536), tmp_path / "x.safetensors")
    with pytest.raises(AdapterFileError, match="no module of Stable Diffusion 3"):
        load_file(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("layers", "width", "family"),
    [
        (("attn.to_q", "attn2.to_q", "attn2.to_k"), 1536, "sd3"),  # SD3.5 medium's second self-attention
        (("attn2.to_k",), 1536, "sd3"),
        (("attn.to_q",), 2432, "sd3"),
        (("attn1.to_q",), 1152, "generic"),  # PixArt
        (("attn2.to_k",), 1152, "generic"),
        (("attn1.to_q", "attn2.to_k"), 1536, "generic"),
    ],
)
def test_double_blocks_are_told_by_their_attention(
    layers: tuple[str, ...], width: int, family: str, tmp_path: Path
) -> None:
    tensors: dict[str, Tensor] = {}
    for layer in layers:
        tensors |= pair(f"transformer.transformer_blocks.0.{layer}", PEFT, width, width)
    save_file(tensors, tmp_path / "x.safetensors")
    assert load_file(tmp_path / "x.safetensors").manifest.base.family == family


@pytest.mark.parametrize("known_by", ["family", "model"])
@pytest.mark.parametrize("model", ["sd1", "sd2", "sdxl"])
def test_products_that_stand_for_1x1_convolutions_get_their_kernel(model: str, known_by: str, tmp_path: Path) -> None:
    base = topology(model)
    layers = {path: shape_of(module) for path, module in changeable(base).items()}
    telling = {path: shape for path, shape in layers.items() if path.endswith(("proj_in", "proj_out", "conv_shortcut"))}
    assert {len(shape) for shape in telling.values()} == ({4} if model == "sd1" else {2, 4})
    tensors: dict[str, Tensor] = {}
    for path, (out, width, *_) in telling.items():
        factors = {"lokr_w1": noise(2, 2), "lokr_w2": noise(out // 2, width // 2)}
        tensors |= {f"lora_unet_{flat(path)}.{part}": factor for part, factor in factors.items()}
    save_file(tensors, tmp_path / "x.safetensors")
    beside = BaseModel(base, "here") if known_by == "model" else None
    adapter, _ = conversion.read(tmp_path / "x.safetensors", Description(family=model), beside)
    assert {path: increment.weight_shape for path, increment in adapter.increments.items()} == telling
    (file,) = conversion.write(adapter, conversion.writer_named("lycoris"), tmp_path / "y.safetensors")
    shapes = {tuple(value.shape) for value in load_tensors(file).values()}
    assert shapes == set(telling.values())


def test_a_reduced_loha_of_sd1_loads_in_plain_diffusers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pipe = pipeline("sd1")
    tensors: dict[str, Tensor] = {}
    for path, module in matrices(pipe.unet).items():
        if ".attentions." in path:
            out, width, *_ = shape_of(module)
            factors = {"hada_w1_a": (out, 1), "hada_w1_b": (1, width), "hada_w2_a": (out, 1), "hada_w2_b": (1, width)}
            tensors |= {
                f"lora_unet_{flat(path)}.{part}": 0.5 * noise(*shape, seed=sum(map(ord, path + part)))
                for part, shape in factors.items()
            }
    save_file(tensors, tmp_path / "x.safetensors")
    adapter = truncate(conversion.read(tmp_path / "x.safetensors", Description(family="sd1"))[0], 1).adapter
    bare, expected = predict(pipe.unet), output_with(pipe.unet, adapter)
    (file,) = conversion.write(adapter, conversion.writer_named("diffusers"), tmp_path / "lora.safetensors")
    load_without_complaint(pipe, file, caplog)
    assert (predict(pipe.unet) - expected).abs().max() <= 1e-5
    assert (expected - bare).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["low_rank", "dense"])
def test_a_model_gives_every_change_the_shape_of_its_weight(kind: str, tmp_path: Path) -> None:
    """Matrices on convolutions of one pixel."""
    base = topology("sd1")
    made = random_eraser(base, kind, rank=2)
    increments = {path: as_matrices(increment) for path, increment in made.increments.items()}
    adapter = Adapter(made.manifest, increments)
    expected = output_with(base, made)
    adapter.save(tmp_path / "x.safetensors")
    (file,) = conversion.write(load_file(tmp_path / "x.safetensors"), conversion.writer_named("lycoris"),
                               tmp_path / "y.safetensors", BaseModel(base, "here"))  # fmt: skip
    again = load_file(file)
    layers: dict[str, nn.Module] = changeable(base)
    assert any(one.weight_shape != increments[path].weight_shape for path, one in again.increments.items())
    assert all(one.weight_shape == shape_of(layers[path]) for path, one in again.increments.items())
    assert (output_with(base, again) - expected).abs().max() <= 1e-6


def as_matrices(increment: Increment) -> Increment:
    if increment.weight_shape[2:] != (1, 1):
        return increment
    if isinstance(increment, LowRank):
        return LowRank(increment.down.flatten(1), increment.up.flatten(1))
    assert isinstance(increment, Dense)
    return Dense(increment.delta.flatten(1), increment.delta_bias)


def test_sdxls_added_embedding_loads_in_plain_diffusers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of its own names for the two, diffusers' loader makes one; the original code's names it tells apart."""
    pipe = pipeline("sdxl")
    layers = changeable(pipe.unet)
    paths = ["add_embedding.linear_1", "add_embedding.linear_2", "time_embedding.linear_1", "time_embedding.linear_2"]
    paths += [path for path in layers if path.endswith("attn2.to_k")][:2]
    increments: dict[str, Increment] = {}
    for seed, path in enumerate(paths):
        out, width = shape_of(layers[path])
        increments[path] = LowRank(noise(2, width, seed=seed), noise(out, 2, seed=seed + 50) / width**0.5)
    manifest = random_eraser(pipe.unet).manifest
    adapter = Adapter(manifest.model_copy(update={"increment": increment_info(increments)}), increments)
    bare, expected = predict(pipe.unet), output_with(pipe.unet, adapter)
    adapter.save(tmp_path / "own.safetensors")
    again = load_file(tmp_path / "own.safetensors", lazy=True)
    assert again.increments.keys() == increments.keys()
    assert (output_with(pipe.unet, again) - expected).abs().max() <= 1e-6
    load_without_complaint(pipe, tmp_path / "own.safetensors", caplog)
    assert (predict(pipe.unet) - expected).abs().max() <= 1e-4
    assert (expected - bare).abs().max() > 1e-2
    dense = {path: Dense(one.delta_for(torch.empty(one.weight_shape or ()))) for path, one in increments.items()}
    adapter.with_increments(dense).save(tmp_path / "dense.safetensors")
    assert load_file(tmp_path / "dense.safetensors").increments.keys() == increments.keys()
