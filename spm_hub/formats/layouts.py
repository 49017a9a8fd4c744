"""Every layout that is read. Adding one is a file with a `parse_key` and its line in `LAYOUTS`."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Never

from torch import Tensor

from spm_hub.errors import AdapterFileError
from spm_hub.formats import diffusers_lora, spm
from spm_hub.formats.parts import KeyParser, Part, assemble
from spm_hub.increments import Increment

LAYOUTS: dict[str, KeyParser] = {
    "SPM and kohya (lora_unet_*)": spm.parse_key,
    "diffusers (*.lora_A.weight, *.processor.to_q_lora.down.weight)": diffusers_lora.parse_key,
}
# Recognised only to be refused in plain words.
_REFUSED = {
    re.compile(
        r"(unet|text_encoder):\d+:(up|down)"
    ): "the cloneofsimo/lora format, which numbers its layers instead of naming them",
    re.compile(
        r"(lora_te\d?_|text_encoder(_\d)?\.|te\d?_).*"
    ): "an increment of a text encoder; an eraser changes the denoiser only",
    re.compile(
        r".*\.(hada_w\d_[ab]|lokr_w\d.*|lora_mid\.weight|dora_scale|oft_blocks)"
    ): "a LyCORIS layout other than LoRA and full",
}


def read_increments(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Increment]:
    """The increments of a file, by module path: dotted where the layout keeps the dots, else with . as _ (`spm.flat`).

    Raises AdapterFileError for a key of no known layout, a module with missing parts, or nothing at all.
    """
    modules: dict[str, dict[Part, Tensor]] = {}
    for key, tensor in tensors.items():
        slot = next((slot for parse_key in LAYOUTS.values() if (slot := parse_key(key)) is not None), None)
        if slot is None:
            # Of a file's keys the telling one: a learnt token says less than a layer beside it.
            _refuse(path, next((each for each in tensors if any(pattern.fullmatch(each) for pattern in _REFUSED)), key))
        parts = modules.setdefault(slot.module, {})
        if slot.part in parts:
            raise AdapterFileError(f"{path}: {slot.module} has two tensors for {slot.part}, the second under {key!r}")
        parts[slot.part] = tensor
    if not modules:
        raise AdapterFileError(f"{path}: it holds no tensors", mend="fetch or train the adapter again")
    return {module: assemble(f"{path}: {module}", modules[module]) for module in sorted(modules)}


def _refuse(path: Path, key: str) -> Never:
    for pattern, what in _REFUSED.items():
        if pattern.fullmatch(key):
            raise AdapterFileError(
                f"{path}: {key!r} is of {what}; it is not supported", mend=f"use a file in one of: {'; '.join(LAYOUTS)}"
            )
    raise AdapterFileError(f"{path}: {key!r} is of no known layout", mend=f"use a file in one of: {'; '.join(LAYOUTS)}")
