"""PEFT's folders: adapter_model.safetensors, whose scales stand in adapter_config.json beside it."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from spm_hub.adapters.formats import spm
from spm_hub.adapters.formats.format import Files, Format, Part, Slot, Writer
from spm_hub.adapters.formats.module_names import dotted
from spm_hub.adapters.increments import Increment, LowRank
from spm_hub.adapters.manifest import Manifest
from spm_hub.errors import AdapterFileError, NotFoundError
from spm_hub.io import untrusted_json as untrusted
from spm_hub.io.safetensors_file import encode

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
CONFIG_UNFOLDS = 20
"""Times the length of its text that a LoraConfig takes in memory, at most."""

_KEY = re.compile(
    r"(?:unet\.|transformer\.)?base_model\.model\.(?:unet\.|transformer\.)?(?P<module>[\w.]+?)\."
    r"(?:lora_(?P<part>[AB])(?:\.\w+)??\.weight|lora_magnitude_vector(?:\.\w+)?(?:\.weight)?)"
)
_PARTS: dict[str | None, Part] = {"A": "down", "B": "up", None: "magnitude"}
# What changes the product beyond its scale, and what it has to be for the file to say all.
_PLAIN = {
    "fan_in_fan_out": False,
    "bias": "none",
    "lora_bias": False,
    "modules_to_save": None,
    "target_parameters": None,
    "layer_replication": None,
    "use_qalora": False,
    "use_bdlora": None,
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "kasa_config": None,
    "monteclora_config": None,
}
# The other ways of PEFT to begin (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) take what they begin with out of the base.
_BASE_UNTOUCHED = (True, False, None, "true", "gaussian", "eva", "orthogonal", "mica")


@dataclass(frozen=True)
class Scaling:
    """alpha by module, as a LoraConfig of PEFT has it; patterns are regular expressions for the end of a path."""

    alpha: float
    alpha_pattern: Mapping[str, float]
    rank_stabilised: bool = False
    decomposed: bool = False
    """Whether it is DoRA, whose tensors then have magnitudes."""

    @classmethod
    def of(cls, config: Mapping[str, Any], source: object) -> "Scaling":
        """From a LoraConfig's fields. Raises AdapterFileError for what is no plain LoRA."""
        for key, plain in _PLAIN.items():
            value = config.get(key, plain)
            if value != plain and (plain or value):
                raise AdapterFileError(f"{source}: {key} is {str(value)[:120]!r}, only {plain!r} is read")
        begun = config.get("init_lora_weights", True)
        if (begun.lower() if isinstance(begun, str) else begun) not in _BASE_UNTOUCHED:
            raise AdapterFileError(
                f"{source}: init_lora_weights is {str(begun)[:120]!r}, which changes the base before training: the "
                "file is what was added to that base, not to the one that everybody has",
                mend="save it with PEFT's path_initial_model_for_weight_conversion, which makes a plain LoRA of it; or "
                "merge it, and: spmhub convert MERGED --model M, the base before",
            )
        try:
            pattern = {str(key): float(value) for key, value in (config.get("alpha_pattern") or {}).items()}
            alpha = float(config["lora_alpha"])
            for key in pattern:
                re.compile(key)
        except (KeyError, TypeError, ValueError, AttributeError, re.error) as error:
            raise AdapterFileError(f"{source}: it has no readable lora_alpha or alpha_pattern: {error!r}") from error
        return cls(alpha, pattern, bool(config.get("use_rslora")), bool(config.get("use_dora")))

    def alpha_of(self, module: str, rank: int) -> float:
        """What kohya would call this module's alpha: the product is scaled by it over the rank."""
        alpha = next(
            (value for key, value in self.alpha_pattern.items() if re.fullmatch(rf"(.*\.)?({key})", module)), self.alpha
        )
        return alpha * math.sqrt(rank) if self.rank_stabilised else alpha


def parse_key(key: str) -> Slot | None:
    """The slot of a key of PEFT's; its scale is not in the file."""
    match = _KEY.fullmatch(key)
    return None if match is None else Slot(match["module"], _PARTS[match["part"]])


def read_scaling(weights: Path) -> Scaling:
    """The scales of a PEFT file, from beside it. Raises NotFoundError where they are not there, AdapterFileError."""
    path = weights.with_name(CONFIG)
    try:
        config = untrusted.parse(path.read_bytes(), unfolds=CONFIG_UNFOLDS)
    except FileNotFoundError as error:
        raise NotFoundError(
            f"{weights} is PEFT's: how strong it is stands in {CONFIG}, which is not beside it",
            mend=f"fetch {CONFIG} into the same folder",
        ) from error
    except ValueError as error:
        raise AdapterFileError(f"{path} is not JSON: {error}", mend=f"fetch {CONFIG} again") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise AdapterFileError(f"{path}: peft_type is {kind!r}, only 'LORA' is read")
    return Scaling.of(config, path)


def write(manifest: Manifest, increments: Mapping[str, Increment], base: Mapping[str, Tensor]) -> Files:
    """The folder that `PeftModel.from_pretrained(denoiser, folder)` loads; alpha is the rank."""
    paths = {dotted(name): increment for name, increment in increments.items()}
    rank = max(increment.rank for increment in paths.values() if isinstance(increment, LowRank))
    tensors = spm.spelled({f"base_model.model.{path}": increment for path, increment in paths.items()}, spm.PEFT)
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
    parse_key,
    Writer(("low_rank",), write),
    explicit=True,
)
