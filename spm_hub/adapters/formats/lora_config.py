"""The scale of a LoRA whose tensors do not state it: PEFT's LoraConfig, also in diffusers' header."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from spm_hub.errors import AdapterFileError
from spm_hub.io import untrusted_json as untrusted

METADATA_KEY = "lora_adapter_metadata"
"""Since 2025 diffusers keeps the LoraConfig under this key of a header, and alpha with it."""

CONFIG_UNFOLDS = 20
"""A parsed LoraConfig takes at most this many times the length of its text in memory."""

# Fields that change the product beyond its scale, with the value that leaves it a plain LoRA.
_PLAIN = {
    "fan_in_fan_out": False,
    "target_parameters": None,
    "layer_replication": None,
    "use_qalora": False,
    "use_bdlora": None,
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "kasa_config": None,
    "monteclora_config": None,
}
# PEFT's other initialisations (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) subtract what they begin with from the base.
_BASE_UNTOUCHED = (True, False, None, "true", "gaussian", "eva", "orthogonal", "mica")


@dataclass(frozen=True)
class Scaling:
    """alpha by module, as in PEFT's LoraConfig.

    alpha_pattern: alpha by regular expressions, which match the end of a module's path.
    """

    alpha: float
    alpha_pattern: Mapping[str, float]
    rank_stabilised: bool = False
    decomposed: bool = False
    """True for DoRA, whose tensors include magnitudes."""

    @classmethod
    def of(cls, config: Mapping[str, Any], source: object) -> "Scaling":
        """Read the fields of a LoraConfig. Raises AdapterFileError for anything but a plain LoRA or DoRA."""
        for key, plain in _PLAIN.items():
            value = config.get(key, plain)
            if value != plain and (plain or value):
                raise AdapterFileError(f"{source}: {key} is {str(value)[:120]!r}, only {plain!r} is read")
        start = config.get("init_lora_weights", True)
        if (start.lower() if isinstance(start, str) else start) not in _BASE_UNTOUCHED:
            raise AdapterFileError(
                f"{source}: init_lora_weights is {str(start)[:120]!r}, which changes the base before training: the "
                "file holds the difference to that changed base, not to the published one",
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
        """Return the module's alpha in kohya's sense: its product is scaled by alpha / rank."""
        alpha = next(
            (value for key, value in self.alpha_pattern.items() if re.fullmatch(rf"(.*\.)?({key})", module)), self.alpha
        )
        return alpha * math.sqrt(rank) if self.rank_stabilised else alpha


def scaling_in(metadata: Mapping[str, str], source: object) -> Scaling | None:
    """Return the scales in a header, or None where it has none; alpha is then the rank.

    A pipeline's `save_lora_weights` puts a component's name before every field, a model's `save_lora_adapter` none.
    Raises AdapterFileError, also for a header that gives scales of other components only.
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
        components = sorted({str(key).partition(".")[0] for key in packed})
        raise AdapterFileError(
            f"{source}: {METADATA_KEY} in its header gives the scale of {', '.join(components)[:200] or 'nothing'}, "
            "and not the denoiser's (unet.lora_alpha or transformer.lora_alpha), so the strength of its LoRA is "
            "unknown",
            mend="save it again with diffusers' unet_lora_adapter_metadata or transformer_lora_adapter_metadata",
        )
    return Scaling.of(config, source)
