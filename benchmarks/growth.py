"""What grows with the number of erasers: the first gates after attaching, a registry's changes, and folding.

    python benchmarks/growth.py                 # everything, a quarter of an hour on one core
    python benchmarks/growth.py first_gates     # one part; the others keep their numbers

All times are CPU seconds of one thread, in one process, of the two ways in turn.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import UNet2DConditionModel
from gates import ERASERS, ROOT, invented_names
from record import RESULTS, record
from runtime import UNETS, eraser
from torch import nn

import spm_hub
from spm_hub.adapters.adapter import Adapter
from spm_hub.adapters.increments import Increment, LowRank
from spm_hub.attachment.gates import calibrated
from spm_hub.attachment.gates.apart import encode_apart
from spm_hub.attachment.layers import Layers
from spm_hub.attachment.text_encoding import encode, encode_together, tokens_of
from spm_hub.evaluation.effect import measure
from spm_hub.evaluation.pictures import DrawingOptions, show
from spm_hub.io.progress import Bars
from spm_hub.models.architectures import targets, weight_of
from spm_hub.models.base_choice import BaseChoice
from spm_hub.registry import lockfile, storage
from spm_hub.registry.registry import Registry

_Result = TypeVar("_Result")

SEED = 1853


def clocked(action: Callable[[], _Result]) -> tuple[float, _Result]:
    """Return the CPU seconds that an action takes, and its result."""
    start = time.process_time()
    result = action()
    return time.process_time() - start, result


def small_erasers(count: int) -> list[Adapter]:
    """Erasers of invented names, each with one increment of its own on the sketchbook."""
    generator = torch.Generator().manual_seed(SEED)
    path = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    made = []
    for number, name in enumerate(invented_names(count, random.Random(SEED))):
        down, up = (torch.randn(*shape, generator=generator) for shape in ((1, 128), (192, 1)))
        one = eraser(number, "sd1", {path: LowRank(1e-3 * down, up)})
        concept = one.manifest.concept.model_copy(update={"target": name})
        made.append(replace(one, manifest=one.manifest.model_copy(update={"concept": concept})))
    return made


def one_by_one(pipe: Any, held: list[Adapter]) -> dict[str, torch.Tensor]:
    """Encode the name of each eraser and cut it into tokens by itself, as was done before calls were shared."""
    states = {}
    for adapter in held:
        name = adapter.manifest.concept.names[0]
        states[name] = encode(pipe, type(pipe), name)[0]
        tokens_of(pipe, [name], positions=len(states[name]))
    return states


def first_gates(count: int = 1000) -> dict[str, Any]:
    """Time the first gates of many erasers after attaching them, against a call of the text encoder for each name.

    The calibrated gate's bank is in the cache; of its calibrations none are, and then all.
    """
    pipe: Any = spm_hub.load_pipeline("sketchbook", device="cpu")
    held = small_erasers(count)

    def asked(gate: str) -> tuple[float, dict[str, float]]:
        with spm_hub.attach(pipe, held, gate=gate) as erasers:
            return clocked(lambda: erasers.gates("a dog in the park"))

    separate, states = clocked(lambda: one_by_one(pipe, held))
    together = encode_apart(lambda texts: encode_together(pipe, type(pipe), texts), [[name] for name in states])
    assert all(torch.equal(one[0], states[name]) for name, one in zip(states, together, strict=True))
    found: dict[str, Any] = {
        "erasers": count,
        "transport": {"names_one_by_one": separate, "first_gates": asked("transport")[0]},
    }
    with tempfile.TemporaryDirectory() as cache:
        os.environ["XDG_CACHE_HOME"] = cache
        with spm_hub.attach(pipe, small_erasers(count + 1)[-1:], gate="calibrated") as erasers:
            erasers.gates("a dog")
        shared, calibrated.encode_apart = calibrated.encode_apart, lambda encode, groups: map(encode, groups)
        before, gammas = asked("calibrated")
        calibrated.encode_apart = shared
        (Path(cache) / "spm-hub" / "calibrations.sqlite").unlink()
        first, now = asked("calibrated")
        later, again = asked("calibrated")
    assert gammas == now == again, "the gammas are those of separate calls to the last bit"
    found["calibrated"] = {
        "a_call_for_each_name": before,
        "first_gates": first,
        "first_gates_of_a_later_process": later,
    }
    return found


def registry(counts: tuple[int, ...] = (100, 10_000), times: int = 15) -> dict[str, Any]:
    """Time single operations on registries of few and of many erasers; the median of some times."""
    found: dict[str, dict[str, float]] = {}
    for count in counts:
        with tempfile.TemporaryDirectory() as folder:
            kept = filled(Path(folder), count)
            spare = iter(kept.entries())
            pins = iter(range(count, count + times))
            kept.get("concept 50")  # keeps the index of concepts
            found[f"{count}"] = {
                "resolve_by_name": median(times, lambda kept=kept: kept.get("eraser-50")),
                "resolve_by_concept": median(times, lambda kept=kept: kept.get("concept 50")),
                "record_one_pin": median(times, lambda kept=kept, pins=pins: recorded(kept, next(pins))),
                "remove_one": median(times, lambda kept=kept, spare=spare: kept.remove(next(spare).name)),
                "resolve_by_concept_after_a_change": median(1, lambda kept=kept: kept.get("concept 50")),
            }
    return {"erasers": found}


def filled(root: Path, count: int) -> Registry:
    """A registry of small erasers that were all pulled."""
    kept = Registry(root)
    one = small_erasers(1)[0]
    kept.add(one)
    entry = kept.entries()[0]
    adapter, manifest = entry.adapter_path, entry.manifest_path
    assert manifest is not None
    data, text = adapter.read_bytes(), manifest.read_text()
    pins = {}
    for number in range(count):
        name, target = f"eraser-{number}", f"concept {number}"
        adapter.with_name(f"{name}{adapter.suffix}").write_bytes(data)
        changed = text.replace(one.name, name).replace(str(one.manifest.concept.target), target)
        manifest.with_name(f"{name}.json").write_text(changed)
        pins[name] = pin(number)
    kept.remove(one.name)
    lock = {"schema_version": 1, "adapters": {name: pins[name].model_dump() for name in sorted(pins)}}
    (root / lockfile.LOCK_NAME).write_text(json.dumps(lock, indent=2) + "\n")
    time.sleep(1.1)  # an index of concepts is kept once nothing has changed for a second
    return kept


def pin(number: int) -> lockfile.Pin:
    return lockfile.Pin(repo=f"someone/spm-{number}", commit=f"{number:040x}", sha256=f"{number:064x}")


def recorded(kept: Registry, number: int) -> None:
    with storage.write_lock(kept.root):
        lockfile.record(kept.root, f"eraser-{number}", pin(number))


def median(times: int, action: Callable[[], object]) -> float:
    """Return the median of the CPU milliseconds that an action takes, after a first time where there are several."""
    if times > 1:
        action()
    return round(1000 * statistics.median(clocked(action)[0] for _ in range(max(1, times - 1))), 3)


def batches(count: int = 16, steps: int = 10) -> dict[str, Any]:
    """Time pictures of several prompts under the calibrated gate, one prompt at a time and eight at once."""
    pipe: Any = spm_hub.load_pipeline("sketchbook", device="cpu")
    held = [spm_hub.load(name, registry=ROOT) for name in ERASERS]
    places = ("in the park", "at night", "on a hill", "with a red hat")
    prompts = [f"{name} {place}" for name in ("snoopy", "a dog", "mickey", "a house") for place in places][:count]
    found: dict[str, Any] = {"prompts": len(prompts), "steps": steps, "erasers": len(held)}
    for at_once in (1, 8):
        drawing = DrawingOptions(steps=steps, at_once=at_once)
        show(pipe, held, prompts[:1], DrawingOptions(steps=1), gate="calibrated", compare=False)
        seconds, shown = clocked(
            lambda drawing=drawing: show(pipe, held, prompts, drawing, gate="calibrated", compare=False)
        )
        found[f"seconds_{at_once}_at_once"] = round(seconds, 2)
        found[f"gammas_{at_once}_at_once"] = [dict(one.gates) for one in shown]
    assert found.pop("gammas_1_at_once") == found.pop("gammas_8_at_once")
    return found


def evaluations(samples: int = 2, steps: int = 10) -> dict[str, Any]:
    """Time the evaluation of one eraser, and then that of a second one on the same base."""
    with tempfile.TemporaryDirectory() as cache:
        os.environ["XDG_CACHE_HOME"] = cache
        pipe: Any = spm_hub.load_pipeline("sketchbook", device="cpu")
        pipe("a dog", num_inference_steps=1)
        seconds = {}
        for name in ("snoopy", "mickey"):
            eraser, base = spm_hub.load(name, registry=ROOT), BaseChoice("sketchbook", device="cpu")
            how = {"samples": samples, "seed": 2024, "steps": steps, "guidance": 7.5, "gate": "calibrated"}
            taken, _ = clocked(lambda eraser=eraser, base=base, how=how: measure([eraser], base, Bars(False), **how))
            seconds[name] = round(taken, 2)
    first, second = seconds.values()
    return {"samples": samples, "steps": steps, "first": first, "second": second}


def refolding(count: int = 100, times: int = 5) -> dict[str, Any]:
    """Time folding when the gamma of one eraser changes among many, of all of them, and of one that is alone.

    On every sixth of the modules of SD1.5's U-Net, of its own shapes, with random weights in float32.
    """
    with torch.device("meta"):
        shapes = {
            path: weight_of(module).shape for path, module in targets(UNet2DConditionModel(**UNETS["sd1"])).items()
        }
    generator, modules, layers = torch.Generator().manual_seed(SEED), dict[str, nn.Module](), Layers()
    for path in list(shapes)[::6]:
        modules[path] = nn.Linear(1, 1, bias=False)
        modules[path].weight = nn.Parameter(0.02 * torch.randn(shapes[path], generator=generator), requires_grad=False)
    for number in range(count):
        pairs: dict[str, Increment] = {}
        for path in modules:
            out, *rest = shapes[path]
            down = torch.randn(1, *rest, generator=generator)
            pairs[path] = LowRank(0.02 * down, 0.02 * torch.randn(out, 1, *[1] * (len(rest) - 1), generator=generator))
        layers.install(f"eraser-{number:03}", modules, pairs)
    names = [f"eraser-{number:03}" for number in range(count)]
    gammas = iter(torch.linspace(0.1, 0.9, 6 * times + 6).tolist())
    found: dict[str, Any] = {
        "erasers": count, "modules": len(modules), "of_modules": len(shapes),
        "all_change": median(times, lambda: layers.fold(dict.fromkeys(names, next(gammas)))),
        "one_changes": median(times, lambda: layers.fold({**dict.fromkeys(names, 0.95), names[50]: next(gammas)})),
        "one_alone_changes": median(times, lambda: layers.fold({names[50]: next(gammas)})),
    }  # fmt: skip
    layers.restore()
    return found


PARTS: dict[str, Callable[[], Any]] = {
    "first_gates": first_gates,
    "registry": registry,
    "batches": batches,
    "evaluations": evaluations,
    "refolding": refolding,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="all, unless some are named")
    chosen = parser.parse_args().parts or list(PARTS)
    torch.set_num_threads(1)
    path = RESULTS / "growth.json"
    found = (
        {part: each for part, each in json.loads(path.read_text()).items() if part in PARTS} if path.is_file() else {}
    )
    for part in chosen:
        found[part] = PARTS[part]()
        record("growth", found, seeds=SEED)


if __name__ == "__main__":
    main()
