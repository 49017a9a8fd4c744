"""Every format. Adding one is a file with a `FORMAT` and its line in `FORMATS`."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Never

from torch import Tensor, tensor

from spm_hub.adapters.formats import diffusers_lora, dora, full_weights, minimalist, peft, spm
from spm_hub.adapters.formats import module_names as names
from spm_hub.adapters.formats import original_names as kohya
from spm_hub.adapters.formats import other_components as text_encoder
from spm_hub.adapters.formats import products as lycoris
from spm_hub.adapters.formats.assembly import assemble, of_one_kind
from spm_hub.adapters.formats.format import Format, Part, Slot
from spm_hub.adapters.increments import Increment
from spm_hub.errors import GET_AGAIN, AdapterFileError
from spm_hub.plugins import plugins

FORMATS: tuple[Format, ...] = (
    spm.FORMAT,
    kohya.FORMAT,
    lycoris.FORMAT,
    diffusers_lora.FORMAT,
    peft.FORMAT,
    full_weights.FORMAT,
    minimalist.FORMAT,
)

# Recognised only to be refused in plain words.
_REFUSED = {
    re.compile(
        r".*\.(lokr_t1|oft_blocks|oft_diag|glora.*|[ab]\d\.weight|w_norm|b_norm)"
    ): "a LyCORIS layout other than LoRA, LoHa, LoKr, DoRA and full",
    re.compile(r"(double|single)_blocks\.\d+\.processor\..*"): "XLabs' layout of FLUX.1",
}
# What an explicit conversion reads, because it needs more than the file.
_CONVERTED = {
    re.compile(r"((unet|transformer)\.)?base_model\.model\..*"): "PEFT's, whose scale stands in another file",
    re.compile(r"unet:\d+:(up|down)"): "cloneofsimo/lora's, which numbers its layers instead of naming them",
    re.compile(r".*\.((hada|lokr)_[wt]\w+|lora_mid\.weight)"): "a LyCORIS product, which is larger than its file",
    re.compile(r".*\.dora_scale"): "DoRA, whose change depends on the weight it is added to",
    re.compile(r"(?!.*lora).+\.(weight|bias)"): "a full tensor, which is an increment only beside its base",
}


def all_formats() -> tuple[Format, ...]:
    """Every format there is, those of plug-ins last; they are imported for it."""
    return (*FORMATS, *plugins("formats", Format).values())


def format_of(tensors: Mapping[str, Tensor]) -> str:
    """The name of the format whose keys these are; SPM's keys are kohya's, and those are LyCORIS' too."""
    found = {
        next((each.name for each in all_formats() if each.parse_key and each.parse_key(key)), "") for key in tensors
    }
    return next((name for name in sorted(found) if name not in ("", spm.FORMAT.name)), kohya.FORMAT.name)


def read_increments(
    path: Path,
    tensors: Mapping[str, Tensor],
    scaling: peft.Scaling | None = None,
    *,
    explicit: bool = False,
    base: Mapping[str, Tensor] | None = None,
) -> dict[str, Increment]:
    """The increments of a file, by module path: dotted where the layout keeps the dots, else with . as _ (`spm.flat`).

    scaling: alpha of what the tensors give none, where it stands elsewhere.  explicit: the user asked for a conversion.
    base: the denoiser's state dict, of which DoRA's changes are a function.
    Raises AdapterFileError for a key of no known layout, a module with missing parts, or nothing at all.
    """
    modules: dict[str, dict[Part, Tensor]] = {}
    keys: dict[tuple[str, Part], str] = {}
    # Before any layout is asked: some of them would take a text encoder's layer for one of a denoiser.
    text_encoder.refuse(path, tensors)
    for key, value in tensors.items():
        # Plug-ins are imported for the first key that no format of our own knows.
        slot = _slot(FORMATS, key, explicit=explicit) or _slot(all_formats(), key, explicit=explicit)
        if slot is None:
            # Of a file's keys the telling one: a learnt token says less than a layer beside it.
            telling = (each for pattern in (*_REFUSED, *_CONVERTED) for each in tensors if pattern.fullmatch(each))
            _refuse(path, next(telling, key))
        parts = modules.setdefault(slot.module, {})
        if slot.part in parts:
            raise AdapterFileError(
                f"{path}: {slot.module} has two tensors for {slot.part}, {keys[slot.module, slot.part]!r} and {key!r}",
                mend="ask its author which of the two it is, and leave the other out",
            )
        parts[slot.part], keys[slot.module, slot.part] = value, key
    if not modules:
        raise AdapterFileError(f"{path}: it holds no tensors", mend=GET_AGAIN)
    magnitudes = _magnitudes(path, modules, scaling, base)
    for module, parts in modules.items():
        if scaling is not None and "down" in parts and "alpha" not in parts and parts["down"].dim():
            parts["alpha"] = tensor(scaling.alpha_of(module, len(parts["down"])))
    try:
        found = kohya.canonical(
            {name: assemble(f"{path}: {name}", modules[name]) for name in sorted(modules)},
            {name: key for (name, _), key in keys.items()},
        )
        if explicit:
            found = of_one_kind({name: names.shaped(name, increment) for name, increment in found.items()})
        return found if base is None or not magnitudes else dora.applied(path, found, magnitudes, base)
    except AdapterFileError as error:
        known_by_path = error.message.startswith(str(path))
        raise error if known_by_path else AdapterFileError(f"{path}: {error.message}", mend=error.mend) from error


def _slot(formats: Iterable[Format], key: str, *, explicit: bool) -> Slot | None:
    parsers = (known.parse_key for known in formats if known.parse_key and (explicit or not known.explicit))
    return next((slot for parse_key in parsers if (slot := parse_key(key)) is not None), None)


def _magnitudes(
    path: Path, modules: Mapping[str, dict[Part, Tensor]], scaling: peft.Scaling | None, base: object
) -> dict[str, tuple[Part, Tensor]]:
    """DoRA's part of each module, taken out of the others. Raises AdapterFileError where the base is not at hand."""
    found = {
        module: (part, parts.pop(part)) for module, parts in modules.items() for part in dora.PARTS if part in parts
    }
    if found and base is None:
        raise AdapterFileError(
            f"{path}: {next(iter(found))} is of DoRA, whose change depends on the weight it is added to",
            mend=f"spmhub convert {path} --model M, the base that it was trained on",
        )
    if scaling is not None and scaling.decomposed and (missing := sorted(modules.keys() - found.keys())):
        raise AdapterFileError(f"{path}: use_dora is True, but {missing[0]} has no lora_magnitude_vector")
    return found


def _refuse(path: Path, key: str) -> Never:
    for pattern, what in _REFUSED.items():
        if pattern.fullmatch(key):
            raise AdapterFileError(
                f"{path}: {key!r} is of {what}; it is not supported", mend=f"use a file in one of: {_names()}"
            )
    for pattern, what in _CONVERTED.items():
        if pattern.fullmatch(key):
            raise AdapterFileError(f"{path}: {key!r} is {what}", mend=f"spmhub convert {path}")
    raise AdapterFileError(f"{path}: {key!r} is of no known layout", mend=f"use a file in one of: {_names()}")


def _names() -> str:
    return "; ".join(f"{known.name} ({known.about})" for known in all_formats())
