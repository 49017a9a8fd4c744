"""Words and numbers of reports, the same in every form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from spm_hub.evaluation.pictures import RESTORED, WITH
from spm_hub.evaluation.reports.report import ALL

HEADINGS = {
    "judge": ("subject", "n", "without", "with", "change", "erased", "detects"),
    "picture": ("subject", "n", "without", "with", "change", "detects"),
    "pair": ("subject", "n", "value"),
    "set": ("subject", "n", "distance"),
}
"""Columns of a metric's table, by its kind."""

_SAYS = {
    "erased": "{subject} is drawn less often",
    "not erased": "{subject} is not shown to be drawn less often",
    "not drawn": "the base draws {subject} in no picture, so its erasure was not measured",
    "damage": "{subject} suffers",
    "restored": "{subject} is drawn again once its eraser is taken away",
    "not restored": "{subject} is drawn less often although its eraser was taken away",
}


def cells(line: Mapping[str, Any], kind: str) -> tuple[str, ...]:
    """Return the cells of a line of a metric's table, in the order of `HEADINGS`."""
    name = named(line)
    if kind in ("pair", "set"):
        return name, str(line["n"]), with_interval(line["value"], line["value_interval"], kind)
    share = kind == "judge"
    numbers = [
        with_interval(line["without"], line["without_interval"], kind),
        with_interval(line["with"], line["with_interval"], kind),
        with_interval(line["difference"], line["difference_interval"], kind, signed=True),
    ]
    if share:
        numbers.append(with_interval(line["erased"], line["erased_interval"], kind))
    return name, str(line["n"]), *numbers, _plain(line["detectable"], kind)


def named(line: Mapping[str, Any]) -> str:
    """Return the name of a line: its subject and role, its group, and the condition unless it is "with"."""
    parts = [line["role"], *filter(None, [line["group"]]), *([line["condition"]] if line["condition"] != WITH else [])]
    return f"{line['subject'] or 'captions'} ({', '.join(parts)})"


def with_interval(
    value: float | None, interval: Sequence[float | None] | None, kind: str, *, signed: bool = False
) -> str:
    """Return a number with its 95 % interval: "43 % (31 to 56)", "-57 (-70 to -42)", or "-" for none."""
    if value is None:
        return "-"
    text = _plain(value, kind, signed=signed)
    if interval is None or interval[0] is None or interval[1] is None:
        return text
    ends = " to ".join(_plain(end, kind, signed=signed).removesuffix(" %") for end in interval if end is not None)
    return f"{text} ({ends})"


def _plain(value: float, kind: str, *, signed: bool = False) -> str:
    sign = "+" if signed else ""
    value += 0.0  # no "-0"
    if kind == "judge":
        return f"{100 * value:{sign}.0f} %"
    return f"{value:{sign}.4g}"


def finding(one: Mapping[str, Any], kind: str) -> str:
    """Return the sentence of a finding."""
    subject = "everything unrelated" if not one["subject"] else one["subject"]
    if one["subject"] == ALL:
        subject = f"every {one['role']} together"
    if one["group"] is not None:
        subject = f"{subject} ({one['group']})"
    says = _SAYS[one["says"]].format(subject=subject)
    if one["condition"] not in (WITH, RESTORED):
        says = f"at {one['condition']}, {says}"
    change = with_interval(one["difference"], one["difference_interval"], kind, signed=True)
    return f"{says}: {one['metric']} {_plain(one['without'], kind)} to {_plain(one['with'], kind)}, {change}"


def remarks(report: Mapping[str, Any]) -> list[str]:
    """Return everything that a reader must know before the numbers."""
    run, found = report["run"], []
    if run["limit"] is not None and run["all_rows"] > report["rows"]:
        found.append(f"INCOMPLETE: {report['rows']} of {run['all_rows']} rows (--limit {run['limit']}).")
    if run["quick"]:
        found.append("A first look (--quick): few pictures and few steps, so the intervals are wide.")
    if run["stand_in_for"]:
        found.append(
            f"Sentences of this project are used in place of the published prompts {run['stand_in_for']}: "
            "give their file with --prompts."
        )
    if (given := run["prompts"]) is not None:
        origin = given["set"] or "a file that is no published set"
        found.append(f"Prompts: {given['file']} ({origin}, sha256 {given['sha256'][:12]}).")
        if given["set"] and not given["licence"]:
            found.append(f"The repository of {given['set']} states no licence.")
    if run["protocol"]["base"] and run["protocol"]["base"] != run["model"]:
        found.append(f"The paper's numbers are of {run['protocol']['base']}; these are of {run['model']}.")
    return [*found, *(f"Not as in the paper: {one}." for one in run["protocol"]["differs"])]
