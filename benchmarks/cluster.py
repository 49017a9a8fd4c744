"""Concepts trained, pictures evaluated and an eraser attacked by two workers, and by one process: the same files?

    python benchmarks/cluster.py --work WORK                                     # by one process, processes and Ray
    python benchmarks/cluster.py --work WORK --runner ray --concepts 2 --pictures 32

Each concept is erased from the sketchbook by the method instant. The pictures are rows of the protocol neighbours, each
drawn without and with an eraser, measured by the probe and SSIM. The attacks are two that search nothing. One worker is
killed in the middle of each, and its loss is in the time. WORK keeps what is done, so that an interrupted benchmark
goes on. Seconds compare only as far as the machine's load was alike, so their ratio is recorded, with the load. Output:
benchmarks/results/cluster.json, a part for each runner.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from record import RESULTS, record

from spm_hub.evaluation.attacks.records.recording import record_attacks
from spm_hub.evaluation.attacks.settings import attacks_named
from spm_hub.evaluation.attacks.tries import AttackDrawingOptions
from spm_hub.evaluation.judging import cases_for
from spm_hub.evaluation.protocols.protocol import Protocol, protocol_named
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
METHOD = "instant"

STEPS, ATTACKED = 2, 16
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


def hashes(folder: Path) -> dict[str, str]:
    """The hash of every file that is no lock, by its path."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    }


def train(out: Path, concepts: Sequence[str], runner: Runner) -> Path:
    """Erase each concept by itself; return the folder of the adapters."""
    plans = tuple(plan_runs([name], {"model": "sketchbook", "method": METHOD})[0] for name in concepts)
    session = Session(plans, BASE, Bars(False), resolve, registry=Registry(out), look=None)
    session.check()
    _ = session.train() if isinstance(runner, Serial) else train_elsewhere(session, runner)
    return out / "adapters"


def of_so_many(pictures: int) -> Protocol:
    """The protocol neighbours, with as many samples of each subject as make that many pictures."""
    protocol = protocol_named("neighbours")
    sets = protocol.sketchbook.sets
    subjects = sum(1 if one.nearest is None else one.nearest.count for one in sets)
    more = tuple(one.model_copy(update={"samples": pictures // 2 // subjects}) for one in sets)
    return protocol.model_copy(update={"sketchbook": protocol.sketchbook.model_copy(update={"sets": more})})


def draw(out: Path, eraser: Any, pictures: int, runner: Runner) -> Path:
    """Draw and measure so many pictures; return the folder of the run."""
    asked = Asked(steps=STEPS, measure=("probe", "ssim"))
    report = evaluate(of_so_many(pictures), [eraser], BASE, out, asked, Bars(False), runner=runner)
    assert report["pictures"] == pictures, f"{report['pictures']} pictures, not {pictures}"
    return out


def attack(out: Path, eraser: Any, prompts: int, runner: Runner) -> Path:
    """Attack an eraser, two prompts at a time; return the folder of the attacks."""
    record_attacks(
        BASE, eraser, cases_for(eraser.manifest.concept, prompts, 2024), attacks_named("seeds,random", tries=3), out,
        Bars(False), drawing=AttackDrawingOptions(steps=STEPS, at_once=2), fresh=1, runner=runner,
    )  # fmt: skip
    return out


def stage(work: Path, name: str, do: Callable[[Path], Path]) -> dict[str, Any]:
    """Return the seconds, load and hashes of a stage: of an earlier run, or after doing it in a new folder."""
    file, folder = work / f"{name}.json", work / name
    if not file.exists():
        print(name, file=sys.stderr, flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        os.environ["XDG_CACHE_HOME"] = str(work / f"{name}-cache")  # it has no pictures of an earlier stage
        begun = time.perf_counter()
        made = do(folder)
        seconds = time.perf_counter() - begun
        found = {"seconds": seconds, "load": round(os.getloadavg()[1], 1), "hashes": hashes(made)}
        file.write_text(json.dumps(found))
    seen: dict[str, Any] = json.loads(file.read_text())
    return seen


def compared(work: Path, name: str, runner: str, workers: int, do: Callable[[Path, Runner], Path]) -> dict[str, Any]:
    """Do a stage by one process, and by workers one of whom is killed; compare all files."""
    one = stage(work, f"{name}-serial", lambda out: do(out, Serial()))
    mark = work / f"{name}-{runner}.killed"
    if not (work / f"{name}-{runner}.json").exists():
        mark.unlink(missing_ok=True)
    many = stage(work, f"{name}-{runner}", lambda out: do(out, Killing(runner_named(runner, workers), mark)))
    return {
        "files": len(one["hashes"]), "equal": many["hashes"] == one["hashes"], "one_worker_killed": mark.exists(),
        "time_of_one_process": round(many["seconds"] / one["seconds"], 2),
        "load": {"one_process": one["load"], "workers": many["load"]},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runner", action="append", help="processes, ray; both unless given")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--concepts", type=int, default=40)
    parser.add_argument("--pictures", type=int, default=2000)
    parser.add_argument("--work", type=Path, required=True)
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    concepts = [*NAMES, *(f"{name} by {style}" for name in NAMES[:10] for style in NAMES[10:])][: given.concepts]
    eraser = resolve("snoopy").load()
    file = RESULTS / "cluster.json"
    numbers: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    runners = numbers.get("runners", {})
    for runner in given.runner or ("processes", "ray"):
        parts = {
            "training": lambda out, by: train(out, concepts, by),
            "evaluation": lambda out, by: draw(out, eraser, given.pictures, by),
            "attacks": lambda out, by: attack(out, eraser, ATTACKED, by),
        }
        about = {"release": version("ray")} if runner == "ray" else {}
        found = {**about, "workers": given.workers, "concepts": len(concepts), "pictures": given.pictures}
        for name, do in parts.items():
            found[name] = compared(given.work, name, runner, given.workers, do)
            runners[runner] = found
            numbers = {"method": METHOD, "steps": STEPS, "attacked": ATTACKED, "runners": runners}
            record("cluster", numbers, seeds={"rows": 2024, "training": 0})


if __name__ == "__main__":
    main()
