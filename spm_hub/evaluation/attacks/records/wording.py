"""Words and numbers of reports of attacks, the same in every form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spm_hub.evaluation.reports.wording import with_interval

HEADINGS = ("attack", "attacker", "tries", "success", "again at fresh seeds", "pictures judged")


def rows_of_judge(judged: Mapping[str, Any]) -> list[list[str]]:
    """Return a row of cells for each attack, in the order of `HEADINGS`."""
    return [
        [one["name"] + (" (control)" if one["control"] else ""), one["threat"], str(one["tries"]), share(one["asr"]),
         share(one["fresh"]), str(one["judged"])]
        for one in judged["attacks"]
    ]  # fmt: skip


def share(one: Mapping[str, Any]) -> str:
    """Return a share as "43 % (31 to 56)", "-" for none."""
    return with_interval(one["value"], one["interval"], "judge")


def summary(judged: Mapping[str, Any]) -> str:
    """Return one sentence about what a judge saw before the attacks."""
    bound = "" if judged["searched"] else "; the searches ended at another judge's answers, so these are lower bounds"
    return (
        f"{judged['judge']}: of {judged['given']} prompts the base draws {judged['cases']}, and the erased model "
        f"{share(judged['before'])} of these without an attack{bound}"
    )
