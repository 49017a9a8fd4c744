"""Writes all forms of a run's report: report.json, report.md and report.html."""

from __future__ import annotations

import json
from typing import Any

from spm_hub.evaluation.attacks.records.folder import AttackFolder
from spm_hub.evaluation.attacks.records.report import attack_report
from spm_hub.evaluation.records.folder import SAMPLES, RunFolder
from spm_hub.evaluation.reports.html import page
from spm_hub.evaluation.reports.markdown import text_of
from spm_hub.evaluation.reports.published import beside
from spm_hub.evaluation.reports.report import Distances, report_of
from spm_hub.io.atomic import write_together

REPORT = "report.json"
ATTACKS = "attacks"
"""The folder of a protocol's attacks, inside that of the run."""


def write_reports(folder: RunFolder, distances: Distances) -> dict[str, Any]:
    """Compute the report of a run, write its three forms, and return it. Raises RegistryError."""
    report = report_of(folder, distances)
    attacked = folder.path / ATTACKS
    report["attacks"] = attack_report(AttackFolder.open(attacked))["judges"] if (attacked / SAMPLES).exists() else []
    report["published"] = beside(report)
    document = json.dumps(report, indent=2, sort_keys=True, allow_nan=False) + "\n"
    write_together({
        folder.path / "report.md": text_of(report).encode(),
        folder.path / "report.html": page(folder, report).encode(),
        folder.path / REPORT: document.encode(),
    })  # fmt: skip
    return report
