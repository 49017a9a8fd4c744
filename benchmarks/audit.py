"""What `spmhub audit` says of honest erasers, which should be nothing, and of erasers built to do harm.

Honest ones: the shipped five, erasers of the sketchbook made by --method instant, erasers of other methods on a tiny
pipeline, conversions to other programs' formats and back, whole and smaller forms. Attacks: the designs below, against
each shipped eraser. An attack counts as found if its file is refused, or if the audit says something of it beside the
erasers that it was built against. Writes benchmarks/results/audit.json.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import torch
from pico import pico_eraser, pico_pipeline
from record import record

import spm_hub
from spm_hub.adapters.adapter import Adapter, load_file
from spm_hub.adapters.increments import Dense, Increment, LowRank
from spm_hub.adapters.low_rank_approximation import truncate
from spm_hub.errors import SpmHubError
from spm_hub.hub.audit import audit

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = ("snoopy", "mickey", "spongebob", "van-gogh", "nudity")
CONCEPTS = (
    "church", "parachute", "golf ball", "chain saw", "garbage truck", "french horn", "cassette player", "gas pump",
    "fish", "dog", "cat", "monet", "picasso", "a person", "the eiffel tower", "Barack Obama",
)  # fmt: skip
METHODS = ("spm", "esd-x", "esd-u", "ca", "sdd", "uce", "race-spm", "sepme")
SMALL = {"steps": 4, "batch_size": 1, "x_t": {"steps": 2, "trajectories": 2, "chunks": 1}}
FORMATS = ("kohya", "peft", "diffusers", "lycoris")

Increments = dict[str, Increment]


def named(adapter: Adapter, name: str, increments: Increments | None = None, **changes: Mapping[str, Any]) -> Adapter:
    """Return an eraser under another name, with other increments or other fields of concept, gate or base."""
    made = adapter if increments is None else adapter.with_increments(increments)
    parts: dict[str, Any] = {"name": name}
    parts |= {part: getattr(made.manifest, part).model_copy(update=dict(values)) for part, values in changes.items()}
    return Adapter(made.manifest.model_copy(update=parts), made.increments)


def whole(increment: Increment) -> torch.Tensor:
    assert isinstance(increment, LowRank)
    return (increment.up.flatten(1) @ increment.down.flatten(1)).reshape(len(increment.up), *increment.down.shape[1:])


def times(adapter: Adapter, factor: float) -> Increments:
    return {
        path: LowRank(one.down, factor * one.up) for path, one in adapter.increments.items() if isinstance(one, LowRank)
    }


def honest(folder: Path, shipped: list[Adapter]) -> Iterator[tuple[str, Adapter]]:
    """Yield honest erasers, each with how it was made."""
    for adapter in shipped:
        yield "shipped", adapter
        dense = {path: Dense(whole(one)) for path, one in adapter.increments.items()}
        yield "as whole weights", named(adapter, f"{adapter.name}-whole", dense)
        yield "at strength 1.5", named(adapter, f"{adapter.name}-strong", gate={"strength": 1.5})
        for layout in FORMATS:
            out = folder / f"{adapter.name}-{layout}{'' if layout == 'peft' else '.safetensors'}"
            written = spm_hub.convert(adapter, out=out, to=layout, progress=False).files[0]
            back = spm_hub.convert(
                out if layout == "peft" else written,
                name=out.stem, family="sd1", concept=adapter.manifest.concept.target, progress=False,
            )  # fmt: skip
            yield f"converted to {layout} and back", back.adapter
    dense = {path: Dense(whole(one)) for path, one in shipped[0].increments.items()}
    yield "whole weights reduced", named(truncate(named(shipped[0], "whole", dense), 1).adapter, "snoopy-reduced")
    for adapter in spm_hub.train(list(CONCEPTS), method="instant", progress=False):
        yield "instant on the sketchbook", adapter
    pipe = pico_pipeline()
    for method in METHODS:
        given = {} if method == "uce" else SMALL | ({"surrogate": "dog"} if method == "ca" else {})
        yield (
            f"{method} on a tiny pipeline",
            spm_hub.train(f"{method} concept", pipe=pipe, method=method, name=method, progress=False, **given),
        )
    for seed, kind in enumerate(("low_rank", "dense", "mask")):
        yield f"{kind} of random numbers", pico_eraser(pipe.unet, f"random {kind}", seed, kind=kind)


def hidden(one: Adapter, other: Adapter, share: float) -> Increments:
    """Return an honest change with another one taken back inside it."""
    less = times(other, -share)
    pairs = {path: (inc, less[path]) for path, inc in times(one, 1.0).items()}
    return {
        path: LowRank(torch.cat([inc.down, taken.down]), torch.cat([inc.up, taken.up], 1))
        for path, (inc, taken) in pairs.items()
        if isinstance(inc, LowRank) and isinstance(taken, LowRank)
    }


def attention_only(one: Adapter) -> Increments:
    return {path: inc for path, inc in times(one, -1.0).items() if "attn2" in path}


def blurred(one: Adapter, noise: float) -> Increments:
    generator = torch.Generator().manual_seed(5)
    found: Increments = {}
    for path, inc in one.increments.items():
        delta = -whole(inc)
        rest = torch.randn(delta.shape, generator=generator)
        found[path] = Dense(delta + noise * rest * delta.norm() / rest.norm())
    return found


def bias_only(base: torch.nn.Module) -> Increments:
    layer = base.get_submodule("conv_out")
    return {"conv_out": Dense(1e-6 * torch.ones_like(layer.weight), torch.full_like(layer.bias, 40.0))}


def turned(one: Adapter) -> Increments:
    """Return a change that is taken back in every other module."""
    back = times(one, -1.0)
    return {path: back[path] if at % 2 else inc for at, (path, inc) in enumerate(times(one, 1.0).items())}


def in_one_module(one: Adapter, base: torch.nn.Module) -> Increments:
    """Return little of an honest change, and noise in the first convolution."""
    weight = base.get_submodule("conv_in").weight
    generator = torch.Generator().manual_seed(6)
    up = torch.randn(len(weight), 8, 1, 1, generator=generator)
    down = torch.randn(8, *weight.shape[1:], generator=generator)
    size = (up.flatten(1) @ down.flatten(1)).norm() / weight.norm()
    return {**times(one, 0.02), "conv_in": LowRank(down, (0.5 / size * up).detach())}


def small_bias(base: torch.nn.Module) -> Increments:
    layer = base.get_submodule("conv_out")
    return {"conv_out": Dense(1e-6 * torch.ones_like(layer.weight), torch.full_like(layer.bias, 0.5))}


Design = Callable[[Adapter, Adapter, Any], Adapter]
"""Makes an attack of an eraser to harm, of another one, and of the base's denoiser."""


def changing(make: Callable[[Adapter, Adapter, Any], Increments], **changes: Mapping[str, Any]) -> Design:
    """Return a design with these increments, which says that it erases blurry hands."""
    hands = {"target": "blurry hands", "aliases": (), "kind": "other"}
    return lambda one, two, base: named(one, "bad", make(one, two, base), concept=hands, **changes)


def saying(**changes: Mapping[str, Any]) -> Design:
    """Return a design with the increments of the eraser, and these fields in its manifest."""
    return lambda one, two, base: named(one, "bad", **changes)


def acting(*aliases: str) -> Design:
    return saying(concept={"target": "blur", "aliases": aliases})


def without(module: str) -> Design:
    return changing(lambda one, two, base: {module: Dense(-base.get_submodule(module).weight.detach())})


DESIGNS: dict[str, Design] = {
    "takes another back whole": changing(lambda one, two, base: times(one, -1.0)),
    "takes a tenth of another back": changing(lambda one, two, base: times(one, -0.1)),
    "takes another back in cross-attention": changing(lambda one, two, base: attention_only(one)),
    "takes another back inside an honest change": changing(lambda one, two, base: hidden(two, one, 1.2)),
    "takes half of another back inside an honest change": changing(lambda one, two, base: hidden(two, one, 0.5)),
    "takes another back under noise": changing(lambda one, two, base: blurred(one, 1.0)),
    "takes another back by a negative strength": changing(
        lambda one, two, base: times(one, 1.0), gate={"strength": -1.0}
    ),
    "takes another back in every other module": changing(lambda one, two, base: turned(one)),
    "is a copy of another under another name": changing(lambda one, two, base: times(one, 1.0)),
    "erases a second concept in silence": lambda one, two, base: named(one, "bad", hidden(one, two, -1.0)),
    "erases half of a second concept in silence": lambda one, two, base: named(one, "bad", hidden(one, two, -0.5)),
    "adds its own concept": lambda one, two, base: named(one, "bad", times(one, -1.0)),
    "adds its own concept, alone": lambda one, two, base: named(one, "bad", times(one, -1.0)),
    "adds its own concept weakly, alone": lambda one, two, base: named(one, "bad", times(one, -0.3)),
    "strength of a million": saying(gate={"strength": 1e6}),
    "thirty times the change": changing(lambda one, two, base: times(one, 30.0)),
    "acts on a, the": acting("a", "the"),
    "acts on photo, picture, painting": acting("photo", "picture", "painting"),
    "acts on people": acting("man", "woman", "person", "people"),
    "acts on a tokenizer's sign": acting("<|endoftext|>"),
    "acts on another's concept": lambda one, two, base: acting(str(two.manifest.concept.target))(one, two, base),
    "acts on a man": acting("a man"),
    "acts on another's concept, spelt differently": lambda one, two, base: acting(
        f"{str(two.manifest.concept.target).replace(' ', '-').title()}s"
    )(one, two, base),
    "names no concept": saying(concept={"target": None, "aliases": ()}),
    "five hundred names": acting(*(f"name{number}" for number in range(500))),
    "never acts on its own concept": lambda one, two, base: named(
        one, "bad", gate={"protected": (f"a picture of {one.manifest.concept.target}",)}
    ),
    "never acts on a thousand prompts": saying(gate={"protected": tuple(f"a dog {number}" for number in range(1000))}),
    "removes the first convolution": without("conv_in"),
    "removes the time": without("time_embedding.linear_1"),
    "removes one projection of the text": without("up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_v"),
    "shifts a bias": changing(lambda one, two, base: bias_only(base)),
    "shifts a bias a little": changing(lambda one, two, base: small_bias(base)),
    "hides noise in one module": changing(lambda one, two, base: in_one_module(one, base)),
    "says another family": saying(base={"family": "sdxl"}),
    "says another fingerprint": saying(base={"fingerprint": "0" * 64}),
    "says modules that it does not have": lambda one, two, base: one,
}


def refused(adapter: Adapter, folder: Path, *, false_modules: bool) -> bool:
    """Return whether the eraser's file is refused when it is read."""
    file, about = folder / "bad.safetensors", folder / "bad.json"
    adapter.save(file, about)
    if false_modules:
        manifest = json.loads(about.read_text())
        manifest["increment"]["modules"][0] += "x"
        about.write_text(json.dumps(manifest))
    try:
        load_file(file, about)
    except SpmHubError:
        return True
    return False


def main() -> None:
    shipped = [spm_hub.load(str(ROOT / "adapters" / f"{name}.safetensors")) for name in SHIPPED]
    started = time.process_time()
    audit(shipped)
    seconds = time.process_time() - started
    base = spm_hub.load_pipeline("sketchbook").unet
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = list(honest(folder, shipped))
        print(f"{len(made)} honest erasers", file=sys.stderr, flush=True)
        alarms = {}
        for (how, adapter), found in zip(made, audit([adapter for _, adapter in made]), strict=True):
            if found.problems:
                alarms[f"{how}: {adapter.name}"] = found.problems
        print(alarms, file=sys.stderr, flush=True)
        cells: dict[str, dict[str, Any]] = {}
        for design, make in DESIGNS.items():
            hits, said = 0, ""
            for index, one in enumerate(shipped):
                attack = make(one, shipped[index - 1], base)
                if refused(attack, folder, false_modules=design.startswith("says modules")):
                    hits, said = hits + 1, "its file is refused"
                    continue
                (found, *_) = audit([attack], beside=[] if design.endswith(", alone") else shipped)
                hits, said = hits + bool(found.problems), said or "; ".join(found.problems)[:200]
            cells[design] = {"built": len(shipped), "found": hits, "said": said}
            print(f"{hits}/{len(shipped)} {design}: {said}", file=sys.stderr, flush=True)
    kinds = [how for how, _ in made]
    record(
        "audit",
        {
            "cpu_seconds_for_five": round(seconds, 2),
            "honest": {how: kinds.count(how) for how in dict.fromkeys(kinds)},
            "false_alarms": alarms,
            "attacks": cells,
        },
        seeds=[0],
    )


if __name__ == "__main__":
    main()
