"""kohya's files: modules under the names of the original repositories (`original_names`).

A file of another trainer with SPM's keys, but without our manifest, counts as kohya's too.
"""

import re
from collections.abc import Mapping

from torch import Tensor

from spm_hub.adapters.formats.format import WHOLE, Files, Format, Source, Writer, read_keys
from spm_hub.adapters.formats.header import header_metadata
from spm_hub.adapters.formats.keys import KOHYA_KEYS, tensors_by_key
from spm_hub.adapters.formats.original_names import to_original
from spm_hub.adapters.formats.slots import Part, Slot
from spm_hub.adapters.formats.spm import kohya_stem
from spm_hub.adapters.increments import Increment, LowRank
from spm_hub.adapters.manifest import Manifest
from spm_hub.io.safetensors_file import encode

_PARTS: dict[str, Part] = {
    "lora_down.weight": "down",
    "lora_up.weight": "up",
    "lora_A.weight": "down",
    "lora_B.weight": "up",
    "lora_B.bias": "up_bias",
    "alpha": "alpha",
    "diff": "delta",
    "diff_b": "delta_bias",
}
# `spm` reads the prefix lora_unet_; these are OneTrainer's, and that of files made for the original code.
_KEY = re.compile(
    r"(?:lora_transformer_(?P<flat>\w+?)|(?:model\.)?diffusion_model\.(?P<dotted>[\w.]+?))"
    rf"\.(?P<part>{'|'.join(re.escape(part) for part in _PARTS)})"
)


def parse_key(key: str) -> Slot | None:
    """Return the slot of a key under the prefixes of this format that are not SPM's too."""
    match = _KEY.fullmatch(key)
    return None if match is None else Slot(match["flat"] or match["dotted"], _PARTS[match["part"]])


def write(manifest: Manifest, increments: Mapping[str, Increment], base: Mapping[str, Tensor]) -> Files:
    """Return one file of kohya's keys; its header is that of our own files, with the rank after fusing."""
    modules = to_original(manifest.base.family, increments)
    ranks = [increment.rank for increment in modules.values() if isinstance(increment, LowRank)]
    info = manifest.increment.model_copy(update={"rank": max(ranks, default=None)})
    stated = manifest.model_copy(update={"increment": info})
    tensors = tensors_by_key({kohya_stem(name): increment for name, increment in modules.items()}, KOHYA_KEYS)
    return {WHOLE: encode(tensors, header_metadata(stated))}


def _matches(source: Source) -> bool:
    return "kohya" in source.layouts or source.layouts == {"spm"}


FORMAT = Format(
    "kohya",
    "kohya's sd-scripts: sgm names for SDXL, fused qkv for FLUX.1 and SD3",
    _matches,
    read_keys,
    Writer(("low_rank",), write),
    parse_key=parse_key,
)
