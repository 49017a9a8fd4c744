"""Separates a denoiser's tensors from those of other components, which no eraser changes.

Most of these belong to text encoders; the file of a whole pipeline also has an autoencoder and more.
"""

import re
from collections import Counter
from collections.abc import Mapping

from torch import Tensor

from spm_hub.errors import AdapterFileError

_LAYER = re.compile(
    r"(lora_te\d?_|lycoris_te\d?_|te\d?[_.]|cond_stage_model\.|conditioner\.embedders\.|text_encoders\."
    r"|(base_model\.model\.)?(text_encoder(_\d)?[.:]|text_model\.|text_projection\.)).*"
)

LEFT_OUT = "spmhub convert FILE --without-text-encoder, if the denoiser's part alone will do"

# A learnt word: cloneofsimo's have the name of the token, kohya's come in a bundle.
_TOKEN = re.compile(r"<[^<>]{1,100}>|bundle_emb\..*")
# The word for manifests -> (the words for people, the keys). The original code keeps its schedule in plain buffers.
_PARTS = {
    "text_encoder": ("a text encoder", _LAYER),
    "autoencoder": ("an autoencoder", re.compile(r"(first_stage_model|vae)\..*")),
    "moving_average": ("a moving average", re.compile(r"model_ema\..*")),
    "schedule": (
        "a noise schedule",
        re.compile(
            r"betas|logvar|scale_factor|denoiser\.sigmas|(sqrt_|log_)?(recip_|recipm1_)?(one_minus_)?"
            r"alphas_cumprod(_prev)?|posterior_(variance|log_variance_clipped|mean_coef[12])"
        ),
    ),
}


def refuse(source: object, tensors: Mapping[str, Tensor]) -> None:
    """Raise AdapterFileError if any of these tensors belongs to another component than the denoiser."""
    for called, pattern in _PARTS.values():
        if key := next(filter(pattern.fullmatch, tensors), None):
            raise AdapterFileError(
                f"{source}: {key!r} is of {called}, and an eraser changes the denoiser only", mend=LEFT_OUT
            )


def split_off(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Mapping[str, int]]:
    """Return the tensors that may be the denoiser's, and the number of tensors of each other component."""
    parts = {key: next((name for name, (_, those) in _PARTS.items() if those.fullmatch(key)), None) for key in tensors}
    parts |= {key: "text_encoder" for key in tensors if _TOKEN.fullmatch(key)}
    rest = {key: value for key, value in tensors.items() if parts[key] is None}
    return rest, Counter(part for part in parts.values() if part is not None)
