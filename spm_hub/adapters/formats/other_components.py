"""What a file holds beside the denoiser, which no eraser changes: told apart, to be refused or left out when asked to.

For the most part it is of text encoders; the one file of a whole pipeline has an autoencoder and more too.
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
# By the word for manifests: that for people, and the keys. The original code keeps its schedule in plain buffers.
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
    """Raise AdapterFileError where any of these is of a part of a pipeline that is not its denoiser."""
    for called, pattern in _PARTS.values():
        if key := next(filter(pattern.fullmatch, tensors), None):
            raise AdapterFileError(
                f"{source}: {key!r} is of {called}, and an eraser changes the denoiser only", mend=LEFT_OUT
            )


def divided(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Mapping[str, int]]:
    """The tensors that may be the denoiser's, and how many are of which other part."""
    parts = {key: next((name for name, (_, those) in _PARTS.items() if those.fullmatch(key)), None) for key in tensors}
    parts |= {key: "text_encoder" for key in tensors if _TOKEN.fullmatch(key)}
    rest = {key: value for key, value in tensors.items() if parts[key] is None}
    return rest, Counter(part for part in parts.values() if part is not None)
