"""All metrics and judges by name: those of spm-hub, of plug-ins, and functions of the user's."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from PIL.Image import Image
from torch import Tensor

from spm_hub.errors import UsageError, did_you_mean
from spm_hub.evaluation import attacks
from spm_hub.evaluation.judges import classifier, clip, nudenet, opennsfw, probe, vlm
from spm_hub.evaluation.judges.function import function_judge
from spm_hub.evaluation.judges.importing import import_judge
from spm_hub.evaluation.metrics import lpips, sets, structure
from spm_hub.evaluation.metrics.metric import Judge, Metric, NamedMetric
from spm_hub.plugins import plugins

METRICS: tuple[NamedMetric, ...] = (
    probe.PROBE_JUDGE,
    nudenet.NUDENET,
    opennsfw.OPENNSFW,
    clip.CLIP_JUDGE,
    classifier.CLASSIFIER,
    vlm.VLM,
    clip.CLIP_SCORE,
    structure.SSIM,
    structure.PSNR,
    lpips.LPIPS,
    sets.FRECHET,
    sets.KID,
)
"""The metrics and judges that come with spm-hub."""


def known_metrics() -> dict[str, NamedMetric]:
    """Return all metrics and judges by name; plug-ins do not replace ours."""
    found = {**plugins("metrics", NamedMetric), **plugins("judges", NamedMetric)}
    return {**found, **{one.name: one for one in METRICS}}


def metric_named(text: str) -> Metric:
    """Return the metric or judge that a text names: NAME[:ARGUMENT], or MODULE:FUNCTION for a judge.

    Raises UsageError for an unknown one; NotFoundError for a package, folder or model that it needs.
    """
    name, _, argument = text.partition(":")
    known = known_metrics()
    if name in known:
        return known[name].make(argument)
    if argument and "/" not in text:
        return function_judge(text)
    usages = ", ".join(one.usage for one in known.values())
    raise UsageError(
        f"there is no metric or judge {text!r}{did_you_mean(name, known)}; known: {usages}, MODULE:FUNCTION",
        mend="spmhub protocols",
    )


def judge_named(text: str) -> Judge:
    """Return the judge that a text names, as `metric_named` does.

    Raises UsageError for a metric that judges nothing too.
    """
    found = metric_named(text)
    if not isinstance(found, Judge):
        raise UsageError(f"{text!r} gives a number, and is no judge", mend=f"--metric {text}")
    return found


def judge_of_subject(text: str, subject: str) -> attacks.Judge:
    """Return the function from pictures to one bool each: does it show the subject?

    text: a judge's name, as `judge_named` knows it, or MODULE:FUNCTION. Raises as `judge_named` does.
    """
    if text.partition(":")[0] not in known_metrics():
        return import_judge(text)
    judge = judge_named(text)

    def shown(pictures: Sequence[Image]) -> list[bool]:
        return [one.present for one in judge.measure(pictures, [subject] * len(pictures))]

    return shown


def distances() -> dict[str, Callable[[Tensor, Tensor], float]]:
    """Return the distance of each metric of sets, by its name."""
    return {name: one.distance for name, one in known_metrics().items() if one.distance is not None}


def metrics_named(texts: Sequence[str]) -> list[Metric]:
    """Return the metrics and judges that texts name, each once. Raises as `metric_named` does."""
    return [metric_named(text) for text in dict.fromkeys(texts)]
