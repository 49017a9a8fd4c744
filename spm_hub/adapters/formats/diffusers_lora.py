"""Low-rank files of diffusers' own trainers: dotted module paths, with or without a prefix, in all its spellings."""

import re
from collections.abc import Mapping

from torch import Tensor

from spm_hub.adapters.formats import spm
from spm_hub.adapters.formats.format import WHOLE, Files, Format, Part, Slot, Writer
from spm_hub.adapters.formats.module_names import dotted
from spm_hub.adapters.formats.peft import CONFIG_UNFOLDS, Scaling
from spm_hub.adapters.increments import Increment
from spm_hub.adapters.manifest import Manifest
from spm_hub.errors import AdapterFileError
from spm_hub.io import untrusted_json as untrusted
from spm_hub.io.safetensors_file import encode

METADATA_KEY = "lora_adapter_metadata"
"""Since 2025 diffusers keeps the LoraConfig here, and with it alpha, which the tensors do not state."""

# torch.compile puts a name of its own before what it wraps; PEFT's name is `peft`'s to read.
_PREFIX = r"(?!(?:unet\.|transformer\.)?base_model\.)(?:unet\.|transformer\.)?(?:_orig_mod\.)?"
# 2023: attention processors own the pair, and to_out means its first layer. Such files often carry no prefix at all.
_PROCESSOR = re.compile(
    _PREFIX + r"(?P<attention>[\w.]+)\.processor\.(?P<layer>to_[qkv]|to_out)_lora\.(?P<part>down|up)\.weight"
)
# Since then: the pair belongs to the layer.
_LAYER = re.compile(
    _PREFIX + r"(?P<module>[\w.]+?)\."
    r"(?P<part>(?:lora_A|lora_B|lora\.down|lora\.up)\.weight|alpha|lora_magnitude_vector(?:\.weight)?)"
)
_PARTS: dict[str, Part] = {
    "lora_A.weight": "down",
    "lora_B.weight": "up",
    "lora.down.weight": "down",
    "lora.up.weight": "up",
    "alpha": "alpha",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
}


def parse_key(key: str) -> Slot | None:
    """The slot of a key in any of diffusers' spellings."""
    if match := _PROCESSOR.fullmatch(key):
        layer = "to_out.0" if match["layer"] == "to_out" else match["layer"]
        return Slot(f"{match['attention']}.{layer}", "down" if match["part"] == "down" else "up")
    if match := _LAYER.fullmatch(key):
        return Slot(match["module"], _PARTS[match["part"]])
    return None


def scaling_in(metadata: Mapping[str, str], source: object) -> Scaling | None:
    """The scales in a header, None where it has none: alpha is then the rank.

    A pipeline's `save_lora_weights` puts a component's name before every field, a model's `save_lora_adapter` none.
    Raises AdapterFileError, also for a header that gives scales and not the denoiser's.
    """
    text = metadata.get(METADATA_KEY)
    if text is None:
        return None
    try:
        packed = untrusted.parse(text.encode(), unfolds=CONFIG_UNFOLDS)
        found = [
            {key.removeprefix(prefix): value for key, value in packed.items() if key.startswith(prefix)}
            for prefix in ("unet.", "transformer.")
        ]
    except (ValueError, AttributeError) as error:
        raise AdapterFileError(f"{source}: {METADATA_KEY} in its header is not a JSON object") from error
    config = packed if "lora_alpha" in packed else next(filter(None, found), None)
    if config is None:
        told = sorted({str(key).partition(".")[0] for key in packed})
        raise AdapterFileError(
            f"{source}: {METADATA_KEY} in its header gives the scale of {', '.join(told)[:200] or 'nothing'}, and none "
            "of the denoiser's (unet.lora_alpha or transformer.lora_alpha), so how strong that is is not known",
            mend="save it again with diffusers' unet_lora_adapter_metadata or transformer_lora_adapter_metadata",
        )
    return Scaling.of(config, source)


def write(manifest: Manifest, increments: Mapping[str, Increment], base: Mapping[str, Tensor]) -> Files:
    """One file as diffusers' `save_lora_weights` names its keys; alpha is the rank and need not be stated."""
    paths = {dotted(name): increment for name, increment in increments.items()}
    component = "unet" if spm.is_unet(paths) else "transformer"
    tensors = spm.spelled({f"{component}.{path}": increment for path, increment in paths.items()}, spm.PEFT)
    return {WHOLE: encode(tensors, spm.header_metadata(manifest))}


FORMAT = Format(
    "diffusers",
    "diffusers' LoRA: *.lora_A.weight; its older *.processor.to_q_lora.down.weight is read too",
    parse_key,
    Writer(("low_rank",), write),
)
