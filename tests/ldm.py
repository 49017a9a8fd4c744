"""Pipelines in the layout of CompVis' and Stability's original code: one file, as checkpoints are passed around.

Written from the module tree of `ldm` and `sgm` (openaimodel.py, model.py), as the inverse of what is under test.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

State = Mapping[str, Tensor]

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def unet_to_ldm(unet: nn.Module) -> dict[str, Tensor]:
    """`model.diffusion_model.*`: every resnet, attention and sampler counted through from one end to the other."""
    config: Any = unet.config
    layers, blocks = int(config.layers_per_block), len(config.block_out_channels)
    has_attention = ["CrossAttn" in kind for kind in config.up_block_types]

    def place(path: str) -> str:
        where, _, leaf = path.rpartition(".")
        if where in _UNET_ENDS:
            return f"{_UNET_ENDS[where]}.{leaf}"
        kind, *rest = path.split(".")
        if kind == "mid_block":
            part, index, *inner = rest
            return f"middle_block.{1 if part == 'attentions' else 2 * int(index)}." + inside(part, inner)
        block, part, index, *inner = rest
        if kind == "down_blocks":
            step = 1 + int(block) * (layers + 1) + (layers if part == "downsamplers" else int(index))
            slot = "1" if part == "attentions" else "0"
            return f"input_blocks.{step}.{slot}." + inside(part, inner)
        step = int(block) * (layers + 1) + (layers if part == "upsamplers" else int(index))
        slot = {"resnets": 0, "attentions": 1, "upsamplers": 1 + has_attention[int(block)]}[part]
        return f"output_blocks.{step}.{slot}." + inside(part, inner)

    def inside(part: str, inner: list[str]) -> str:
        if part == "resnets":
            return ".".join([_RESNET[inner[0]], *inner[1:]])
        return ".".join(["op", *inner[1:]] if part == "downsamplers" else inner)

    assert blocks == len(has_attention)
    return {f"model.diffusion_model.{place(key)}": tensor for key, tensor in unet.state_dict().items()}


def vae_to_ldm(vae: nn.Module) -> dict[str, Tensor]:
    """`first_stage_model.*`: levels of the decoder count from the picture inwards, its attention is convolutions."""
    config: Any = vae.config
    last = len(config.up_block_types) - 1
    renamed = {}
    for key, tensor in vae.state_dict().items():
        new = re.sub(r"up_blocks\.(\d+)", lambda found: f"up.{last - int(found[1])}", key)
        new = re.sub(r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}", new)
        new = (
            new.replace("down_blocks.", "down.").replace("resnets.", "block.").replace("conv_shortcut", "nin_shortcut")
        )
        new = new.replace("downsamplers.0.", "downsample.").replace("upsamplers.0.", "upsample.")
        new = new.replace("conv_norm_out", "norm_out")
        if "attentions" in new:
            new = new.replace("mid_block.attentions.0.", "mid.attn_1.").replace("group_norm", "norm")
            new = re.sub(r"to_([qkv])\.", r"\1.", new).replace("to_out.0", "proj_out")
            if tensor.ndim == 2:
                tensor = tensor[:, :, None, None]
        renamed[f"first_stage_model.{new}"] = tensor
    return renamed


def clip_to_ldm(encoder: nn.Module, prefix: str) -> dict[str, Tensor]:
    """OpenAI's CLIP keeps the names of transformers, with `text_model.` before them, which later releases dropped."""
    return {f"{prefix}text_model.{key.removeprefix('text_model.')}": t for key, t in encoder.state_dict().items()}


def open_clip_to_ldm(encoder: nn.Module, prefix: str) -> dict[str, Tensor]:
    """OpenCLIP's own names: one matrix for queries, keys and values, the projection transposed."""
    state = {key.removeprefix("text_model."): tensor for key, tensor in encoder.state_dict().items()}
    renamed: dict[str, Tensor] = {}
    simple = {
        "embeddings.position_embedding.weight": "positional_embedding",
        "embeddings.token_embedding.weight": "token_embedding.weight",
        "final_layer_norm.weight": "ln_final.weight",
        "final_layer_norm.bias": "ln_final.bias",
    }
    inner = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    for key, tensor in state.items():
        if key in simple:
            renamed[simple[key]] = tensor
        elif key == "text_projection.weight":
            renamed["text_projection"] = tensor.T.contiguous()
        elif found := re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", key):
            layer, part, leaf = found.groups()
            start = f"transformer.resblocks.{layer}"
            if part == "self_attn.q_proj":
                three = [state[f"encoder.layers.{layer}.self_attn.{one}_proj.{leaf}"] for one in "qkv"]
                renamed[f"{start}.attn.in_proj_{leaf}"] = torch.cat(three)
            elif part == "self_attn.out_proj":
                renamed[f"{start}.attn.out_proj.{leaf}"] = tensor
            elif part in inner:
                renamed[f"{start}.{inner[part]}.{leaf}"] = tensor
    return {f"{prefix}{key}": tensor for key, tensor in renamed.items()}


def single_file(
    pipe: Any, path: Path, *, without: Iterable[str] = (), metadata: Mapping[str, str] | None = None, **extra: Tensor
) -> Path:
    """Write `pipe` (Stable Diffusion 1, or XL where it has a second text encoder) to `path`; `extra` tensors beside it.

    `without` names components that are left out.
    """
    parts = {"unet": unet_to_ldm(pipe.unet), "vae": vae_to_ldm(pipe.vae)}
    if hasattr(pipe, "text_encoder_2"):
        parts["text_encoder"] = clip_to_ldm(pipe.text_encoder, "conditioner.embedders.0.transformer.")
        parts["text_encoder_2"] = open_clip_to_ldm(pipe.text_encoder_2, "conditioner.embedders.1.model.")
    else:
        parts["text_encoder"] = clip_to_ldm(pipe.text_encoder, "cond_stage_model.transformer.")
    tensors = {key: t for name, part in parts.items() if name not in set(without) for key, t in part.items()}
    contiguous = {key: tensor.detach().contiguous().clone() for key, tensor in {**tensors, **extra}.items()}
    save_file(contiguous, path, dict(metadata or {}))
    return path
