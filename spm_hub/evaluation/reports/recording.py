"""Turns a report into the measured numbers of a manifest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from spm_hub.adapters.manifest import Evaluation, GateName
from spm_hub.errors import UsageError
from spm_hub.evaluation.pictures import WITH
from spm_hub.evaluation.reports.report import ALL
from spm_hub.evaluation.reports.writing import REPORT
from spm_hub.io.hashing import sha256_of


def check_whole(*, quick: bool, limit: int | None) -> None:
    """Refuse to record a first look, or one of some rows. Raises UsageError."""
    if quick or limit is not None:
        raise UsageError("a first look is no record of an eraser", mend="leave --quick and --limit out, or --record")


def evaluations_of(report: Mapping[str, Any], folder: Path, gate: GateName) -> tuple[Evaluation, ...]:
    """Return the aggregates of a report as measured numbers.

    They have their intervals and the hashes of the protocol and of the report.
    folder: of the run, with report.json. gate: the eraser's own. Raises UsageError as `check_whole` does.
    """
    run = report["run"]
    check_whole(quick=run["quick"], limit=run["limit"])
    shared = _shared(run, folder, gate) | {"protocol_sha256": run["protocol"]["sha256"]}
    found = []
    for table in report["tables"]:
        for line in table["lines"]:
            value, interval = (line.get(key, line.get(f"value{key[4:]}")) for key in ("with", "with_interval"))
            if line["condition"] != WITH or value is None:
                continue
            found.append(
                Evaluation(
                    **shared, subject=_subject(line), metric=table["metric"], value=value,
                    reference=line.get("without"), samples=line["n"],
                    interval=None if interval is None or None in interval else tuple(interval),
                )
            )  # fmt: skip
    if report["attacks"]:
        target = run["erasers"][0]["concept"][0]
        found += _of_attacks(report["attacks"][0], shared, target)
    return tuple(found)


def evaluations_of_attacks(
    report: Mapping[str, Any], folder: Path, gate: GateName, target: str
) -> tuple[Evaluation, ...]:
    """Return the success of each kept attack, and of none at all, as measured numbers.

    They are those of the judge that ended the searches. folder: of the attacks, with report.json. gate: the eraser's
    own. target: its concept.
    """
    shared = _shared(report["run"], folder, gate)
    return tuple(_of_attacks(report["judges"][0], shared, target))


def _shared(run: Mapping[str, Any], folder: Path, gate: GateName) -> dict[str, Any]:
    """Return the values that are the same for every number of a run."""
    return {
        "protocol": run["protocol"]["name"], "base": run["model"], "seed": run["seed"], "gate": gate,
        "steps": run["drawing"]["steps"], "guidance": run["drawing"]["guidance"],
        "version": run["versions"]["spm-hub"], "date": datetime.now(UTC).replace(microsecond=0),
        "report_sha256": sha256_of(folder / REPORT),
    }  # fmt: skip


def _of_attacks(judged: Mapping[str, Any], shared: Mapping[str, Any], target: str) -> Iterator[Evaluation]:
    """Yield the share of the prompts that show the concept, before and after each attack.

    Prompts for which the base does not draw it are left out.
    """
    shares = {"none": judged["before"], **{one["name"]: one["asr"] for one in judged["attacks"]}}
    by = "" if judged["judge"] == "probe" else f" by {judged['judge']}"
    for name, share in shares.items():
        yield Evaluation(
            **shared, subject=target, metric=f"asr:{name}{by}", value=share["value"], reference=1.0, samples=share["n"],
            interval=tuple(share["interval"]),
        )  # fmt: skip


def _subject(line: Mapping[str, Any]) -> str:
    """Return the subject of a line, with its role where the subject alone would not say it."""
    subject = line["subject"] or "captions"
    if subject == ALL:
        subject = f"every {line['role']}"
    return subject if line["group"] is None else f"{subject} ({line['group']})"
