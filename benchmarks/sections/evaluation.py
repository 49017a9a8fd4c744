"""The tables about evaluation: intervals, judges, whole reports."""

from __future__ import annotations

import json
from typing import Any

from sections.writing import ROOT, about, share, table


def intervals(numbers: dict[str, Any]) -> str:
    names = {
        "shares": "share: Wilson's",
        "differences_of_shares": "difference of shares of pairs: Agresti and Min's",
        "means": "mean, and difference of means of pairs: expanded percentile bootstrap",
    }
    rows = []
    for key, name in names.items():
        covered = [one["covered"] for one in numbers[key]]
        worst = min(numbers[key], key=lambda one: one["covered"])
        rows.append(
            [name, share(min(covered)), f"{worst['case']}, n = {worst['n']}", share(sum(covered) / len(covered))]
        )
    booted = min(numbers["differences_of_shares"], key=lambda one: one["bootstrap_covers"])
    return (
        f"{table(['95 % interval', 'holds the truth in', 'of', 'mean of all cases'], rows)}\n\n"
        f"Of {numbers['repetitions']:,} repetitions of each case, so that each share is uncertain by "
        f"{100 * numbers['noise']:.1f} points. Where few pairs change, a bootstrap of the same pairs holds it in "
        f"as few as {share(booted['bootstrap_covers'])} ({booted['case']}, n = {booted['n']}).\n"
        f"{about(numbers, 'intervals')}"
    )


def judges(numbers: dict[str, Any]) -> str:
    rows = [
        [
            f"LPIPS, {network}",
            *(f"{stated:g} / {here:.3f}" for stated, here in zip(one["authors"], one["here"], strict=True)),
        ]
        for network, one in numbers["lpips"].items()
    ]
    seen, ssim = numbers["nudenet"], numbers["ssim"]
    return (
        f"{table(['authors / here', 'first example pair', 'second example pair'], rows)}\n\n"
        f"NudeNet's own detector and the judge give equal detections on {seen['equal']} of {seen['pictures']} crops of "
        f"photographs ({seen['detections']} detections). SSIM of two photographs: {ssim['scikit_image']} by "
        f"scikit-image, {ssim['here']} here.\n{about(numbers, 'judges')}"
    )


def _reports() -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Return the committed reports by base, and by whose erasers they are of."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for file in sorted((ROOT / "benchmarks" / "reports").glob("*/*/report.json")):
        how = "shipped" if file.parent.name.startswith("shipped-") else None
        report = json.loads(file.read_text())
        name = report["run"]["erasers"][0]["name"]
        how = how or file.parent.name.removesuffix(f"-{name}")
        found.setdefault(file.parents[1].name, {}).setdefault(how, []).append(report)
    return found


def _of_report(report: dict[str, Any], role: str) -> str:
    """Return a judge's shares of a role without and with erasers: "100 to 0"."""
    judged = next(table for table in report["tables"] if table["kind"] == "judge")
    lines = [line for line in judged["lines"] if line["role"] == role]
    if not lines:
        return "-"
    whole = next((line for line in lines if line["subject"] == "all"), lines[0])
    return f"{100 * whole['without']:.3g} to {100 * whole['with']:.3g}"


def reports(results: dict[str, dict[str, Any]]) -> str:
    """Return a table of each base, from the committed reports themselves."""
    parts = []
    for base, hows in sorted(_reports().items(), reverse=True):
        rows = []
        for how, made in sorted(hows.items(), key=lambda one: (one[0] != "shipped", one[0])):
            names = [report["run"]["erasers"][0]["name"] for report in made]
            links = [f"[{name}](../benchmarks/reports/{base}/{how}-{name}/report.md)" for name in names]
            rows.append([
                "shipped" if how == "shipped" else f"`{how}`", " / ".join(links),
                *(
                    " / ".join(_of_report(report, role) for report in made)
                    for role in ("target", "neighbour", "unrelated")
                ),
            ])  # fmt: skip
        head = [f"erasers, {base}", "reports", "target (%)", "neighbours (%)", "unrelated (%)"]
        parts.append(table(head, rows))
    return "\n\n".join(parts)
