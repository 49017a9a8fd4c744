"""LyCORIS files: `full` (.diff), and the products LoHa and LoKr, which are read as dense increments."""

import re

from spm_hub.adapters.formats import kohya
from spm_hub.adapters.formats.format import Format, Writer
from spm_hub.adapters.formats.products import FACTORS
from spm_hub.adapters.formats.slots import Part, Slot

_PARTS: dict[str, Part] = {
    **{part: part for part in sorted(FACTORS)},
    "lora_down.weight": "down",
    "lora_mid.weight": "mid",
    "lora_up.weight": "up",
    "dora_scale": "dora_scale",
    "alpha": "alpha",
    "diff": "delta",
    "diff_b": "delta_bias",
}
# LyCORIS trained without kohya's scripts spells its own prefix; OneTrainer spells the transformer's.
_KEY = re.compile(
    r"(?:lora_unet|lycoris|lora_transformer)_(?P<module>\w+?)"
    rf"\.(?P<part>{'|'.join(re.escape(part) for part in _PARTS)})"
)


def parse_key(key: str) -> Slot | None:
    """Return the slot of a key in LyCORIS' spellings."""
    match = _KEY.fullmatch(key)
    return None if match is None else Slot(match["module"], _PARTS[match["part"]])


FORMAT = Format.by_keys(
    "lycoris",
    "LyCORIS: full (.diff) and LoRA are written, LoHa, LoKr and, with --model, DoRA read too; kohya's module names",
    parse_key,
    Writer(("low_rank", "dense"), kohya.write),
    converted_only=True,
)
