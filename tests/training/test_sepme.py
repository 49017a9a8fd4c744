"""SepME: the loss and its stop against float64, null spaces against NumPy, protection measured on the layers."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from pico import TEXT_WIDTH, WINDOW, pico_pipeline
from pico_families import family_pipeline
from torch import nn

from spm_hub.adapters.increments import Dense, LowRank
from spm_hub.attachment.attachment import attach
from spm_hub.errors import RecipeError
from spm_hub.training import Recipe, train
from spm_hub.training.base_model import TeacherModel
from spm_hub.training.data.anchors import AnchorSource
from spm_hub.training.data.batch import Batch
from spm_hub.training.data.prompts import PromptMaker, Words, vocabulary_words
from spm_hub.training.data.q_sample import QSampleSource, add_noise
from spm_hub.training.data.sampling import generator_for
from spm_hub.training.loop.early_stopping import EarlyStopping
from spm_hub.training.loop.joint_run import balance
from spm_hub.training.methods.sepme import SepME
from spm_hub.training.protection import PROTOCOL, check_room, space_left
from spm_hub.training.recipe.protected_prompts import members
from spm_hub.training.recipe.schema import EarlyStop
from spm_hub.training.trainable.low_rank import TrainableLowRank
from spm_hub.training.trainable.module_selection import select_modules
from spm_hub.training.trainable.null_space import TrainableNullSpace
from spm_hub.training.trainer import train_together

pytestmark = pytest.mark.slow

WIDTH = 64  # of text states: 12 tokens for the first prompt and 11 for each further one leave room for four
SMALL = {
    "target": "snoopy", "method": "sepme", "steps": 6, "batch_size": 4, "templates": False,
    "x_t": {"steps": 4, "trajectories": 4, "chunks": 2}, "stop": {"below": None},
}  # fmt: skip


def recipe(**values: object) -> Recipe:
    return Recipe.make(**{**SMALL, **values})


def pipeline():
    return pico_pipeline(text_width=WIDTH)


def states_of(pipe, *prompts: str) -> np.ndarray:
    """(n, tokens, d_text), float64, by the text encoder alone."""
    ids = pipe.tokenizer(list(prompts), padding="max_length", max_length=WINDOW, return_tensors="pt").input_ids
    with torch.no_grad():
        return pipe.text_encoder(ids)[0].double().numpy()


def test_the_loss_is_the_correlation_in_float64() -> None:
    generator = np.random.default_rng(0)
    at_concept, at_empty, concept, empty = generator.normal(size=(4, 2, 4, 8, 8))
    base, batch = pico_stub(at_concept, at_empty, concept, empty)
    losses = SepME().losses(base, batch)
    r_now, r_before = at_concept - at_empty, concept - empty
    assert float(losses.erase) == pytest.approx(float((r_now * r_before).sum() / r_now.size), rel=1e-12)
    assert float(losses.distance) == pytest.approx(float((r_before**2).sum() / r_now.size), rel=1e-12)
    assert float(losses.anchor) == 0.0
    untouched = [torch.from_numpy(array) for array in (concept, concept, empty)]
    assert float(SepME().erase(*untouched)) == pytest.approx(float(losses.distance), rel=1e-12)


def pico_stub(at_concept, at_empty, concept, empty):
    """A base whose student gives the first two arrays for a concept and for the empty prompt."""
    base = TeacherModel(pico_pipeline())
    size, given = len(concept), base.encode(["snoopy", ""])
    told, blank = (row.expand(size) for row in given)

    def predict(latents, times, conditioning):
        is_blank = torch.equal(conditioning.states, blank.states)
        return torch.from_numpy(at_empty if is_blank else at_concept)

    base.predict = predict
    latents = torch.zeros(size, 4, 8, 8)
    led = torch.ones(size, dtype=torch.bool)
    return base, Batch(
        latents, torch.zeros(size), latents, led, ("snoopy",) * size, told, blank, torch.from_numpy(concept),
        torch.from_numpy(empty), latents[:0], torch.zeros(0), told[:0], torch.zeros(0, 4, 8, 8),
    )  # fmt: skip


def test_balancing_and_the_momentum_statistic_are_the_papers() -> None:
    values = np.array([0.02, -0.5, 0.1])
    expected = np.abs(values).max() / np.abs(values)
    np.testing.assert_allclose(balance([torch.tensor(v, dtype=torch.float64) for v in values]), expected, rtol=1e-12)
    seen = np.random.default_rng(1).normal(0.3, 0.4, size=200)
    stopping = EarlyStopping(EarlyStop(below=0.0))
    mean, due_at = None, None
    for step, loss in enumerate(seen):
        mean = loss if mean is None else 0.9 * mean + 0.1 * loss
        if due_at is None and step > 10 and mean <= 0.0:
            due_at = step
        stopping.note(step, float(loss))
        assert stopping.due == (due_at is not None)
    first = EarlyStopping(EarlyStop(below=1.0))
    for step in range(11):
        first.note(step, 0.0)
        assert not first.due
    first.note(11, 0.0)
    assert first.due


def test_q_sample_is_the_forward_process_of_diffusions_and_of_flows() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    base = TeacherModel(pico_pipeline())
    scheduler = base.scheduler(999)
    x0, noise = torch.randn(2, 3, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found, times = add_noise(scheduler, x0, noise, torch.tensor([0, 500, 998]))
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    bar = np.cumprod(1 - betas)[times.numpy()][:, None, None, None]
    expected = np.sqrt(bar) * x0.numpy() + np.sqrt(1 - bar) * noise.numpy()
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-5)
    assert times.tolist() == [999, 499, 1]
    flow = FlowMatchEulerDiscreteScheduler(shift=1.0)
    flow.set_timesteps(10)
    found, times = add_noise(flow, x0, noise, torch.tensor([0, 4, 9]))
    sigma = (times.double() / 1000).numpy()[:, None, None, None]
    np.testing.assert_allclose(found.numpy(), (1 - sigma) * x0.numpy() + sigma * noise.numpy(), rtol=1e-5, atol=1e-6)


def test_q_samples_come_from_the_bases_pictures_at_all_times_and_carry_its_predictions() -> None:
    plan = recipe(batch_size=16, surrogate="dog", anchoring={"weight": 1.0, "per_target": 2})
    base = TeacherModel(pipeline())
    maker = PromptMaker(("snoopy",), plan.kind, Words.load(), vocabulary_words(base.pipe.tokenizer))
    injection = TrainableNullSpace(select_modules(base.denoiser, "esd-x-strict"), torch.eye(WIDTH), 1.0)
    source = QSampleSource(base, plan, maker, AnchorSource(base, plan.anchoring, "snoopy", maker), injection)
    _, before = source.pictures(0)
    with torch.no_grad():
        for weight in injection.state().values():
            weight.add_(0.3)
    batch = source.batch(0)
    again = QSampleSource(base, plan, maker, AnchorSource(base, plan.anchoring, "snoopy", maker), injection)
    assert torch.equal(again.pictures(0)[1], before), "the student draws no pictures"
    assert torch.equal(again.batch(0).latents, batch.latents)
    injection.remove()
    told = base.encode(["snoopy", "dog"])
    with torch.no_grad():
        for row, kept in ((0, batch.concept), (1, batch.neutral)):
            prediction = base.predict(batch.latents, batch.times, told[row].expand(16))
            torch.testing.assert_close(kept, prediction, rtol=1e-4, atol=1e-5)
    assert len(batch.anchor_latents) == 32
    times = torch.cat([source.batch(step).times for step in range(3)])
    assert len(set(times.tolist())) > 30
    assert 300 < float(times.float().mean()) < 700
    bar = base.scheduler(999).alphas_cumprod[batch.times].view(-1, 1, 1, 1)
    pictures = (batch.latents - (1 - bar).sqrt() * batch.noise) / bar.sqrt()
    assert all(
        any(torch.allclose(one, kept, rtol=1e-3, atol=1e-3) for kept in before)
        for one, time in zip(pictures, batch.times.tolist(), strict=True)
        if time < 500
    )
    with pytest.raises(RecipeError, match="erase_from"):
        recipe(erase_from="a dog")


@pytest.mark.parametrize("method", ["spm", "esd-x"])
def test_other_objectives_train_on_q_samples_too(method: str) -> None:
    plan = Recipe.make(
        target="snoopy", method=method, steps=3, batch_size=2, anchoring={"weight": 40, "per_target": 1},
        x_t={"source": "q_sample", "steps": 3, "trajectories": 2, "chunks": 1},
    )  # fmt: skip
    pipe = pico_pipeline()
    adapter = train(plan, pipe=pipe)
    changed = [found.delta_for(pipe.unet.get_submodule(path).weight) for path, found in adapter.increments.items()]
    assert any(bool(delta.any()) for delta in changed)
    assert not any("forward" in module.__dict__ for module in pipe.unet.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_null_space_increments_begin_at_nothing_and_go(dtype: torch.dtype) -> None:
    pipe = pico_pipeline(dtype=dtype)
    unet = pipe.unet
    before = {key: value.clone() for key, value in unet.state_dict().items()}
    latents, states = torch.randn(2, 4, 8, 8).to(dtype), torch.randn(2, WINDOW, TEXT_WIDTH).to(dtype)
    with torch.no_grad():
        plain = unet(latents, 500, states).sample
        injection = TrainableNullSpace(select_modules(unet, "esd-x-strict"), torch.eye(TEXT_WIDTH)[:5], 0.5)
        assert torch.equal(unet(latents, 500, states).sample, plain)
        for weight in injection.state().values():
            weight.add_(0.2)
        changed = unet(latents, 500, states).sample
        assert not torch.equal(changed, plain)
        with injection.frozen():
            assert torch.equal(unet(latents, 500, states).sample, plain)
        injection.remove()
        assert torch.equal(unet(latents, 500, states).sample, plain)
        increments = injection.increments()
        assert {increment.rank for increment in increments.values()} == {5}
        for path, increment in increments.items():
            module = unet.get_submodule(path)
            module.weight.data = (module.weight.float() + increment.delta_for(module.weight)).to(dtype)
        torch.testing.assert_close(unet(latents, 500, states).sample, changed, rtol=1e-3, atol=1e-3)
    assert list(before) == list(unet.state_dict())


def cross_attention_of(unet: nn.Module, states: torch.Tensor) -> list[torch.Tensor]:
    """What every cross-attention gives for these text states, whatever else the denoiser does."""
    outputs = []
    for path, module in unet.named_modules():
        if path.endswith("attn2"):
            hidden = torch.randn(1, 5, module.to_q.in_features, generator=torch.Generator().manual_seed(0))
            outputs.append(module(hidden, encoder_hidden_states=states))
    return outputs


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"method": "esd-x-strict", "protection": {"separable": True}},
        {"method": "esd-x-strict", "increment": {"kind": "low_rank", "rank": 3}, "protection": {"separable": True}},
        {"method": "spm", "increment": {"modules": "esd-x-strict"}, "protection": {"separable": True}},
        {"method": "uce", "protection": {"separable": True}},
        {"method": "instant", "protection": {"separable": True}},
        {"method": "esd-x-strict", "increment": {"kind": "null_space"}},
        *(
            {"method": "esd-x-strict", "increment": {"kind": kind, "rank": 4}, "protection": {"separable": True}}
            for kind in ("loha", "lokr", "vera", "dora")
        ),
    ],
    ids=[
        "null_space",
        "dense",
        "low_rank",
        "spm",
        "uce",
        "instant",
        "esd in null_space",
        "loha",
        "lokr",
        "vera",
        "dora",
    ],
)
def test_protected_prompts_keep_their_cross_attention_under_every_increment(values: dict[str, object]) -> None:
    held = ["mickey mouse", "a painting by van gogh"]
    closed = values.get("method") in ("instant", "uce")
    own = {} if closed else {"steps": 8, "batch_size": 4, "x_t": SMALL["x_t"]}
    if "method" not in values:
        own = {key: value for key, value in SMALL.items() if key != "target"}
    plan = Recipe.make(**{"target": "snoopy", **own, **values}).with_set(
        f"protection.prompts={held}", *([] if closed else ["optimiser.lr=0.05"])
    )
    if "method" not in values:
        plan = plan.with_set("optimiser.lr=10")
    pipe = pipeline()
    adapter = train(plan, pipe=pipe)
    if values.get("increment", {}).get("kind") == "low_rank":
        assert {increment.rank for increment in adapter.increments.values()} == {3}
    told = {prompt: torch.from_numpy(states_of(pipe, prompt)).float() for prompt in ["", *held, "snoopy", "a dog"]}
    with torch.no_grad():
        before = {prompt: cross_attention_of(pipe.unet, states) for prompt, states in told.items()}
        for path, increment in adapter.increments.items():
            module = pipe.unet.get_submodule(path)
            module.weight.data = module.weight + increment.delta_for(module.weight)
        after = {prompt: cross_attention_of(pipe.unet, states) for prompt, states in told.items()}
    change = {
        prompt: max(float((new - old).abs().max()) for new, old in zip(after[prompt], before[prompt], strict=True))
        for prompt in told
    }
    assert max(change[prompt] for prompt in ["", *held]) < 1e-5
    assert change["snoopy"] > 1e-3
    *_, protected, target = adapter.manifest.evaluation
    assert {protected.protocol, target.protocol} == {PROTOCOL}
    assert protected.samples == 3
    assert protected.value < 1e-5 < 1e-3 < target.value
    assert adapter.manifest.gate.protected == ("", *held)


def test_the_empty_prompt_of_sdxl_is_protected_as_its_encoders_have_it() -> None:
    """Guidance puts zeros in its place, which every weight leaves alone; a negative prompt of "" is encoded."""
    pipe = family_pipeline("sdxl")
    assert pipe.config.force_zeros_for_empty_prompt
    adapter = train(recipe(steps=2, protection={"prompts": ["a dog"]}).with_set("optimiser.lr=10"), pipe=pipe)
    protected, target = adapter.manifest.evaluation
    assert protected.value < 1e-5 < 1e-3 < target.value
    assert adapter.manifest.gate.protected == ("", "a dog")
    with torch.no_grad():
        empty = pipe.encode_prompt("", device="cpu", do_classifier_free_guidance=False)[0][0].double()
    assert empty.norm() > 1
    for path, increment in adapter.increments.items():
        weight = pipe.unet.get_submodule(path).weight.detach().double()
        moved = torch.linalg.norm(empty @ increment.delta_for(weight).double().T)
        assert moved < 1e-5 * torch.linalg.norm(empty @ weight.T)


def test_the_null_space_is_numpys_and_the_measured_move_is_its_definition() -> None:
    pipe = pipeline()
    plan = recipe(protection={"prompts": ["mickey", "dog"]})
    base = TeacherModel(pipe)
    modules = select_modules(base.denoiser, "esd-x-strict")
    space = space_left(plan, base, modules)
    a = states_of(pipe, "", "mickey", "dog").reshape(-1, WIDTH)
    rank = np.linalg.matrix_rank(a, tol=1e-5)
    assert rank == WINDOW + 2 * (WINDOW - 1)
    assert tuple(space.basis.shape) == (WIDTH - rank, WIDTH)
    np.testing.assert_allclose(space.basis @ space.basis.T, np.eye(WIDTH - rank), atol=1e-12)
    np.testing.assert_allclose(space.projector, np.eye(WIDTH) - np.linalg.pinv(a, rcond=1e-6) @ a, atol=1e-5)
    generator = torch.Generator().manual_seed(0)
    loose = {path: Dense(0.01 * torch.randn(m.weight.shape, generator=generator)) for path, m in modules.items()}
    worst, target = space.measured(loose, modules, plan)

    def moved(prompt: str) -> float:
        e = states_of(pipe, prompt)[0]
        pairs = [(loose[path].delta.double().numpy(), m.weight.double().numpy()) for path, m in modules.items()]
        return max(np.linalg.norm(delta @ e.T) / np.linalg.norm(w @ e.T) for delta, w in pairs)

    assert worst.value == pytest.approx(max(moved(prompt) for prompt in ("", "mickey", "dog")), rel=1e-4)
    assert target.value == pytest.approx(moved("snoopy"), rel=1e-4)
    assert worst.subject == repr(max(("", "mickey", "dog"), key=moved))


def test_at_the_width_of_stable_diffusion_the_null_space_has_the_rank_of_the_paper() -> None:
    """77 + 76 k rows of 768: BOS, and nothing else, is the same in all prompts."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(1, 768, generator=generator)
    pipe = pico_pipeline(text_width=768)
    plan = recipe(protection={"prompts": [f"prompt {n}" for n in range(9)]})
    base = TeacherModel(pipe)
    known = {
        prompt: torch.cat([start, torch.randn(76, 768, generator=generator)])
        for prompt in ("", *plan.protection.prompts, "snoopy", "one more")
    }
    real = base.encode
    base.encode = lambda prompts, literally=False: real([""] * len(prompts)).map(
        lambda part: torch.stack([known[prompt] for prompt in prompts])
    )
    modules = select_modules(base.denoiser, "esd-x-strict")
    begun = time.process_time()
    space = space_left(plan, base, modules)
    assert time.process_time() - begun < 30
    assert len(space.basis) == 768 - (77 + 76 * 9) == 7
    leak = torch.cat([known[prompt] for prompt in space.prompts]).double() @ space.basis.T
    assert float(leak.abs().max()) < 1e-9
    with pytest.raises(RecipeError, match=r"of 'snoopy' in the 768 dimensions.*'prompt 8' would fit") as caught:
        space_left(recipe(protection={"prompts": [*plan.protection.prompts, "one more"]}), base, modules)
    assert "protect the first 10 only" in str(caught.value)
    assert "directions" in str(caught.value)


def test_hundreds_of_prompts_are_held_by_principal_directions_and_leak_less_the_more_there_are() -> None:
    pipe = pipeline()
    words = ["dog", "cat", "church", "beach", "person", "nude", "mickey", "pikachu", "red", "blue"]
    prompts = [f"a photo of {one} {of} {other}" for one in words for of in ("and", "by") for other in words[:5]]
    base = TeacherModel(pipe)
    modules = select_modules(base.denoiser, "esd-x-strict")
    generator = torch.Generator().manual_seed(0)
    loose = {path: Dense(torch.randn(m.weight.shape, generator=generator)) for path, m in modules.items()}
    leaks = []
    for count in (2, 10, 30):
        plan = recipe(
            method="esd-x-strict",
            protection={"prompts": prompts, "directions": count, "erased": ["picasso"], "separable": True},
        )
        space = space_left(plan, base, modules)
        assert len(space.basis) == WIDTH - (2 * WINDOW - 1) - count
        assert space.exact == ("", "picasso")
        assert len(space.prompts) == 102
        worst, _ = space.measured(space.projected(loose), modules, plan)
        leaks.append(worst.value)
        # The exact ones stay exact, and only they are gated off.
        e = states_of(pipe, "", "picasso").reshape(-1, WIDTH)
        assert np.abs(e @ space.basis.numpy().T).max() < 1e-6
    assert leaks[0] > 2 * leaks[1] > 4 * leaks[2] > 0
    best = np.linalg.svd(
        (a := states_of(pipe, *prompts).reshape(-1, WIDTH)) - a @ (q := exact_span(pipe)).T @ q, compute_uv=False
    )
    left = np.linalg.norm(a @ space.basis.numpy().T) ** 2
    assert left == pytest.approx((best[30:] ** 2).sum(), rel=1e-6), "no 30 directions leave less of the states"


def exact_span(pipe) -> np.ndarray:
    _, values, directions = np.linalg.svd(states_of(pipe, "", "picasso").reshape(-1, WIDTH), full_matrices=False)
    return directions[values > 1e-6 * values[0]]


THREE = ({"target": "mickey"}, {"target": "picasso", "kind": "style"})


@pytest.fixture(scope="module")
def three():
    pipe = pipeline()
    plan = recipe(together=THREE, steps=8, optimiser={"lr": 10.0})
    return pipe, plan, train_together(plan, pipe=pipe)


def pictures(pipe, prompt: str) -> np.ndarray:
    return pipe(
        prompt, num_inference_steps=4, generator=torch.Generator().manual_seed(5), output_type="np", guidance_scale=3.0
    ).images  # fmt: skip


@pytest.mark.parametrize("gate", ["transport", "always"])
@pytest.mark.parametrize("mode", ["fold", "branch"])
def test_restoring_one_of_three_gives_its_pictures_back_bit_for_bit(three, gate: str, mode: str) -> None:
    pipe, _, adapters = three
    names = ("snoopy", "mickey", "picasso")
    assert tuple(adapter.manifest.concept.target for adapter in adapters) == names
    bare = {name: pictures(pipe, name) for name in names}
    with attach(pipe, list(adapters), gate=gate, mode=mode) as erasers:
        erased = {name: pictures(pipe, name) for name in names}
        assert not any(np.array_equal(erased[name], bare[name]) for name in names)
        erasers.recover("snoopy")
        assert np.array_equal(pictures(pipe, "snoopy"), bare["snoopy"])
        for name in names[1:]:
            assert np.array_equal(pictures(pipe, name), erased[name]), "the others stay as they were erased"
    with attach(pipe, [adapters[1]], gate=gate, mode=mode):
        assert np.array_equal(pictures(pipe, "mickey"), erased["mickey"]), "each needs none of the others"


def test_without_a_gate_the_folded_weights_alone_restore_to_rounding(three) -> None:
    pipe, _, adapters = three
    bare = pictures(pipe, "snoopy")
    kept = {path: pipe.unet.get_submodule(path).weight.clone() for path in adapters[0].increments}
    for adapter in adapters[1:]:
        for path, increment in adapter.increments.items():
            module = pipe.unet.get_submodule(path)
            module.weight.data = module.weight + increment.delta_for(module.weight)
    folded = pictures(pipe, "snoopy")
    for path, weight in kept.items():
        pipe.unet.get_submodule(path).weight.data = weight
    assert np.abs(folded - bare).max() < 1e-4


def test_an_eraser_of_a_run_of_three_is_reproduced_from_its_own_manifest(three, tmp_path: Path) -> None:
    pipe, plan, adapters = three
    again = train(Recipe.make(**adapters[1].manifest.recipe), pipe=pipe)
    adapters[1].save(tmp_path / "first.safetensors")
    again.save(tmp_path / "second.safetensors")
    assert (tmp_path / "first.safetensors").read_bytes() == (tmp_path / "second.safetensors").read_bytes()
    assert [member.target for member in members(plan)] == ["mickey", "picasso", "snoopy"]


def test_a_later_concept_leaves_earlier_erasers_alone(three) -> None:
    pipe, _, _ = three
    first = train(recipe(), pipe=pipe)
    earlier = {path: increment.delta_for(pipe.unet.get_submodule(path).weight) for path, increment in
               first.increments.items()}  # fmt: skip
    second = train(recipe(target="mickey", protection={"erased": ["snoopy"]}, optimiser={"lr": 10.0}), pipe=pipe)
    assert second.manifest.gate.protected == ("", "snoopy")
    with attach(pipe, [first], gate="always"):
        alone = pictures(pipe, "snoopy")
    with attach(pipe, [first, second], gate="always"):
        assert np.array_equal(pictures(pipe, "snoopy"), alone)
    for path, delta in earlier.items():
        assert torch.equal(first.increments[path].delta_for(pipe.unet.get_submodule(path).weight), delta)


def test_the_early_stop_ends_a_run_and_survives_a_resume(tmp_path: Path) -> None:
    pipe = pipeline()
    plan = recipe(steps=40, stop={"below": 1e9, "after": 3})
    done: list[int] = []
    whole = train(plan, pipe=pipe, progress=lambda step, total, info: done.append(step))
    assert done[-1] == 5

    def interrupt(step: int, total: int, info: dict[str, float]) -> None:
        if step == 5:
            raise KeyboardInterrupt

    with pytest.raises(Exception, match="step 5 of 40"):
        train(plan, pipe=pipe, progress=interrupt, checkpoint_dir=tmp_path)
    further: list[int] = []
    resumed = train(
        plan, pipe=pipe, checkpoint_dir=tmp_path, resume=True, progress=lambda step, total, info: further.append(step)
    )  # fmt: skip
    assert further == []
    weight = next(iter(whole.increments))
    assert torch.equal(*(
        found.increments[weight].delta_for(pipe.unet.get_submodule(weight).weight) for found in (whole, resumed)
    ))  # fmt: skip


def test_the_l1_term_is_sum_of_changes_over_the_number_of_tensors() -> None:
    """Of one step from nothing: with the term alone, its gradient's sign is all that Adam follows."""
    pipe = pipeline()
    modules = select_modules(pipe.unet, "esd-x-strict")
    basis = torch.linalg.qr(torch.randn(WIDTH, 5, generator=torch.Generator().manual_seed(0))).Q.T
    injection = TrainableNullSpace(modules, basis, 0.5)
    low_rank = TrainableLowRank(pico_pipeline(text_width=WIDTH).unet, 2, generator_for(0, 2, 0), modules)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in (*injection.state().values(), *low_rank.state().values()):
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    for trained in (injection, low_rank):
        deltas = [found.delta_for(modules[path].weight).numpy() for path, found in trained.increments().items()]
        expected = sum(np.abs(delta).sum() for delta in deltas)
        assert float(sum(delta.detach().abs().sum() for delta in trained.deltas())) == pytest.approx(expected, rel=1e-5)
        assert len(trained.deltas()) == len(modules)
    injection.remove()
    plain, pulled = (train(recipe(steps=12, regulariser={"l1": l1}), pipe=pipe) for l1 in (0.0, 1.0))

    def size(adapter) -> float:
        return sum(
            float(found.delta_for(modules[path].weight).abs().sum()) for path, found in adapter.increments.items()
        )

    assert size(pulled) < 0.7 * size(plain)


def test_stored_as_products_or_multiplied_out_whichever_is_smaller() -> None:
    pipe = pipeline()
    modules = select_modules(pipe.unet, "esd-x-strict")
    few = TrainableNullSpace(modules, torch.eye(WIDTH)[:4], 1.0)
    few.remove()
    many = TrainableNullSpace(modules, torch.eye(WIDTH)[:50], 1.0)
    many.remove()
    assert {type(found) for found in few.increments().values()} == {LowRank}
    assert {type(found) for found in many.increments().values()} == {Dense}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"increment": {"modules": "targets"}}, "null_space.*esd-x-strict"),
        ({"method": "spm", "protection": {"separable": True}}, "increment.modules=esd-x-strict"),
        ({"method": "spm", "protection": {"prompts": ["a dog"]}}, "--method sepme, or --separable"),
        ({"protection": {"prompts": ["Snoopy"]}}, "erased and protected at once"),
        ({"protection": {"directions": 3}}, "protection: directions"),
        ({"protection": {"prompt": ["x"]}}, "did you mean prompts"),
        ({"method": "esd-x-strict", "together": [{"target": "dog"}]}, "together.*--method sepme"),
        ({"together": [{"target": "Snoopy "}]}, "together|protected at once"),
        ({"objective": {"eta": 2.0}}, "stop.below"),
        (
            {"method": "uce", "stop": {"below": 0.1}},
            "stop.below 0.1 would change nothing: method 'uce' does not read it",
        ),
        ({"method": "spm", "increment": {"kind": "null_space"}}, "null_space.*esd-x-strict"),
        (
            {"increment": {"dtype": "bfloat16"}},
            "'bfloat16' would round the numbers that send protected prompts to zero.*float32",
        ),
        (
            {"method": "uce", "increment": {"dtype": "float16"}, "protection": {"separable": True}},
            "'float16' would round",
        ),
        ({"together": [{"target": "mickey", "foo": 1}]}, r"together\.0\.foo is unknown"),
        ({"together": [{"target": "mickey", "alias": []}]}, "did you mean aliases"),
    ],
)
def test_impossible_protection_is_refused_before_any_model(values: dict[str, object], words: str) -> None:
    method = values.get("method")
    base = {"target": "snoopy"} if method else SMALL
    with pytest.raises(RecipeError, match=words):
        Recipe.make(**{**base, **values})


def test_prompts_that_leave_nothing_are_refused_with_the_nearest_choice() -> None:
    pipe = pipeline()
    prompts = ["mickey", "dog", "cat", "church", "beach", "red", "blue"]
    with pytest.raises(RecipeError, match=r"in the 64 dimensions.*; '', 'mickey', 'dog', 'cat', 'church' would fit"):
        train(recipe(protection={"prompts": prompts}), pipe=pipe)
    fitting = train(recipe(protection={"prompts": prompts[:4]}, steps=2), pipe=pipe)
    assert fitting.manifest.evaluation[0].value < 1e-5
    with pytest.raises(RecipeError, match=r"directions: 60 of 64.*take 12") as caught:
        train(recipe(protection={"prompts": prompts, "directions": 60}), pipe=pipe)
    assert "protection.directions=51" in str(caught.value)
    base = TeacherModel(pipe)
    queries = {path: module for path, module in base.denoiser.named_modules() if path.endswith("attn2.to_q")}
    with pytest.raises(RecipeError, match=r"cannot be made separable.*to_q"):
        space_left(recipe(), base, queries)
    assert not any("forward" in module.__dict__ for module in pipe.unet.modules())


def test_crowded_prompts_are_refused_by_the_tokenizer_alone_wherever_the_encoder_would_refuse_them(
    tmp_path: Path,
) -> None:
    pipe = pipeline()
    pipe.save_pretrained(tmp_path)
    for weights in tmp_path.rglob("*.safetensors"):
        weights.unlink()
    check_room(recipe(protection={"prompts": ["mickey", "dog", "cat"]}), tmp_path)
    with pytest.raises(RecipeError, match=r"; '', 'mickey', 'dog', 'cat', 'church' would fit"):
        check_room(recipe(protection={"prompts": ["mickey", "dog", "cat", "church", "red"]}), tmp_path)
    # Prompts that begin alike share states, so that more of them fit.
    alike = [f"a photo of a painting by the red {word}" for word in ("dog", "cat", "church", "beach", "person")]
    plan = recipe(protection={"prompts": alike}, steps=1)
    check_room(plan, tmp_path)
    base = TeacherModel(pipe)
    left = len(space_left(plan, base, select_modules(base.denoiser, "esd-x-strict")).basis)
    assert left == WIDTH - WINDOW - (WINDOW - 1) - 4 * (WINDOW - 9)
    with pytest.raises(RecipeError, match="directions: 52 of 64"):
        check_room(recipe(protection={"prompts": alike, "directions": 52}), tmp_path)
