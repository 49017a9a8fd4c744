"""A classifier of pictures as a judge: a subject is shown if it is the first of its answers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image

from spm_hub.errors import NotFoundError, UsageError, did_you_mean
from spm_hub.evaluation.metrics.hub_models import model_folder
from spm_hub.evaluation.metrics.metric import Judge, NamedMetric, Verdict
from spm_hub.evaluation.metrics.placement import placed


def _make(argument: str) -> Judge:
    model, equals, listed = argument.partition("=")
    if not model or (equals and not listed):
        raise UsageError(
            f"classifier:{argument} is not classifier:MODEL[=LABEL,LABEL]", mend="classifier:microsoft/resnet-50"
        )
    folder, about = model_folder(model, "classifier")
    labels = [label.strip() for label in listed.split(",")] if equals else []

    def verdicts(pictures: Sequence[Image], subjects: Sequence[str]) -> list[Verdict]:
        return classified(folder, pictures, [labels or [subject] for subject in subjects])

    return Judge(
        f"classifier:{about['model']}{equals}{listed}",
        verdicts,
        {**about, "labels": [*labels], "present": "the first answer is one"},
    )


CLASSIFIER = NamedMetric(
    "classifier", "classifier:MODEL[=LABEL,LABEL]", "a classifier's first answer, by its labels or the subject's", _make
)


@torch.no_grad()
def classified(folder: Path, pictures: Sequence[Image], wanted: Sequence[Sequence[str]]) -> list[Verdict]:
    """Return whether the first answer for each picture is a wanted label, and their probability.

    A label of several names, such as "tench, Tinca tinca", answers to each. Raises NotFoundError for an unknown label.
    """
    model, prepare = _model(folder)
    places = [{place for label in labels for place in _places(folder, label)} for labels in wanted]
    pixels = prepare([picture.convert("RGB") for picture in pictures], return_tensors="pt").to(model.device)
    shares = model(**pixels).logits.softmax(-1).cpu()
    return [
        Verdict(int(row.argmax()) in right, round(float(row[sorted(right)].sum()), 6))
        for row, right in zip(shares, places, strict=True)
    ]


@cache
def _model(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    model = placed(AutoModelForImageClassification.from_pretrained(folder))
    return model, AutoImageProcessor.from_pretrained(folder)


@cache
def _places(folder: Path, label: str) -> tuple[int, ...]:
    names = {int(place): str(name) for place, name in _model(folder)[0].config.id2label.items()}
    found = tuple(
        place
        for place, name in names.items()
        if label.casefold() in {name.casefold(), *(part.strip().casefold() for part in name.split(","))}
    )
    if not found:
        raise NotFoundError(
            f"the classifier has no label {label!r}{did_you_mean(label, names.values())}",
            mend="classifier:MODEL=LABEL, with a label of the model's config.json",
        )
    return found
