"""PEFT's folders: adapter_model.safetensors, and adapter_config.json with the scales."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from spm_hub.adapters.formats import peft_kinds
from spm_hub.adapters.formats.format import Files, Format, Source, Writer
from spm_hub.adapters.formats.keys import PEFT_KEYS, tensors_by_key
from spm_hub.adapters.formats.lora_config import CONFIG_UNFOLDS, Scaling, scaling_in
from spm_hub.adapters.formats.module_names import dotted
from spm_hub.adapters.formats.products import FACTORS
from spm_hub.adapters.formats.slots import Part, Slot
from spm_hub.adapters.increments import Increment, LowRank
from spm_hub.adapters.manifest import Manifest
from spm_hub.errors import AdapterFileError, NotFoundError
from spm_hub.io import untrusted_json as untrusted
from spm_hub.io.safetensors_file import encode

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"

_KEY = re.compile(
    r"(?:unet\.|transformer\.)?base_model\.model\.(?:unet\.|transformer\.)?(?P<module>[\w.]+?)\."
    r"(?P<part>lora_[AB]\.weight|lora_B\.bias|lora_magnitude_vector(?:\.weight)?|(?:hada|lokr)_\w+|ia3_l|oft_R\.weight)"
)
_PARTS: dict[str, Part] = {
    "lora_A.weight": "down",
    "lora_B.weight": "up",
    "lora_B.bias": "up_bias",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "ia3_l": "ia3_l",
    "oft_R.weight": "oft_R",
    **{part: part for part in sorted(FACTORS)},
}


def parse_key(key: str) -> Slot | None:
    """Return the slot of a key of PEFT's."""
    match = _KEY.fullmatch(key)
    return Slot(match["module"], _PARTS[match["part"]]) if match is not None and match["part"] in _PARTS else None


def read_config(weights: Path) -> dict[str, Any]:
    """Read the config next to `weights`.

    Raises NotFoundError without one, AdapterFileError for a damaged one.
    """
    path = weights.with_name(CONFIG)
    try:
        config = untrusted.parse(path.read_bytes(), unfolds=CONFIG_UNFOLDS)
    except FileNotFoundError as error:
        raise NotFoundError(
            f"{weights} is PEFT's: the strength of its change is in {CONFIG}, which is missing from its folder",
            mend=f"fetch {CONFIG} into the same folder",
        ) from error
    except ValueError as error:
        raise AdapterFileError(f"{path} is not JSON: {error}", mend=f"fetch {CONFIG} again") from error
    if not isinstance(config, dict):
        raise AdapterFileError(f"{path} is no JSON object", mend=f"fetch {CONFIG} again")
    return config


def _matches(source: Source) -> bool:
    return any(map(parse_key, source.tensors))


def _read(source: Source) -> dict[str, Increment]:
    if (scaling := scaling_in(source.metadata, source.place)) is not None:
        return source.read_keys(scaling=scaling)
    config, path = read_config(source.place), source.place.with_name(CONFIG)
    if config.get("peft_type") != "LORA":
        return source.read_keys(peft_kinds.prepared(config, path, source.tensors))
    return source.read_keys(scaling=Scaling.of(config, path))


def _write(manifest: Manifest, increments: Mapping[str, Increment], base: Mapping[str, Tensor]) -> Files:
    """Return the folder that `PeftModel.from_pretrained(denoiser, folder)` loads; alpha is the rank."""
    paths = {dotted(name): increment for name, increment in increments.items()}
    rank = max(increment.rank for increment in paths.values() if isinstance(increment, LowRank))
    tensors = tensors_by_key({f"base_model.model.{path}": increment for path, increment in paths.items()}, PEFT_KEYS)
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": manifest.base.id or None,
        "revision": manifest.base.revision,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(paths),
    }
    return {
        WEIGHTS: encode(tensors, {"format": "pt"}),
        CONFIG: json.dumps(config, indent=2).encode() + b"\n",
    }


def _caveat(manifest: Manifest) -> str | None:
    if manifest.base.family in ("sd1", "sd2", "sdxl", "flux"):
        return (
            "PEFT and diffusers load this folder; ComfyUI, the web UIs and sd-scripts load nothing of it: for these, "
            "--to comfyui, --to webui or --to kohya"
        )
    if manifest.base.family == "sd3":
        return (
            "PEFT, diffusers and ComfyUI load this folder's file; Forge and sd-scripts leave it out: for these, "
            "--to webui or --to kohya"
        )
    return None


FORMAT = Format(
    "peft",
    "PEFT's folder: adapter_model.safetensors and its config",
    _matches,
    _read,
    Writer(("low_rank",), _write, suffix="", caveat=_caveat),
    parse_key=parse_key,
    converted_only=True,
)
