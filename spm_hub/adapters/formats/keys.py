"""The library of formats that name every tensor by its module: reads and makes keys."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from spm_hub.adapters.formats import dora, other_components, rewritten
from spm_hub.adapters.formats.assembly import ADDED, assemble, of_one_kind
from spm_hub.adapters.formats.lora_config import Scaling
from spm_hub.adapters.formats.module_names import flat, with_kernel
from spm_hub.adapters.formats.original_names import original_tensor, to_diffusers
from spm_hub.adapters.formats.slots import Part, Slot
from spm_hub.adapters.increments import Increment, LowRank, Mask
from spm_hub.errors import GET_AGAIN, AdapterFileError
from spm_hub.io.wording import quoted

_PADDING = 8
"""How many times larger a single rank may make a file; the ranks of trainers differ by far less."""

# Recognised only to be refused in plain words, each with what helps.
_MERGED = "merge it in the program that wrote it, save the whole denoiser, and: spmhub convert MERGED --model M"
_REFUSED = {
    re.compile(r".*\.(lokr_t1|bm\.weight|glora.*)"): ("a rare layout of LyCORIS", _MERGED),
    re.compile(r".*\.(hra_\w+|vera_\w+|vera_lambda.*|boft_[RSs].*|oft_[RSr].*|ia3_l.*|ln_tuning_layers.*)"): (
        "another kind of PEFT's",
        _MERGED,
    ),
    re.compile(r".*\.(set_weight|reshape_weight)"): ("a layer that ComfyUI replaces or widens", _MERGED),
    re.compile(r".*(ip_adapter|\.processor\.(norm|im)\.|image_proj|to_[kv]_ip).*"): (
        "an IP-Adapter, which adds layers and changes no weight",
        None,
    ),
    re.compile(r".*\.(absmax|quant_map|quant_state.*|SCB|qweight|qzeros|g_idx)"): (
        "quantised weights, which only the program that wrote them can read",
        "ask its author for a float16 version",
    ),
}
_ATTENTION = re.compile(
    r"(?:down_blocks|mid_block|up_blocks|(?:in|out)put_blocks|middle_block)[._].+[._]attn[12][._]to_(?P<layer>[qkv])"
)
# Read by a conversion only, because it needs more than the file.
_CONVERTED = {
    re.compile(r"((unet|transformer)\.)?base_model\.model\..*"): "PEFT's, whose scale is in another file",
    re.compile(r"unet:\d+:(up|down)"): "cloneofsimo/lora's, which numbers its layers instead of naming them",
    re.compile(r".*\.((hada|lokr)_[wt]\w+|lora_mid\.weight)"): "a LyCORIS product, which is larger than its file",
    re.compile(r".*\.(dora_scale|oft_(blocks|diag).*|on_input|[ab]\d\.weight)"): (
        "a change that depends on the weight it belongs to"
    ),
    re.compile(r".*\.(w_norm|b_norm|diff|diff_b|bias_values)|.*\.processor\.\w+_lora\d?\..*"): (
        "in a layout of another program"
    ),
    re.compile(r"(?!.*lora).+\.(weight|bias)"): "a full tensor, whose increment is its difference to the base",
}


def read_by_keys(
    path: Path,
    tensors: Mapping[str, Tensor],
    slots: Mapping[str, Slot],
    scaling: Scaling | None = None,
    *,
    converting: bool = False,
    base: Mapping[str, Tensor] | None = None,
) -> dict[str, Increment]:
    """Return the increments by module path: dotted if the keys keep the dots, else with . as _ (`flat`).

    slots: of every key.  scaling: gives alpha to the tensors that state none.  converting: the user asked for a
    conversion, which may make low-rank increments dense.  base: the denoiser's state dict, which DoRA needs.
    Raises AdapterFileError for two tensors of one part, a module with missing parts, or a file without tensors.
    """
    modules: dict[str, dict[Part, Tensor]] = {}
    keys: dict[tuple[str, Part], str] = {}
    for key, value in tensors.items():
        slot = slots[key]
        parts = modules.setdefault(slot.module, {})
        if slot.part in parts:
            raise AdapterFileError(
                f"{path}: {slot.module} has two tensors for {slot.part}, {keys[slot.module, slot.part]!r} and {key!r}",
                mend="ask its author which of the two it is, and leave the other out",
            )
        parts[slot.part], keys[slot.module, slot.part] = value, key
    if not modules:
        raise AdapterFileError(f"{path}: it holds no tensors", mend=GET_AGAIN)
    magnitudes = _take_magnitudes(path, modules, scaling, base)
    _leave_out_biases_of_keys(path, modules, base)
    if not converting and (
        thick := next((m for m, parts in modules.items() if "down" in parts and ADDED & parts.keys()), None)
    ):
        raise AdapterFileError(
            f"{path}: {thick} changes a bias too, which makes of its thin factors a whole change",
            mend=f"spmhub convert {quoted(path)}",
        )
    rewriting = {name: modules.pop(name) for name in sorted(modules) if rewritten.name_of(modules[name])}
    for module, parts in modules.items():
        if scaling is not None and "down" in parts and "alpha" not in parts and parts["down"].dim():
            parts["alpha"] = torch.tensor(scaling.alpha_of(module, len(parts["down"])))
    try:
        changes: dict[str, Increment] = {name: assemble(f"{path}: {name}", modules[name]) for name in sorted(modules)}
        changes |= _rewritten(path, rewriting, base)
        found = to_diffusers(changes, {name: key for (name, _), key in keys.items()})
        if converting:
            found = of_one_kind({name: with_kernel(name, increment) for name, increment in found.items()})
        return found if base is None or not magnitudes else dora.apply_magnitudes(path, found, magnitudes, base)
    except AdapterFileError as error:
        names_path = error.message.startswith(str(path))
        raise error if names_path else AdapterFileError(f"{path}: {error.message}", mend=error.mend) from error


def is_refused(key: str) -> bool:
    """Return True for a key that is recognised only to be refused."""
    return any(pattern.fullmatch(key) for pattern in _REFUSED)


def unknown_key(
    path: Path, key: str, keys: Iterable[str], formats: str, *, converting: bool = True
) -> AdapterFileError:
    """Return the error for a file with the unknown `key`.

    keys: all keys of the file. The message names the one that says most: a layer, rather than a learnt token.
    formats: the formats that are read, in words.  converting: False where a conversion could read it.
    """
    keys = tuple(keys)
    if (what := other_components.alone(keys)) is not None:
        return AdapterFileError(f"{path}: {what}", mend=other_components.FOR_DENOISERS)
    telling = next((each for pattern in (*_REFUSED, *_CONVERTED) for each in keys if pattern.fullmatch(each)), key)
    for pattern, (about, mend) in _REFUSED.items():
        if pattern.fullmatch(telling):
            return AdapterFileError(f"{path}: {telling!r} is of {about}; it is not supported", mend=mend)
    for pattern, named in _CONVERTED.items():
        if pattern.fullmatch(telling) and not converting:
            return AdapterFileError(f"{path}: {telling!r} is {named}", mend=f"spmhub convert {quoted(path)}")
    return AdapterFileError(
        f"{path}: {(key if converting else telling)!r} is of no known layout", mend=f"use a file in one of: {formats}"
    )


def _leave_out_biases_of_keys(
    path: Path, modules: dict[str, dict[Part, Tensor]], base: Mapping[str, Tensor] | None
) -> None:
    """Take the changes of biases out of attention layers that have none, where they change nothing.

    The layers of queries, keys and values in Stable Diffusion's U-Nets have no bias. One on the keys adds the same
    number to all scores of a query, which a softmax takes out again. Raises AdapterFileError for queries and values.
    """
    owned = {flat(key) for key in base or ()}
    for module in list(modules):
        match, biases = _ATTENTION.fullmatch(module), {"up_bias", "delta_bias"} & modules[module].keys()
        if match is None or not biases or f"{flat(module)}_bias" in owned:
            continue
        if match["layer"] != "k":
            raise AdapterFileError(
                f"{path}: {module} has the change of a bias, and that layer has no bias in Stable Diffusion's U-Nets",
                mend="ask its author for one that was trained without biases",
            )
        modules[module] = {part: value for part, value in modules[module].items() if part not in biases}
        if not modules[module].keys() - {"alpha"}:
            del modules[module]
    if not modules:
        raise AdapterFileError(
            f"{path}: it changes biases of keys alone, and these change nothing", mend="another file of its author"
        )


def _rewritten(
    path: Path, modules: Mapping[str, Mapping[Part, Tensor]], base: Mapping[str, Tensor] | None
) -> dict[str, Increment]:
    """Return the changes that need the base's weights. Raises AdapterFileError without a base."""
    if not modules:
        return {}
    if base is None:
        name, parts = next(iter(modules.items()))
        about = f"{name} is of {rewritten.name_of(parts)}, so that its change depends on the base"
        if parts.keys() - {"alpha"} == {"delta_bias"}:
            about = f"{name} changes a bias alone, and only the base says which shape its weight has"
        raise AdapterFileError(
            f"{path}: {about}",
            mend=f"spmhub convert {quoted(path)} --model M, the base that it was trained on",
        )
    by_name = {flat(key): tensor for key, tensor in base.items()}
    return {
        name: rewritten.rewrite(
            f"{path}: {name}", parts, *(original_tensor(name, kind, by_name) for kind in ("weight", "bias"))
        )
        for name, parts in modules.items()
    }


@dataclass(frozen=True)
class Spelling:
    """The last parts of the keys of a low-rank pair; `alpha` is True if the format states alpha."""

    down: str
    up: str
    alpha: bool


KOHYA_KEYS = Spelling("lora_down.weight", "lora_up.weight", alpha=True)
PEFT_KEYS = Spelling("lora_A.weight", "lora_B.weight", alpha=False)


def tensors_by_key(modules: Mapping[str, Increment], spelling: Spelling) -> dict[str, Tensor]:
    """Return the tensors of a file by key; `modules` maps the key without its last part to the increment.

    Increments of lower rank are padded with zeros to the highest: same products, and one alpha, which is the rank.
    """
    rank = common_rank(modules.values())
    tensors: dict[str, Tensor] = {}
    for module, increment in modules.items():
        match increment:
            case LowRank():
                down, up = _padded(increment, rank)
                tensors[f"{module}.{spelling.down}"] = down
                tensors[f"{module}.{spelling.up}"] = up
                if spelling.alpha:
                    alpha = torch.tensor(float(rank), dtype=up.dtype)
                    # bfloat16 has no 257: the scale would not be 1.
                    tensors[f"{module}.alpha"] = alpha if float(alpha) == rank else torch.tensor(float(rank))
            case Mask():
                tensors[f"{module}.{'keep_out' if increment.dim == 0 else 'keep_in'}"] = increment.keep.to(torch.uint8)
            case _:
                tensors[f"{module}.diff"] = increment.delta
                if increment.delta_bias is not None:
                    tensors[f"{module}.diff_b"] = increment.delta_bias
    return tensors


def common_rank(increments: Iterable[Increment]) -> int:
    """Return the rank to which all low-rank increments are padded; 0 if there are none.

    Raises AdapterFileError if the padding makes the file much larger, as a hostile file of a few numbers can ask for.
    """
    pairs = [increment for increment in increments if isinstance(increment, LowRank)]
    rank = max((pair.rank for pair in pairs), default=0)
    now, padded = sum(pair.nbytes for pair in pairs), sum(pair.nbytes // pair.rank * rank for pair in pairs)
    if padded > _PADDING * now + 8 * 2**20:
        raise AdapterFileError(
            f"ranks from {min(pair.rank for pair in pairs)} to {rank} in one file: written with one rank, "
            f"{now} bytes become {padded}"
        )
    return rank


def _take_magnitudes(
    path: Path, modules: Mapping[str, dict[Part, Tensor]], scaling: Scaling | None, base: object
) -> dict[str, tuple[Part, Tensor]]:
    """Take DoRA's magnitude out of each module's parts. Raises AdapterFileError if there is no base."""
    found = {
        module: (part, parts.pop(part)) for module, parts in modules.items() for part in dora.PARTS if part in parts
    }
    if found and base is None:
        raise AdapterFileError(
            f"{path}: {next(iter(found))} is of DoRA, whose change depends on the weight it is added to",
            mend=f"spmhub convert {quoted(path)} --model M, the base that it was trained on",
        )
    if scaling is not None and scaling.decomposed and (missing := sorted(modules.keys() - found.keys())):
        raise AdapterFileError(f"{path}: use_dora is True, but {missing[0]} has no lora_magnitude_vector")
    return found


def _padded(increment: LowRank, rank: int) -> tuple[Tensor, Tensor]:
    missing = rank - increment.rank
    if missing == 0:
        return increment.down, increment.up
    down, up = increment.down, increment.up
    return (
        torch.cat([down, down.new_zeros(missing, *down.shape[1:])]),
        torch.cat([up, up.new_zeros(up.shape[0], missing, *up.shape[2:])], dim=1),
    )
