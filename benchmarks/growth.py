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
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from gates import invented_names
from record import RESULTS, record
from runtime import eraser

import spm_hub
from spm_hub.adapters.adapter import Adapter
from spm_hub.adapters.increments import LowRank
from spm_hub.attachment.gates import calibrated
from spm_hub.attachment.gates.apart import encode_apart
from spm_hub.attachment.text_encoding import encode, encode_together, tokens_of

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


PARTS: dict[str, Callable[[], Any]] = {"first_gates": first_gates}


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
