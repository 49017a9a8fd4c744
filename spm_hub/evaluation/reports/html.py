"""A report as one HTML page that needs no other file: pictures, tables and a plot."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from PIL.Image import Image, Resampling

from spm_hub.evaluation.pictures import WITH
from spm_hub.evaluation.records.folder import RunFolder
from spm_hub.evaluation.reports.plot import changes
from spm_hub.evaluation.reports.report import groups_of
from spm_hub.evaluation.reports.wording import HEADINGS, cells, finding, named, remarks

PAIRS = 4
"""Rows of each subject that the page shows."""

LARGEST = 256
"""Pixels of the longer side of a picture on the page."""

_STYLE = """
:root { color-scheme: light dark; --ink: #18181b; --paper: #fff; --faint: #71717a; --line: #d4d4d8; --bad: #b91c1c; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #f4f4f5; --paper: #18181b; --faint: #a1a1aa; --line: #3f3f46; --bad: #f87171; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1200px; padding: 16px; font: 16px/1.5 system-ui, sans-serif; color: var(--ink);
  background: var(--paper); overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; } h3 { font-size: 1rem; margin: 1rem 0 .25rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 4px 12px 4px 0; border-bottom: 1px solid var(--line); white-space: nowrap; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(170px, 1fr)); gap: 12px; }
figure { margin: 0; } figcaption { font-size: .8rem; color: var(--faint); }
.pair { display: grid; grid-auto-flow: column; grid-auto-columns: 1fr; gap: 2px; }
.pair img { width: 100%; image-rendering: auto; display: block; } .damage { color: var(--bad); }
svg { width: 100%; height: auto; max-width: 760px; } svg text { font: 13px system-ui, sans-serif; fill: var(--ink); }
"""


def page(folder: RunFolder, report: Mapping[str, Any]) -> str:
    """Return the whole page. It loads nothing: styles, pictures and the plot are in it."""
    return "\n".join(_parts(folder, report)) + "\n"


def _parts(folder: RunFolder, report: Mapping[str, Any]) -> Iterator[str]:
    run = report["run"]
    title = f"{', '.join(one['name'] for one in run['erasers'])} by {run['protocol']['name']}"
    kinds = {table["metric"]: table["kind"] for table in report["tables"]}
    yield '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield f'<title>{escape(title)}</title>\n<link rel="icon" href="data:,">\n<style>{_STYLE}</style>\n</head>\n<body>'
    yield f"<h1>{escape(title)}</h1>"
    yield (
        f"<p>{escape(run['protocol']['about'])} Base: {escape(run['model'])}. Every row is drawn without and with the "
        f"erasers from the same noise: {report['rows']} rows, {report['pictures']} pictures. Intervals are 95 %.</p>"
    )
    yield _list([(remark, "") for remark in remarks(report)])
    yield "<h2>Findings</h2>"
    yield _list([(finding(one, kinds[one["metric"]]), one["says"]) for one in report["findings"]])
    if plotted := changes(report["tables"]):
        yield f"<h2>Change of each subject</h2>\n{plotted}"
    for table in report["tables"]:
        yield f"<h2>{escape(table['metric'])}</h2>"
        yield _table(HEADINGS[table["kind"]], [cells(line, table["kind"]) for line in table["lines"]])
    if report["published"]:
        yield f"<h2>Published: {escape(run['protocol']['paper'])}</h2>"
        yield _table(
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
                f'<img src="{_data(folder.picture(samples[one, row]))}" alt="{one}" loading="lazy">'
                for one in folder.conditions
            )
            yield f'<figure><div class="pair">{pair}</div><figcaption>{escape(rows[row].prompt)}</figcaption></figure>'
        yield "</div>"


def _data(picture: Image) -> str:
    """Return a picture as a data address, at most LARGEST pixels wide and high."""
    if max(picture.size) > LARGEST:
        picture = picture.copy()
        picture.thumbnail((LARGEST, LARGEST), Resampling.LANCZOS)
    file = io.BytesIO()
    picture.save(file, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _list(items: Sequence[tuple[str, str]]) -> str:
    """Return a list of texts, each with its class."""
    lines = "".join(f'<li class="{escape(kind)}">{escape(text)}</li>' for text, kind in items)
    return f"<ul>{lines}</ul>"


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(one)}</th>" for one in headings)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
