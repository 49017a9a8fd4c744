"""Separates a denoiser's tensors from those of other components, which no eraser changes.

Most of these belong to text encoders; the file of a whole pipeline also has an autoencoder and more.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping

from torch import Tensor

from spm_hub.errors import AdapterFileError
from spm_hub.io.wording import counted, quoted

_LAYER = re.compile(
    r"(lora_te\d?_|lycoris_te\d?_|te\d?[_.]|cond_stage_model\.|conditioner\.embedders\.|text_encoders\."
    r"|(base_model\.model\.)?(text_encoder(_\d)?[.:]|text_model\.|text_projection\.)).*"
)

# A learnt word: cloneofsimo's have the name of the token, kohya's come in a bundle.
_TOKEN = re.compile(r"<[^<>]{1,100}>|bundle_emb\..*")
FOR_DENOISERS = "use its file for the denoiser (unet or transformer), if there is one"
"""The mend for a file that holds nothing of a denoiser."""

# The word for manifests -> (the words for people, the keys). The original code keeps its schedule in plain buffers.
_PARTS = {
    "text_encoder": ("a text encoder", _LAYER),
    "autoencoder": ("an autoencoder", re.compile(r"(first_stage_model|vae)\..*")),
    "moving_average": ("a moving average", re.compile(r"model_ema\..*")),
    "schedule": (
        "a noise schedule",
        re.compile(
            r"betas|logvar|scale_factor|v_pred|ztsnr|edm_\w+|denoiser\.sigmas|(sqrt_|log_)?(recip_|recipm1_)?(one_minus_)?"
            r"alphas_cumprod(_prev)?|posterior_(variance|log_variance_clipped|mean_coef[12])"
        ),
    ),
}
# Files in which every key is of one such kind, in the order in which they are looked for.
_ALONE = {
    "it is a textual-inversion embedding: learnt words for a prompt": re.compile(
        r"emb_params|clip_[lg]|t5xxl|string_to_(param|token).*|<[^<>]{1,100}>|bundle_emb\..*"
    ),
    "it holds nothing but parts of a text encoder": re.compile(
        rf"{_LAYER.pattern}|{_TOKEN.pattern}|encoder\.(block|layers)\..*|shared\.weight|final_layer_norm\..*|embeddings\..*"
    ),
    "it is a ControlNet, which adds layers": re.compile(
        r"(control_model|controlnet_\w+|input_hint_block|zero_convs|lllite_\w+)\..*"
    ),
    "it is an IP-Adapter, which adds layers": re.compile(r"(ip_adapter|image_proj)\..*"),
    "it is a motion module, which adds layers": re.compile(r".*\.motion_modules\..*"),
    "it is an autoencoder": re.compile(r"(first_stage_model|vae|encoder|decoder|quant_conv|post_quant_conv)\..*"),
}


def left_out(source: object) -> str:
    """Return the command that converts the denoiser's part of a file alone."""
    return f"spmhub convert {quoted(source)} --without-text-encoder, if the denoiser's part alone will do"


def alone(keys: Iterable[str]) -> str | None:
    """Return in words what a file of these keys is, if it holds nothing of a denoiser; None for any other."""
    keys = tuple(keys)
    for what, pattern in _ALONE.items():
        if keys and all(map(pattern.fullmatch, keys)):
            return f"{what} ({counted(len(keys), 'tensor')}), and an eraser changes the denoiser only"
    return None


def refuse(source: object, tensors: Mapping[str, Tensor]) -> None:
    """Raise AdapterFileError if any of these tensors belongs to another component than the denoiser."""
    if (what := alone(tensors)) is not None:
        raise AdapterFileError(f"{source}: {what}", mend=FOR_DENOISERS)
    for called, pattern in _PARTS.values():
        if key := next(filter(pattern.fullmatch, tensors), None):
            raise AdapterFileError(
                f"{source}: {key!r} is of {called}, and an eraser changes the denoiser only", mend=left_out(source)
            )


def split_off(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Mapping[str, int]]:
    """Return the tensors that may be the denoiser's, and the number of tensors of each other component."""
    parts = {key: next((name for name, (_, those) in _PARTS.items() if those.fullmatch(key)), None) for key in tensors}
    parts |= {key: "text_encoder" for key in tensors if _TOKEN.fullmatch(key)}
    rest = {key: value for key, value in tensors.items() if parts[key] is None}
    return rest, Counter(part for part in parts.values() if part is not None)
