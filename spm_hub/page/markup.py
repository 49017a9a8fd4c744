"""The parts of the page that are text: gammas with their reasons, reports, remarks."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from html import escape
from io import BytesIO
from itertools import cycle

from PIL import Image

from spm_hub.adapters.manifest import Evaluation, Manifest
from spm_hub.attachment.gates.gate import Explanation
from spm_hub.training.verdict import verdict

_MOST_ROWS = 40
_THUMBNAIL = 256
_COLOURS = ("#4f46e5", "#c2410c", "#0f766e", "#a21caf")

STYLE = """
.gradio-container { width: 100% !important; max-width: 1180px !important; margin: 0 auto !important; }
.spm-remark { min-height: 1.6em; margin: 0; }
.spm-remark.wrong { color: #b3261e; font-weight: 600; }
@media (prefers-color-scheme: dark) { .dark .spm-remark.wrong { color: #ff8a80; } }
.spm-table { width: 100%; border-collapse: collapse; }
.spm-table, .spm-table th, .spm-table td, .spm-table tr { border: none !important; }
.spm-table th, .spm-table td { text-align: left; padding: 4px 10px 4px 0 !important; vertical-align: top; }
.spm-table tr + tr { border-top: 1px solid var(--border-color-primary) !important; }
.spm-table td { overflow-wrap: anywhere; }
.spm-table td.number { white-space: nowrap; }
.spm-scroll { max-height: 300px; overflow: auto; }
#erasers .wrap-inner { max-height: 160px; overflow: auto; }
.spm-strength { display: grid; grid-template-columns: minmax(0, 9em) minmax(60px, 1fr) 2.6em auto; }
.spm-strength { gap: 4px 10px; align-items: center; padding: 3px 2px; }
.spm-strength label { overflow-wrap: anywhere; font-weight: 600; }
.spm-strength input { width: 100%; accent-color: var(--color-accent); }
#strengths button { padding: 4px 12px; border-radius: 6px; cursor: pointer; font-weight: 600; }
#strengths button { background: var(--button-secondary-background-fill); color: var(--button-secondary-text-color); }
#strengths button { border: 1px solid var(--border-color-primary); }
#strengths button:hover { background: var(--button-secondary-background-fill-hover); }
#strengths #recover-all { margin: 4px 2px; }
.spm-bar { display: inline-block; width: 72px; height: 0.7em; margin-right: 8px; }
.spm-bar { background: rgba(127, 127, 127, 0.25); }
.spm-bar span { display: block; height: 100%; background: #2a6f97; }
.spm-picture button, .spm-picture .image-frame { width: 100%; }
.spm-picture img { width: 100%; max-height: 480px; object-fit: contain; image-rendering: pixelated; }
.spm-curve svg { width: 100%; height: 180px; border: solid var(--border-color-primary); border-width: 0 0 1px 1px; }
.spm-curve polyline { fill: none; stroke-width: 2px; vector-effect: non-scaling-stroke; }
.spm-curve ul { display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 6px 0 0; padding: 0; list-style: none; }
.spm-curve i { display: inline-block; width: 0.8em; height: 0.8em; margin-right: 6px; }
.spm-curve p { margin: 0 0 4px; }
.spm-pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(120px, 1fr)); gap: 10px; }
.spm-pictures figure { margin: 0; }
.spm-pictures img { width: 100%; margin: 0; image-rendering: pixelated; border-radius: 4px; }
@media (max-width: 640px) {
.spm-strength { grid-template-columns: minmax(0, 6.5em) minmax(60px, 1fr) 2.4em auto; }
.spm-gammas tr { display: grid; grid-template-columns: 1fr 130px 70px; padding: 4px 0; }
.spm-gammas th:last-child { display: none; }
.spm-gammas td:last-child { grid-column: 1 / -1; }
.spm-gammas th, .spm-gammas td { padding: 1px 10px 1px 0 !important; }
.spm-picture { max-width: calc(50% - 8px); }
}
"""


def remark(text: str, *, wrong: bool = False) -> str:
    """Return a line for the visitor; a reader for the blind says it when it changes."""
    kind = " wrong" if wrong else ""
    return f'<p class="spm-remark{kind}" role="status" aria-live="polite">{escape(text)}</p>'


def gammas(explanations: Mapping[str, Explanation], strengths: Mapping[str, float]) -> str:
    """Return a table of each eraser's gamma, its strength, and the reason; those that act most come first."""
    if not explanations:
        return "<p>No eraser is chosen: both pictures are those of the model.</p>"
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td class='number'><span class='spm-bar' aria-hidden='true'>"
        f"<span style='width:{100 * min(max(one.gamma, 0.0), 1.0):.0f}%'></span></span>{one.gamma:.2f}</td>"
        f"<td class='number'>{strengths[name]:.2f}</td><td>{escape(_reason(one))}</td></tr>"
        for name, one in sorted(explanations.items(), key=lambda pair: -pair[1].gamma)
    )
    head = "".join(f"<th scope='col'>{name}</th>" for name in ("eraser", "gamma", "strength", "why"))
    return f"<div class='spm-scroll'><table class='spm-table spm-gammas'><tr>{head}</tr>{rows}</table></div>"


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
    where, counts = {one.base for one in rows}, {one.samples for one in rows}
    columns: dict[str, Callable[[Evaluation], str]] = {
        "subject": lambda one: one.subject,
        "measure": lambda one: one.metric.replace("_", " "),
        "without": lambda one: "-" if one.reference is None else f"{one.reference:.3g}",
        "with": lambda one: f"{one.value:.3g}",
    }
    title = "Measured"
    if len(where) == 1:
        title += f" on {rows[0].base}"
    else:
        columns["base"] = lambda one: one.base
    if len(counts) == 1:
        title += f", {rows[0].samples} pictures each"
    else:
        columns["pictures"] = lambda one: str(one.samples)
    head = "".join(f"<th scope='col'>{name}</th>" for name in columns)
    shown = "".join(
        f"<tr>{''.join(f'<td>{escape(cell(one))}</td>' for cell in columns.values())}</tr>" for one in rows[:_MOST_ROWS]
    )
    more = f"<p>and {len(rows) - _MOST_ROWS} more</p>" if len(rows) > _MOST_ROWS else ""
    return f"<h3>{escape(title)}</h3><table class='spm-table'><tr>{head}</tr>{shown}</table>{more}"


def curve(losses: Sequence[tuple[int, str, float]], total: int) -> str:
    """Return a drawing of losses, one line for each part; "" while there is none.

    losses: (step, part, value).  total: the last step, where the lines will end.
    """
    if not losses:
        return ""
    highest = max(*(value for _, _, value in losses), 1e-12)
    lines, legend = "", ""
    for part, colour in zip(dict.fromkeys(part for _, part, _ in losses), cycle(_COLOURS)):
        own = [(step, value) for step, other, value in losses if other == part]
        points = " ".join(f"{step / total:.4f},{1 - value / highest:.4f}" for step, value in own)
        lines += f"<polyline points='{points}' stroke='{colour}'/>"
        legend += f"<li><i style='background:{colour}'></i>{escape(part.replace('_', ' '))} {own[-1][1]:.3g}</li>"
    return (
        f"<div class='spm-curve'><p>Losses, up to {highest:.3g}</p><svg viewBox='0 0 1 1' preserveAspectRatio='none' "
        f"role='img' aria-label='losses by step'>{lines}</svg><ul>{legend}</ul>"
        f"<p>step {losses[-1][0]} of {total}</p></div>"
    )


def pictures(shown: Sequence[tuple[Image.Image, str]]) -> str:
    """Return pictures with their captions, in as many columns as there is room for."""
    figures = "".join(
        f"<figure><img src='{_inline(picture)}' alt=''><figcaption>{escape(caption)}</figcaption></figure>"
        for picture, caption in shown
    )
    return f"<div class='spm-pictures'>{figures}</div>"


def _inline(picture: Image.Image) -> str:
    small = picture.copy()
    small.thumbnail((_THUMBNAIL, _THUMBNAIL))
    file = BytesIO()
    small.save(file, "png")
    return f"data:image/png;base64,{b64encode(file.getvalue()).decode()}"


def _reason(one: Explanation) -> str:
    token = f", at {one.token!r}" if one.token else ""
    return f"{one.term}: {one.shown}{token}" if one.shown else f"{one.term}{token}"
