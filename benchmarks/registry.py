"""Eight processes pulling, replacing, removing, listing and loading the same 50 adapters for a minute.

Writes benchmarks/results/registry.json; exit code 1 where a process saw anything but a clean "not found" or "held
already", or the registry is not valid afterwards.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests/adapters"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests/registry"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import pytest
from loopback import LoopbackHub
from record import record
from test_storage import assert_valid, stress


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--adapters", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=60.0)
    given = parser.parse_args()
    names = [f"eraser-{number}" for number in range(given.adapters)]
    with tempfile.TemporaryDirectory() as folder, LoopbackHub() as hub, pytest.MonkeyPatch.context() as patch:
        hub.adopt(patch, Path(folder))
        seen = stress(Path(folder), names, hub, processes=given.processes, seconds=given.seconds)
        assert_valid(Path(folder) / "shared")
    failures = sorted(what for what in seen if what.startswith("FAILED"))
    record(
        "registry", {**vars(given), "seen": dict(sorted(seen.items())), "failures": failures, "valid": True}, seeds=0
    )
    print(*failures, sep="\n")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
