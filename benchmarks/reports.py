"""Whole reports of the shipped erasers and of every method, on the sketchbook and on a base no preset was tuned to.

    python benchmarks/reports.py --work WORK                # all reports that are not there yet; hours on two cores
    python benchmarks/reports.py --work WORK uce esd-x      # the shipped erasers' or some methods' only

Each method erases three concepts of each base, by `spmhub train`'s own preset.
The protocols are benchmarks/protocols/short-*.yaml; the second base is benchmarks/bases/fluent, for which the names
that its reports judge are taken out of the words that anchors are made of. Shipped erasers are for concepts that the
second base does not know: there the report has only what is to stay. WORK keeps erasers, pictures and interrupted runs.
What is committed of each run, in benchmarks/reports, is its settings, report and records: all but the pictures.
"""

from __future__ import annotations

import argparse
import gzip
import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from composition import SHIPPED
from diffusers.utils import logging
from methods import CONCEPTS, TRAINED, anchors_without
from methods_second import ANCHOR

import spm_hub
from spm_hub.adapters.adapter import Adapter
from spm_hub.adapters.manifest import slug
from spm_hub.evaluation.protocols.protocol import Protocol
from spm_hub.evaluation.protocols.running import Asked, evaluate
from spm_hub.evaluation.records.folder import METRICS, ROWS, RUN, SAMPLES
from spm_hub.evaluation.reports.writing import REPORT
from spm_hub.io.progress import Bars
from spm_hub.models.base_choice import BaseChoice
from spm_hub.registry.registry import Registry
from spm_hub.training.recipe.recipe import Recipe
from spm_hub.training.trainer import train

ROOT = Path(__file__).parents[1]
REPORTS = ROOT / "benchmarks" / "reports"
FLUENT = ROOT / "benchmarks" / "bases" / "fluent" / "base"
ERASED = {"sketchbook": CONCEPTS, "fluent": ("orangutan", "skunk", "syringe")}
OWN = "shipped"
PLAIN, PACKED = (RUN, METRICS, REPORT, "report.md"), (ROWS, SAMPLES)


@dataclass(frozen=True)
class Cell:
    """One report: the erasers by `how` ("shipped" or a method) of a concept, on a base."""

    base: str
    how: str
    concept: str

    @property
    def folder(self) -> Path:
        return Path(self.base) / f"{self.how}-{slug(self.concept)}"


def cells() -> Iterator[Cell]:
    """Yield all cells, the cheapest first."""
    dear = ("minimalist", "ca", "sdd", "spm", "race", "race-spm")
    for how in (OWN, *(one for one in TRAINED if one not in dear), *dear):
        for base in ERASED:
            for concept in SHIPPED if how == OWN else ERASED[base]:
                yield Cell(base, how, concept)


def protocol_of(cell: Cell, kind: str) -> Protocol:
    """Return the protocol of a cell; without targets where the base does not know the concept."""
    name = "short-styles" if kind == "style" and cell.base == "sketchbook" else "short-subjects"
    read = Protocol.model_validate(yaml.safe_load((ROOT / "benchmarks" / "protocols" / f"{name}.yaml").read_text()))
    if cell.base == "sketchbook" or cell.how != OWN:
        return read
    others = read.usual.model_copy(update={"sets": read.usual.sets[1:]})
    about = "Attach an eraser of another base, whose concept this base does not know, and keep eight subjects."
    return read.model_copy(update={"name": "short-others", "about": about, "usual": others})


def base_of(cell: Cell, work: Path) -> BaseChoice:
    """Return the base; a folder is called by its own name in reports, so the second base has a link of its name."""
    if cell.base == "sketchbook":
        return BaseChoice(cell.base, None, "cpu", "auto")
    link = work / "bases" / cell.base
    if not link.exists():
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(FLUENT)
    return BaseChoice(str(link), None, "cpu", "auto")


def eraser_of(cell: Cell, work: Path) -> Adapter:
    """Return the shipped eraser, or the one that an earlier run has trained, or train it."""
    if cell.how == OWN:
        return spm_hub.load(cell.concept, registry=ROOT)
    registry = Registry(work / "erasers" / cell.base / cell.how)
    if registry.find(slug(cell.concept)) is None:
        given = ANCHOR.get(cell.how, {}) if cell.base == "fluent" else {}
        recipe = Recipe.plan(target=cell.concept, method=cell.how, model=cell.base, **given)
        variant = protocol_of(cell, "object").usual
        judged = {name for one in variant.sets if one.nearest for name in one.nearest.among}
        judged |= {name for one in variant.sets if one.role == "unrelated" for name in one.subjects}
        with anchors_without(sorted(judged)) if cell.base == "fluent" else nullcontext():
            registry.add(train(recipe, pipe=base_of(cell, work).open()))
    return registry.get(slug(cell.concept)).load()


def keep(run: Path, committed: Path) -> None:
    """Copy a run's report and records; the records are packed, as most of them is hashes and seeds."""
    committed.mkdir(parents=True, exist_ok=True)
    for name in PLAIN:
        shutil.copy(run / name, committed / name)
    for name in PACKED:
        (committed / f"{name}.gz").write_bytes(gzip.compress((run / name).read_bytes(), mtime=0))


def measure(cell: Cell, work: Path) -> None:
    """Make the report of one cell, and commit it."""
    eraser = eraser_of(cell, work)
    run, protocol = work / cell.folder, protocol_of(cell, eraser.manifest.concept.kind)
    evaluate(protocol, [eraser], base_of(cell, work), run, Asked(), Bars(False), resume=True, force=True)
    keep(run, REPORTS / cell.folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("hows", nargs="*", help="shipped, or methods; all unless given", metavar="METHOD")
    parser.add_argument("--work", type=Path, required=True)
    given = parser.parse_args()
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    for cell in cells():
        if (given.hows and cell.how not in given.hows) or (REPORTS / cell.folder / REPORT).exists():
            continue
        print(json.dumps(vars(cell)), file=sys.stderr, flush=True)
        measure(cell, given.work)


if __name__ == "__main__":
    main()
