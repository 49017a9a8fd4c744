"""Memory of an evaluation while it draws 500 pictures and measures them, on the sketchbook.

    python benchmarks/memory.py [--pictures 500]

The resident set of the process, read from /proc every 50 pictures. Nothing that has been drawn is kept but its file and
its line, so it has to be flat. Output: benchmarks/results/memory.json.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from cluster import BASE, of_so_many
from record import record

from spm_hub.evaluation.protocols.running import Asked, evaluate
from spm_hub.hub.resolve import resolve
from spm_hub.io.progress import Progress

EVERY, STEPS, AT_ONCE = 50, 4, 10


def resident() -> float:
    """Return this process's resident set in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) / 1024


@dataclass
class Watching:
    """A reporter that reads the resident set at each 50th picture of a stage."""

    seen: dict[str, list[float]] = field(default_factory=dict)

    def say(self, text: str) -> None:
        """Remarks are of no interest here."""

    @contextmanager
    def progress(self, label: str) -> Iterator[Progress]:
        found = self.seen.setdefault(label, [])

        def progress(done: int, total: int, note: str = "") -> None:
            if done * (1 if label == "drawing" else AT_ONCE) % EVERY == 0:
                found.append(round(resident(), 1))

        yield progress


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=500)
    pictures = parser.parse_args().pictures
    torch.set_num_threads(1)
    watching = Watching()
    asked = Asked(steps=STEPS, at_once=AT_ONCE, measure=("probe", "ssim"), limit=pictures // 2)
    with tempfile.TemporaryDirectory() as folder:
        evaluate(of_so_many(2 * pictures), [resolve("snoopy").load()], BASE, Path(folder) / "run", asked, watching)
    drawing = watching.seen["drawing"]
    assert len(drawing) == pictures // EVERY
    record("memory", {
        "pictures": pictures, "every": EVERY, "at_once": AT_ONCE, "steps": STEPS, "mebibytes": watching.seen,
        "growth_of_drawing": round(drawing[-1] - drawing[1], 1),
    }, seeds=2024)  # fmt: skip


if __name__ == "__main__":
    main()
