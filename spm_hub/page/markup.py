"""The parts of the page that are text: gammas with their reasons, reports, remarks."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

from spm_hub.adapters.manifest import Evaluation, Manifest
from spm_hub.attachment.gates.gate import Explanation
from spm_hub.training.verdict import verdict

_MOST_ROWS = 40

STYLE = """
.gradio-container { width: 100% !important; max-width: 1180px !important; margin: 0 auto !important; }
.spm-remark { min-height: 1.6em; margin: 0; }
.spm-remark.wrong { color: #b3261e; font-weight: 600; }
@media (prefers-color-scheme: dark) { .dark .spm-remark.wrong { color: #ff8a80; } }
.spm-table { width: 100%; border-collapse: collapse; }
.spm-table th, .spm-table td, .spm-table tr { border: none !important; }
.spm-table th, .spm-table td { text-align: left; padding: 4px 10px 4px 0; vertical-align: top; }
.spm-table td { overflow-wrap: anywhere; }
.spm-table td.number { white-space: nowrap; }
.spm-bar { display: inline-block; width: 72px; height: 0.7em; margin-right: 8px; }
.spm-bar { background: rgba(127, 127, 127, 0.25); }
.spm-bar span { display: block; height: 100%; background: #2a6f97; }
.spm-picture img { width: 100%; height: 100%; object-fit: contain; image-rendering: pixelated; }
"""


def remark(text: str, *, wrong: bool = False) -> str:
    """Return a line for the visitor; a reader for the blind says it when it changes."""
    kind = " wrong" if wrong else ""
    return f'<p class="spm-remark{kind}" role="status" aria-live="polite">{escape(text)}</p>'


def gammas(explanations: Mapping[str, Explanation], strengths: Mapping[str, float]) -> str:
    """Return a table of each eraser's gamma, its strength, and the reason."""
    if not explanations:
        return "<p>No eraser is chosen: both pictures are those of the model.</p>"
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td class='number'><span class='spm-bar' aria-hidden='true'>"
        f"<span style='width:{100 * min(max(one.gamma, 0.0), 1.0):.0f}%'></span></span>{one.gamma:.2f}</td>"
        f"<td class='number'>{strengths[name]:.2f}</td><td>{escape(_reason(one))}</td></tr>"
        for name, one in explanations.items()
    )
    head = "<tr><th scope='col'>eraser</th><th scope='col'>gamma</th><th scope='col'>strength</th>"
    return f"<table class='spm-table'>{head}<th scope='col'>why</th></tr>{rows}</table>"


def report(manifest: Manifest) -> str:
    """Return an eraser's concept, base, training, gate, and everything measured of it."""
    concept = manifest.concept
    names = ", ".join(concept.names) or "unknown"
    facts = [
        ("erases", f"{names} ({concept.kind})"),
        ("trained on", manifest.base.id or manifest.base.family),
        ("method", str(manifest.recipe.get("method", "unknown"))),
        ("training", verdict(manifest)),
        ("gate", f"{manifest.default_gate}, strength {manifest.gate.strength:g}"),
        ("protected prompts", str(len(manifest.gate.protected))),
    ]
    shown = "".join(f"<tr><th scope='row'>{name}</th><td>{escape(value)}</td></tr>" for name, value in facts)
    return f"<table class='spm-table'>{shown}</table>{_measured(manifest)}"


def _measured(manifest: Manifest) -> str:
    rows = sorted(manifest.evaluation, key=lambda one: -abs(one.value - (one.reference or one.value)))
    if not rows:
        return "<p>Nothing was measured. On the command line: <code>spmhub eval NAME</code></p>"
    head = "".join(f"<th scope='col'>{name}</th>" for name in ("subject", "measure", "without", "with", "of", "base"))
    shown = "".join(map(_row, rows[:_MOST_ROWS]))
    more = f"<p>and {len(rows) - _MOST_ROWS} more</p>" if len(rows) > _MOST_ROWS else ""
    return f"<h3>Measured</h3><table class='spm-table'><tr>{head}</tr>{shown}</table>{more}"


def _row(one: Evaluation) -> str:
    before = "-" if one.reference is None else f"{one.reference:.3g}"
    cells = (one.subject, one.metric, before, f"{one.value:.3g}", str(one.samples), one.base)
    return f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"


def _reason(one: Explanation) -> str:
    token = f", at {one.token!r}" if one.token else ""
    return f"{one.term}: {one.shown}{token}" if one.shown else f"{one.term}{token}"
