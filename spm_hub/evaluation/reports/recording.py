"""Turns a report into the measured numbers of a manifest."""

from __future__ import annotations

from collections.abc import Mapping
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
    digest, found = sha256_of(folder / REPORT), []
    for table in report["tables"]:
        for line in table["lines"]:
            value, interval = (line.get(key, line.get(f"value{key[4:]}")) for key in ("with", "with_interval"))
            if line["condition"] != WITH or value is None:
                continue
            found.append(
                Evaluation(
                    protocol=run["protocol"]["name"], base=run["model"], subject=_subject(line), metric=table["metric"],
                    value=value, reference=line.get("without"), samples=line["n"], seed=run["seed"],
                    steps=run["drawing"]["steps"], guidance=run["drawing"]["guidance"], gate=gate,
                    version=run["versions"]["spm-hub"], date=datetime.now(UTC).replace(microsecond=0),
                    interval=None if interval is None or None in interval else tuple(interval),
                    protocol_sha256=run["protocol"]["sha256"], report_sha256=digest,
                )
            )  # fmt: skip
    return tuple(found)


def _subject(line: Mapping[str, Any]) -> str:
    """Return the subject of a line, with its role where the subject alone would not say it."""
    subject = line["subject"] or "captions"
    if subject == ALL:
        subject = f"every {line['role']}"
    return subject if line["group"] is None else f"{subject} ({line['group']})"
