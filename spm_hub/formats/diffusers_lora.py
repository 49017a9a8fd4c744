"""Low-rank files of diffusers' own trainers: dotted module paths, with or without a prefix, in all its spellings."""

import re

from spm_hub.formats.parts import Slot

_PREFIX = r"(?:unet\.|transformer\.)?"
# 2023: attention processors own the pair, and to_out means its first layer. Such files often carry no prefix at all.
_PROCESSOR = re.compile(
    _PREFIX + r"(?P<attention>[\w.]+)\.processor\.(?P<layer>to_[qkv]|to_out)_lora\.(?P<part>down|up)\.weight"
)
# Since then: the pair belongs to the layer.
_LAYER = re.compile(_PREFIX + r"(?P<module>[\w.]+?)\.(?P<part>lora_A|lora_B|lora\.down|lora\.up)\.weight")


def parse_key(key: str) -> Slot | None:
    """The slot of a key in any of diffusers' spellings."""
    if match := _PROCESSOR.fullmatch(key):
        layer = "to_out.0" if match["layer"] == "to_out" else match["layer"]
        return Slot(f"{match['attention']}.{layer}", "down" if match["part"] == "down" else "up")
    if match := _LAYER.fullmatch(key):
        return Slot(match["module"], "down" if match["part"] in ("lora_A", "lora.down") else "up")
    return None
