"""PEFT's LoHa, LoKr, IA3 and OFT: what their config says, put into their tensors.

LoHa and LoKr are scaled by alpha / r whether or not a factor has a rank. OFT's tensor is the upper triangle of a
skew-symmetric Q, and its rotation is Cayley's (I - Q)(I + Q)^-1, or, as PEFT does by default since 0.17, the first
terms of the series of (I + Q)(I - Q)^-1.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from spm_hub.errors import AdapterFileError

MERGED = "merge it with PEFT's merge_and_unload, save the denoiser, and: spmhub convert MERGED --model M"
_SCALED = {"LOHA": ("hada_w1_a",), "LOKR": ("lokr_w1", "lokr_w1_a")}
_TERMS = 5
"""Terms of the series, unless the config says otherwise."""


def prepared(config: Mapping[str, Any], source: object, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a folder's tensors so that they say their change without the config.

    config: adapter_config.json, named `source` in messages. Raises AdapterFileError for any other kind of PEFT's, and
    for settings that are not read.
    """
    kind = config.get("peft_type")
    unread = [key for key in ("fan_in_fan_out", "coft") if config.get(key)]
    if kind not in (*_SCALED, "IA3", "OFT") or unread:
        what = f"{unread[0]} is on" if unread else f"peft_type is {str(kind)[:40]!r}"
        raise AdapterFileError(f"{source}: {what}; LORA, LOHA, LOKR, IA3 and plain OFT are read", mend=MERGED)
    try:
        return {key: _prepared(str(kind), config, key, tensor) for key, tensor in tensors.items()}
    except (KeyError, TypeError, ValueError, ZeroDivisionError, re.error) as error:
        raise AdapterFileError(f"{source}: it does not fit its tensors: {error!r}", mend=MERGED) from error


def _prepared(kind: str, config: Mapping[str, Any], key: str, tensor: Tensor) -> Tensor:
    module, _, part = key.removesuffix(".weight").rpartition(".")
    if part in _SCALED.get(kind, ()):
        alpha, rank = (_of(module, config, each) for each in ("alpha", "r"))
        return tensor.double() * (alpha / rank)
    if part == "ia3_l":
        columns = _names(config.get("feedforward_modules"), module) if tensor.dim() > 2 else tensor.shape[0] == 1
        return tensor.reshape((1, -1) if columns else (-1, 1))
    if part == "oft_R":
        terms = int(config.get("num_cayley_neumann_terms", _TERMS)) if config.get("use_cayley_neumann") else None
        return _rotations(tensor.double(), terms)
    return tensor


def _of(module: str, config: Mapping[str, Any], name: str) -> float:
    """Return alpha or r of a module: the config's, unless a pattern matches the end of the module's path."""
    patterns = config.get("rank_pattern" if name == "r" else f"{name}_pattern") or {}
    found = next((value for key, value in patterns.items() if re.fullmatch(rf"(.*\.)?({key})", module)), config[name])
    return float(found)


def _names(modules: str | Sequence[str] | None, path: str) -> bool:
    """Return whether a config's list of names, or regular expression, means a module."""
    if isinstance(modules, str):
        return re.fullmatch(modules, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in modules or ())


def _rotations(triangles: Tensor, terms: int | None) -> Tensor:
    """Return the rotation of each block.

    triangles: (blocks, n (n - 1) / 2).  terms: of the series; None for the exact rotation.  The result: (blocks, n, n).
    """
    size = round((1 + (1 + 8 * triangles.shape[1]) ** 0.5) / 2)
    rows, columns = torch.triu_indices(size, size, 1)
    skew = triangles.new_zeros(len(triangles), size, size)
    skew[:, rows, columns] = triangles
    skew = skew - skew.mT
    unit = torch.eye(size, dtype=skew.dtype).expand_as(skew)
    if terms is None:
        exact: Tensor = torch.linalg.solve(unit + skew, unit - skew, left=False)
        return exact
    # I + 2 Q + 2 Q^2 ... + Q^(terms - 1): the last power counts once, but for three terms PEFT takes four.
    last = max(terms - 1, 3) if terms > 2 else terms
    total, power = unit.clone(), unit
    for exponent in range(1, max(terms, 4) if terms > 2 else terms):
        power = power @ skew
        total = total + power * (1 if exponent == last else 2)
    return total
