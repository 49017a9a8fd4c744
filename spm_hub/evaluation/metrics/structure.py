"""SSIM and PSNR: how alike two pictures of one size are, pixel by pixel."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Tensor

from spm_hub.errors import UsageError
from spm_hub.evaluation.metrics.metric import NamedMetric, PairMetric, refuse_argument

WINDOW, SIGMA = 11, 1.5
"""Side of the Gaussian window and its deviation in pixels (Wang et al. 2004, section III-C)."""

MOST_DECIBELS = 100.0
"""PSNR of equal pictures, which would be infinite."""


def to_tensor(pictures: Sequence[Image]) -> Tensor:
    """Convert pictures of one size to a tensor (n, 3, height, width) in [0, 1], float32."""
    arrays = [np.asarray(picture.convert("RGB"), dtype=np.float32) for picture in pictures]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2) / 255


def structural_similarity(first: Tensor, second: Tensor) -> Tensor:
    """Return SSIM of pairs of pictures, (n,), each of -1 to 1, computed in float64.

    Wang et al. 2004 (IEEE Transactions on Image Processing 13), K1 = .01, K2 = .03, without borders; the mean of the
    three colours. first, second: (n, 3, height, width) in [0, 1].
    Raises UsageError for pictures smaller than the window.
    """
    if min(first.shape[-2:]) < WINDOW:
        raise UsageError(f"SSIM needs pictures of {WINDOW} or more pixels a side, not {tuple(first.shape[-2:])}")
    steps = torch.arange(WINDOW, dtype=torch.float64) - WINDOW // 2
    line = torch.exp(-(steps**2) / (2 * SIGMA**2))
    window = (line / line.sum()).outer(line / line.sum()).expand(3, 1, -1, -1)

    def blur(values: Tensor) -> Tensor:
        return F.conv2d(values, window, groups=3)

    one, two = first.double(), second.double()
    mean_one, mean_two = blur(one), blur(two)
    variance_one, variance_two = blur(one**2) - mean_one**2, blur(two**2) - mean_two**2
    covariance = blur(one * two) - mean_one * mean_two
    c1, c2 = 0.01**2, 0.03**2
    similarity = (2 * mean_one * mean_two + c1) * (2 * covariance + c2)
    similarity = similarity / ((mean_one**2 + mean_two**2 + c1) * (variance_one + variance_two + c2))
    return similarity.mean((1, 2, 3))


def signal_to_noise(first: Tensor, second: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio of pairs of pictures, (n,), in decibels; 100 for equal ones.

    first, second: (n, 3, height, width) in [0, 1].
    """
    errors = (first.double() - second.double()).pow(2).mean((1, 2, 3))
    return (-10 * torch.log10(errors)).clamp(max=MOST_DECIBELS)


def _ssim(argument: str) -> PairMetric:
    refuse_argument("ssim", argument)
    return PairMetric(
        "ssim",
        lambda one, two: structural_similarity(to_tensor(one), to_tensor(two)).tolist(),
        {"window": WINDOW, "sigma": SIGMA, "borders": "left out"},
        better="higher",
    )


def _psnr(argument: str) -> PairMetric:
    refuse_argument("psnr", argument)
    return PairMetric(
        "psnr",
        lambda one, two: signal_to_noise(to_tensor(one), to_tensor(two)).tolist(),
        {"most": MOST_DECIBELS},
        better="higher",
    )


SSIM = NamedMetric("ssim", "ssim", "structural similarity of the pictures without and with erasers; 1 is equal", _ssim)
PSNR = NamedMetric("psnr", "psnr", "decibels between the pictures without and with erasers; 100 is equal", _psnr)
