"""Module names of the original repositories: SDXL's sgm blocks, fused projections of FLUX.1 and SD3.

SD1 and SD2 are named as diffusers names them. For the others kohya and more train the original code, so that a module
has another name and, in FLUX.1 and SD3, one weight holds what diffusers keeps in several: its rows are split exactly,
and FLUX.1's joined again.
"""

import re
from collections.abc import Mapping, Sequence
from functools import reduce
from typing import TypeVar

import torch
from torch import Tensor

from spm_hub.adapters.formats.module_names import SGM_ONLY, dotted, flat
from spm_hub.adapters.increments import Dense, Increment, LowRank, Mask
from spm_hub.errors import AdapterFileError

Name = TypeVar("Name")

# Residual layers and their downsampler count as one row of input_blocks; all of Stable Diffusion has two such layers.
_ROWS = 3
_RESNET = {
    "in_layers_0": "norm1",
    "in_layers_2": "conv1",
    "emb_layers_1": "time_emb_proj",
    "out_layers_0": "norm2",
    "out_layers_3": "conv2",
    "skip_connection": "conv_shortcut",
}
_RESNET_BACK = {theirs: ours for ours, theirs in _RESNET.items()}
_UNET_ENDS = {
    "input_blocks_0_0": "conv_in",
    "out_0": "conv_norm_out",
    "out_2": "conv_out",
    "time_embed_0": "time_embedding_linear_1",
    "time_embed_2": "time_embedding_linear_2",
    **{theirs: ours for ours, theirs in SGM_ONLY.items()},
}
_UNET_ENDS_BACK = {theirs: ours for ours, theirs in _UNET_ENDS.items()}

# FLUX.1: the original module, and those of diffusers that share its rows, in their order.
_DOUBLE: dict[str, tuple[str, ...]] = {
    "img_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn_proj": ("attn.to_out.0",),
    "txt_attn_proj": ("attn.to_add_out",),
    "img_mlp_0": ("ff.net.0.proj",),
    "img_mlp_2": ("ff.net.2",),
    "txt_mlp_0": ("ff_context.net.0.proj",),
    "txt_mlp_2": ("ff_context.net.2",),
    "img_mod_lin": ("norm1.linear",),
    "txt_mod_lin": ("norm1_context.linear",),
}
_SINGLE: dict[str, tuple[str, ...]] = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation_lin": ("norm.linear",),
}
_FLUX_ENDS = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in_in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in_out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in_in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in_out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in_in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in_out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer_linear": "proj_out",
}
_FLUX_ENDS_BACK = {theirs: ours for ours, theirs in _FLUX_ENDS.items()}
# SD3, read only: `joint_blocks`, whose x_block is the picture's and context_block the text's.
_JOINT: dict[str, tuple[str, ...]] = {
    "x_block_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "x_block_attn_proj": ("attn.to_out.0",),
    "x_block_attn2_qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "x_block_attn2_proj": ("attn2.to_out.0",),
    "x_block_mlp_fc1": ("ff.net.0.proj",),
    "x_block_mlp_fc2": ("ff.net.2",),
    "x_block_adaLN_modulation_1": ("norm1.linear",),
    "context_block_attn_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "context_block_attn_proj": ("attn.to_add_out",),
    "context_block_mlp_fc1": ("ff_context.net.0.proj",),
    "context_block_mlp_fc2": ("ff_context.net.2",),
    "context_block_adaLN_modulation_1": ("norm1_context.linear",),
}
_SD3_ENDS = {
    "x_embedder_proj": "pos_embed.proj",
    "t_embedder_mlp_0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder_mlp_2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder_mlp_0": "time_text_embed.text_embedder.linear_1",
    "y_embedder_mlp_2": "time_text_embed.text_embedder.linear_2",
}
_BLOCKS = {
    "double_blocks": ("FLUX.1", "transformer_blocks", _DOUBLE),
    "single_blocks": ("FLUX.1", "single_transformer_blocks", _SINGLE),
    "joint_blocks": ("Stable Diffusion 3", "transformer_blocks", _JOINT),
}
# The original's last modulation gives shift and scale, diffusers' scale and shift; in SD3 the text's last one as well,
# which has two outputs for each channel, not six.
_SWAPPED, _SWAPPED_BACK = "final_layer_adaLN_modulation_1", "norm_out.linear"
_LAST_OF_TEXT = "context_block_adaLN_modulation_1"


def to_diffusers(increments: Mapping[str, Increment], keys: Mapping[str, str] | None = None) -> dict[str, Increment]:
    """Return the same increments under diffusers' names; names that are diffusers' already are unchanged.

    keys: a key of the file for each name, for error messages.
    Raises AdapterFileError for a fused module whose rows cannot be divided, or two names of one module, whether they
    differ in their dots or altogether.
    """
    found: dict[str, Increment] = {}
    names: dict[str, str] = {}
    for name, increment in increments.items():
        for path, part in _in_diffusers(name, increment).items():
            if (other := names.setdefault(flat(path), name)) != name or path in found:
                both = ((keys or {}).get(each, each) for each in (other, name))
                raise AdapterFileError(
                    f"{path} is in it twice: {' and '.join(map(repr, both))}",
                    mend="ask its author which of the two it is, and leave the other out",
                )
            found[path] = part
    return found


def sgm_to_diffusers(name: str) -> str | None:
    """Return diffusers' name, with . as _, for a U-Net module's original name; None for any other name."""
    if name in _UNET_ENDS:
        return _UNET_ENDS[name]
    match = re.fullmatch(r"(input|middle|output)_blocks?_(\d+)(?:_(\d+))?_(.+)", name)
    if match is None:
        return None
    if match[1] == "middle":
        row, inner = int(match[2]), "_".join(filter(None, match.group(3, 4)))
        kind = {0: "resnets_0", 1: "attentions_0", 2: "resnets_1"}.get(row)
        return kind and f"mid_block_{kind}_{_RESNET.get(inner, inner)}"
    if match[3] is None:
        return None
    block, layer = divmod(int(match[2]) - (match[1] == "input"), _ROWS)
    side = "down_blocks" if match[1] == "input" else "up_blocks"
    column, inner = int(match[3]), match[4]
    if inner in ("op", "conv"):
        return f"{side}_{block}_{'down' if inner == 'op' else 'up'}samplers_0_conv"
    return (
        f"{side}_{block}_{('resnets', 'attentions')[column]}_{layer}_{_RESNET.get(inner, inner)}"
        if column < 2
        else None
    )


def diffusers_to_sgm(path: str) -> str | None:
    """Return the original name, with . as _, for a dotted path of diffusers' SDXL; None if there is none."""
    if (name := flat(path)) in _UNET_ENDS_BACK:
        return _UNET_ENDS_BACK[name]
    if match := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d)\.(.+)", path):
        row = 1 if match[1] == "attentions" else 2 * int(match[2])
        return f"middle_block_{row}_{_RESNET_BACK.get(match[3], flat(match[3]))}"
    if match := re.fullmatch(r"(down|up)_blocks\.(\d)\.(resnets|attentions)\.(\d)\.(.+)", path):
        row = _ROWS * int(match[2]) + int(match[4]) + (match[1] == "down")
        side = "input_blocks" if match[1] == "down" else "output_blocks"
        return f"{side}_{row}_{int(match[3] == 'attentions')}_{_RESNET_BACK.get(match[5], flat(match[5]))}"
    if match := re.fullmatch(r"down_blocks\.(\d)\.downsamplers\.0\.conv", path):
        return f"input_blocks_{_ROWS * (int(match[1]) + 1)}_0_op"
    if match := re.fullmatch(r"up_blocks\.(\d)\.upsamplers\.0\.conv", path):
        return f"output_blocks_{_ROWS * int(match[1]) + 2}_2_conv"
    return None


def to_original(family: str, increments: Mapping[str, Increment]) -> dict[str, Increment]:
    """Return the increments under kohya's own names, with . as _; the inverse of `to_diffusers`.

    Raises AdapterFileError for a module without such a name.
    """
    paths = {dotted(name): increment for name, increment in increments.items()}
    if family == "flux":
        return _flux_fused(paths)
    if family == "sdxl":
        return {_known(path, diffusers_to_sgm(path)): increment for path, increment in paths.items()}
    if family in ("sd1", "sd2"):
        return {flat(path): increment for path, increment in paths.items()}
    raise AdapterFileError(
        f"kohya's files have no names for the modules of family {family!r}", mend="spmhub convert FILE --to diffusers"
    )


def _in_diffusers(name: str, increment: Increment) -> dict[str, Increment]:
    """Return one module's increments by diffusers' names: several if the original fuses them."""
    plain = flat(name)
    if (path := sgm_to_diffusers(plain)) is not None:
        return {path: increment}
    if match := re.fullmatch(r"((?:double|single|joint)_blocks)_(\d+)_(.+)", plain):
        model, root, table = _BLOCKS[match[1]]
        paths = table.get(match[3])
        if paths is None:
            raise AdapterFileError(f"{name} is no module of {model}")
        parts = _split(name, increment, len(paths)) if len(paths) > 1 else [increment]
        if match[3] == _LAST_OF_TEXT and (shape := increment.weight_shape) and shape[0] == 2 * shape[1]:
            parts = [_halves_swapped(increment)]
        return {f"{root}.{match[2]}.{path}": part for path, part in zip(paths, parts, strict=True)}
    if plain == _SWAPPED:
        return {_SWAPPED_BACK: _halves_swapped(increment)}
    return {_FLUX_ENDS.get(plain) or _SD3_ENDS.get(plain) or name: increment}


def _split(name: str, increment: Increment, count: int) -> list[Increment]:
    """Split rows into q, k and v, each as many as there are inputs, and the rest (FLUX.1's mlp)."""
    if isinstance(increment, Mask):
        raise AdapterFileError(f"{name}: a mask of a fused module is not read")
    out, width = increment.weight_shape[:2]
    rest = out - 3 * width
    if (rest > 0) != (count == 4) or rest < 0:
        raise AdapterFileError(f"{name}: {out} rows of {width} inputs are not q, k, v{' and mlp' * (count == 4)}")
    sizes = [width] * 3 + [rest] * (count == 4)
    if isinstance(increment, LowRank):
        return [LowRank(increment.down, up) for up in increment.up.split(sizes)]
    biases: Sequence[Tensor | None] = (
        [None] * count if increment.delta_bias is None else increment.delta_bias.split(sizes)
    )
    return [Dense(delta, bias) for delta, bias in zip(increment.delta.split(sizes), biases, strict=True)]


def _flux_fused(paths: Mapping[str, Increment]) -> dict[str, Increment]:
    """Return increments of FLUX.1 under the original names; those that share a weight are joined."""
    fused: dict[str, Increment] = {}
    groups: dict[str, dict[int, Increment]] = {}
    for path, increment in paths.items():
        if path == _SWAPPED_BACK:
            fused[_SWAPPED] = _halves_swapped(increment)
        elif path in _FLUX_ENDS_BACK:
            fused[_FLUX_ENDS_BACK[path]] = increment
        else:
            name, place = _known(path, _FLUX_PLACES.get(re.sub(r"\.\d+\.", ".{}.", path, count=1)))
            groups.setdefault(name.format(path.split(".")[1]), {})[place] = increment
    for name, members in groups.items():
        count = 4 if name.endswith("linear1") else 3 if name.endswith("qkv") else 1
        fused[name] = members[0] if count == 1 else _joined(name, members, count)
    return fused


_FLUX_PLACES = {
    f"{root}.{{}}.{path}": (f"{blocks}_{{}}_{name}", place)
    for blocks, (model, root, table) in _BLOCKS.items()
    if model == "FLUX.1"
    for name, paths in table.items()
    for place, path in enumerate(paths)
}
"""Path with {} for its block -> (original name, likewise, and the place among the parts of that weight)."""


def _joined(name: str, members: Mapping[int, Increment], count: int) -> Increment:
    """Return one increment of the fused weight; rows of absent members are zero.

    It is as precise as the most precise member. Low-rank members with one `down` keep their rank; others are placed
    side by side, and the ranks add up.
    """
    dtype = reduce(torch.promote_types, (member.dtype for member in members.values()))
    members = {place: member.to(dtype=dtype) for place, member in members.items()}
    shape = next(iter(members.values())).weight_shape
    if shape is None:
        raise AdapterFileError(f"{name}: a mask of a fused module cannot be written", mend="--model M makes it dense")
    width = shape[1]
    absent = [width, width, width, 4 * width][:count]
    sizes = [len(_up(members[place])) if place in members else absent[place] for place in range(count)]
    lows = {place: member for place, member in members.items() if isinstance(member, LowRank)}
    if lows:
        first = next(iter(lows.values()))
        shared = all(torch.equal(first.down, member.down) for member in lows.values())
        down = first.down if shared else torch.cat([member.down for member in lows.values()])
        up = first.up.new_zeros(sum(sizes), len(down))
        column = 0
        for place, member in lows.items():
            row, wide = sum(sizes[:place]), member.rank
            up[row : row + sizes[place], column : column + wide] = member.up
            column += 0 if shared else wide
        return LowRank(down, up)
    denses = {place: member for place, member in members.items() if isinstance(member, Dense)}
    kind = next(iter(denses.values())).delta
    deltas = [denses[place].delta if place in denses else kind.new_zeros(sizes[place], width) for place in range(count)]
    biases = [denses[place].delta_bias if place in denses else None for place in range(count)]
    if all(bias is None for bias in biases):
        return Dense(torch.cat(deltas))
    return Dense(
        torch.cat(deltas),
        torch.cat([kind.new_zeros(size) if bias is None else bias for bias, size in zip(biases, sizes, strict=True)]),
    )


def _up(increment: Increment) -> Tensor:
    """Return the part of an increment that has the rows of its weight."""
    return increment.up if isinstance(increment, LowRank) else increment.tensors()["delta"]


def _halves_swapped(increment: Increment) -> Increment:
    def swapped(rows: Tensor) -> Tensor:
        return rows.roll(len(rows) // 2, 0)

    match increment:
        case LowRank():
            return LowRank(increment.down, swapped(increment.up))
        case Dense():
            bias = None if increment.delta_bias is None else swapped(increment.delta_bias)
            return Dense(swapped(increment.delta), bias)
        case Mask():
            return Mask(swapped(increment.keep), 0) if increment.dim == 0 else increment


def _known(path: str, name: Name | None) -> Name:
    if name is None:
        raise AdapterFileError(
            f"{path} has no name in kohya's files", mend="spmhub convert FILE --to diffusers, or --to spm"
        )
    return name
