"""How often 95 % intervals of the evaluation hold the truth, on synthetic data of known truth.

2,000 repetitions of each case; about a minute on one core. Writes benchmarks/results/intervals.json.

    python benchmarks/intervals.py
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from record import record
from torch import Tensor

from spm_hub.evaluation import statistics
from spm_hub.evaluation.attacks.outcome import wilson

REPETITIONS = 2000
SEED = 2024
RESAMPLES = 400
"""A fifth of those of a report, to be done in a minute: it makes the ends noisier, and covers no more."""

SIZES = (20, 50, 200)
SHARES = (0.02, 0.1, 0.5, 0.9)
# Shares of pictures that show the subject before, and of those before and of the others that show it after.
PAIRS = {"erased": (0.95, 0.05, 0.0), "kept": (0.95, 0.97, 0.5), "half": (0.8, 0.5, 0.2), "nothing": (0.9, 1.0, 0.0)}
NUMBERS: dict[str, tuple[Callable[[tuple[int, ...], torch.Generator], Tensor], float]] = {
    "normal": (lambda shape, random: torch.randn(shape, generator=random), 0.0),
    "skewed": (lambda shape, random: -torch.rand(shape, generator=random).log(), 1.0),
    "mostly zero": (
        lambda shape, random: torch.rand(shape, generator=random) * (torch.rand(shape, generator=random) < 0.3), 0.15,
    ),
}  # fmt: skip


def holds(interval: tuple[float, float], truth: float) -> bool:
    """Whether the truth is inside; an end that is the truth up to rounding counts."""
    return interval[0] - 1e-9 <= truth <= interval[1] + 1e-9


def shares(random: torch.Generator) -> list[dict[str, Any]]:
    rows = []
    for n in SIZES:
        for share in SHARES:
            counts = (torch.rand((REPETITIONS, n), generator=random) < share).sum(1).tolist()
            hits = sum(holds(wilson(count, n), share) for count in counts)
            rows.append({"n": n, "case": f"share {share}", "covered": hits / REPETITIONS})
    return rows


def pairs(random: torch.Generator) -> list[dict[str, Any]]:
    rows = []
    for n in SIZES:
        for case, (first, stays, comes) in PAIRS.items():
            truth = first * stays + (1 - first) * comes - first
            before = torch.rand((REPETITIONS, n), generator=random) < first
            chance = torch.where(before, stays, comes)
            after = torch.rand((REPETITIONS, n), generator=random) < chance
            sides = list(zip(before.tolist(), after.tolist(), strict=True))
            closed = sum(holds(statistics.paired_share_difference(one, other), truth) for one, other in sides)
            booted = sum(
                holds(
                    statistics.bootstrap_mean([b - a for a, b in zip(one, other, strict=True)], resamples=RESAMPLES),
                    truth,
                )
                for one, other in sides[: REPETITIONS // 4]
            )
            rows.append({
                "n": n, "case": case, "covered": closed / REPETITIONS, "bootstrap_covers": booted / (REPETITIONS // 4),
            })  # fmt: skip
    return rows


def numbers(random: torch.Generator) -> list[dict[str, Any]]:
    rows = []
    for n in SIZES:
        for case, (draw, truth) in NUMBERS.items():
            values = draw((REPETITIONS, n), random).tolist()
            hits = sum(holds(statistics.bootstrap_mean(one, resamples=RESAMPLES), truth) for one in values)
            rows.append({"n": n, "case": case, "covered": hits / REPETITIONS})
    return rows


if __name__ == "__main__":
    random = torch.Generator().manual_seed(SEED)
    found = {"shares": shares(random), "differences_of_shares": pairs(random), "means": numbers(random)}
    record(
        "intervals",
        {
            "repetitions": REPETITIONS,
            "resamples": RESAMPLES,
            # Two standard errors of a share of 0.95 in so many repetitions.
            "noise": round(2 * math.sqrt(0.95 * 0.05 / REPETITIONS), 4),
            **found,
            "worst": {name: min(row["covered"] for row in rows) for name, rows in found.items()},
        },
        seeds=SEED,
    )
