"""Concepts trained and pictures evaluated by two workers, and by one process: the same files, and the time.

    python benchmarks/cluster.py [--runner processes|ray] [--concepts 4] [--pictures 40]

Each concept is erased from the sketchbook by the method instant; the pictures are rows of the protocol neighbours, each
drawn without and with an eraser. One worker is killed in the middle of the drawing. Output:
benchmarks/results/cluster.json.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from record import record

from spm_hub.evaluation.protocols.protocol import protocol_named
from spm_hub.evaluation.protocols.running import Asked, evaluate
from spm_hub.hub.resolve import resolve
from spm_hub.io.progress import Bars
from spm_hub.io.runners.named import runner_named
from spm_hub.io.runners.runner import Place, Runner, Say, Serial, Work
from spm_hub.models.base_choice import BaseChoice
from spm_hub.registry.registry import Registry
from spm_hub.training.elsewhere import train_elsewhere
from spm_hub.training.planning import plan_runs
from spm_hub.training.session import Session

NAMES = (
    "snoopy", "mickey", "spongebob", "pikachu", "dog", "cat", "church", "tree", "car", "person", "van gogh", "picasso",
    "rembrandt", "warhol", "caravaggio",
)  # fmt: skip
BASE = BaseChoice("sketchbook", None, "cpu", "auto")


@dataclass(frozen=True)
class KilledOnce:
    """Work whose worker kills itself when it comes to the piece in the middle; a file marks that it did."""

    work: Work
    piece: Any
    mark: Path

    @contextmanager
    def open(self, place: Place) -> Iterator[Callable[[Any], Any]]:
        with self.work.open(place) as do:

            def do_or_die(piece: Any) -> Any:
                if piece == self.piece and not self.mark.exists():
                    self.mark.touch()
                    os.kill(os.getpid(), signal.SIGKILL)
                return do(piece)

            yield do_or_die


@dataclass(frozen=True)
class Killing:
    """A runner one of whose workers is killed in the middle."""

    runner: Runner
    mark: Path

    def run(self, work: Work, pieces: Sequence[Any], say: Say) -> Iterator[tuple[int, Any]]:
        middle = pieces[len(pieces) // 2] if pieces else None
        yield from self.runner.run(KilledOnce(work, middle, self.mark), pieces, say)


def hashes(folder: Path, *, apart_from: Sequence[str] = ()) -> dict[str, str]:
    """The hash of every file that is no lock or index, by its path."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(".") and not str(path.relative_to(folder)).startswith(apart_from)
    }


def trained(folder: Path, concepts: Sequence[str], runner: Runner) -> tuple[float, dict[str, str]]:
    """Seconds to erase each concept by itself, and the hashes of the adapters."""
    plans = tuple(plan_runs([name], {"model": "sketchbook", "method": "instant"})[0] for name in concepts)
    session = Session(plans, BASE, Bars(False), resolve, registry=Registry(folder), look=None)
    session.check()
    start = time.perf_counter()
    _ = session.train() if isinstance(runner, Serial) else train_elsewhere(session, runner)
    return time.perf_counter() - start, hashes(folder / "adapters")


def drawn(out: Path, eraser: Any, pictures: int, runner: Runner) -> tuple[float, dict[str, str]]:
    """Seconds to draw and measure so many pictures, and the hashes of all files of the run."""
    asked = Asked(limit=pictures // 2, steps=12, measure=("probe", "ssim"))
    start = time.perf_counter()
    evaluate(protocol_named("neighbours"), [eraser], BASE, out, asked, Bars(False), runner=runner)
    return time.perf_counter() - start, hashes(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runner", default="processes")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--concepts", type=int, default=4)
    parser.add_argument("--pictures", type=int, default=40)
    given = parser.parse_args()
    concepts = [*NAMES, *(f"{name} by {style}" for name in NAMES[:10] for style in NAMES[10:])][: given.concepts]
    runner = runner_named(given.runner, given.workers)
    root = Path(tempfile.mkdtemp())
    try:
        one_seconds, one = trained(root / "one", concepts, Serial())
        many_seconds, many = trained(root / "many", concepts, runner)
        eraser = Registry(root / "one").get(concepts[0]).load()
        serial_seconds, serial = drawn(root / "serial", eraser, given.pictures, Serial())
        workers_seconds, by_workers = drawn(root / "workers", eraser, given.pictures, runner)
        mark = root / "mark"
        killed_seconds, killed = drawn(root / "killed", eraser, given.pictures, Killing(runner, mark))
        record("cluster", {
            "load": round(os.getloadavg()[1], 1),
            "runner": given.runner, "workers": given.workers,
            "training": {"concepts": len(concepts), "seconds_serial": round(one_seconds, 1),
                         "seconds_workers": round(many_seconds, 1), "equal": one == many},
            "evaluation": {"pictures": given.pictures, "files": len(serial), "seconds_serial": round(serial_seconds, 1),
                           "seconds_workers": round(workers_seconds, 1), "equal": serial == by_workers},
            "one_worker_killed": {"killed": mark.exists(), "seconds": round(killed_seconds, 1),
                                  "equal": serial == killed},
        }, seeds={"rows": 2024, "training": 0})  # fmt: skip
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
