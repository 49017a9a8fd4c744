"""PEFT's folders: adapter_model.safetensors, and adapter_config.json with the scales."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from spm_hub.adapters.formats.format import Files, Format, Source, Writer
from spm_hub.adapters.formats.keys import PEFT_KEYS, tensors_by_key
from spm_hub.adapters.formats.lora_config import CONFIG_UNFOLDS, Scaling, scaling_in
from spm_hub.adapters.formats.module_names import dotted
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
    r"(?:lora_(?P<part>[AB])(?:\.\w+)??\.weight|lora_magnitude_vector(?:\.\w+)?(?:\.weight)?)"
)
_PARTS: dict[str | None, Part] = {"A": "down", "B": "up", None: "magnitude"}


def parse_key(key: str) -> Slot | None:
    """Return the slot of a key of PEFT's."""
    match = _KEY.fullmatch(key)
    return None if match is None else Slot(match["module"], _PARTS[match["part"]])


def read_scaling(weights: Path) -> Scaling:
    """Read the scales from the config next to `weights`.

    Raises NotFoundError without a config, AdapterFileError for one that is no plain LoRA's.
    """
    path = weights.with_name(CONFIG)
    try:
        config = untrusted.parse(path.read_bytes(), unfolds=CONFIG_UNFOLDS)
    except FileNotFoundError as error:
        raise NotFoundError(
            f"{weights} is PEFT's: the strength of its LoRA is in {CONFIG}, which is missing from its folder",
            mend=f"fetch {CONFIG} into the same folder",
        ) from error
    except ValueError as error:
        raise AdapterFileError(f"{path} is not JSON: {error}", mend=f"fetch {CONFIG} again") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise AdapterFileError(f"{path}: peft_type is {kind!r}, only 'LORA' is read")
    return Scaling.of(config, path)


def _matches(source: Source) -> bool:
    return any(map(parse_key, source.tensors))


def _read(source: Source) -> dict[str, Increment]:
    return source.read_keys(scaling=scaling_in(source.metadata, source.place) or read_scaling(source.place))


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


FORMAT = Format(
    "peft",
    "PEFT's folder: adapter_model.safetensors and its config",
    _matches,
    _read,
    Writer(("low_rank",), _write, suffix=""),
    parse_key=parse_key,
    converted_only=True,
)
