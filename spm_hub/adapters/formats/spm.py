"""Our own layout: SPM's kohya keys for U-Nets, diffusers' dotted keys for transformers.

Both load in plain diffusers; the first also in A1111, ComfyUI and InvokeAI. alpha is the rank, one value for the whole
file, because some of them ignore any other. Dense changes of transformers, which diffusers does not load, have the
original code's names.
"""

import re
from collections.abc import Mapping

from torch import Tensor

from spm_hub.adapters.formats import fused_names
from spm_hub.adapters.formats.format import WHOLE, About, Files, Format, Source, Writer
from spm_hub.adapters.formats.header import header_metadata
from spm_hub.adapters.formats.keys import KOHYA_KEYS, PEFT_KEYS, tensors_by_key
from spm_hub.adapters.formats.lora_config import scaling_in
from spm_hub.adapters.formats.module_names import SGM_ONLY, flat, is_unet
from spm_hub.adapters.formats.slots import Part, Slot
from spm_hub.adapters.increments import Dense, Increment
from spm_hub.adapters.manifest import Manifest
from spm_hub.io.safetensors_file import MANIFEST_KEY, encode

_PARTS: dict[str, Part] = {
    "lora_down.weight": "down",
    "lora_up.weight": "up",
    "lora_A.weight": "down",
    "lora_B.weight": "up",
    "alpha": "alpha",
    "diff": "delta",
    "diff_b": "delta_bias",
    "keep_out": "keep_out",
    "keep_in": "keep_in",
}
# In the wild the prefix is sometimes doubled and the last dot sometimes flattened too.
_KOHYA = re.compile(
    r"lora_unet_(?:unet_)?(?P<module>\w+?)"
    r"(?:\.(?P<part>lora_down\.weight|lora_up\.weight|alpha|diff|diff_b|keep_out|keep_in)|_(?P<flat>lora_(?:down|up)\.weight))"
)
_TRANSFORMER = re.compile(
    r"transformer\.(?!base_model\.)(?P<module>[\w.]+?)"
    r"\.(?P<part>lora_A\.weight|lora_B\.weight|alpha|diff|diff_b|keep_out|keep_in)"
)


def parse_key(key: str) -> Slot | None:
    """Return the slot of a key in either spelling of this layout."""
    match = _KOHYA.fullmatch(key) or _TRANSFORMER.fullmatch(key)
    if match is None:
        return None
    found = match.groupdict()
    return Slot(found["module"], _PARTS[found["part"] or found["flat"]])


def to_tensors(increments: Mapping[str, Increment], family: str = "") -> dict[str, Tensor]:
    """Return the tensors of an adapter file by key; dense changes of FLUX.1 and SD3 need their family."""
    if is_unet(increments):
        named = {SGM_ONLY.get(name := flat(path), name): increment for path, increment in increments.items()}
        return tensors_by_key({f"lora_unet_{name}": increment for name, increment in named.items()}, KOHYA_KEYS)
    if family in ("flux", "sd3") and any(isinstance(increment, Dense) for increment in increments.values()):
        return tensors_by_key(_fused(family, increments), KOHYA_KEYS)
    return tensors_by_key({f"transformer.{path}": increment for path, increment in increments.items()}, PEFT_KEYS)


def _fused(family: str, increments: Mapping[str, Increment]) -> dict[str, Increment]:
    """Return dense changes by the keys of the original fused weights.

    ComfyUI and Forge take diffusers' names for slices of these, and drop the bias of a slice. Rows of a module that is
    not changed are zero there, which costs space: without biases such modules of FLUX.1 keep diffusers' names.
    """
    biased = any(isinstance(one, Dense) and one.delta_bias is not None for one in increments.values())
    joined = {
        path: increment
        for path, increment in increments.items()
        if family == "sd3" or biased or fused_names.is_whole(family, path, increments)
    }
    named, others = fused_names.join(family, joined)
    apart = others | {path: one for path, one in increments.items() if path not in joined}
    return {kohya_stem(name): one for name, one in named.items()} | {
        f"transformer.{p}": one for p, one in apart.items()
    }


def kohya_stem(name: str) -> str:
    """Return the key, without its last part, of an original module's name with . as _ ."""
    return fused_names.dotted_original(name) or f"lora_unet_{name}"


def _matches(source: Source) -> bool:
    return MANIFEST_KEY in source.metadata


def _read(source: Source) -> dict[str, Increment]:
    return source.read_keys(scaling=scaling_in(source.metadata, source.place), converting=False)


def _describe(source: Source) -> About:
    text = source.metadata[MANIFEST_KEY]
    return About(manifest=Manifest.from_json(text, source=f"{source.place} ({MANIFEST_KEY})"))


def write(manifest: Manifest, increments: Mapping[str, Increment], base: Mapping[str, Tensor]) -> Files:
    """Return one file as `Adapter.save` writes it."""
    return {WHOLE: encode(to_tensors(increments, manifest.base.family), header_metadata(manifest))}


FORMAT = Format(
    "spm",
    "spm-hub's own files: SPM's kohya keys for U-Nets, diffusers' for transformers",
    _matches,
    _read,
    Writer(("low_rank", "dense", "mask"), write),
    describe=_describe,
    parse_key=parse_key,
)
