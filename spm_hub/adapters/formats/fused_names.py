"""Module names of the original FLUX.1 and SD3, where one weight holds what diffusers keeps in several.

The rows of such a weight are split exactly, and joined again. The q and k norms of FLUX.1 are `X.scale` there.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from spm_hub.adapters.increments import Dense, Increment, LowRank, Mask
from spm_hub.errors import AdapterFileError

_Table = dict[str, tuple[str, ...]]
# The original module, and those of diffusers that share its rows, in their order.
_DOUBLE: _Table = {
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
    "img_attn_norm_query_norm_scale": ("attn.norm_q",),
    "img_attn_norm_key_norm_scale": ("attn.norm_k",),
    "txt_attn_norm_query_norm_scale": ("attn.norm_added_q",),
    "txt_attn_norm_key_norm_scale": ("attn.norm_added_k",),
}
_SINGLE: _Table = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation_lin": ("norm.linear",),
    "norm_query_norm_scale": ("attn.norm_q",),
    "norm_key_norm_scale": ("attn.norm_k",),
}
# x_block is the picture's, context_block the text's.
_JOINT: _Table = {
    "x_block_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "x_block_attn_proj": ("attn.to_out.0",),
    "x_block_attn_ln_q": ("attn.norm_q",),
    "x_block_attn_ln_k": ("attn.norm_k",),
    "x_block_attn2_qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "x_block_attn2_proj": ("attn2.to_out.0",),
    "x_block_attn2_ln_q": ("attn2.norm_q",),
    "x_block_attn2_ln_k": ("attn2.norm_k",),
    "x_block_mlp_fc1": ("ff.net.0.proj",),
    "x_block_mlp_fc2": ("ff.net.2",),
    "x_block_adaLN_modulation_1": ("norm1.linear",),
    "context_block_attn_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "context_block_attn_proj": ("attn.to_add_out",),
    "context_block_attn_ln_q": ("attn.norm_added_q",),
    "context_block_attn_ln_k": ("attn.norm_added_k",),
    "context_block_mlp_fc1": ("ff_context.net.0.proj",),
    "context_block_mlp_fc2": ("ff_context.net.2",),
    "context_block_adaLN_modulation_1": ("norm1_context.linear",),
}
# The original's last modulation gives shift and scale, diffusers' scale and shift; in SD3 the text's last one as well,
# which has two outputs for each channel, not six.
_LAST = {"final_layer_linear": "proj_out", "final_layer_adaLN_modulation_1": "norm_out.linear"}
_SWAPPED, _SWAPPED_IF_LAST = "norm_out.linear", "norm1_context.linear"
_FLUX_ENDS = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in_in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in_out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in_in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in_out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in_in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in_out_layer": "time_text_embed.guidance_embedder.linear_2",
    **_LAST,
}
_SD3_ENDS = {
    "x_embedder_proj": "pos_embed.proj",
    "context_embedder": "context_embedder",
    "t_embedder_mlp_0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder_mlp_2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder_mlp_0": "time_text_embed.text_embedder.linear_1",
    "y_embedder_mlp_2": "time_text_embed.text_embedder.linear_2",
    **_LAST,
}
_Blocks = dict[str, tuple[str, _Table]]
_FLUX_BLOCKS: _Blocks = {
    "double_blocks": ("transformer_blocks", _DOUBLE),
    "single_blocks": ("single_transformer_blocks", _SINGLE),
}
_SD3_BLOCKS: _Blocks = {"joint_blocks": ("transformer_blocks", _JOINT)}
_FAMILIES = {"flux": (_FLUX_BLOCKS, _FLUX_ENDS), "sd3": (_SD3_BLOCKS, _SD3_ENDS)}
_MODELS = {"double_blocks": "FLUX.1", "single_blocks": "FLUX.1", "joint_blocks": "Stable Diffusion 3"}
# Read only: the first rows of FLUX.1's linear1, as if they were a weight of their own; norms without their `.scale`.
_ALSO_READ: dict[str, _Table] = {
    "double_blocks": {name.removesuffix("_scale"): paths for name, paths in _DOUBLE.items() if "_norm_" in name},
    "single_blocks": {
        "linear1_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
        **{name.removesuffix("_scale"): paths for name, paths in _SINGLE.items() if "_norm_" in name},
    },
    "joint_blocks": {},
}


def paths_of(name: str) -> tuple[str, ...] | None:
    """Return diffusers' paths for an original module's name with . as _, in the order of its rows.

    None for a name of no such block; raises AdapterFileError for a module that these blocks do not have.
    """
    if match := re.fullmatch(r"((?:double|single|joint)_blocks)_(\d+)_(.+)", name):
        kind = match[1]
        root, table = (_FLUX_BLOCKS | _SD3_BLOCKS)[kind]
        paths = table.get(match[3]) or _ALSO_READ[kind].get(match[3])
        if paths is None:
            raise AdapterFileError(f"{name} is no module of {_MODELS[kind]}")
        return tuple(f"{root}.{match[2]}.{path}" for path in paths)
    end = _FLUX_ENDS.get(name) or _SD3_ENDS.get(name)
    return None if end is None else (end,)


def split(name: str, paths: Sequence[str], increment: Increment) -> dict[str, Increment]:
    """Return the change of an original module as changes of diffusers' modules at `paths`.

    Raises AdapterFileError for a change whose rows cannot be divided.
    """
    if len(paths) > 1:
        return dict(zip(paths, _split(name, increment, len(paths)), strict=True))
    shape = increment.weight_shape
    return {paths[0]: _swapped(increment) if shape and is_swapped(paths[0], shape) else increment}


def is_swapped(path: str, shape: Sequence[int]) -> bool:
    """Return True if the halves of this weight's rows are the other way round in the original code."""
    if len(shape) < 2:
        return False
    return path == _SWAPPED or (path.endswith(_SWAPPED_IF_LAST) and shape[0] == 2 * shape[1])


def join(family: str, increments: Mapping[str, Increment]) -> tuple[dict[str, Increment], dict[str, Increment]]:
    """Return increments of FLUX.1 or SD3 by their original names, and those that have no such name.

    Original names have . as _ . Increments that share a weight are joined, and the rows of absent ones are zero.
    Raises AdapterFileError for a mask of a shared weight.
    """
    blocks, ends = _FAMILIES[family]
    places = {
        f"{root}.{{}}.{path}": (f"{kind}_{{}}_{name}", place, len(paths))
        for kind, (root, table) in blocks.items()
        for name, paths in table.items()
        for place, path in enumerate(paths)
    }
    ends_back = {path: name for name, path in ends.items()}
    named: dict[str, Increment] = {}
    other: dict[str, Increment] = {}
    groups: dict[tuple[str, int], dict[int, Increment]] = {}
    for path, increment in increments.items():
        shape = increment.weight_shape
        mended = _swapped(increment) if shape and is_swapped(path, shape) else increment
        if path in ends_back:
            named[ends_back[path]] = mended
        elif found := places.get(re.sub(r"\.\d+\.", ".{}.", path, count=1)):
            name, place, count = found
            if count > 1 and place < 3 and (shape is None or shape[0] != shape[1]):
                # No original model has such a q, k or v: its rows could not be told from the others'.
                other[path] = increment
                continue
            groups.setdefault((name.format(path.split(".")[1]), count), {})[place] = mended
        else:
            other[path] = increment
    for (name, count), members in groups.items():
        named[name] = members[0] if count == 1 else _joined(name, members, count)
    return named, other


def is_whole(family: str, path: str, paths: Mapping[str, object]) -> bool:
    """Return True if all modules that share a weight with `path` are in `paths`."""
    return all(other in paths for other in together(path, family))


def together(path: str, family: str | None = None) -> tuple[str, ...]:
    """Return diffusers' modules that share a weight of the original code, `path` among them.

    Empty for a module with a weight of its own.  family: None for any that has such modules.
    """
    for name, (blocks, _) in _FAMILIES.items():
        for root, table in blocks.values() if family in (None, name) else ():
            if match := re.fullmatch(rf"({root}\.\d+)\.(.+)", path):
                for those in table.values():
                    if match[2] in those and len(those) > 1:
                        return tuple(f"{match[1]}.{other}" for other in those)
    return ()


def _split(name: str, increment: Increment, count: int) -> list[Increment]:
    """Split rows into q, k and v, each as many as there are inputs, and the rest (FLUX.1's mlp)."""
    if isinstance(increment, Mask):
        raise AdapterFileError(f"{name}: a mask of a fused module is not read")
    out, width, *_ = (*increment.weight_shape, 0)
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


@dataclass(frozen=True)
class _Rows:
    """The rows of a joined weight: the number of each member's, in their order."""

    sizes: list[int]

    def of(self, place: int) -> slice:
        start = sum(self.sizes[:place])
        return slice(start, start + self.sizes[place])


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
    shapes = {place: member.weight_shape or shape for place, member in members.items()}
    rows = _Rows([shapes[place][0] if place in members else absent[place] for place in range(count)])
    lows = {place: member for place, member in members.items() if isinstance(member, LowRank)}
    if lows:
        first = next(iter(lows.values()))
        shared = all(torch.equal(first.down, member.down) for member in lows.values())
        down = first.down if shared else torch.cat([member.down for member in lows.values()])
        up = first.up.new_zeros(sum(rows.sizes), len(down))
        column = 0
        for place, member in lows.items():
            up[rows.of(place), column : column + member.rank] = member.up
            column += 0 if shared else member.rank
        return LowRank(down, up)
    denses = {place: member for place, member in members.items() if isinstance(member, Dense)}
    delta = next(iter(denses.values())).delta.new_zeros(sum(rows.sizes), width)
    bias = delta.new_zeros(len(delta))
    for place, dense in denses.items():
        delta[rows.of(place)] = dense.delta
        if dense.delta_bias is not None:
            bias[rows.of(place)] = dense.delta_bias
    return Dense(delta, bias if any(dense.delta_bias is not None for dense in denses.values()) else None)


def _swapped(increment: Increment) -> Increment:
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


def dotted_original(name: str) -> str | None:
    """Return a q or k norm of FLUX.1 as ComfyUI names it, with dots; None for other names.

    ComfyUI knows a parameter that is no `weight` by its whole path only.
    """
    match = re.fullmatch(r"(double|single)_blocks_(\d+)_(?:(img|txt)_attn_)?norm_(query|key)_norm_scale", name)
    if match is None:
        return None
    stream = f"{match[3]}_attn." if match[3] else ""
    return f"diffusion_model.{match[1]}_blocks.{match[2]}.{stream}norm.{match[4]}_norm.scale"
