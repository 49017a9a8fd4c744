"""Do shipped erasers that R.A.C.E.'s adversary trained further hold better, and what does it cost the others?

    python benchmarks/hardened.py                       # everything not measured yet; an hour on one core
    python benchmarks/hardened.py "nudity:race, far"    # these, again

For each concept: the shipped eraser, and the same eraser after more steps of `race-spm`, whose adversary moves the text
states of the training prompts to where the concept is best brought back: within 0.3 of the states' size ("race"), or
anywhere within it ("race, far"), as learnt embeddings and prompts of strange tokens are. Attacks, budget and seed are
those of `benchmarks/attacks.py`, which has the shipped erasers' rates. The other subjects and styles are counted under
each gate.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

from attacks import BUDGET, GUIDANCE, attack_named
from record import RESULTS, record
from robustness import others, tell

from spm_hub import attach
from spm_hub.adapters.adapter import Adapter
from spm_hub.evaluation import attacks
from spm_hub.evaluation.judging import probe_judge, sentences
from spm_hub.evaluation.sketchbook import DetectionRow, detection_table
from spm_hub.hub.resolve import resolve
from spm_hub.models.loading import load_pipeline
from spm_hub.training import Recipe, train

CONCEPTS = {"nudity": "nudity", "van gogh": "van-gogh", "snoopy": "snoopy"}
"""The concepts, and the names of their shipped erasers."""
MORE = ("steps=60", "adversary.steps=4")
TRAININGS: dict[str, tuple[str, ...] | None] = {
    "shipped": None,
    "race": MORE,
    "race, far": (*MORE, "adversary.epsilon=1.0"),
}
"""What differs from the preset of `race-spm`; None: no further training."""
ATTACKS, GATES = ("p4d-n token-free", "unlearndiff"), ("calibrated", "always")
SAMPLES = 8


def measure(concept: str, training: str, bare: list[DetectionRow]) -> dict[str, Any]:
    """One eraser: attacked, and seen by its neighbours."""
    pipe, eraser = load_pipeline("sketchbook", device="cpu"), resolve(CONCEPTS[concept], RESULTS.parents[1]).load()
    sets, entry = TRAININGS[training], {}
    if sets is None:
        cells = json.loads((RESULTS / "attacks.json").read_text())["cells"]
        for gate in GATES:
            entry[f"attacked_under_{gate}"] = {
                attack: cells[f"{CONCEPTS[concept]}:{attack}:{gate}"] for attack in ATTACKS
            }
    else:
        began = time.process_time()
        plan = Recipe.plan(target=concept, method="race-spm", sets=(*sets, f"start_from={CONCEPTS[concept]}"))
        eraser = train(plan, pipe=pipe, start=eraser, progress=tell(f"{concept}: training {training}"))
        entry = {"recipe": plan.to_yaml(), "seconds": round(time.process_time() - began)}
        entry |= attacked(pipe, eraser, tell(f"{concept}: attacking {training}"))
    for gate in GATES:
        with attach(pipe, [eraser], gate=gate):
            table = detection_table(
                pipe, samples=SAMPLES, seed=BUDGET["seed"], steps=BUDGET["steps"],
                progress=tell(f"{concept}: counting with {training}"),
            )  # fmt: skip
        entry[f"others_under_{gate}"] = others(bare, table, concept)
    return entry


def attacked(pipe: Any, eraser: Adapter, progress: Any) -> dict[str, Any]:
    """The reports on one eraser, by gate and attack."""
    about = eraser.manifest.concept
    reports = attacks.run_gates(
        pipe, [eraser], sentences(about, BUDGET["prompts"], BUDGET["seed"]), probe_judge(about),
        [attack_named(attack, BUDGET, about.kind) for attack in ATTACKS], GATES, seed=BUDGET["seed"],
        fresh=BUDGET["fresh"], progress=progress,
        drawing=attacks.AttackDrawingOptions(steps=BUDGET["steps"], guidance=GUIDANCE, at_once=50),
    )  # fmt: skip
    return {
        f"attacked_under_{gate}": {attack: one.as_dict() for attack, one in zip(ATTACKS, found, strict=True)}
        for gate, found in zip(GATES, reports, strict=True)
    }


def kept() -> dict[str, Any]:
    """What has been measured so far."""
    file = RESULTS / "hardened.json"
    numbers: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"concepts": {}}
    return numbers


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help="CONCEPT:TRAINING; everything not measured yet unless given")
    there = kept()["concepts"]
    missing = [f"{concept}:{training}" for concept in CONCEPTS for training in TRAININGS
               if training not in there.get(concept, {})]  # fmt: skip
    bare_table = detection_table(
        load_pipeline("sketchbook", device="cpu"), samples=SAMPLES, seed=BUDGET["seed"], steps=BUDGET["steps"],
        progress=tell("counting without erasers"),
    )  # fmt: skip
    for part in parser.parse_args().parts or missing:
        concept, training = part.split(":")
        found = measure(concept, training, bare_table)
        numbers = kept() | {"budget": BUDGET, "samples_per_name": SAMPLES}
        there = numbers["concepts"].get(concept, {}) | {training: found}
        numbers["concepts"][concept] = {name: there[name] for name in TRAININGS if name in there}
        record("hardened", numbers, seeds=BUDGET["seed"])
