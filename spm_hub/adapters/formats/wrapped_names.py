"""Names that wrappers leave in a file's keys: parallel training, torch.compile, PEFT's adapters.

None of them is part of a module's path. A compiled model, for instance, saves `_orig_mod.up_blocks...`, and PEFT's
plain state dict `...to_k.lora_A.default.weight`, where `default` is the name of an adapter. PEFT also keeps the base's
own weight as `...to_k.base_layer.weight`, and a layer that it trained whole as `...modules_to_save.default.weight`.
"""

import re
from collections.abc import Mapping

from torch import Tensor

from spm_hub.errors import AdapterFileError

_INNER = "_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module"
# `module` is a wrapper only before the path begins; further in, it could be a name of the model's own.
_BEFORE = "model|diffusion_model|unet|transformer|base_model"
_WRAPPER = re.compile(rf"(?:^|(?<=\.))(?:{_INNER})\.")
_PARALLEL = re.compile(rf"^((?:(?:{_BEFORE})\.)*)module\.")
_FLAT = re.compile(r"^((?:lora_unet|lora_transformer|lycoris|oft_unet)_)(?:_orig_mod_)+")
# Of each group that matches, what is left of the key; the rest is the name of an adapter.
_ADAPTERS = (
    re.compile(r"(.+\.lora_[AB])\.[^.]+(\.weight|\.bias)"),
    re.compile(r"(.+\.oft_R)\.[^.]+(\.weight)"),
    re.compile(r"(.+\.lora_magnitude_vector)\.(?!weight$)[^.]+(?:\.weight)?"),
    re.compile(r"(.+\.(?:hada_\w+|lokr_\w+|ia3_l|boft_[RSs]|vera_lambda_[bd]))\.(?!weight$)[^.]+"),
    re.compile(r"(.+)\.modules_to_save\.[^.]+(\.weight|\.bias)"),
    re.compile(r"(.+)\.base_layer(\.weight|\.bias)"),
    re.compile(r"(.+)\.default(\.(?:weight|bias|diff|diff_b|w_norm|b_norm|alpha|hada_\w+|lokr_\w+))"),
)
_HOLDER = re.compile(r"^(?:model\.)+(?=(?:unet|transformer)\.)")


def unwrapped(source: object, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the same tensors under keys without the names of wrappers and adapters.

    Raises AdapterFileError for two keys that differ in nothing else, as in a file of two adapters.
    """
    found: dict[str, Tensor] = {}
    first: dict[str, str] = {}
    for key, tensor in tensors.items():
        plain = _without_wrappers(key)
        if (other := first.setdefault(plain, key)) != key:
            raise AdapterFileError(
                f"{source}: {other!r} and {key!r} are the same part of one module, of two adapters or two copies",
                mend="save one of the two alone, and convert that file",
            )
        found[plain] = tensor
    return found


def _without_wrappers(key: str) -> str:
    plain = _FLAT.sub(r"\1", _WRAPPER.sub("", key))
    while (shorter := _PARALLEL.sub(r"\1", plain)) != plain:
        plain = shorter
    plain = _HOLDER.sub("", plain)
    for pattern in _ADAPTERS:
        if (match := pattern.fullmatch(plain)) is not None:
            plain = "".join(filter(None, match.groups()))
    return plain
