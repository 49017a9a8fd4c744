"""Compares runs of one protocol: the same rows, with different erasers, strengths or bases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from spm_hub.errors import UsageError
from spm_hub.evaluation import statistics
from spm_hub.evaluation.pictures import WITH, WITHOUT
from spm_hub.evaluation.records.folder import RunFolder
from spm_hub.evaluation.records.sample import Sample
from spm_hub.evaluation.records.scoring import described_metrics
from spm_hub.evaluation.reports.parts import HEAD, STYLE
from spm_hub.evaluation.reports.plot import trade_off
from spm_hub.evaluation.reports.report import groups_of
from spm_hub.evaluation.reports.wording import named


@dataclass(frozen=True)
class Comparison:
    """Runs next to each other.

    names: of the runs. same_base: True if all drew the same pictures without erasers, so that their differences are
    the erasers' alone. lines: for each metric of pictures and each subject the mean of every run with erasers, and the
    difference of each run from the first with its 95 % interval. points: (name, share erased, share of others lost).
    """

    names: tuple[str, ...]
    same_base: bool
    lines: tuple[Mapping[str, Any], ...]
    points: tuple[tuple[str, float, float], ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the comparison for JSON."""
        points = [{"run": name, "erased": erased, "others_lost": lost} for name, erased, lost in self.points]
        return {"runs": self.names, "same_base": self.same_base, "lines": self.lines, "trade_off": points}

    def page(self) -> str:
        """Return one HTML page with the plot of erasure against damage. It loads nothing."""
        plot = trade_off(self.points) if self.points else "<p>No judge measured all runs.</p>"
        rows = "".join(
            f"<tr><td>{escape(line['metric'])}</td><td>{escape(named(line))}</td>"
            + "".join(f"<td>{value:.4g}</td>" for value in line["values"])
            + "</tr>"
            for line in self.lines
        )
        heads = "".join(f"<th>{escape(name)}</th>" for name in self.names)
        return (
            f"{HEAD}<title>Comparison</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
            f'<h1>{escape(" and ".join(self.names))}</h1>\n<div class="scroll">{plot}</div>\n'
            f'<div class="scroll"><table><tr><th>metric</th><th>subject</th>{heads}</tr>{rows}</table></div>\n'
            "</body>\n</html>\n"
        )


def compare(folders: Sequence[RunFolder]) -> Comparison:
    """Compare runs of the same rows.

    Raises UsageError for fewer than two runs, and for runs whose rows or metrics are not the same question.
    """
    if len(folders) < 2:
        raise UsageError("a comparison needs two runs or more", mend="spmhub compare DIR DIR")
    first = folders[0]
    for other in folders[1:]:
        if [row.as_dict() for row in other.rows] != [row.as_dict() for row in first.rows]:
            raise UsageError(
                f"{other.path} has other rows than {first.path}, so their numbers answer different questions",
                mend="evaluate both with the same protocol, prompts, seed and limit",
            )
    samples = [{(one.condition, one.row): one for one in folder.samples()} for folder in folders]
    bases = [[found[WITHOUT, row.id].sha256 for row in first.rows] for found in samples]
    described = [described_metrics(folder) for folder in folders]
    shared = [key for key, about in described[0].items() if all(one.get(key) == about for one in described[1:])]
    lines = [line for key in shared for line in _lines(first, key, samples)]
    judges = [key for key in shared if described[0][key]["kind"] == "judge"]
    points = _points(folders, samples, judges[0]) if judges else ()
    return Comparison(
        tuple(folder.path.name for folder in folders), all(base == bases[0] for base in bases), tuple(lines), points
    )


def _lines(first: RunFolder, key: str, samples: Sequence[Mapping[tuple[str, str], Sample]]) -> list[dict[str, Any]]:
    lines = []
    for group in groups_of(first):
        rows = [row for row in group.rows if all(key in found[WITH, row].scores for found in samples)]
        if not rows:
            continue
        columns = [[float(found[WITH, row].scores[key]) for row in rows] for found in samples]
        lines.append({
            "metric": key, "role": group.role, "subject": group.subject, "group": group.group, "condition": WITH,
            "n": len(rows),
            "values": [sum(column) / len(rows) for column in columns],
            "differences": [
                {"value": (sum(column) - sum(columns[0])) / len(rows), "interval": _interval(columns[0], column)}
                for column in columns[1:]
            ],
        })  # fmt: skip
    return lines


def _interval(one: Sequence[float], other: Sequence[float]) -> list[float] | None:
    """Return the 95 % interval of the mean difference of pairs; None for a single pair."""
    if len(one) < 2:
        return None
    if all(value in (0.0, 1.0) for value in (*one, *other)):
        return list(statistics.paired_share_difference(list(map(bool, one)), list(map(bool, other))))
    return list(statistics.bootstrap_mean([new - old for old, new in zip(one, other, strict=True)]))


def _points(
    folders: Sequence[RunFolder], samples: Sequence[Mapping[tuple[str, str], Sample]], judge: str
) -> tuple[tuple[str, float, float], ...]:
    """Return for each run the share of shown targets that are gone, and that of all others."""

    def lost(folder: RunFolder, found: Mapping[tuple[str, str], Sample], *, target: bool) -> float:
        rows = [row.id for row in folder.rows if (row.role == "target") == target]
        shown = [row for row in rows if found[WITHOUT, row].scores.get(judge) is True]
        return sum(found[WITH, row].scores[judge] is False for row in shown) / max(len(shown), 1)

    return tuple(
        (folder.path.name, lost(folder, found, target=True), lost(folder, found, target=False))
        for folder, found in zip(folders, samples, strict=True)
    )
