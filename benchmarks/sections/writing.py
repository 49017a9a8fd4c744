"""How all tables are written: cells, shares, and the line about machine, versions and command."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


RESULTS = ROOT / "benchmarks" / "results"


GATES = ("transport", "calibrated", "always")


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def share(value: float) -> str:
    return f"{100 * value:.4g} %"


def named_steps(numbers: dict[str, Any]) -> str:
    return ", ".join(f"{steps} (`{model}`)" for model, steps in numbers["steps"].items())


def named_gates(measured: Iterable[dict[str, Any]]) -> str:
    """Name the gate of some numbers; parts of a benchmark may be older than others."""
    return "with " + " or ".join(f"`--gate {gate}`" for gate in sorted({one["gate"] for one in measured}))


def about(numbers: dict[str, Any], script: str, file: str | None = None) -> str:
    machine = numbers["machine"]
    return (
        f"Measured on {machine['cores']} cores ({machine['processor']}), torch {numbers['versions']['torch']}, by "
        f"`python benchmarks/{script}.py`; output in "
        f"`benchmarks/results/{file or script}.json`."
    )
