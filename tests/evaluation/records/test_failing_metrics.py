"""A metric that must fail does: nothing erased, damage, wrong labels, and judges that break."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pico import pico_eraser, pico_pipeline
from PIL import Image
from recorded import ROWS, evaluate

from spm_hub.adapters.increments import LowRank
from spm_hub.evaluation.metrics.metric import Judge, PictureMetric, Verdict
from spm_hub.evaluation.metrics.named import metric_named
from spm_hub.evaluation.records.scoring import MetricError, measured
from spm_hub.sketchbook.world import drawings


def lines(report: dict[str, Any], metric: str) -> dict[str, dict[str, Any]]:
    (table,) = (table for table in report["tables"] if table["metric"] == metric)
    return {line["subject"]: line for line in table["lines"]}


def sees_everything(pictures: Sequence[Any], subjects: Sequence[str]) -> list[Verdict]:
    return [Verdict(True) for _ in pictures]


def test_an_eraser_of_zeros_erases_nothing_and_harms_nothing(tmp_path: Path) -> None:
    eraser = pico_eraser(pico_pipeline().unet)
    # Attaching refuses true zeros; this is lost to rounding in every weight.
    zeros = replace(eraser, increments={
        path: LowRank(one.tensors()["down"] * 0 + 1e-20, one.tensors()["up"] * 0 + 1e-20)
        for path, one in eraser.increments.items()
    })  # fmt: skip
    report = evaluate(tmp_path / "run", eraser=zeros, measured=[
        Judge("all", sees_everything), metric_named("ssim"), metric_named("psnr"), metric_named("frechet:probe"),
    ])  # fmt: skip
    assert lines(report, "all")["snoopy"]["erased"] == 0.0
    assert {line["value"] for line in lines(report, "ssim").values()} == {1.0}
    assert {line["value"] for line in lines(report, "psnr").values()} == {100.0}
    assert lines(report, "frechet:probe")["dog"]["value"] == pytest.approx(0, abs=1e-4)
    assert [one["says"] for one in report["findings"]] == ["not erased"]


def test_an_eraser_of_noise_is_caught_as_damage(tmp_path: Path) -> None:
    """Everything looks erased, the neighbours too: that is no erasure of the concept."""
    eraser = pico_eraser(pico_pipeline().unet)

    def sees_clean_pictures(pictures: Sequence[Any], subjects: Sequence[str]) -> list[Verdict]:
        return [Verdict(picture.tobytes() in clean) for picture in pictures]

    rows = [replace(row, id=f"{row.id}-{i}", seed=row.seed + i) for row in ROWS for i in range(4)]
    clean: set[bytes] = set()

    def learn(pictures: Sequence[Any], subjects: Sequence[str]) -> list[float]:
        """The pictures without erasers are measured first, half of all."""
        if len(clean) < len(rows):
            clean.update(picture.tobytes() for picture in pictures)
        return [0.0] * len(pictures)

    report = evaluate(
        tmp_path / "run", rows=rows, eraser=eraser,
        measured=[PictureMetric("learn", learn), Judge("clean", sees_clean_pictures), metric_named("ssim")],
    )  # fmt: skip
    assert lines(report, "clean")["snoopy"]["erased"] == 1.0
    says = {(one["subject"], one["says"]) for one in report["findings"] if one["metric"] == "clean"}
    assert says == {("snoopy", "erased"), ("dog", "damage"), ("church", "damage")}
    assert all(line["value"] < 1.0 for line in lines(report, "ssim").values())


def test_shuffled_labels_break_the_accuracy_of_the_probe() -> None:
    world = drawings(60, torch.Generator().manual_seed(3))
    pictures = [picture for drawing, picture, _ in world if drawing.subject is not None]
    subjects = [drawing.subject for drawing, _, _ in world if drawing.subject is not None]
    judge = metric_named("probe")
    assert isinstance(judge, Judge)

    def accuracy(names: list[str]) -> float:
        return sum(verdict.present for verdict in judge.measure(pictures, names)) / len(names)

    shuffled = [subjects[int(i)] for i in torch.randperm(len(subjects), generator=torch.Generator().manual_seed(0))]
    assert accuracy(subjects) > 0.9
    assert accuracy(shuffled) < 0.25


def raises(pictures: Sequence[Any], subjects: Sequence[str]) -> list[Verdict]:
    raise ConnectionResetError("the judge's server is gone")


@pytest.mark.parametrize(
    ("metric", "words"),
    [
        (Judge("j", raises), "j failed: ConnectionResetError: the judge's server is gone"),
        (Judge("j", lambda pictures, subjects: [Verdict(True)]), "gave 1 answer for 2 pictures"),
        (Judge("j", lambda pictures, subjects: [None] * len(pictures)), "gave None, not a verdict"),
        (Judge("j", lambda pictures, subjects: [Verdict(1)] * 2), "not a verdict"),
        (Judge("j", lambda pictures, subjects: [Verdict(True, float("nan"))] * 2), "gave nan, not a finite number"),
        (PictureMetric("m", lambda pictures, subjects: ["high"] * 2), "gave 'high', not a finite number"),
        (PictureMetric("m", lambda pictures, subjects: [True] * 2), "gave True, not a finite number"),
    ],
)
def test_a_judge_that_raises_or_gives_no_answer_stops_the_run(metric: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(MetricError, match=words):
        measured(metric, [object(), object()], ROWS[:2])


def test_a_judge_is_not_asked_about_a_batch_without_subjects() -> None:
    probe = metric_named("probe")
    assert isinstance(probe, Judge)
    rows = [replace(row, subject="") for row in ROWS[:2]]
    assert measured(probe, [Image.new("RGB", (64, 64))] * 2, rows) == [{}, {}]


def test_a_run_that_its_judge_stopped_has_no_report(tmp_path: Path) -> None:
    with pytest.raises(MetricError, match="the judge's server is gone"):
        evaluate(tmp_path / "run", measured=[Judge("j", raises)])
    assert not (tmp_path / "run" / "report.json").exists()
    report = evaluate(tmp_path / "run", resume=True, measured=[Judge("j", sees_everything)])
    assert lines(report, "j")["snoopy"]["with"] == 1.0
