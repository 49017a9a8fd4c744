"""Text encoders whose names lack `text_model.`, as in NovelAI's descendants.

A transformers that dropped the word writes such names too. diffusers' reader of single files knows only the names with
it; these encoders are made from the configuration here.
"""

from __future__ import annotations

from collections.abc import Set
from pathlib import Path
from typing import TYPE_CHECKING

from spm_hub.errors import ModelError

if TYPE_CHECKING:
    import torch

# What precedes the encoder's tensors, by its part of a pipeline.
_PREFIXES = {
    "text_encoder": (
        "cond_stage_model.transformer.",
        "conditioner.embedders.0.transformer.",
        "text_encoders.clip_l.transformer.",
    ),
    "text_encoder_2": ("text_encoders.clip_g.transformer.",),
}
_FIRST = "embeddings.position_embedding.weight"


def prefix_of(part: str, keys: Set[str]) -> str | None:
    """Return what precedes the tensors of such an encoder in a file of these keys, or None if it has none."""
    return next((prefix for prefix in _PREFIXES.get(part, ()) if prefix + _FIRST in keys), None)


def load(path: Path, keys: Set[str], folder: Path, precision: torch.dtype) -> dict[str, torch.nn.Module]:
    """Return the encoders of this kind in a file, by their part of the pipeline.

    folder: a diffusers folder with their configuration.  Raises ModelError if the two do not fit.
    """
    import transformers
    from safetensors import safe_open

    found: dict[str, torch.nn.Module] = {}
    for part in _PREFIXES:
        prefix = prefix_of(part, keys)
        if prefix is None:
            continue
        config = transformers.CLIPTextConfig.from_pretrained(folder / part)
        projects = any("WithProjection" in name for name in config.architectures or ())
        made = transformers.CLIPTextModelWithProjection if projects else transformers.CLIPTextModel
        encoder: torch.nn.Module = made(config)
        names = {key.removeprefix("text_model."): key for key in encoder.state_dict()}
        with safe_open(path, "pt") as file:
            tensors = {
                names[name]: file.get_tensor(prefix + name).to(precision) for name in names if prefix + name in keys
            }
        lost = encoder.state_dict().keys() - tensors.keys()
        expected = {key: tuple(value.shape) for key, value in encoder.state_dict().items()}
        odd = next((key for key, tensor in tensors.items() if tuple(tensor.shape) != expected[key]), None)
        if lost or odd is not None:
            what = f"lacks {min(lost)}" if lost else f"has {odd} {tuple(tensors[str(odd)].shape)}"
            raise ModelError(
                f"{path} does not fit the configuration {folder}: its {part} {what}",
                mend="--config for a diffusers folder of its own family",
            )
        encoder.load_state_dict(tensors)
        found[part] = encoder.to(precision).eval()
    return found
