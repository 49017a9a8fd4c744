"""Fréchet and kernel distances of two sets of pictures, on features of a chosen network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from PIL.Image import Image
from torch import Tensor

from spm_hub.errors import UsageError, did_you_mean
from spm_hub.evaluation.judges.clip import clip_features
from spm_hub.evaluation.judges.probe import probe_about
from spm_hub.evaluation.metrics.distances import frechet_distance, kernel_distance
from spm_hub.evaluation.metrics.metric import About, NamedMetric, SetMetric
from spm_hub.evaluation.sketchbook import probe

Features = Callable[[Sequence[Image]], Tensor]

NETWORKS = ("probe", "inception", "clip:MODEL")
"""Networks of features by name; inception's makes these distances FID and KID."""


def _network(name: str, metric: str) -> tuple[Features, About]:
    """Return the features of the network of that name and the facts about it. Raises UsageError."""
    if name == "probe":
        return lambda pictures: probe().features(pictures), {"features": name, **probe_about()}
    if name == "inception":
        from spm_hub.evaluation.metrics.inception import inception

        return inception()
    if name.startswith("clip"):
        return clip_features(name.removeprefix("clip").removeprefix(":"), metric)
    raise UsageError(
        f"{metric}:{name} names no network of features{did_you_mean(name, NETWORKS)}", mend=f"{metric}:{NETWORKS[1]}"
    )


def _make(kind: Literal["frechet", "kid"], distance: Callable[[Tensor, Tensor], float], argument: str) -> SetMetric:
    features, about = _network(argument, kind)
    return SetMetric(f"{kind}:{argument}", features, distance, about)


USAGE = f":{'|'.join(NETWORKS)}"
FRECHET = NamedMetric(
    "frechet", f"frechet{USAGE}", "Fréchet distance of the pictures without and with erasers (FID with inception)",
    lambda argument: _make("frechet", frechet_distance, argument), frechet_distance,
)  # fmt: skip
KID = NamedMetric(
    "kid", f"kid{USAGE}", "kernel distance of the pictures without and with erasers, unbiased for few pictures",
    lambda argument: _make("kid", kernel_distance, argument), kernel_distance,
)  # fmt: skip
