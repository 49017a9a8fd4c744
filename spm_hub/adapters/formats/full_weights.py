"""Files of whole fine-tuned tensors under state-dict keys, as ESD, UCE and Concept Ablation save them.

A file may also hold a whole denoiser. An increment is the difference between such a tensor and the base's; a file is
written by adding the increment to the base. ESD's authors mark their files `erasing-esd-v2` in the header since 2025.
"""

import re
from collections.abc import Mapping
from contextlib import suppress

import torch
from torch import Tensor

from spm_hub.adapters.formats import eight_bit
from spm_hub.adapters.formats.format import WHOLE, About, Files, Format, Source, Writer
from spm_hub.adapters.formats.module_names import dotted, flat, is_unet
from spm_hub.adapters.formats.original_names import original_tensor, to_diffusers
from spm_hub.adapters.increments import Dense, Increment, LowRank
from spm_hub.adapters.manifest import Manifest
from spm_hub.errors import AdapterFileError, CompatibilityError
from spm_hub.io.safetensors_file import encode
from spm_hub.models.architectures import changeable

ESD_FORMAT = "erasing-esd-v2"

_PREFIXES = ("model", "diffusion_model", "unet", "transformer")
_KEY = re.compile(r"[\w.]+\.(weight|bias|(query|key)_norm\.scale)|pos_embed(\.pos_embed)?")
_LORA = re.compile(r".*(lora|hada_|lokr_).*")
_ESD_FAMILIES = {"sd1": "sd", "sd2": "sd", "sdxl": "sdxl", "flux": "flux"}


def _matches(source: Source) -> bool:
    """Return True if all keys are those of plain weights and biases."""
    tensors = source.tensors
    return bool(tensors) and all(_KEY.fullmatch(key) and not _LORA.fullmatch(key) for key in tensors)


def _is_esd(source: Source) -> bool:
    return source.metadata.get("format") == ESD_FORMAT and _matches(source)


def _read(source: Source) -> dict[str, Increment]:
    """Return the difference of each tensor to the base's, by dotted path.

    The base is rounded to the file's precision first, as training began from it; a tensor that equals it then was not
    trained. Raises AdapterFileError for a tensor that the base does not have, or has in another shape, for a changed
    one that no increment can hold, and if nothing differs.
    """
    assert source.base is not None  # `needs_base`
    path, tensors = source.place, source.tensors
    layers = {flat(layer) for layer in changeable(source.base.denoiser)}
    base = {flat(key): tensor for key, tensor in source.base.tensors.items()}
    modules: dict[str, dict[str, Tensor]] = {}
    keys: dict[str, str] = {}
    for count, (key, tensor) in enumerate(tensors.items()):
        source.progress(count + 1, len(tensors))
        module, kind, original = _original(path, key, base)
        if (other := keys.setdefault(f"{flat(module)}.{kind}", key)) != key:
            raise AdapterFileError(f"{path}: {module}.{kind} is in it twice: {other!r} and {key!r}")
        if tensor.shape != original.shape and tensor.squeeze().shape != original.squeeze().shape:
            raise AdapterFileError(
                f"{path}: {key} is {tuple(tensor.shape)}, the model's is {tuple(original.shape)}",
                mend="--model M, the base that the file was trained on",
            )
        scale = source.scales.get(key)
        before, after = eight_bit.rounded_as(original, tensor, scale), eight_bit.widened(tensor, scale)
        if torch.equal(after, before):
            continue
        modules.setdefault(module, {})[kind] = (after.double() - before.double()).reshape(original.shape).float()
    if not modules:
        raise AdapterFileError(f"{path}: all its tensors are the model's own: nothing is erased")
    changes: dict[str, Increment] = {}
    for module, parts in modules.items():
        weight = original_tensor(module, "weight", base)
        if weight is None or weight.dim() not in (1, 2, 4):
            raise _unchangeable(path, f"{module}.{min(parts)}")
        changes[module] = Dense(parts.get("weight", torch.zeros(weight.shape)), parts.get("bias"))
    # Of a fused weight only the parts with a change are modules of the eraser.
    found = {
        path: one
        for path, one in to_diffusers(changes).items()
        if any(bool(part.any()) for part in one.tensors().values())
    }
    for module in found:
        if flat(module) not in layers:
            raise _unchangeable(path, module)
    return found


def _original(path: object, key: str, base: Mapping[str, Tensor]) -> tuple[str, str, Tensor]:
    """Return the module, "weight" or "bias", and the base's tensor for a key under any prefix.

    base: by key with . as _ .  The tensor is fused where the file's is. Raises AdapterFileError for an unknown key.
    """
    rest = "pos_embed.pos_embed" if key == "pos_embed" else key
    while True:
        module, _, kind = rest.rpartition(".")
        # FLUX.1's q and k norms alone are `X.scale`.
        named, kind = (rest, "weight") if kind == "scale" else (module, kind)
        with suppress(AdapterFileError):
            if (found := original_tensor(named, kind, base)) is not None:
                return named, kind, found
        prefix, dot, rest = rest.partition(".")
        if not dot or prefix not in _PREFIXES:
            raise AdapterFileError(
                f"{path}: the model has no tensor {key!r}", mend="--model M, the base that the file was trained on"
            )


def _unchangeable(path: object, what: str) -> AdapterFileError:
    return AdapterFileError(
        f"{path}: {what} was trained too, and an increment changes Linear, Conv2d and norm layers only",
        mend="ask its author for a file without it",
    )


def _write(manifest: Manifest, increments: Mapping[str, Increment], base: Mapping[str, Tensor]) -> Files:
    """Return ESD's file: the base's tensors plus the increments, in the base's precision.

    Raises CompatibilityError for a module that the base does not have.
    """
    tensors: dict[str, Tensor] = {}
    for name, increment in increments.items():
        path = dotted(name)
        weight, bias = base.get(f"{path}.weight"), base.get(f"{path}.bias")
        if weight is None:
            raise CompatibilityError(f"the model has no module {path}", mend="--model M, the base of this eraser")
        increment.check_fits(path, weight, bias)
        delta = _product(increment) if isinstance(increment, LowRank) else increment.tensors()["delta"].double()
        tensors[f"{path}.weight"] = (weight.double() + delta.reshape(weight.shape)).to(weight.dtype)
        if isinstance(increment, Dense) and increment.delta_bias is not None and bias is not None:
            tensors[f"{path}.bias"] = (bias.double() + increment.delta_bias.double()).to(bias.dtype)
    family = manifest.base.family
    metadata = {
        "format": ESD_FORMAT,
        "family": _ESD_FAMILIES.get(family, family),
        "component": "unet" if is_unet(map(dotted, increments)) else "transformer",
        "base_model_id": manifest.base.id,
        "train_method": str(manifest.recipe.get("method", "spm-hub")),
        "erase_concept": manifest.concept.target or "",
        "erase_from": str(manifest.recipe.get("erase_from") or ""),
    }
    return {WHOLE: encode(tensors, metadata)}


def _product(increment: LowRank) -> Tensor:
    return increment.up.double().flatten(1) @ increment.down.double().flatten(1)


def _describe(source: Source) -> About:
    return About(method=source.metadata.get("train_method") or None)


ESD = Format(
    "esd",
    "ESD's whole weights (erasing-esd-v2); needs --model",
    _is_esd,
    _read,
    Writer(("low_rank", "dense"), _write, needs_base=True),
    needs_base=True,
    describe=_describe,
)
FULL_WEIGHTS = Format(
    "full-weights",
    "whole weights, as UCE and Concept Ablation save them; needs --model",
    _matches,
    _read,
    needs_base=True,
)
