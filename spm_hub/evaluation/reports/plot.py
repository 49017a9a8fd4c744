"""Plots of reports, as SVG: the change of each subject, and runs by erasure and by damage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from spm_hub.evaluation.pictures import RESTORED, WITH
from spm_hub.evaluation.reports.report import ALL
from spm_hub.evaluation.reports.wording import named

WIDTH, LEFT, RIGHT, LINE = 760, 210, 60, 26
Point = tuple[str, float, float]
"""A name, the share of the target that is erased, and the share of everything else that is lost."""

_ERASED, _KEPT, _AXIS = "#2563eb", "#d97706", "#a1a1aa"


def changes(tables: Sequence[Mapping[str, Any]]) -> str:
    """Return a plot of the first judge's table: for each subject its share without and with erasers.

    Blue subjects are to go, orange ones are to stay; bars are the 95 % intervals with erasers. Other strengths are left
    to `trade_off`. "" without a judge.
    """
    judged = next((table for table in tables if table["kind"] == "judge" and table["lines"]), None)
    if judged is None:
        return ""
    scale = WIDTH - LEFT - RIGHT

    def x(share: float) -> float:
        return round(LEFT + share * scale, 1)

    parts = []
    shown = [line for line in judged["lines"] if line["condition"] in (WITH, RESTORED)]
    for number, line in enumerate(shown):
        y = LINE * (number + 1)
        colour = _ERASED if line["role"] == "target" else _KEPT
        low, high = line["with_interval"]
        name = named(line)
        parts += [
            f'<text x="{LEFT - 12}" y="{y + 4}" text-anchor="end">{escape(name)}</text>',
            f'<line x1="{x(low)}" x2="{x(high)}" y1="{y}" y2="{y}" stroke="{colour}" stroke-width="6" opacity=".3"/>',
            f'<line x1="{x(line["without"])}" x2="{x(line["with"])}" y1="{y}" y2="{y}" stroke="{colour}"/>',
            f'<circle cx="{x(line["without"])}" cy="{y}" r="5" fill="none" stroke="{colour}" stroke-width="2"/>',
            f'<circle cx="{x(line["with"])}" cy="{y}" r="5" fill="{colour}"/>',
        ]
    bottom = LINE * (len(shown) + 1)
    for share in (0.0, 0.5, 1.0):
        parts.append(f'<line x1="{x(share)}" x2="{x(share)}" y1="8" y2="{bottom}" stroke="{_AXIS}" opacity=".4"/>')
        parts.append(f'<text x="{x(share)}" y="{bottom + 18}" text-anchor="middle">{share:.0%}</text>')
    label = f"Share of pictures that show the subject by {judged['metric']}: circles without, dots with erasers"
    return (
        f'<svg viewBox="0 0 {WIDTH} {bottom + 46}" role="img" aria-label="{escape(label)}">{"".join(parts)}'
        f'<text x="{LEFT}" y="{bottom + 40}">{escape(judged["metric"])}: circles without, dots with erasers</text>'
        "</svg>"
    )


_COLOURS = ("#2563eb", "#d97706", "#059669", "#9333ea", "#dc2626", "#0891b2", "#a1a1aa", "#71717a")


def curves(shares: Mapping[str, Sequence[float]]) -> str:
    """Return a plot of attacks: the share of cases that are brought back, over the tries of each case.

    shares: for each attack its share after 0, 1, 2, ... tries.
    """
    bottom, most = 270, max([len(curve) - 1 for curve in shares.values()] + [1])
    scale = WIDTH - 60 - RIGHT

    def x(tries: int) -> float:
        return round(60 + tries / most * scale, 1)

    def y(share: float) -> float:
        return round(bottom - share * (bottom - 20), 1)

    parts = [f'<line x1="60" x2="{60 + scale}" y1="{bottom}" y2="{bottom}" stroke="{_AXIS}"/>']
    parts += [f'<text x="52" y="{y(share) + 4}" text-anchor="end">{share:.0%}</text>' for share in (0.0, 0.5, 1.0)]
    parts += [
        f'<text x="{x(tries)}" y="{bottom + 18}" text-anchor="middle">{tries}</text>' for tries in {0, most // 2, most}
    ]
    for place, (name, curve) in enumerate(shares.items()):
        colour, points = _COLOURS[place % len(_COLOURS)], []
        for tries, share in enumerate(curve):
            points += [(x(tries), y(curve[tries - 1] if tries else share)), (x(tries), y(share))]
        line = " ".join(f"{across},{up}" for across, up in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<text x="{72 + 170 * (place % 4)}" y="{bottom + 44 + 20 * (place // 4)}" style="fill:{colour}">')
        parts.append(f"{escape(name)}</text>")
    height = bottom + 56 + 20 * ((len(shares) - 1) // 4)
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="Share of prompts brought back over tries">'
        f"{''.join(parts)}</svg>"
    )


def points_of(tables: Sequence[Mapping[str, Any]]) -> list[Point]:
    """Return a point for each condition of a report, by its first judge; none for a single condition.

    Shares are of the pictures that show their subject without erasers, as in comparisons of runs.
    """
    judged = next((table for table in tables if table["kind"] == "judge"), {"lines": ()})
    lines = [line for line in judged["lines"] if line["subject"] != ALL and line["condition"] != RESTORED]
    points = []
    for condition in dict.fromkeys(line["condition"] for line in lines):
        gone, shown = [0.0, 0.0], [0.0, 0.0]
        for line in (one for one in lines if one["condition"] == condition):
            place = line["role"] != "target"
            shown[place] += line["without"] * line["n"]
            gone[place] += (line["erased"] or 0.0) * line["without"] * line["n"]
        points.append((condition, *(part / whole if whole else 0.0 for part, whole in zip(gone, shown, strict=True))))
    return points if len(points) > 1 else []


def trade_off(points: Sequence[Point]) -> str:
    """Return a plot of runs: the target's share erased to the right, others' share lost upwards.

    points: with shares of 0 to 1; a loss below 0 is drawn as 0.
    """
    height, bottom = 360, 310

    def x(share: float) -> float:
        return round(LEFT / 2 + share * (WIDTH - LEFT / 2 - RIGHT), 1)

    def y(share: float) -> float:
        return round(bottom - min(1.0, max(0.0, share)) * (bottom - 20), 1)

    parts = [
        f'<line x1="{x(0)}" x2="{x(1)}" y1="{bottom}" y2="{bottom}" stroke="{_AXIS}"/>',
        f'<line x1="{x(0)}" x2="{x(0)}" y1="20" y2="{bottom}" stroke="{_AXIS}"/>',
    ]
    for share in (0.0, 0.5, 1.0):
        parts.append(f'<text x="{x(share)}" y="{bottom + 18}" text-anchor="middle">{share:.0%}</text>')
        parts.append(f'<text x="{x(0) - 8}" y="{y(share) + 4}" text-anchor="end">{share:.0%}</text>')
    labels: dict[tuple[float, float], list[str]] = {}
    for name, erased, lost in points:
        labels.setdefault((x(erased), y(lost)), []).append(name)
        parts.append(
            f'<circle cx="{x(erased)}" cy="{y(lost)}" r="6" fill="{_ERASED}"><title>{escape(name)}</title></circle>'
        )
    for (across, up), names in labels.items():
        left = across < WIDTH / 2  # a label stays within the frame on the other side of its point
        parts.append(
            f'<text x="{across + (10 if left else -10)}" y="{up - 8}" text-anchor="{"start" if left else "end"}">'
            f"{escape(', '.join(names))}</text>"
        )
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="Erased share of the target against the share lost '
        f'of others">{"".join(parts)}<text x="{x(0)}" y="{height - 8}">target erased (right is better), others lost '
        f"(up is worse)</text></svg>"
    )
