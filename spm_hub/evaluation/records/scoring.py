"""Measures the kept pictures of a run, batch by batch, and writes the scores into samples.jsonl."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from torch import Tensor

from spm_hub.errors import SpmHubError, UsageError
from spm_hub.evaluation.metrics.metric import Judge, Metric, PairMetric, PictureMetric, SetMetric, Verdict
from spm_hub.evaluation.pictures import WITHOUT
from spm_hub.evaluation.records.folder import FEATURES, METRICS, SCORES, RunFolder, append_durably, whole_lines
from spm_hub.evaluation.records.rows import Batch, PromptRow
from spm_hub.evaluation.records.sample import Sample, Score
from spm_hub.io.atomic import write_atomic
from spm_hub.io.progress import Reporter
from spm_hub.io.wording import counted

OF_JUDGE = ".score"
"""Ending of the key under which a judge's number is kept, next to its answer."""

Unit = tuple[str, Batch]
"""A condition and a batch: the pictures that are measured together."""


class MetricError(SpmHubError):
    """A metric or judge that raised, or gave no number; that never counts as "not shown"."""


def score(folder: RunFolder, metrics: Sequence[Metric], reporter: Reporter) -> None:
    """Measure the kept pictures with each metric that has not measured them yet.

    A metric whose weights or settings have changed measures again. Scores of an interrupted run are kept and not
    computed again. Raises UsageError for a run with pictures missing; MetricError.
    """
    samples = folder.samples()
    wanted = len(folder.rows) * len(folder.conditions)
    if len(samples) < wanted:
        raise UsageError(
            f"{folder.path} has {len(samples)} of {counted(wanted, 'picture')}", mend="spmhub eval again with --resume"
        )
    for metric in metrics:
        known = described_metrics(folder)
        if known.get(metric.key) == describe(metric):
            continue
        with reporter.progress(metric.key) as progress:
            units = list(_units(folder, metric))
            results = _features(folder, metric) if isinstance(metric, SetMetric) else _numbers(folder, metric)
            scores: dict[tuple[str, str], dict[str, Score]] = {}
            for done, ((condition, batch), values) in enumerate(zip(units, results, strict=True), start=1):
                scores |= {(condition, row.id): one for row, one in zip(batch.rows, values, strict=True)}
                progress(done, len(units))
        folder.replace([one.scored(scores.get((one.condition, one.row), {})) for one in folder.samples()])
        known[metric.key] = describe(metric)
        write_atomic(folder.path / METRICS, (json.dumps(known, indent=2, sort_keys=True) + "\n").encode())
        _journal(folder, metric).unlink(missing_ok=True)


def describe(metric: Metric) -> dict[str, Any]:
    """Return everything that decides a metric's numbers, for JSON."""
    kinds = {Judge: "judge", PictureMetric: "picture", PairMetric: "pair", SetMetric: "set"}
    return {
        "kind": kinds[type(metric)],
        "about": dict(metric.about),
        "better": None if isinstance(metric, Judge) else metric.better,
    }


def described_metrics(folder: RunFolder) -> dict[str, Any]:
    """Return the metrics that have measured all pictures, by key, as `describe` describes them."""
    path = folder.path / METRICS
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return found


def features_of(folder: RunFolder, described: Any, condition: str) -> Tensor:
    """Return the features of a condition's pictures, (n, d), in the order of `folder.samples()`.

    described: a metric of sets, as `describe` describes it.
    """
    place = _place_of_features(folder, described)
    return torch.cat([load_file(place / _features_name(condition, batch))["features"] for batch in folder.batches])


def _units(folder: RunFolder, metric: Metric) -> Iterator[Unit]:
    """Yield the pictures that are measured together; pairs have no unit without erasers."""
    for condition in folder.conditions:
        if isinstance(metric, PairMetric) and condition == WITHOUT:
            continue
        for batch in folder.batches:
            yield condition, batch


def _numbers(folder: RunFolder, metric: Judge | PictureMetric | PairMetric) -> Iterator[list[dict[str, Score]]]:
    """Yield the scores of each unit, those of an interrupted run from its journal."""
    journal = _journal(folder, metric)
    kept: dict[tuple[str, int], list[dict[str, Score]]] = {}
    if journal.exists():
        lines = list(whole_lines(journal))
        kept = {(line["condition"], line["batch"]): line["scores"] for line in lines}
        write_atomic(journal, "".join(json.dumps(line) + "\n" for line in lines).encode())
    by_unit = _by_unit(folder)
    for condition, batch in _units(folder, metric):
        values = kept.get((condition, batch.number))
        if values is None:
            pictures = [folder.picture(sample) for sample in by_unit[condition, batch.number]]
            others: list[Image] = []
            if isinstance(metric, PairMetric):
                others = [folder.picture(sample) for sample in by_unit[WITHOUT, batch.number]]
            values = measured(metric, pictures, batch.rows, others)
            line = {"condition": condition, "batch": batch.number, "scores": values}
            append_durably(journal, json.dumps(line) + "\n")
        yield values


def _features(folder: RunFolder, metric: SetMetric) -> Iterator[list[dict[str, Score]]]:
    """Write the features of each unit, unless an interrupted run has; single pictures get no score."""
    place = _place_of_features(folder, describe(metric))
    by_unit = _by_unit(folder)
    for condition, batch in _units(folder, metric):
        path = place / _features_name(condition, batch)
        if not path.exists():
            pictures = [folder.picture(sample) for sample in by_unit[condition, batch.number]]
            with _failing(metric):
                found = metric.features(pictures)
            if found.dim() != 2 or len(found) != len(pictures) or not bool(found.isfinite().all()):
                raise MetricError(
                    f"{metric.key} gave features of shape {tuple(found.shape)} for {len(pictures)} pictures"
                )
            write_atomic(path, to_safetensors({"features": found.contiguous()}))
        yield [{} for _ in batch.rows]


def measured(
    metric: Judge | PictureMetric | PairMetric,
    pictures: Sequence[Image],
    rows: Sequence[PromptRow],
    others: Sequence[Image] = (),
) -> list[dict[str, Score]]:
    """Return the scores of the pictures of `rows` by a metric, each as {key: score}.

    others: for a metric of pairs, the pictures without erasers. A judge is not asked about rows without a subject.
    Raises MetricError if the metric raises, or gives anything but one number or verdict for each picture.
    """
    asked = [place for place, row in enumerate(rows) if row.subject or not isinstance(metric, Judge)]
    if not asked:
        return [{} for _ in rows]
    shown, texts = [pictures[place] for place in asked], [rows[place].subject or rows[place].prompt for place in asked]
    with _failing(metric):
        answers = list(
            metric.measure(others, shown) if isinstance(metric, PairMetric) else metric.measure(shown, texts)
        )
    if len(answers) != len(asked):
        raise MetricError(f"{metric.key} gave {counted(len(answers), 'answer')} for {counted(len(asked), 'picture')}")
    scores: list[dict[str, Score]] = [{} for _ in rows]
    for place, answer in zip(asked, answers, strict=True):
        scores[place] = _scores(metric, answer)
    return scores


def _scores(metric: Metric, answer: Any) -> dict[str, Score]:
    if isinstance(metric, Judge):
        if not isinstance(answer, Verdict) or not isinstance(answer.present, bool):
            raise MetricError(f"{metric.key} gave {answer!r}, not a verdict")
        more = {} if answer.score is None else {metric.key + OF_JUDGE: _number(metric, answer.score)}
        return {metric.key: answer.present, **more}
    return {metric.key: _number(metric, answer)}


def _number(metric: Metric, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise MetricError(f"{metric.key} gave {value!r}, not a finite number")
    return float(value)


@contextmanager
def _failing(metric: Metric) -> Iterator[None]:
    """Turn whatever a metric raises into a MetricError, but for our own messages and a full memory."""
    try:
        yield
    except (SpmHubError, MemoryError):
        raise
    except Exception as error:
        raise MetricError(
            f"{metric.key} failed: {type(error).__name__}: {error}", mend="mend it, then run it again with --resume"
        ) from error


def _by_unit(folder: RunFolder) -> dict[tuple[str, int], list[Sample]]:
    found: dict[tuple[str, int], list[Sample]] = {}
    for sample in folder.samples():
        found.setdefault((sample.condition, sample.batch), []).append(sample)
    return found


def _journal(folder: RunFolder, metric: Metric) -> Path:
    return folder.path / SCORES / f"{_digest(metric.key, describe(metric))}.jsonl"


def _place_of_features(folder: RunFolder, described: Any) -> Path:
    """Return the folder of features that metrics of the same network share, whatever their distance is."""
    return folder.path / FEATURES / _digest(FEATURES, described["about"])


def _features_name(condition: str, batch: Batch) -> str:
    return f"{condition}-{batch.number:06d}.safetensors"


def _digest(key: str, described: Any) -> str:
    return hashlib.sha256(json.dumps([key, described], sort_keys=True).encode()).hexdigest()[:16]
