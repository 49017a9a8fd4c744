"""10,000 hostile repositories against loading, keeping, describing, installing and pulling; see tests/hostile.py.

With --files 10,000 small files instead, each against what reads it; see tests/hostile_files.py. Writes
benchmarks/results/hostile.json or hostile_files.json; exit code 1 where one of them crashed, hung, cost too much memory
or touched a file elsewhere. A seed that failed is run again by --first SEED --mutants 1.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections import Counter
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests/adapters"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import hostile_files
import pytest
from hostile import ACTS, SECONDS, SPARE, TIMES_THE_FILE, Tally, pulling, send
from loopback import LoopbackHub
from record import record

AT_A_TIME = 100


def run(seeds: range) -> Tally:
    """One part, in a folder and with a Hub of its own."""
    with tempfile.TemporaryDirectory() as name, LoopbackHub() as hub, pytest.MonkeyPatch.context() as patch:
        folder = Path(name).resolve()
        hub.adopt(patch, folder)
        return send(seeds, folder, {**ACTS, "pull": pulling(hub)})


def run_files(seeds: range) -> Tally:
    """One part of the small files, in a folder of its own."""
    with tempfile.TemporaryDirectory() as name:
        return hostile_files.send(seeds, Path(name).resolve())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mutants", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0, help="seed of the first one")
    parser.add_argument("--files", action="store_true", help="small files, in place of whole repositories")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    given = parser.parse_args()
    last = given.first + given.mutants
    parts = [range(start, min(start + AT_A_TIME, last)) for start in range(given.first, last, AT_A_TIME)]
    if given.files:
        # What is imported for a model, once: in each part it would take longer than the files.
        run_files(range(0))
    outcomes: Counter[str] = Counter()
    failures: list[str] = []
    worst: dict[str, Any] = {"cpu_seconds": 0.0, "times_the_file": 0.0}
    done = 0
    # Each in a process of its own, of one that has imported and done nothing: what one part leaves in memory must not
    # stand in for what the next one takes.
    with get_context("fork").Pool(given.processes, maxtasksperchild=1) as pool:
        for tally in pool.imap_unordered(run_files if given.files else run, parts):
            done += tally.mutants
            outcomes.update(tally.outcomes)
            failures += tally.failures
            worst["cpu_seconds"] = max(worst["cpu_seconds"], round(tally.seconds, 3))
            worst["times_the_file"] = max(worst["times_the_file"], round(tally.bytes_over_file, 2))
            so_far = f"{done}/{given.mutants}: {len(failures)} failures, {worst}"
            print(*tally.failures, so_far, sep="\n", file=sys.stderr, flush=True)
    bars = {"cpu_seconds": SECONDS, "times_the_file": TIMES_THE_FILE, "bytes_of_memory_to_spare": SPARE}
    record(
        "hostile_files" if given.files else "hostile",
        {
            "mutants": done,
            "bars": bars,
            "worst": worst,
            "failures": failures,
            "outcomes": dict(sorted(outcomes.items())),
        },
        seeds=[given.first, last - 1],
    )
    print(*failures, sep="\n")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
