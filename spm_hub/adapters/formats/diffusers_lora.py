"""Low-rank files of diffusers' own trainers: dotted module paths in all of diffusers' spellings."""

import re
from collections.abc import Mapping

from torch import Tensor

from spm_hub.adapters.formats.format import WHOLE, Files, Format, Writer
from spm_hub.adapters.formats.header import header_metadata
from spm_hub.adapters.formats.keys import PEFT_KEYS, tensors_by_key
from spm_hub.adapters.formats.module_names import dotted, is_unet
from spm_hub.adapters.formats.slots import Part, Slot
from spm_hub.adapters.increments import Increment
from spm_hub.adapters.manifest import Manifest
from spm_hub.io.safetensors_file import encode

# PEFT's prefix belongs to `peft`.
_PREFIX = r"(?!(?:unet\.|transformer\.)?base_model\.)(?:unet\.|transformer\.)?"
# 2023: attention processors own the pair, and to_out means its first layer. Such files often carry no prefix at all.
_PROCESSOR = re.compile(
    _PREFIX + r"(?P<attention>[\w.]+)\.processor\.(?P<layer>to_[qkv]|to_out)_lora\.(?P<part>down|up)\.weight"
)
# Since then: the pair belongs to the layer.
_LAYER = re.compile(
    _PREFIX + r"(?P<module>[\w.]+?)\."
    r"(?P<part>(?:lora_A|lora_B|lora_down|lora_up|lora\.down|lora\.up)\.weight|lora_B\.bias|alpha"
    r"|lora_magnitude_vector(?:\.weight)?)"
)
_PARTS: dict[str, Part] = {
    "lora_A.weight": "down",
    "lora_B.weight": "up",
    "lora_B.bias": "up_bias",
    "lora_down.weight": "down",
    "lora_up.weight": "up",
    "lora.down.weight": "down",
    "lora.up.weight": "up",
    "alpha": "alpha",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
}


def parse_key(key: str) -> Slot | None:
    """Return the slot of a key in any of diffusers' spellings."""
    if match := _PROCESSOR.fullmatch(key):
        layer = "to_out.0" if match["layer"] == "to_out" else match["layer"]
        return Slot(f"{match['attention']}.{layer}", "down" if match["part"] == "down" else "up")
    if match := _LAYER.fullmatch(key):
        return Slot(match["module"], _PARTS[match["part"]])
    return None


def _write(manifest: Manifest, increments: Mapping[str, Increment], base: Mapping[str, Tensor]) -> Files:
    """Return one file with the keys of diffusers' `save_lora_weights`; alpha is the rank."""
    paths = {dotted(name): increment for name, increment in increments.items()}
    component = "unet" if is_unet(paths) else "transformer"
    tensors = tensors_by_key({f"{component}.{path}": increment for path, increment in paths.items()}, PEFT_KEYS)
    return {WHOLE: encode(tensors, header_metadata(manifest))}


def _caveat(manifest: Manifest) -> str | None:
    if manifest.base.family in ("sd1", "sd2", "sdxl"):
        return (
            "diffusers loads this file whole; ComfyUI loads it without its attention layers, and the web UIs and "
            "sd-scripts leave it out: for these, --to comfyui, --to webui or --to kohya"
        )
    if manifest.base.family == "sd3":
        return (
            "diffusers and ComfyUI load this file whole; Forge and sd-scripts leave it out: for these, --to webui or "
            "--to kohya"
        )
    if manifest.base.family == "flux":
        return "diffusers, ComfyUI and Forge load this file whole; sd-scripts leaves it out: for it, --to kohya"
    return None


FORMAT = Format.by_keys(
    "diffusers",
    "diffusers' LoRA: *.lora_A.weight; its older *.processor.to_q_lora.down.weight is read too",
    parse_key,
    Writer(("low_rank",), _write, caveat=_caveat),
)
