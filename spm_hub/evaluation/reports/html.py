"""A report as one HTML page that needs no other file: pictures, tables and a plot."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from spm_hub.evaluation.attacks.records import wording as attack_wording
from spm_hub.evaluation.pictures import WITH
from spm_hub.evaluation.records.folder import RunFolder
from spm_hub.evaluation.reports.parts import HEAD, STYLE, data_address, rows_in_table
from spm_hub.evaluation.reports.plot import changes, curves, points_of, trade_off
from spm_hub.evaluation.reports.report import ALL, groups_of
from spm_hub.evaluation.reports.wording import HEADINGS, cells, finding, named, remarks

PROMPTS = 3
"""Prompts of each subject whose gammas the page shows."""

PAIRS = 4
"""Rows of each subject that the page shows."""


def page(folder: RunFolder, report: Mapping[str, Any]) -> str:
    """Return the whole page. It loads nothing: styles, pictures and the plot are in it."""
    return "\n".join(_parts(folder, report)) + "\n"


def _parts(folder: RunFolder, report: Mapping[str, Any]) -> Iterator[str]:
    run = report["run"]
    title = f"{', '.join(one['name'] for one in run['erasers'])} by {run['protocol']['name']}"
    kinds = {table["metric"]: table["kind"] for table in report["tables"]}
    yield f"{HEAD}<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>"
    yield f"<h1>{escape(title)}</h1>"
    yield (
        f"<p>{escape(run['protocol']['about'])} Base: {escape(run['model'])}. Every row is drawn without and with the "
        f"erasers from the same noise: {report['rows']} rows, {report['pictures']} pictures. Intervals are 95 %.</p>"
    )
    yield _list([(remark, "") for remark in remarks(report)])
    yield "<h2>Findings</h2>"
    yield _list([(finding(one, kinds[one["metric"]]), one["says"]) for one in report["findings"]])
    if plotted := changes(report["tables"]):
        yield f'<h2>Change of each subject</h2>\n<div class="scroll">{plotted}</div>'
    if points := points_of(report["tables"]):
        yield f'<h2>Erasure and damage</h2>\n<div class="scroll">{trade_off(points)}</div>'
    for table in report["tables"]:
        yield f"<h2>{escape(table['metric'])}</h2>"
        yield rows_in_table(HEADINGS[table["kind"]], [cells(line, table["kind"]) for line in table["lines"]])
    for judged in report["attacks"]:
        yield f"<h2>Attacks</h2>\n<p>{escape(attack_wording.summary(judged))}</p>"
        yield f'<div class="scroll">{curves({one["name"]: one["curve"] for one in judged["attacks"]})}</div>'
        yield rows_in_table(attack_wording.HEADINGS, attack_wording.rows_of_judge(judged))
    if report["gates"]:
        yield "<h2>Gates</h2>\n<p>Gamma of each eraser: 0 leaves a prompt alone, 1 is its whole effect.</p>"
        yield _gates(folder)
    if report["published"]:
        yield f"<h2>Published: {escape(run['protocol']['paper'])}</h2>"
        yield rows_in_table(
            ("method", "subject", "quantity", "paper", "here", "where"),
            [(one["method"], one["subject"] or "captions", one["quantity"], f"{one['value']:g}",
              "-" if one["here"] is None else f"{one['here']:.4g}", one["where"]) for one in report["published"]],
        )  # fmt: skip
    yield f"<h2>Pictures</h2>\n<p>From left to right: {', '.join(run['conditions'])}.</p>"
    yield from _pictures(folder)
    yield f"<p>Run {run['sha256']}, protocol {run['protocol']['sha256']}.</p>\n</body>\n</html>"


def _pictures(folder: RunFolder) -> Iterator[str]:
    """Yield the first pairs of each subject, of the rows that every report of this run shows."""
    rows = {row.id: row for row in folder.rows}
    samples = {(sample.condition, sample.row): sample for sample in folder.samples()}
    seen: set[str] = set()
    for group in groups_of(folder):
        fresh = [row for row in group.rows if row not in seen][:PAIRS]
        seen.update(group.rows)
        if not fresh:
            continue
        about = {"subject": group.subject, "role": group.role, "group": group.group, "condition": WITH}
        yield f'<h3>{escape(named(about))}</h3>\n<div class="grid">'
        for row in fresh:
            pair = "".join(
                f'<img src="{data_address(folder.picture(samples[one, row]))}" alt="{one}" loading="lazy">'
                for one in folder.conditions
            )
            yield f'<figure><div class="pair">{pair}</div><figcaption>{escape(rows[row].prompt)}</figcaption></figure>'
        yield "</div>"


def _gates(folder: RunFolder) -> str:
    """Return a heat map of the gammas of some prompts of each subject, as a table."""
    gammas = {sample.row: sample.gammas for sample in folder.samples() if sample.condition == WITH}
    prompts = {row.id: row.prompt for row in folder.rows}
    erasers = list(next(iter(gammas.values())))
    shown: dict[str, str] = {}
    for group in groups_of(folder):
        for row in group.rows[:PROMPTS] if group.subject != ALL else ():
            shown.setdefault(prompts[row], row)
    lines = "".join(
        f"<tr><th>{escape(prompt)}</th>{''.join(_heat(gammas[row][name]) for name in erasers)}</tr>"
        for prompt, row in shown.items()
    )
    heads = "".join(f"<th>{escape(name)}</th>" for name in erasers)
    return f'<div class="scroll"><table class="heat"><tr><th>prompt</th>{heads}</tr>{lines}</table></div>'


def _heat(gamma: float) -> str:
    """Return a cell, white for gamma 0 and dark blue for 1."""
    strong = min(1.0, max(0.0, gamma))
    ink = "#fff" if strong > 0.5 else "#18181b"
    return f'<td style="background:rgb(8 48 107 / {strong:.2f});color:{ink}">{gamma:.2f}</td>'


def _list(items: Sequence[tuple[str, str]]) -> str:
    """Return a list of texts, each with its class."""
    lines = "".join(f'<li class="{escape(kind)}">{escape(text)}</li>' for text, kind in items)
    return f"<ul>{lines}</ul>"
