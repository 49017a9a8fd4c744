"""On a GPU: erasers are right there, leave without a trace, and everything that computes finds its tensors.

Skipped on a machine without one.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from attacked import CASES as ATTACKED
from pico import pico_eraser, pico_pipeline
from pico_families import FAMILY_PIPELINES, family_pipeline
from test_families import apart, draw, eraser
from torch import Tensor

import spm_hub
from spm_hub.evaluation import attacks
from spm_hub.models.architectures import denoiser_of
from spm_hub.training import Recipe, train
from spm_hub.training.methods import METHODS
from spm_hub.training.trainer import TrainingInterruptedError

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SMALL = {"target": "snoopy", "steps": 4, "batch_size": 2, "x_t": {"steps": 3, "trajectories": 2, "chunks": 2}}


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions in float32 proper, not in TF32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def state(pipe: Any) -> dict[str, Tensor]:
    return {key: value.detach().cpu().clone() for key, value in denoiser_of(pipe).state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def kinds(pipe: Any) -> list[Any]:
    return [
        pico_eraser(pipe.unet, name, seed=seed, kind=kind)
        for seed, (name, kind) in enumerate({"snoopy": "low_rank", "mickey": "dense", "nudity": "mask"}.items(), 1)
    ]


def predicted(pipe: Any) -> Tensor:
    """One prediction with all erasers on, in float64 on the CPU; the input is the same in every dtype."""
    generator = torch.Generator().manual_seed(3)
    latents, states = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 12, 16, generator=generator)
    like = next(pipe.unet.parameters())
    with torch.no_grad():
        found: Tensor = pipe.unet(latents.to(like), 500, states.to(like)).sample
    return found.double().cpu()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ["fold", "branch"])
def test_every_kind_is_right_and_leaves_without_a_trace(dtype: torch.dtype, mode: Any) -> None:
    pipe = pico_pipeline(dtype=dtype).to(DEVICE)
    before, bare = state(pipe), draw(pipe, ["snoopy"])
    wide = pico_pipeline(dtype=dtype).to(dtype=torch.float64)
    plain = predicted(wide)
    with spm_hub.attach(wide, kinds(wide)):
        expected = predicted(wide)
    with spm_hub.attach(pipe, kinds(pipe), mode=mode) as erasers:
        found, drawn = predicted(pipe), draw(pipe, ["snoopy"])
        erasers.recover("mickey")
        without = draw(pipe, ["snoopy"])
        assert drawn.device.type == DEVICE
        assert same(state(pipe), before), "a state_dict is the checkpoint's own"
    with spm_hub.attach(pipe, [one for one in kinds(pipe) if one.name != "mickey"], mode=mode):
        assert torch.equal(draw(pipe, ["snoopy"]), without)
    assert torch.equal(draw(pipe, ["snoopy"]), bare)
    assert same(state(pipe), before)
    assert apart(found, expected) <= {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]
    assert apart(plain, expected) > 0.1


@pytest.mark.parametrize("family", FAMILY_PIPELINES)
def test_families(family: str) -> None:
    pipe = family_pipeline(family)
    held = [eraser(denoiser_of(pipe), name, seed) for seed, name in enumerate(("snoopy", "mickey"))]
    with spm_hub.attach(pipe, held):
        expected = draw(pipe, ["snoopy", "a dog"])
    pipe.to(DEVICE)
    before = state(pipe)
    with spm_hub.attach(pipe, held) as erasers:
        assert apart(draw(pipe, ["snoopy", "a dog"]).cpu(), expected) <= 1e-3
        for name in erasers.names:
            erasers.recover(name)
    assert same(state(pipe), before)


def test_rows_of_a_mixed_batch_are_single_calls() -> None:
    pipe = pico_pipeline().to(DEVICE)
    prompts = ["snoopy", "a dog", "mickey by the sea", "red church"]
    with spm_hub.attach(pipe, kinds(pipe)):
        together = draw(pipe, prompts)
        for row, prompt in enumerate(prompts):
            assert apart(together[row : row + 1], draw(pipe, [prompt])) <= 1e-4


def offloaded(pipe: Any) -> Any:
    pipe.enable_model_cpu_offload(device=DEVICE)
    return pipe


def offloaded_in_sequence(pipe: Any) -> Any:
    pipe.enable_sequential_cpu_offload(device=DEVICE)
    return pipe


def offloaded_in_groups(pipe: Any) -> Any:
    pipe.to(DEVICE)
    pipe.unet.enable_group_offload(
        onload_device=torch.device(DEVICE), offload_device=torch.device("cpu"), offload_type="leaf_level"
    )
    return pipe


@pytest.mark.parametrize("place", [offloaded, offloaded_in_sequence, offloaded_in_groups])
@pytest.mark.parametrize("mode", ["auto", "branch"])
def test_offloading(place: Callable[[Any], Any], mode: Any) -> None:
    pipe = pico_pipeline().to(DEVICE)
    with spm_hub.attach(pipe, kinds(pipe), mode=mode):
        expected = [draw(pipe, prompts) for prompts in (["snoopy"], ["snoopy", "a dog"])]
    for early in (True, False):
        pipe = pico_pipeline()
        bare = draw(place(pico_pipeline()), ["a dog"])
        if early:
            place(pipe)
        with spm_hub.attach(pipe, kinds(pipe), mode=mode):
            if not early:
                place(pipe)
            found = [draw(pipe, prompts) for prompts in (["snoopy"], ["snoopy", "a dog"])]
        for one, other in zip(found, expected, strict=True):
            assert apart(one, other) <= 1e-4
        assert torch.equal(draw(pipe, ["a dog"]), bare)


def test_a_pipeline_moves_with_its_erasers() -> None:
    pipe = pico_pipeline()
    before = state(pipe)
    with spm_hub.attach(pipe, kinds(pipe)):
        on_cpu = draw(pipe, ["snoopy"])
        pipe.to(DEVICE)
        there = draw(pipe, ["snoopy"])
        assert apart(there.cpu(), on_cpu) <= 1e-4
        pipe.to("cpu")
        assert torch.equal(draw(pipe, ["snoopy"]), on_cpu)
        pipe.to(DEVICE)
    assert same(state(pipe), before)


def test_beyond_the_memory_budget_originals_go_to_the_cpu() -> None:
    pipe = pico_pipeline().to(DEVICE)
    before = state(pipe)
    with spm_hub.attach(pipe, kinds(pipe)):
        expected = draw(pipe, ["snoopy"])
    with spm_hub.attach(pipe, kinds(pipe), memory_budget=0):
        at_rest = torch.cuda.memory_allocated()
        assert torch.equal(draw(pipe, ["snoopy"]), expected)
        torch.cuda.synchronize()
        assert torch.cuda.memory_allocated() - at_rest < sum(tensor.nbytes for tensor in before.values()) / 4
    assert same(state(pipe), before)


def test_threads_never_mix_two_states_within_a_picture() -> None:
    pipe = pico_pipeline().to(DEVICE)
    held = kinds(pipe)
    allowed = []
    for some in (held, held[:1]):
        with spm_hub.attach(pipe, some):
            allowed.append(draw(pipe, ["snoopy"]))
    erasers = spm_hub.attach(pipe, held[:1])
    drawn: list[Tensor] = []

    def picture() -> None:
        drawn.extend(draw(pipe, ["snoopy"]) for _ in range(8))

    def come_and_go() -> None:
        for _ in range(8):
            # Both come as one, and go as one: a picture between the two would be a third state.
            with erasers._lock:
                for one in held[1:]:
                    erasers.add(one)
            time.sleep(0.05)
            with erasers._lock:
                for one in held[1:]:
                    erasers.recover(one.name)
            time.sleep(0.05)

    threads = [threading.Thread(target=work) for work in (picture, picture)]
    for thread in threads:
        thread.start()
    come_and_go()
    for thread in threads:
        thread.join()
    erasers.detach()
    assert len(drawn) == 16
    assert all(any(torch.equal(one, state) for state in allowed) for one in drawn)


METHOD_CASES: dict[str, dict[str, Any]] = {
    **{method: {} for method in METHODS},
    "student": {"method": "spm", "x_t": {**SMALL["x_t"], "source": "student"}},  # type: ignore[dict-item]
    "released": {"method": "spm", "anchoring": {"source": "gaussian"}},
    "q_sample": {"method": "esd-x", "x_t": {**SMALL["x_t"], "source": "q_sample"}},  # type: ignore[dict-item]
    "sepme, protected": {"method": "sepme", "protection": {"prompts": ["a dog"]}},
    "race-hold": {"method": "race", "adversary": {"steps": 2, "hold": 0.1}},
    **{kind: {"increment": {"kind": kind, "rank": 2}} for kind in ("loha", "lokr", "dora")},
    "vera": {"increment": {"kind": "vera", "rank": 2, "modules": "esd-x"}},
}


@pytest.mark.parametrize("case", METHOD_CASES)
def test_every_method_trains_and_what_it_trains_attaches(case: str) -> None:
    pipe = pico_pipeline(text_width=64).to(DEVICE)
    given: dict[str, Any] = {**SMALL, "method": case, **METHOD_CASES[case]}
    if given["method"] not in METHODS:
        given["method"] = "spm"
    if given["method"] == "uce":
        given |= {"steps": None, "batch_size": None, "x_t": None}
    if given["method"] == "minimalist":
        given["x_t"] = {"steps": 3}
    given = {key: value for key, value in given.items() if value is not None}
    before, bare = state(pipe), draw(pipe, ["snoopy"])
    adapter = train(Recipe.make(**given), pipe=pipe)
    tensors = [tensor for increment in adapter.increments.values() for tensor in increment.tensors().values()]
    assert {tensor.device.type for tensor in tensors} == {"cpu"}
    with spm_hub.attach(pipe, [adapter]):
        changed = draw(pipe, ["snoopy"])
    if case != "minimalist":  # four steps do not switch a neuron off
        assert not torch.equal(changed, bare)
    assert same(state(pipe), before)
    assert torch.equal(draw(pipe, ["snoopy"]), bare)


@pytest.mark.parametrize("family", FAMILY_PIPELINES)
def test_every_family_trains(family: str) -> None:
    pipe = family_pipeline(family)
    pipe.to(DEVICE)
    adapter = train(Recipe.make(**SMALL, templates=False), pipe=pipe)
    assert adapter.increments


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_training_on_a_half_precision_base(dtype: torch.dtype) -> None:
    pipe = pico_pipeline(dtype=dtype).to(DEVICE)
    for method in ("spm", "esd-x"):
        assert train(Recipe.make(**SMALL, method=method), pipe=pipe).increments


@pytest.mark.parametrize("method", ["spm", "esd-x", "sepme", "race-spm"])
def test_twice_and_resumed_is_the_identical_file(method: str, tmp_path: Path) -> None:
    recipe = Recipe.make(**{**SMALL, "method": method, "steps": 6})

    def run(name: str, **options: Any) -> bytes:
        pipe = pico_pipeline(text_width=64).to(DEVICE)
        adapter = train(recipe, pipe=pipe, **options)
        adapter.save(tmp_path / name)
        return (tmp_path / name).read_bytes()

    whole = run("whole.safetensors")
    assert run("again.safetensors") == whole

    def stop(step: int, total: int, losses: dict[str, float]) -> None:
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises((TrainingInterruptedError, KeyboardInterrupt)):
        run("first.safetensors", checkpoint_dir=tmp_path / "run", progress=stop)
    assert run("resumed.safetensors", checkpoint_dir=tmp_path / "run", resume=True) == whole


@pytest.mark.parametrize(
    "attack",
    [
        attacks.UnlearnDiffAtk(tokens=2, iterations=2, timesteps=2),
        attacks.P4D(tokens=2, iterations=1, tries=2),
        attacks.RingABell(tokens=2, iterations=2, tries=2, population=6),
        attacks.PEZ(tokens=2, iterations=2, tries=2),
        attacks.ConceptInversion(initial="photo", iterations=1, tries=2, batch=2),
        attacks.NoiseProbing(most=2),
        attacks.Completion(share=0.5, tries=1),
        attacks.RandomTokens(tokens=2, tries=2),
        attacks.SeedSearch(tries=2),
    ],
    ids=lambda attack: type(attack).__name__,
)
def test_attacks(attack: Any) -> None:
    pipe = pico_pipeline().to(DEVICE)
    before, answers = state(pipe), iter([[True] * 3] + [[False] * 3] * 20)
    report = attacks.run(
        pipe, [pico_eraser(pipe.unet)], ATTACKED, lambda pictures: next(answers)[: len(pictures)], attack,
        drawing=attacks.AttackDrawingOptions(steps=2, guidance=3.0),
    )  # fmt: skip
    assert report.asr == 0.0
    assert same(state(pipe), before)


def test_compiled_is_not_compiled_again_for_other_gammas() -> None:
    pipe = pico_pipeline().to(DEVICE)
    with spm_hub.attach(pipe, kinds(pipe)):
        expected = {prompt: draw(pipe, [prompt, "a dog"]) for prompt in ("snoopy", "mickey")}
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        pipe.unet = torch.compile(pipe.unet)
        first = draw(pipe, ["snoopy", "a dog"])
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        other = draw(pipe, ["mickey", "a dog"])
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs > 0
        assert apart(first, expected["snoopy"]) <= 1e-3
        assert apart(other, expected["mickey"]) <= 1e-3
