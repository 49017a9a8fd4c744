"""Memory of an evaluation while it draws 500 pictures and measures them.

    python benchmarks/memory.py [--pictures 500]           # on the sketchbook
    python benchmarks/memory.py --sd15 FOLDER              # at SD1.5's sizes, random weights; FOLDER is made if missing

The resident set of the process, read from /proc every 50 pictures. Nothing that has been drawn is kept but its file and
its line, so it has to be flat. Pictures of SD1.5 have 64 x 64 pixels and one step. Each of the two is a part of the
output, benchmarks/results/memory.json.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from cluster import BASE, of_so_many
from instant import write_sd15
from record import RESULTS, record

import spm_hub
from spm_hub.adapters.adapter import Adapter
from spm_hub.evaluation.protocols.running import Asked, evaluate
from spm_hub.hub.resolve import resolve
from spm_hub.io.progress import Progress
from spm_hub.models.base_choice import BaseChoice

EVERY, AT_ONCE = 50, 10


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

        def progress(done: int, total: int, *details: object) -> None:
            if done * (1 if label == "drawing" else AT_ONCE) % EVERY == 0:
                found.append(round(resident(), 1))

        yield progress


def measured(base: BaseChoice, eraser: Adapter, pictures: int, asked: Asked) -> dict[str, Any]:
    """Return the resident set in MiB while so many pictures are drawn and measured."""
    watching = Watching()
    protocol = of_so_many(2 * pictures)
    protocol = protocol.model_copy(update={"usual": protocol.sketchbook})
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder  # all pictures are drawn
        evaluate(protocol, [eraser], base, Path(folder) / "run", asked, watching)
    drawing = watching.seen["drawing"]
    assert len(drawing) == pictures // EVERY
    return {
        "steps": asked.steps, "mebibytes": watching.seen, "growth_of_drawing": round(drawing[-1] - drawing[1], 1),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=500)
    parser.add_argument("--sd15", type=Path, help="folder of a model of SD1.5's sizes")
    options = parser.parse_args()
    torch.set_num_threads(1)
    asked = Asked(steps=4, at_once=AT_ONCE, measure=("probe", "ssim"), limit=options.pictures // 2)
    path = RESULTS / "memory.json"
    numbers = json.loads(path.read_text()) if path.exists() else {"models": {}}
    numbers |= {"pictures": options.pictures, "every": EVERY, "at_once": AT_ONCE}
    if options.sd15 is None:
        numbers["models"]["sketchbook"] = measured(BASE, resolve("snoopy").load(), options.pictures, asked)
    else:
        if not options.sd15.exists():
            write_sd15(options.sd15)
        eraser = spm_hub.train("snoopy", model=str(options.sd15), method="instant", device="cpu")
        base = BaseChoice(str(options.sd15), None, "cpu", "auto")
        asked = replace(asked, steps=1, size=(64, 64), measure=("ssim", "psnr"))
        numbers["models"]["sd15"] = measured(base, eraser, options.pictures, asked)
    record("memory", numbers, seeds=2024)


if __name__ == "__main__":
    main()
