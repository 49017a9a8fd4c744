"""A function of the user's as a judge: MODULE:FUNCTION, also in the working folder."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL.Image import Image

from spm_hub.evaluation.judges.importing import import_judge
from spm_hub.evaluation.metrics.metric import Judge, Verdict
from spm_hub.io.hashing import sha256_of


def function_judge(reference: str) -> Judge:
    """Return the judge that calls the function MODULE:FUNCTION.

    It is called with the pictures of a batch and, if it takes a second argument, with their subjects. It returns for
    each a bool, or a pair of a bool and a number. The hash of the module's file is recorded. Raises UsageError.
    """
    function = import_judge(reference)
    takes_subjects = len(inspect.signature(function).parameters) > 1

    def verdicts(pictures: Sequence[Image], subjects: Sequence[str]) -> list[Verdict]:
        given: Any = function
        return [_verdict(one) for one in (given(pictures, subjects) if takes_subjects else given(pictures))]

    source = inspect.getsourcefile(inspect.unwrap(function)) if inspect.isfunction(function) else None
    return Judge(reference, verdicts, {"source": sha256_of(Path(source)) if source else None})


def _verdict(answer: Any) -> Verdict:
    """Return a verdict for the answer of a function; numpy's and torch's own bools count as bools.

    Raises TypeError for anything else: None is no answer, and no "not shown".
    """
    if isinstance(answer, Verdict):
        return answer
    shown, score = answer if isinstance(answer, tuple | list) and len(answer) == 2 else (answer, None)
    shown = shown.item() if hasattr(shown, "item") else shown
    if not isinstance(shown, bool):
        raise TypeError(f"it answered {answer!r}, not True or False")
    return Verdict(shown, None if score is None else float(score))
