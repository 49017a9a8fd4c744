"""A report as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from spm_hub.evaluation.attacks.records import wording as attack_wording
from spm_hub.evaluation.reports.wording import HEADINGS, cells, finding, remarks


def text_of(report: Mapping[str, Any]) -> str:
    """Return the whole report as Markdown."""
    return "\n".join(_lines(report)) + "\n"


def _lines(report: Mapping[str, Any]) -> Iterator[str]:
    run = report["run"]
    kinds = {table["metric"]: table["kind"] for table in report["tables"]}
    names = ", ".join(one["name"] for one in run["erasers"])
    yield f"# {_escaped(names)} by {run['protocol']['name']}, version {run['protocol']['version']}"
    yield ""
    yield f"{_escaped(run['protocol']['about'])} Base: {_escaped(run['model'])}. Every row is drawn with and without"
    yield f"the erasers from the same noise: {report['rows']} rows, {report['pictures']} pictures. Intervals are 95 %."
    yield ""
    yield from (f"- {_escaped(remark)}" for remark in remarks(report))
    yield from ("", "## Findings", "")
    yield from (f"- {_escaped(finding(one, kinds[one['metric']]))}" for one in report["findings"])
    if not report["findings"]:
        yield "- No judge answers for the target, and nothing else is shown to have changed."
    for table in report["tables"]:
        yield from ("", f"## {_escaped(table['metric'])}", "")
        yield from _table(HEADINGS[table["kind"]], [cells(line, table["kind"]) for line in table["lines"]])
    for judged in report["attacks"]:
        yield from ("", "## Attacks", "", _escaped(attack_wording.summary(judged)), "")
        yield from _table(attack_wording.HEADINGS, attack_wording.rows_of_judge(judged))
    if report["published"]:
        yield from ("", f"## Published: {_escaped(run['protocol']['paper'])}", "")
        yield from _table(
            ("method", "subject", "quantity", "paper", "here", "where"),
            [(one["method"], one["subject"] or "captions", one["quantity"], f"{one['value']:g}",
              "-" if one["here"] is None else f"{one['here']:.4g}", one["where"]) for one in report["published"]],
        )  # fmt: skip
    yield from ("", "## How", "")
    drawing = run["drawing"]
    yield f"- {drawing['steps']} steps, guidance {drawing['guidance']}, batches of {run['at_once']}, seed {run['seed']}"
    yield from (f"- {name} {found}" for name, found in sorted(run["versions"].items()))
    hashes = (run["protocol"]["sha256"], run["sha256"], report["samples_sha256"])
    yield "- protocol {:.16}, run {:.16}, records {:.16}".format(*hashes)
    for table in report["tables"]:
        about = ", ".join(f"{key} {value}" for key, value in sorted(table["about"].items()))
        yield f"- {_escaped(table['metric'])}: {_escaped(about)}"


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(headings)} |"
    yield f"|{' --- |' * len(headings)}"
    yield from (f"| {' | '.join(map(_escaped, row))} |" for row in rows)


def _escaped(text: str) -> str:
    """Escape the characters that would end a table's cell or begin markup."""
    return "".join(f"\\{letter}" if letter in "\\|`*_<>[]" else letter for letter in text).replace("\n", " ")
