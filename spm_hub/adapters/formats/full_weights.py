"""Files of whole fine-tuned tensors under state-dict keys, as ESD, UCE and Concept Ablation save them.

A file may also hold a whole denoiser. An increment is the difference between such a tensor and the base's; a file is
written by adding the increment to the base. ESD's authors mark their files `erasing-esd-v2` in the header since 2025.
"""

from collections.abc import Mapping

from torch import Tensor

from spm_hub.adapters.formats.differences import differences, is_whole
from spm_hub.adapters.formats.format import WHOLE, About, Files, Format, Source, Writer
from spm_hub.adapters.formats.module_names import dotted, is_unet
from spm_hub.adapters.increments import Dense, Increment, LowRank
from spm_hub.adapters.manifest import Manifest
from spm_hub.errors import AdapterFileError, CompatibilityError
from spm_hub.io.safetensors_file import encode

ESD_FORMAT = "erasing-esd-v2"

_ESD_FAMILIES = {"sd1": "sd", "sd2": "sd", "sdxl": "sdxl", "flux": "flux"}


def _matches(source: Source) -> bool:
    """Return True if all keys are those of plain weights and biases."""
    return bool(source.tensors) and all(map(is_whole, source.tensors))


def _is_esd(source: Source) -> bool:
    return source.metadata.get("format") == ESD_FORMAT and _matches(source)


def _read(source: Source) -> dict[str, Increment]:
    """Return the differences to the base.

    Raises AdapterFileError as `differences` does, and if there are none.
    """
    assert source.base is not None  # `needs_base`
    found = differences(source.place, source.tensors, source.base.denoiser, source.scales, source.progress)
    if not found:
        raise AdapterFileError(f"{source.place}: all its tensors are the model's own: nothing is erased")
    return {**found}


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
