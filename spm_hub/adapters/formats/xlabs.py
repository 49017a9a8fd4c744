"""XLabs' LoRAs of FLUX.1: processors that own the pairs are named after attention layers."""

import re

from spm_hub.adapters.formats.format import Format
from spm_hub.adapters.formats.slots import Part, Slot

# 1 is the picture's half of a double block, 2 the text's; in a single block q, k and v are the first rows of linear1.
_LAYERS = {
    ("double", "qkv_lora1"): "img_attn.qkv",
    ("double", "qkv_lora2"): "txt_attn.qkv",
    ("double", "proj_lora1"): "img_attn.proj",
    ("double", "proj_lora2"): "txt_attn.proj",
    ("single", "qkv_lora"): "linear1_qkv",
    ("single", "proj_lora"): "linear2",
}
_KEY = re.compile(
    r"(?:(?:model\.)?diffusion_model\.|transformer\.)?(?P<kind>double|single)_blocks\.(?P<block>\d+)\.processor\."
    r"(?P<layer>\w+)\.(?P<part>down\.weight|up\.weight|alpha)"
)
_PARTS: dict[str, Part] = {"down.weight": "down", "up.weight": "up", "alpha": "alpha"}


def parse_key(key: str) -> Slot | None:
    """Return the slot of a key of XLabs'."""
    match = _KEY.fullmatch(key)
    layer = match and _LAYERS.get((match["kind"], match["layer"]))
    if match is None or layer is None:
        return None
    return Slot(f"{match['kind']}_blocks.{match['block']}.{layer}", _PARTS[match["part"]])


FORMAT = Format.by_keys("xlabs", "XLabs' LoRAs of FLUX.1 (processor.qkv_lora1)", parse_key)
