"""SSIM and PSNR against numbers that scikit-image 0.26 gave, and against their definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
from PIL import Image

from spm_hub.errors import UsageError
from spm_hub.evaluation.metrics.metric import PairMetric
from spm_hub.evaluation.metrics.named import metric_named


def waves(phase: float, side: int = 24) -> Image.Image:
    x, y = np.meshgrid(np.arange(side), np.arange(side))
    bands = [127.5 + 127.5 * np.sin(x / 3 + phase + k) * np.cos(y / (4 + k)) for k in range(3)]
    return Image.fromarray(np.stack(bands, -1).round().astype(np.uint8))


def measure(name: str, one: Image.Image, two: Image.Image) -> float:
    metric = metric_named(name)
    assert isinstance(metric, PairMetric)
    return metric.measure([one], [two])[0]


@pytest.mark.parametrize(
    ("phase", "ssim", "psnr"), [(0.1, 0.9923332, 31.87141), (1.0, 0.4518349, 12.20192), (3.0, -0.7158164, 5.83526)]
)
def test_other_programs_give_the_same(phase: float, ssim: float, psnr: float) -> None:
    """structural_similarity(gaussian_weights=True, sigma=1.5, use_sample_covariance=False), peak_signal_noise_ratio."""
    assert measure("ssim", waves(0), waves(phase)) == pytest.approx(ssim, abs=1e-6)
    assert measure("psnr", waves(0), waves(phase)) == pytest.approx(psnr, abs=1e-4)


def test_of_a_picture_and_itself_and_of_a_picture_that_is_too_small() -> None:
    assert measure("ssim", waves(0), waves(0)) == 1.0
    assert measure("psnr", waves(0), waves(0)) == 100.0
    with pytest.raises(UsageError, match="11 or more pixels"):
        measure("ssim", waves(0, 8), waves(1, 8))


def test_an_error_of_one_step_in_every_pixel() -> None:
    grey, lighter = (Image.new("RGB", (16, 16), (value,) * 3) for value in (100, 101))
    assert measure("psnr", grey, lighter) == pytest.approx(20 * math.log10(255), abs=1e-4)
    # With no variance SSIM is the comparison of the means alone.
    a, b, c = 100 / 255, 101 / 255, 0.01**2
    assert measure("ssim", grey, lighter) == pytest.approx((2 * a * b + c) / (a * a + b * b + c), abs=1e-6)
