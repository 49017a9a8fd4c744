"""LyCORIS files: `full` (.diff), norms, and products and rotations, read as dense increments.

Modules have kohya's flat names, or dotted ones, as ai-toolkit and ComfyUI write them.
"""

import re

from spm_hub.adapters.formats import kohya
from spm_hub.adapters.formats.format import Format, Writer
from spm_hub.adapters.formats.products import FACTORS
from spm_hub.adapters.formats.slots import Part, Slot
from spm_hub.adapters.manifest import Manifest

_PARTS: dict[str, Part] = {
    **{part: part for part in sorted(FACTORS)},
    "lora_down.weight": "down",
    "lora_mid.weight": "mid",
    "lora_up.weight": "up",
    "dora_scale": "dora_scale",
    "alpha": "alpha",
    "diff": "delta",
    "diff_b": "delta_bias",
    "w_norm": "delta",
    "b_norm": "delta_bias",
    **{part: part for part in ("bias_indices", "bias_values", "bias_size", "oft_blocks", "oft_diag", "rescale")},
    "oft_blocks.0": "oft_blocks_0",
    "oft_blocks.1": "oft_blocks_1",
    "oft_blocks.2": "oft_blocks_2",
    "oft_blocks.3": "oft_blocks_3",
    "weight": "ia3",
    "on_input": "on_input",
    "a1.weight": "glora_a1",
    "a2.weight": "glora_a2",
    "b1.weight": "glora_b1",
    "b2.weight": "glora_b2",
}
_NAMES = "|".join(map(re.escape, sorted(_PARTS, key=len, reverse=True)))
# LyCORIS trained without kohya's scripts spells its own prefix; OneTrainer spells the transformer's, kohya that of OFT.
_FLAT = re.compile(rf"(?:lora_unet|lycoris|lora_transformer|oft_unet)_(?P<module>\w+?)\.(?P<part>{_NAMES})")
# Under dotted names the plain ends are those of whole weights and of other formats.
_DOTTED = re.compile(
    r"(?:unet\.|transformer\.|lycoris\.|(?:model\.)?diffusion_model\.)?(?P<module>[\w.]+?)"
    rf"\.(?P<part>(?!weight$|lora_(?:down|up)\.weight$|alpha$)(?:{_NAMES}))"
)
_ALPHA = re.compile(
    r"(?:unet\.|transformer\.|lycoris\.|(?:model\.)?diffusion_model\.)(?P<module>[\w.]+)\.(?P<part>alpha)"
)


def parse_key(key: str) -> Slot | None:
    """Return the slot of a key in LyCORIS' spellings."""
    match = _FLAT.fullmatch(key) or _DOTTED.fullmatch(key) or _ALPHA.fullmatch(key)
    return None if match is None else Slot(match["module"], _PARTS[match["part"]])


def _caveat(manifest: Manifest) -> str | None:
    if manifest.increment.kind == "low_rank":
        return None
    return (
        "sd-scripts' own networks (lora, lora_flux, lora_sd3) load nothing of a dense change: for them, --to kohya "
        "--svd-rank 8"
    )


FORMAT = Format.by_keys(
    "lycoris",
    "LyCORIS: full (.diff) and LoRA are written, LoHa, LoKr and, with --model, DoRA read too; kohya's module names",
    parse_key,
    Writer(("low_rank", "dense"), kohya.write, caveat=_caveat),
    converted_only=True,
)
