"""The rules by which other programs load a file, in float64, and small denoisers in the original code's layout.

Written from ComfyUI 0.3.64 (comfy/lora.py, comfy/utils.py), Forge of 2025-06-26 (its copy of ComfyUI's loader), and
InvokeAI of 2026-08-19 (backend/patches/lora_conversions), sd-scripts of 2026-02-16; each was also run on these files.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from ldm import unet_to_ldm
from topologies import topology
from torch import Tensor, nn

State = Mapping[str, Tensor]
TEXT = 24


def denoiser(family: str) -> nn.Module:
    """A denoiser with every kind of module of its family, a few channels wide."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if family == "flux":
            made: nn.Module = FluxTransformer2DModel(
                in_channels=8, num_layers=2, num_single_layers=2, attention_head_dim=8, num_attention_heads=2,
                joint_attention_dim=TEXT, pooled_projection_dim=TEXT, axes_dims_rope=(2, 2, 4), guidance_embeds=True,
            )  # fmt: skip
        elif family == "sd3":
            made = SD3Transformer2DModel(
                sample_size=8, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=64,
                num_attention_heads=3, joint_attention_dim=TEXT, caption_projection_dim=192, qk_norm="rms_norm",
                pooled_projection_dim=TEXT, pos_embed_max_size=8, dual_attention_layers=(0,),
            )  # fmt: skip
            # ComfyUI knows the width by the number of blocks: 64 for each.
        else:
            return topology(family)
    return made.eval().requires_grad_(False)


# The original module -> diffusers' modules whose rows it has, in their order; {} is the number of the block.
_FLUX = {
    "double_blocks.{}.img_attn.qkv": "transformer_blocks.{}.attn. to_q to_k to_v",
    "double_blocks.{}.txt_attn.qkv": "transformer_blocks.{}.attn. add_q_proj add_k_proj add_v_proj",
    "double_blocks.{}.img_attn.proj": "transformer_blocks.{}.attn. to_out.0",
    "double_blocks.{}.txt_attn.proj": "transformer_blocks.{}.attn. to_add_out",
    "double_blocks.{}.img_attn.norm.query_norm": "transformer_blocks.{}.attn. norm_q",
    "double_blocks.{}.img_attn.norm.key_norm": "transformer_blocks.{}.attn. norm_k",
    "double_blocks.{}.txt_attn.norm.query_norm": "transformer_blocks.{}.attn. norm_added_q",
    "double_blocks.{}.txt_attn.norm.key_norm": "transformer_blocks.{}.attn. norm_added_k",
    "double_blocks.{}.img_mlp.0": "transformer_blocks.{}. ff.net.0.proj",
    "double_blocks.{}.img_mlp.2": "transformer_blocks.{}. ff.net.2",
    "double_blocks.{}.txt_mlp.0": "transformer_blocks.{}. ff_context.net.0.proj",
    "double_blocks.{}.txt_mlp.2": "transformer_blocks.{}. ff_context.net.2",
    "double_blocks.{}.img_mod.lin": "transformer_blocks.{}. norm1.linear",
    "double_blocks.{}.txt_mod.lin": "transformer_blocks.{}. norm1_context.linear",
    "single_blocks.{}.linear1": "single_transformer_blocks.{}. attn.to_q attn.to_k attn.to_v proj_mlp",
    "single_blocks.{}.linear2": "single_transformer_blocks.{}. proj_out",
    "single_blocks.{}.modulation.lin": "single_transformer_blocks.{}. norm.linear",
    "single_blocks.{}.norm.query_norm": "single_transformer_blocks.{}.attn. norm_q",
    "single_blocks.{}.norm.key_norm": "single_transformer_blocks.{}.attn. norm_k",
    "img_in": " x_embedder",
    "txt_in": " context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder. linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder. linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder. linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder. linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder. linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder. linear_2",
    "final_layer.linear": " proj_out",
    "final_layer.adaLN_modulation.1": " norm_out.linear",
}
_SD3 = {
    **{
        f"joint_blocks.{{}}.{side}.attn{second}.{theirs}": f"transformer_blocks.{{}}.attn{second}. {ours}"
        for side, second, parts in (
            ("x_block", "", ("to_q to_k to_v", "to_out.0", "norm_q", "norm_k")),
            ("x_block", "2", ("to_q to_k to_v", "to_out.0", "norm_q", "norm_k")),
            ("context_block", "", ("add_q_proj add_k_proj add_v_proj", "to_add_out", "norm_added_q", "norm_added_k")),
        )
        for theirs, ours in zip(("qkv", "proj", "ln_q", "ln_k"), parts, strict=True)
    },
    "joint_blocks.{}.x_block.mlp.fc1": "transformer_blocks.{}. ff.net.0.proj",
    "joint_blocks.{}.x_block.mlp.fc2": "transformer_blocks.{}. ff.net.2",
    "joint_blocks.{}.context_block.mlp.fc1": "transformer_blocks.{}. ff_context.net.0.proj",
    "joint_blocks.{}.context_block.mlp.fc2": "transformer_blocks.{}. ff_context.net.2",
    "joint_blocks.{}.x_block.adaLN_modulation.1": "transformer_blocks.{}. norm1.linear",
    "joint_blocks.{}.context_block.adaLN_modulation.1": "transformer_blocks.{}. norm1_context.linear",
    "x_embedder.proj": " pos_embed.proj",
    "context_embedder": " context_embedder",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder. linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder. linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder. linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder. linear_2",
    "final_layer.linear": " proj_out",
    "final_layer.adaLN_modulation.1": " norm_out.linear",
}


def _modules(family: str, state: State) -> dict[str, tuple[str, ...]]:
    """The original modules of a transformer, each with diffusers' modules that it has the rows of."""
    found = {}
    for name, spelled in (_FLUX if family == "flux" else _SD3).items():
        root, *parts = spelled.split(" ")
        for block in range(99 if "{}" in name else 1):
            paths = tuple(f"{root}{part}".format(block) for part in parts)
            if f"{paths[0]}.weight" in state:
                found[name.format(block)] = paths
    return found


def original_state(family: str, state: State, model: nn.Module) -> dict[str, Tensor]:
    """The weights of a denoiser as the original code has them, under `diffusion_model.`."""
    if family in ("sd1", "sd2", "sdxl"):
        holder: Any = type("Holder", (), {"config": model.config, "state_dict": lambda self: state})()
        return {key.removeprefix("model."): value for key, value in unet_to_ldm(holder).items()}
    found: dict[str, Tensor] = {}
    for name, paths in _modules(family, state).items():
        for kind in ("weight", "bias"):
            if f"{paths[0]}.{kind}" not in state:
                continue
            rows = torch.cat([state[f"{path}.{kind}"] for path in paths])
            is_last_of_text = name.endswith("context_block.adaLN_modulation.1") and len(rows) == 2 * _width(state)
            if name == "final_layer.adaLN_modulation.1" or is_last_of_text:
                rows = torch.cat(rows.chunk(2)[::-1])
            scale = name.endswith(("query_norm", "key_norm"))
            found[f"diffusion_model.{name}.{'scale' if scale else kind}"] = rows
    return found


def _width(state: State) -> int:
    return state["context_embedder.weight"].shape[0]


@dataclass(frozen=True)
class Place:
    """Where a key's change goes: a parameter of the original code, or the rows of one."""

    parameter: str
    rows: slice | None = None


def flat(name: str) -> str:
    return name.replace(".", "_")


def comfy_places(family: str, model: nn.Module, *, forge: bool = False) -> dict[str, Place]:
    """ComfyUI's key map: the parameter for each beginning of a key. Forge's copy lacks diffusers' names of SD3."""
    state = model.state_dict()
    places: dict[str, Place] = {}
    for key in original_state(family, state, model):
        if key.endswith(".weight"):
            stem = key.removesuffix(".weight")
            places[f"lora_unet_{flat(stem.removeprefix('diffusion_model.'))}"] = places[stem] = Place(key)
        else:
            places[key] = Place(key)
    if family in ("sd1", "sd2", "sdxl"):
        theirs = {id(value): key for key, value in original_state(family, state, model).items()}
        for key, value in state.items():
            if key.endswith(".weight"):
                path, place = key.removesuffix(".weight"), Place(theirs[id(value)])
                places[f"lora_unet_{flat(path)}"] = places[f"lycoris_{flat(path)}"] = place
                # Attention layers have the names of 2023 only, which a file of today's diffusers has not.
                processor = path.replace(".to_", ".processor.to_")
                processor = processor.removesuffix(".0") if path.endswith("to_out.0") else processor
                places[processor] = places[f"unet.{processor}"] = place
        return places
    if family == "sd3" and forge:
        return places
    for name, paths in _modules(family, state).items():
        start = 0
        for path in paths:
            rows = len(state[f"{path}.weight"])
            scale = name.endswith(("query_norm", "key_norm"))
            key = f"diffusion_model.{name}.{'scale' if scale else 'weight'}"
            place = Place(key, slice(start, start + rows) if len(paths) > 1 else None)
            places[f"transformer.{path}"] = places[f"lora_transformer_{flat(path)}"] = place
            if family == "sd3":
                places[f"base_model.model.{path}"] = place
            start += rows
    return places


def patched(file: State, places: Mapping[str, Place], state: State) -> tuple[dict[str, Tensor], set[str]]:
    """The weights that ComfyUI computes from a file, in float64, and the keys of the file that it did not use."""
    weights = {key: value.double().clone() for key, value in state.items()}
    used: set[str] = set()
    for stem, place in places.items():
        delta = None
        for up, down in (("lora_up.weight", "lora_down.weight"), ("lora_B.weight", "lora_A.weight")):
            if f"{stem}.{up}" in file:
                first, second = file[f"{stem}.{down}"].double(), file[f"{stem}.{up}"].double()
                alpha = file.get(f"{stem}.alpha")
                scale = 1.0 if alpha is None else float(alpha) / len(first)
                delta = scale * (second.flatten(1) @ first.flatten(1))
                used |= {f"{stem}.{up}", f"{stem}.{down}"} | ({f"{stem}.alpha"} if alpha is not None else set())
        if f"{stem}.diff" in file:
            delta = file[f"{stem}.diff"].double()
            used.add(f"{stem}.diff")
        if delta is not None:
            target = weights[place.parameter] if place.rows is None else weights[place.parameter][place.rows]
            target += delta.reshape(target.shape)
        if f"{stem}.diff_b" in file and place.rows is None:
            # For a slice it makes the name `().bias`, which no model has: the change is lost.
            bias = f"{place.parameter.removesuffix('.weight')}.bias"
            if bias in weights:
                weights[bias] += file[f"{stem}.diff_b"].double()
                used.add(f"{stem}.diff_b")
    return weights, set(file) - used


_INVOKE_FLUX = re.compile(
    r"lora_unet_(\w+_blocks)_(\d+)_(img_attn|img_mlp|img_mod|txt_attn|txt_mlp|txt_mod|linear1|linear2|modulation)_?(.*)"
    r"|lora_unet_final_layer_(linear|linear1|linear2)_?(.*)"
)


def invoke_takes_for(family: str, file: State) -> bool:
    """True if InvokeAI recognises the file; one unknown key is enough that it does not."""
    if family == "flux":
        return all(map(_INVOKE_FLUX.match, file))
    names = [key.removeprefix("lora_unet_") for key in file if key.startswith("lora_unet_")]
    original = [
        re.match(r"(input_blocks|middle_block|output_blocks|time_embed|label_emb|out)_", name) for name in names
    ]
    # Of SDXL all names are the original code's, or none.
    return len(names) == len(file) and (all(original) or not any(original))


def sd_scripts_takes(file: State) -> bool:
    """True if sd-scripts (networks/lora.py, lora_flux.py, lora_sd3.py of 2026-02-16) makes a network of every key.

    A module's name is what stands before the first dot, and only factors and alpha are looked for under it.
    """
    return all(re.fullmatch(r"lora_unet_\w+\.(lora_down\.weight|lora_up\.weight|alpha)", key) for key in file)


def forge_takes_for(metadata: Mapping[str, str]) -> str | None:
    """The family that Forge reads in a header, None for its "Unknown"."""
    architecture = metadata.get("modelspec.architecture", "")
    if metadata.get("modelspec.implementation") == "https://github.com/black-forest-labs/flux":
        return "flux"
    if architecture == "flux-1-dev/lora":
        return "flux"
    version = metadata.get("ss_base_model_version", "")
    if architecture == "stable-diffusion-xl-v1-base/lora" or version.startswith("sdxl_"):
        return "sdxl"
    if metadata.get("ss_v2") == "True":
        return "sd2"
    return "sd1" if architecture == "stable-diffusion-v1/lora" else None
