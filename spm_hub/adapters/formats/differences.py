"""Computes what a file's whole tensors change: their differences to a base."""

import re
from collections.abc import Mapping
from contextlib import suppress

import torch
from torch import Tensor, nn

from spm_hub.adapters.formats import eight_bit
from spm_hub.adapters.formats.assembly import dense
from spm_hub.adapters.formats.module_names import flat
from spm_hub.adapters.formats.original_names import original_tensor, to_diffusers
from spm_hub.adapters.increments import Dense, Increment, Mask
from spm_hub.errors import AdapterFileError
from spm_hub.io.progress import Progress, no_progress
from spm_hub.models.architectures import body_of, changeable

_PREFIXES = ("base_model", "model", "diffusion_model", "unet", "transformer")
_KEY = re.compile(r"[\w.]+\.(weight|bias|(query|key)_norm\.scale)|pos_embed(\.pos_embed)?")
_OTHERS = re.compile(r".*(lora|hada_|lokr_|oft_|hra_|ia3_|vera_|ln_tuning).*")


def is_whole(key: str) -> bool:
    """Return True for the key of a plain weight or bias."""
    return _KEY.fullmatch(key) is not None and _OTHERS.fullmatch(key) is None


def differences(
    path: object,
    tensors: Mapping[str, Tensor],
    denoiser: nn.Module,
    scales: Mapping[str, Tensor] | None = None,
    progress: Progress = no_progress,
) -> dict[str, Dense]:
    """Return the difference of each tensor to the denoiser's, by dotted path.

    Tensors that are equal have none. The denoiser's is rounded to the file's precision first, as training began from
    it; a tensor that equals it then was not trained. path: named in messages. scales: of tensors in eight-bit floats,
    by key.
    Raises AdapterFileError for a tensor that the denoiser does not have, or has in another shape, and for a changed one
    that no increment can hold.
    """
    layers = {flat(layer) for layer in changeable(denoiser)}
    base = {flat(key): tensor for key, tensor in body_of(denoiser).state_dict().items()}
    modules: dict[str, dict[str, Tensor]] = {}
    keys: dict[str, str] = {}
    for count, (key, tensor) in enumerate(tensors.items()):
        progress(count + 1, len(tensors))
        module, kind, original = _original(path, key, base)
        if (other := keys.setdefault(f"{flat(module)}.{kind}", key)) != key:
            raise AdapterFileError(f"{path}: {module}.{kind} is in it twice: {other!r} and {key!r}")
        if tensor.shape != original.shape and tensor.squeeze().shape != original.squeeze().shape:
            raise AdapterFileError(
                f"{path}: {key} is {tuple(tensor.shape)}, the model's is {tuple(original.shape)}",
                mend="--model M, the base that the file was trained on",
            )
        scale = (scales or {}).get(key)
        before, after = eight_bit.rounded_as(original, tensor, scale), eight_bit.widened(tensor, scale)
        if torch.equal(after, before):
            continue
        modules.setdefault(module, {})[kind] = (after.double() - before.double()).reshape(original.shape).float()
    changes: dict[str, Increment] = {}
    for module, parts in modules.items():
        weight = original_tensor(module, "weight", base)
        if weight is None or weight.dim() not in (1, 2, 4):
            raise _unchangeable(path, f"{module}.{min(parts)}")
        changes[module] = Dense(parts.get("weight", torch.zeros(weight.shape)), parts.get("bias"))
    # Of a fused weight only the parts with a change are modules of the eraser.
    found = {path: one for path, one in to_diffusers(changes).items() if isinstance(one, Dense) and not one.is_zero}
    for module in found:
        if flat(module) not in layers:
            raise _unchangeable(path, module)
    return found


def added(increments: Mapping[str, Increment], more: Mapping[str, Dense]) -> dict[str, Dense | Mask]:
    """Return the sums of changes and of dense ones, all of them dense, by the names of the first.

    Names of one module may differ in their dots. Raises AdapterFileError as `dense` does.
    """
    names = {flat(name): name for name in increments}
    found = {name: one if isinstance(one, Mask) else dense(name, one) for name, one in increments.items()}
    for path, change in more.items():
        name = names.get(flat(path), path)
        here = found.get(name)
        if here is None:
            found[name] = change
            continue
        assert isinstance(here, Dense)  # no file has masks beside whole tensors
        biases = [bias for bias in (here.delta_bias, change.delta_bias) if bias is not None]
        bias = sum(biases[1:], biases[0]) if biases else None
        found[name] = Dense(here.delta + change.delta.reshape(here.delta.shape), bias)
    return found


def _original(path: object, key: str, base: Mapping[str, Tensor]) -> tuple[str, str, Tensor]:
    """Return the module, "weight" or "bias", and the base's tensor for a key under any prefix.

    base: by key with . as _ .  The tensor is fused where the file's is. Raises AdapterFileError for an unknown key.
    """
    rest = "pos_embed.pos_embed" if key == "pos_embed" else key
    while True:
        module, _, kind = rest.rpartition(".")
        # FLUX.1's q and k norms alone are `X.scale`.
        named, kind = (rest, "weight") if kind == "scale" else (module, kind)
        with suppress(AdapterFileError):
            if (found := original_tensor(named, kind, base)) is not None:
                return named, kind, found
        prefix, dot, rest = rest.partition(".")
        if not dot or prefix not in _PREFIXES:
            raise AdapterFileError(
                f"{path}: the model has no tensor {key!r}", mend="--model M, the base that the file was trained on"
            )


def _unchangeable(path: object, what: str) -> AdapterFileError:
    return AdapterFileError(
        f"{path}: {what} was trained too, and an increment changes Linear, Conv2d and norm layers only",
        mend="ask its author for a file without it",
    )
