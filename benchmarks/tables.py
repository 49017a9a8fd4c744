"""Write the numbers of README.md and some pages of docs/ from the committed results: none of them is typed by hand.

python benchmarks/tables.py
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from sections.attacks import attacks, attacks_methods, audit, hostile, hostile_files, robustness
from sections.bases import (
    default_time,
    erasers,
    faster,
    instant,
    instant_cost,
    methods,
    methods_elsewhere,
    sketchbook,
    sketchbook_training,
    speed,
    surrogates,
)
from sections.evaluation import intervals, judges, reports
from sections.gates import composition, evidence, gates, gates_in_short, papers_gate
from sections.running import cluster, full_size, growth, memory, registry, runtime, serving
from sections.writing import RESULTS, ROOT, named_gates, share, table


def summary(results: dict[str, dict[str, Any]]) -> str:
    """The README's one table, out of the results of several benchmarks."""
    alone, together = results["erasure"]["alone"].values(), results["erasure"]["together"]
    elsewhere = results["erasure"]["transferred_to_chalk"].values()
    lately = results["default_time"]["cells"]["sketchbook"]["snoopy"]
    speed, cycles = results["training_speed"], results["runtime"]["cycles"]
    trainings = ("spm", "race-spm", "esd-x, further")
    attacked = {
        concept: cells for concept, cells in results["robustness"]["concepts"].items() if set(trainings) <= set(cells)
    }
    steps = {(one["method"], one["prompts"], one["erasers"]): one["ratio"]
             for one in results["full_size"]["models"]["sd1"]["steps"]}  # fmt: skip
    asr = {
        training: " / ".join(share(attacked[concept][training]["asr"]) for concept in attacked)
        for training in trainings
    }

    def erased(found: Iterable[dict[str, Any]]) -> str:
        return ", ".join(share(one["with"]) for each in found for one in each["erased"].values())

    rows = [
        [
            f"Five erasers, one at a time, {named_gates(alone)}: share of its pictures in which the concept is still "
            "found",
            erased(alone),
        ],
        [
            "All other subjects and styles are then recognised more or less often, by",
            f"{min(one['others_mean_change_points'] for one in alone):+.2f} to "
            f"{max(one['others_mean_change_points'] for one in alone):+.2f} points on average; the worst one by "
            f"{min(one['others_worst_change_points'] for one in alone):+.1f}",
        ],
        [
            f"Three erasers at once, {named_gates([together])}: still found",
            f"{erased([together])}; others {together['others_mean_change_points']:+.2f} points on average, the worst "
            f"one {together['others_worst_change_points']:+.1f}",
        ],
        [
            f"Two erasers on a checkpoint that they were not trained on, {named_gates(elsewhere)}: still found",
            erased(elsewhere),
        ],
        [
            f"Share of {results['robustness']['prompts']} prompts that bring {' / '.join(attacked)} back under attack, "
            "without a gate",
            f"`spm` {asr['spm']}; `race-spm` {asr['race-spm']}; ESD trained further {asr['esd-x, further']}",
        ],
        [
            "CPU time of one thread to train an eraser of snoopy",
            f"{lately['now']['seconds']:.0f} s, then found in {share(lately['now']['target_found'])} without a gate; "
            f"by the first defaults {lately['first']['seconds']:.0f} s. Compared with those, {faster(speed)}",
        ],
        [
            "Time of one SD 1.5 step with 1 / 20 / 100 erasers, over the bare step (H200, random weights)",
            " / ".join(f"{steps['ours', 1, count]:.2f}x" for count in (1, 20, 100))
            + f"; PEFT with 1: {steps['peft', 1, 1]:.2f}x",
        ],
        [
            f"Weights after {cycles['cycles']:,} cycles of attach, draw, recover, detach",
            "bit-identical" if cycles["weights_bit_identical"] else "not bit-identical",
        ],
    ]
    return table(["Measured on the sketchbook, unless a row says otherwise", "Result"], rows)


SECTIONS: dict[str, Callable[[dict[str, Any]], str]] = {
    "sketchbook": sketchbook,
    "sketchbook_training": sketchbook_training,
    "erasure": erasers,
    "training_speed": speed,
    "default_time": default_time,
    "runtime": runtime,
    "full_size": full_size,
    "gates": gates,
    "composition": composition,
    "evidence": evidence,
    "methods": methods,
    "methods_second": partial(methods_elsewhere, base="second base", file="methods_second"),
    "methods_third": partial(methods_elsewhere, base="third base", file="methods_third"),
    "instant": instant,
    "instant_cost": instant_cost,
    "robustness": robustness,
    "attacks": attacks,
    "attacks_methods": attacks_methods,
    "growth": growth,
    "registry": registry,
    "hostile": hostile,
    "cluster": cluster,
    "memory": memory,
    "hostile_files": hostile_files,
    "intervals": intervals,
    "judges": judges,
    "audit": audit,
    "serving": serving,
    "surrogates": surrogates,
}


ACROSS: dict[str, Callable[[dict[str, dict[str, Any]]], str]] = {
    "summary": summary, "gates_in_short": gates_in_short, "papers_gate": papers_gate,
    "reports": reports,
}  # fmt: skip
"""Sections that take all results."""


PAGES = {
    "README.md": ("summary", "papers_gate"),
    "docs/how-it-works.md": ("gates_in_short",),
    "docs/attacks.md": ("attacks", "attacks_methods"),
    "docs/training.md": ("surrogates",),
    "docs/benchmarks.md": (
        *(name for name in SECTIONS if name not in ("attacks", "attacks_methods", "surrogates")),
        "reports",
    ),
}


def render(page: str, text: str) -> str:
    """Return the text of a page of `PAGES` with each of its sections, between two markers, written anew."""
    results = {name: json.loads((RESULTS / f"{name}.json").read_text()) for name in SECTIONS}
    for name in PAGES[page]:
        section = ACROSS[name](results) if name in ACROSS else SECTIONS[name](results[name])
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        text, found = re.subn(
            pattern, lambda match, section=section: f"{match[1]}{section}\n{match[2]}", text, flags=re.DOTALL
        )
        if found != 1:
            raise SystemExit(f"{page} holds {found} sections marked {name}, not 1")
    return text


if __name__ == "__main__":
    for page in PAGES:
        path = ROOT / page
        path.write_text(render(page, path.read_text()))
