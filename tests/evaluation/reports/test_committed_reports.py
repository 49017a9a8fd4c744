"""The reports in benchmarks/reports say what their records say."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

import pytest

from spm_hub.evaluation.metrics.named import distances
from spm_hub.evaluation.records.folder import METRICS, ROWS, RUN, SAMPLES, RunFolder
from spm_hub.evaluation.reports.markdown import text_of
from spm_hub.evaluation.reports.report import report_of

REPORTS = Path(__file__).parents[3] / "benchmarks" / "reports"
FOLDERS = sorted(path.parent for path in REPORTS.glob("*/*/report.json"))


def unpacked(committed: Path, folder: Path) -> RunFolder:
    for name in (RUN, METRICS):
        shutil.copy(committed / name, folder / name)
    for name in (ROWS, SAMPLES):
        (folder / name).write_bytes(gzip.decompress((committed / f"{name}.gz").read_bytes()))
    return RunFolder.open(folder)


@pytest.mark.parametrize("committed", FOLDERS, ids=[f"{path.parent.name}-{path.name}" for path in FOLDERS])
def test_a_committed_report_is_computed_from_its_records(committed: Path, tmp_path: Path) -> None:
    folder = unpacked(committed, tmp_path)
    report = report_of(folder, distances()) | {"attacks": [], "published": []}
    written = json.loads((committed / "report.json").read_text())
    assert json.loads(json.dumps(report)) == written
    assert text_of(written) == (committed / "report.md").read_text()

    # The same shares, counted here from the lines of samples.jsonl.
    rows = {row.id: row for row in folder.rows}
    judged = next(table for table in written["tables"] if table["kind"] == "judge")
    for line in judged["lines"]:
        for condition in ("without", "with"):
            seen = [
                sample.scores[judged["metric"]]
                for sample in folder.samples()
                if sample.condition == condition
                and rows[sample.row].role == line["role"]
                and line["subject"] in ("all", rows[sample.row].subject)
            ]
            assert len(seen) == line["n"]
            assert sum(seen) / len(seen) == pytest.approx(line[condition], abs=1e-6)


def test_every_shipped_eraser_has_a_report_on_both_bases() -> None:
    shipped = {path.stem for path in (REPORTS.parents[1] / "adapters").glob("*.safetensors")}
    for base in ("sketchbook", "fluent"):
        assert {path.parent.name for path in REPORTS.glob(f"{base}/shipped-*/report.json")} == {
            f"shipped-{name}" for name in shipped
        }
