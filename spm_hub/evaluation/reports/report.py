"""Computes the report of a run from its records: tables with intervals, and findings."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spm_hub.evaluation import statistics
from spm_hub.evaluation.attacks.outcome import wilson
from spm_hub.evaluation.pictures import RESTORED, WITHOUT
from spm_hub.evaluation.records.folder import SAMPLES, RunFolder
from spm_hub.evaluation.records.sample import Sample
from spm_hub.evaluation.records.scoring import described_metrics, features_of
from spm_hub.io.hashing import sha256_of

FORMAT = 1
ACTS = 0.05
"""Above this gamma an eraser counts as acting on a prompt."""

ALL = "all"
"""The subject of a line about every subject of a role."""

Distances = Mapping[str, Callable[[Tensor, Tensor], float]]
"""The distance of each metric of sets, by the name before its colon."""


@dataclass(frozen=True)
class Group:
    """Rows of one role, subject and group.

    subject: ALL for the rows of every subject. group: None for rows without one.
    """

    role: str
    subject: str
    rows: tuple[str, ...]
    group: str | None = None


def report_of(folder: RunFolder, distances: Distances) -> dict[str, Any]:
    """Return the report of a run whose pictures are all there, for JSON.

    The same records give the same report, whenever and wherever it is computed.
    """
    samples = {(sample.condition, sample.row): sample for sample in folder.samples()}
    groups = groups_of(folder)
    tables = []
    for key, described in described_metrics(folder).items():
        lines = [
            line
            for condition in folder.conditions
            if condition != WITHOUT
            for line in _lines(folder, key, described, groups, samples, condition, distances)
        ]
        tables.append({"metric": key, **described, "lines": lines})
    return {
        "format": FORMAT,
        "run": {**folder.run, "sha256": folder.sha256},
        "rows": len(folder.rows),
        "pictures": len(samples),
        "samples_sha256": sha256_of(folder.path / SAMPLES),
        "tables": tables,
        "gates": [line for condition in folder.conditions for line in _gates(groups, samples, condition)],
        "findings": findings(tables, folder.run.get("restored")),
    }


def _gates(groups: Sequence[Group], samples: Mapping[tuple[str, str], Sample], condition: str) -> list[dict[str, Any]]:
    """Return the mean gamma of each group and eraser, and the share of prompts on which it acts."""
    lines = []
    for group in groups:
        drawn = [samples[condition, row].gammas for row in group.rows]
        for eraser in drawn[0] if group.subject != ALL else ():
            gammas = [each[eraser] for each in drawn]
            about = {"condition": condition, "role": group.role, "subject": group.subject, "group": group.group}
            acting = sum(gamma > ACTS for gamma in gammas) / len(gammas)
            lines.append({**about, "eraser": eraser, "n": len(gammas), "mean": _rounded(sum(gammas) / len(gammas)),
                          "acting": _rounded(acting)})  # fmt: skip
    return lines


def groups_of(folder: RunFolder) -> tuple[Group, ...]:
    """Return the groups of a run's rows in order of appearance; a role of several has one of all."""
    found: dict[str, dict[tuple[str, str | None], list[str]]] = {}
    for row in folder.rows:
        found.setdefault(row.role, {}).setdefault((row.subject, row.group), []).append(row.id)
    groups = []
    for role, parts in found.items():
        groups += [Group(role, subject, tuple(rows), group) for (subject, group), rows in parts.items()]
        if len(parts) > 1:
            groups.append(Group(role, ALL, tuple(row for rows in parts.values() for row in rows)))
    return tuple(groups)


def _lines(
    folder: RunFolder,
    key: str,
    described: Mapping[str, Any],
    groups: Sequence[Group],
    samples: Mapping[tuple[str, str], Sample],
    condition: str,
    distances: Distances,
) -> list[dict[str, Any]]:
    """Return one line of a metric's table for each group that has scores."""
    lines = []
    kind = described["kind"]
    if kind == "set":
        features = {one: features_of(folder, described, one) for one in (WITHOUT, condition)}
        drawn = (row.id for batch in folder.batches for row in batch.rows)
        order = {row: place for place, row in enumerate(drawn)}
        distance = distances[key.partition(":")[0]]
    for group in groups:
        about = {"condition": condition, "role": group.role, "subject": group.subject, "group": group.group}
        if kind == "set":
            places = torch.tensor([order[row] for row in group.rows])
            numbers = _of_sets(features[WITHOUT][places], features[condition][places], distance)
        else:
            rows = [row for row in group.rows if key in samples[condition, row].scores]
            given = [samples[condition, row].scores[key] for row in rows]
            if not rows:
                continue
            match kind:
                case "pair":
                    numbers = _of_pairs(given)
                case "judge":
                    numbers = _of_verdicts([bool(samples[WITHOUT, row].scores[key]) for row in rows], given)
                case _:
                    numbers = _of_numbers([samples[WITHOUT, row].scores[key] for row in rows], given)
        lines.append({**about, **numbers})
    return lines


def _of_verdicts(before: Sequence[bool], given: Sequence[float]) -> dict[str, Any]:
    """Return the shares of pictures that show their subject, and of those before that are gone."""
    after = [bool(one) for one in given]
    n, shown = len(before), sum(before)
    gone = sum(old and not new for old, new in zip(before, after, strict=True))
    changes = [float(new) - float(old) for old, new in zip(before, after, strict=True)]
    return {
        "n": n,
        "without": _rounded(shown / n),
        "without_interval": _ends(wilson(shown, n)),
        "with": _rounded(sum(after) / n),
        "with_interval": _ends(wilson(sum(after), n)),
        "difference": _rounded((sum(after) - shown) / n),
        "difference_interval": _ends(statistics.paired_share_difference(before, after)),
        "erased": _rounded(gone / shown) if shown else None,
        "erased_interval": _ends(wilson(gone, shown)) if shown else None,
        "detectable": _rounded(statistics.detectable_difference(changes)),
    }


def _of_numbers(before: Sequence[float], after: Sequence[float]) -> dict[str, Any]:
    changes = [new - old for old, new in zip(before, after, strict=True)]
    return {
        "n": len(before),
        "without": _rounded(sum(before) / len(before)),
        "without_interval": _ends(statistics.bootstrap_mean(before)),
        "with": _rounded(sum(after) / len(after)),
        "with_interval": _ends(statistics.bootstrap_mean(after)),
        "difference": _rounded(sum(changes) / len(changes)),
        "difference_interval": _ends(statistics.bootstrap_mean(changes)),
        "detectable": _rounded(statistics.detectable_difference(changes)),
    }


def _of_pairs(values: Sequence[float]) -> dict[str, Any]:
    return {
        "n": len(values),
        "value": _rounded(sum(values) / len(values)),
        "value_interval": _ends(statistics.bootstrap_mean(values)),
    }


def _of_sets(before: Tensor, after: Tensor, distance: Callable[[Tensor, Tensor], float]) -> dict[str, Any]:
    """Return the distance of two sets of equal n; no number for fewer than two pictures."""
    if len(before) < 2:
        return {"n": len(before), "value": None, "value_interval": None}
    interval = statistics.jackknife(lambda places: distance(before[places], after[places]), len(before))
    return {"n": len(before), "value": _rounded(distance(before, after)), "value_interval": _ends(interval)}


def findings(tables: Sequence[Mapping[str, Any]], restored: str | None = None) -> list[dict[str, Any]]:
    """Return the lines whose intervals say something, each with its conclusion.

    "erased": a target is drawn less often. "not erased": it is not shown to be. "not drawn": the base draws the target
    in no picture, so nothing was measured. "damage": a neighbour or unrelated subject is drawn less often, or a number
    of which more is better fell, or one of which less is better rose.
    restored: the target whose eraser was taken away again, "restored" or "not restored": it is drawn less often.
    """
    found = []
    for table in tables:
        for line in table["lines"]:
            if (says := _says(table, line, restored)) is not None:
                found.append({"metric": table["metric"], "says": says, **line})
    return found


def _says(table: Mapping[str, Any], line: Mapping[str, Any], restored: str | None) -> str | None:
    low, high = line.get("difference_interval") or (None, None)
    fell, rose = high is not None and high < 0, low is not None and low > 0
    if line["role"] != "target":
        better = "higher" if table["kind"] == "judge" else table["better"]
        return "damage" if (fell and better == "higher") or (rose and better == "lower") else None
    if table["kind"] != "judge":
        return None
    if line["without"] == 0:
        return "not drawn"
    if line["condition"] == RESTORED:
        if line["subject"] == ALL:
            return None
        if line["subject"] == restored:
            return "not restored" if fell else "restored"
    return "erased" if fell else "not erased"


def _ends(interval: tuple[float, float]) -> list[float | None]:
    return [_rounded(end) if math.isfinite(end) else None for end in interval]


def _rounded(value: float) -> float:
    return round(float(value), 6)
