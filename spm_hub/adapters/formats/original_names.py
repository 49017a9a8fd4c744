"""Module names of the original repositories: SDXL's sgm blocks, fused projections of FLUX.1 and SD3.

SD1 and SD2 are named as diffusers names them. For the others kohya and more train the original code, so that a module
has another name and, in FLUX.1 and SD3, one weight holds what diffusers keeps in several (`fused_names`).
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from spm_hub.adapters.formats import fused_names
from spm_hub.adapters.formats.module_names import SGM_ONLY, dotted, flat
from spm_hub.adapters.increments import Increment
from spm_hub.errors import AdapterFileError

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
    if family in ("flux", "sd3"):
        named, others = fused_names.join(family, paths)
        if others:
            raise _without_name(next(iter(others)))
        return named
    if family == "sdxl":
        names = {path: diffusers_to_sgm(path) for path in paths}
        if (lost := next((path for path, name in names.items() if name is None), None)) is not None:
            raise _without_name(lost)
        return {name: paths[path] for path, name in names.items() if name is not None}
    if family in ("sd1", "sd2"):
        return {flat(path): increment for path, increment in paths.items()}
    raise AdapterFileError(
        f"kohya's files have no names for the modules of family {family!r}", mend="spmhub convert FILE --to diffusers"
    )


def original_tensor(name: str, kind: str, base: Mapping[str, Tensor]) -> Tensor | None:
    """Return a base's weight or bias as the file's module `name` has it: fused, in its order.

    name: dotted or not, an original name or diffusers'.  kind: "weight" or "bias".  base: by key with . as _ .
    None where the base has no such tensor. Raises AdapterFileError for a module that no model has.
    """
    plain = flat(name)
    path = sgm_to_diffusers(plain)
    paths = (path,) if path is not None else fused_names.paths_of(plain) or (name,)
    parts = [base.get(f"{flat(path)}_{kind}") for path in paths]
    found = [part for part in parts if part is not None]
    if len(found) < len(paths):
        return None
    whole = found[0] if len(found) == 1 else torch.cat(found)
    weight = base.get(f"{flat(paths[0])}_weight")
    is_original = paths[0] != name
    swapped = is_original and weight is not None and fused_names.is_swapped(paths[0], weight.shape)
    return whole.roll(len(whole) // 2, 0) if swapped else whole


def _in_diffusers(name: str, increment: Increment) -> dict[str, Increment]:
    """Return one module's increments by diffusers' names: several if the original fuses them."""
    plain = flat(name)
    if (path := sgm_to_diffusers(plain)) is not None:
        return {path: increment}
    # Both name this module alike, and it is not shared.
    paths = None if plain == "context_embedder" else fused_names.paths_of(plain)
    return {name: increment} if paths is None else fused_names.split(name, paths, increment)


def _without_name(path: str) -> AdapterFileError:
    return AdapterFileError(
        f"{path} has no name in kohya's files", mend="spmhub convert FILE --to diffusers, or --to spm"
    )
