"""The reports of attacks as Markdown and as one HTML page."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

from spm_hub.evaluation.attacks.records.folder import BASE, BEFORE, AttackFolder
from spm_hub.evaluation.attacks.records.report import attack_report
from spm_hub.evaluation.attacks.records.wording import HEADINGS, rows_of_judge, summary
from spm_hub.evaluation.reports.parts import HEAD, STYLE, data_address, rows_in_table
from spm_hub.evaluation.reports.plot import curves
from spm_hub.evaluation.reports.writing import REPORT
from spm_hub.io.atomic import write_together

MOST_WINNERS = 8
"""Successful tries of each attack that the page shows."""


def write_attack_reports(folder: AttackFolder) -> dict[str, Any]:
    """Compute the report of attacks, write its three forms, and return it. Raises RegistryError."""
    report = attack_report(folder)
    document = json.dumps(report, indent=2, sort_keys=True, allow_nan=False) + "\n"
    write_together({
        folder.path / "report.md": "\n".join(_text(report)).encode() + b"\n",
        folder.path / "report.html": "\n".join(_page(folder, report)).encode() + b"\n",
        folder.path / REPORT: document.encode(),
    })  # fmt: skip
    return report


def _title(report: Mapping[str, Any]) -> str:
    return f"Attacks on {report['run']['eraser']['name']}"


def _text(report: Mapping[str, Any]) -> Iterator[str]:
    yield f"# {_title(report)}"
    for judged in report["judges"]:
        yield f"\n## {summary(judged)}\n"
        yield f"| {' | '.join(HEADINGS)} |"
        yield "|" + " --- |" * len(HEADINGS)
        for row in rows_of_judge(judged):
            yield f"| {' | '.join(row)} |"
    yield f"\nBase {report['run']['model']}, gate {report['run']['gate']}, seed {report['run']['seed']}; intervals are"
    yield f"95 %. Run {report['run']['sha256']:.16}, records {report['samples_sha256']:.16}."


def _page(folder: AttackFolder, report: Mapping[str, Any]) -> Iterator[str]:
    title = escape(_title(report))
    yield f"{HEAD}<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>"
    run = report["run"]
    yield f"<p>Base {escape(run['model'])}, gate {escape(str(run['gate']))}. Intervals are 95 %.</p>"
    for judged in report["judges"]:
        yield f"<h2>{escape(summary(judged))}</h2>"
        plotted = curves({one["name"]: one["curve"] for one in judged["attacks"]})
        yield f'<p>Prompts brought back, over the tries of each.</p><div class="scroll">{plotted}</div>'
        yield rows_in_table(HEADINGS, rows_of_judge(judged))
    yield "<h2>What brought it back</h2>\n<p>From left to right: the base, the erased model, the attack.</p>"
    first = report["judges"][0]
    pictures = {(one.row, one.why): one for one in folder.tries() if one.why in (BASE, BEFORE)}
    by_name = {one.picture: one for one in folder.tries()}
    for attack in first["attacks"]:
        if not attack["winners"]:
            continue
        yield f'<h3>{escape(attack["name"])}</h3>\n<div class="grid">'
        for won in attack["winners"][:MOST_WINNERS]:
            shown = [pictures[won["row"], BASE], pictures[won["row"], BEFORE], by_name[won["picture"]]]
            row = "".join(f'<img src="{data_address(folder.picture_of(one))}" alt="{one.why}">' for one in shown)
            gammas = ", ".join(f"{value:.2f}" for value in won["gammas"].values())
            yield (
                f'<figure><div class="pair">{row}</div><figcaption>{escape(won["text"])} (try {won["tries"]}, gamma '
                f"{gammas or '-'})</figcaption></figure>"
            )
        yield "</div>"
    yield f"<p>Run {report['run']['sha256']}.</p>\n</body>\n</html>"
