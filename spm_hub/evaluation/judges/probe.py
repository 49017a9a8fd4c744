"""The sketchbook's probe, as a judge and as features of sets of pictures."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL.Image import Image

from spm_hub.errors import NotFoundError, did_you_mean
from spm_hub.evaluation.metrics.metric import Judge, NamedMetric, Verdict, refuse_argument
from spm_hub.evaluation.sketchbook import PROBE, probe
from spm_hub.io.hashing import sha256_of
from spm_hub.sketchbook.figures import SUBJECTS
from spm_hub.sketchbook.world import STYLE_NAMES


def probe_about() -> dict[str, str]:
    """Return the hash of the probe's weights."""
    return {"weights": sha256_of(PROBE / "model.safetensors")}


def _judge(argument: str) -> Judge:
    refuse_argument("probe", argument)
    return Judge("probe", _verdicts, probe_about())


@torch.no_grad()
def _verdicts(pictures: Sequence[Image], subjects: Sequence[str]) -> list[Verdict]:
    """Return whether the probe names each picture's subject, and the probability that it gives it.

    Raises NotFoundError for a subject that it was not trained on.
    """
    shares = [logits.softmax(1) for logits in probe().logits(pictures)]
    found = []
    for row, subject in enumerate(subjects):
        kind, place = _place(subject)
        found.append(Verdict(int(shares[kind][row].argmax()) == place, round(float(shares[kind][row, place]), 6)))
    return found


def _place(subject: str) -> tuple[int, int]:
    """Return which logits (0 subjects, 1 styles) and which place among them belong to a name."""
    for kind, names in enumerate((SUBJECTS, STYLE_NAMES)):
        if subject.lower() in names:
            return kind, names.index(subject.lower())
    raise NotFoundError(
        f"the sketchbook's probe does not know {subject!r}{did_you_mean(subject, (*SUBJECTS, *STYLE_NAMES))}",
        mend="--judge MODULE:FUNCTION, or another that knows it: spmhub protocols",
    )


PROBE_JUDGE = NamedMetric("probe", "probe", "the sketchbook's probe, for the subjects and styles it knows", _judge)
