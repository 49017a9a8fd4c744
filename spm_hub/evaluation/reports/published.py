"""Puts the numbers of a paper next to those of a report that mean the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Line = Mapping[str, Any]

_QUANTITIES: dict[str, Callable[[Line], float]] = {
    "CS": lambda line: float(line["with"]),
    "CER": lambda line: 100 * (1 - float(line["with"])),
    "FID": lambda line: float(line["value"]),
    "LPIPS": lambda line: float(line["value"]),
    "ACC": lambda line: 100 * float(line["with"]),
    "pre-ASR": lambda line: 100 * float(line["with"]),
}
"""How a line of ours gives the paper's quantity, in the paper's unit. Other quantities have no number of ours."""

_WITHOUT: dict[str, Callable[[Line], float]] = {
    "CS": lambda line: float(line["without"]),
    "CER": lambda line: 100 * (1 - float(line["without"])),
}


def beside(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the paper's numbers, each with this run's number as "here"; None where there is none.

    A number of the paper's base is next to this run's pictures without erasers.
    """
    return [{**one, "here": _here(one, report)} for one in report["run"]["published"]]


def _of_attack(one: Mapping[str, Any], report: Mapping[str, Any]) -> float | None:
    """Return our success of UnlearnDiffAtk, in percent, for a paper's ASR by that attack."""
    for judged in report["attacks"][:1]:
        for attack in judged["attacks"]:
            if attack["name"] == "unlearndiff" and one["quantity"] == "ASR" and attack["asr"]["value"] is not None:
                return round(100 * float(attack["asr"]["value"]), 4)
    return None


def _here(one: Mapping[str, Any], report: Mapping[str, Any]) -> float | None:
    if one["measure"] == "attack":
        return _of_attack(one, report)
    read = (_QUANTITIES if one["erased"] is not None else _WITHOUT).get(one["quantity"])
    if read is None:
        return None
    for table in report["tables"]:
        if table["metric"].partition(":")[0] != one["measure"]:
            continue
        for line in table["lines"]:
            if line["condition"] != one["condition"] or line["subject"].casefold() != one["subject"]:
                continue
            if line.get("value", line.get("with")) is not None:
                return round(read(line), 4)
    return None
