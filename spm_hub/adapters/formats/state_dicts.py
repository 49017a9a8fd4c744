"""Tensors by name in a pickled checkpoint, taken out of the dictionaries around them."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spm_hub.adapters.formats import other_components
from spm_hub.errors import AdapterFileError

# Names of numbers that scale all tensors; each training script applies them in its own way.
_STRENGTHS = {"alpha", "lora_alpha", "network_alpha", "scale", "lora_scale", "multiplier"}
# Names under which training scripts keep the denoiser's tensors.
_HOLDERS = {"state_dict", "unet", "transformer", "model"}
# A name that only files of another kind have.
_OTHER_KINDS = {
    "string_to_param": "a textual-inversion embedding",
    "layer_structure": "a hypernetwork, which adds layers",
}
_TEXT_ENCODERS = {"text_encoder", "text_encoder_2", "text_encoder_3"}


def tensors_in(path: Path, content: Any, *, without_text_encoder: bool = False) -> dict[str, Tensor]:
    """Return the tensors of one denoiser by name.

    content: the content of the pickle at `path`.  without_text_encoder: leave out the parts of text encoders.
    Raises AdapterFileError for other content, for a second component, and for a scale of unknown meaning.
    """
    if not isinstance(content, dict):
        raise AdapterFileError(f"{path} holds {type(content).__name__}, not tensors by name")
    named = {str(key): _as_tensor(str(key), value) for key, value in content.items()}
    holding = {key: value for key, value in named.items() if _holds_tensors(value)}
    for mark, what in _OTHER_KINDS.items():
        if mark in named:
            raise AdapterFileError(
                f"{path}: it is {what} ({mark!r}), and an eraser changes the denoiser's weights",
                mend=other_components.FOR_DENOISERS,
            )
    if strength := sorted(key for key, value in named.items() if key in _STRENGTHS and isinstance(value, int | float)):
        raise AdapterFileError(
            f"{path}: it holds {strength[0]} = {named[strength[0]]} for all its modules, and only the program that "
            "wrote the file defines which tensors that scales",
            mend="ask its author for a safetensors file, or multiply the up matrices by the scale of that program",
        )
    if without_text_encoder:
        holding = {key: value for key, value in holding.items() if key not in _TEXT_ENCODERS}
    if holding.keys() <= _HOLDERS and len(holding) == 1:
        return tensors_in(path, next(iter(holding.values())), without_text_encoder=without_text_encoder)
    for key, value in holding.items():
        if not isinstance(value, Tensor) and key not in _HOLDERS:
            raise AdapterFileError(
                f"{path}: it also holds {key!r}, which is no part of a denoiser; an eraser changes the denoiser only",
                mend=other_components.left_out(path) if key in _TEXT_ENCODERS else None,
            )
    tensors = {key: value.detach() for key, value in holding.items() if isinstance(value, Tensor)}
    if not tensors or len(tensors) < len(holding):
        others = [*holding.keys() - tensors.keys(), *(["tensors"] if tensors else [])]
        raise AdapterFileError(f"{path} holds {' and '.join(others) or 'no tensors'}, not the tensors of one denoiser")
    return tensors


def _as_tensor(key: str, value: Any) -> Any:
    """Return a plain number under a module's name as the tensor that it is in any other file."""
    if "." not in key or isinstance(value, bool) or not isinstance(value, int | float):
        return value
    return torch.tensor(float(value) if abs(value) < 2**1000 else math.inf)


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, dict | list | tuple):
        return any(_holds_tensors(inner) for inner in (value.values() if isinstance(value, dict) else value))
    return isinstance(value, Tensor)
