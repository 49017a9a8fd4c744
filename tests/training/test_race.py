"""R.A.C.E.: its inner and outer loop against float64 transcriptions, its pre-erased start, its resumption."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pico import pico_eraser, pico_pipeline

import spm_hub
from spm_hub.adapters.adapter import Adapter, increment_info
from spm_hub.adapters.increments import Dense, LowRank
from spm_hub.errors import RecipeError
from spm_hub.training import Recipe, train
from spm_hub.training.base_model import TeacherModel
from spm_hub.training.data.adversary import Attacker, drift, worst_states
from spm_hub.training.data.anchors import AnchorSource
from spm_hub.training.data.batch import Batch
from spm_hub.training.data.prompts import PromptMaker, Words, vocabulary_words
from spm_hub.training.data.sampling import denoise, generator_for, trained_prompt
from spm_hub.training.data.student import StudentSource
from spm_hub.training.data.trajectories import TrajectorySource
from spm_hub.training.methods.esd import ESD
from spm_hub.training.trainable.dense import TrainableDense
from spm_hub.training.trainable.low_rank import TrainableLowRank
from spm_hub.training.trainable.module_selection import select_modules
from spm_hub.training.trainable.warm_start import begin_with, tensors_sha256

pytestmark = pytest.mark.slow

SMALL = {"target": "snoopy", "steps": 6, "batch_size": 3, "x_t": {"steps": 5, "trajectories": 4, "chunks": 3}}


def recipe(**values: object) -> Recipe:
    return Recipe.make(**{**SMALL, "method": "race-spm", **values})


def room(plan: Recipe) -> tuple[TeacherModel, PromptMaker, AnchorSource]:
    base = TeacherModel(pico_pipeline())
    maker = PromptMaker((plan.target, *plan.aliases), plan.kind, Words.load(), vocabulary_words(base.pipe.tokenizer))
    return base, maker, AnchorSource(base, plan.anchoring, plan.target, maker)


def batch_of(plan: Recipe) -> tuple[TeacherModel, Batch]:
    base, maker, anchors = room(plan)
    return base, TrajectorySource(base, plan, maker, anchors).batch(0)


@pytest.mark.parametrize("steps", [1, 3, 10])
def test_the_inner_loop_is_projected_sign_descent_in_float64(steps: int) -> None:
    random = np.random.default_rng(steps)
    states, matrix, goal = random.normal(size=(2, 5, 4)), random.normal(size=(20, 7)), random.normal(size=(2, 7))
    reach = np.array([0.1, 0.4])
    start = torch.rand(states.shape, generator=generator_for(0, 5, 0), dtype=torch.float64).numpy() * 2 - 1

    def harm(given: torch.Tensor) -> torch.Tensor:
        return (torch.tanh(given.flatten(1) @ torch.from_numpy(matrix)) - torch.from_numpy(goal)).pow(2).mean(dim=1)

    found = worst_states(
        torch.from_numpy(states), harm, torch.from_numpy(reach).view(2, 1, 1), steps, generator_for(0, 5, 0)
    ).numpy()
    for row, eps in enumerate(reach):
        clean = states[row]

        def clamped(moved: np.ndarray, clean: np.ndarray = clean, eps: float = eps) -> np.ndarray:
            return np.clip(clean + np.clip(moved - clean, -eps, eps), clean.min(), clean.max())

        now = clamped(clean + eps * start[row])
        for _ in range(steps):
            y = np.tanh(now.ravel() @ matrix)
            gradient = matrix @ (2 * (y - goal[row]) * (1 - y**2) / 7)
            now = clamped(now - eps / 4 * np.sign(gradient).reshape(now.shape))
        np.testing.assert_allclose(found[row], now, rtol=1e-12, atol=1e-12)
        assert np.abs(found[row] - clean).max() <= eps * (1 + 1e-9)


@pytest.mark.parametrize("goal", ["noise", "concept"])
@pytest.mark.parametrize("unit", ["absolute", "rms"])
def test_the_adversary_lowers_what_it_aims_at_within_its_reach(goal: str, unit: str) -> None:
    plan = recipe(adversary={"steps": 10, "epsilon": 0.3, "goal": goal, "unit": unit}, batch_size=12)
    base, batch = batch_of(plan)
    injection = TrainableLowRank(base.denoiser, 1, generator_for(0, 2, 0))
    begin_with(injection, pico_eraser(pico_pipeline().unet))
    harmed = Attacker(plan.adversary, base, plan.seed).attacked(batch, 2)
    clean, moved = batch.states.states, harmed.states.states
    scale = clean.pow(2).mean(dim=(1, 2)).sqrt() if unit == "rms" else torch.ones(len(clean))
    assert ((moved - clean).abs().amax(dim=(1, 2)) <= 0.3 * scale * (1 + 1e-6)).all()
    assert (moved.amax(dim=(1, 2)) <= clean.amax(dim=(1, 2))).all()
    assert (moved.amin(dim=(1, 2)) >= clean.amin(dim=(1, 2))).all()
    assert goal == "concept" or 0 < batch.led.sum() < 12
    aim = batch.concept
    if goal == "noise":
        aim = torch.stack([n if led else c for n, c, led in zip(batch.noise, aim, batch.led.tolist(), strict=True)])
    random = clean + 0.3 * scale.view(-1, 1, 1) * (torch.rand(clean.shape, generator=generator_for(9, 1, 1)) * 2 - 1)

    def away(states: torch.Tensor) -> float:
        with torch.no_grad():
            found = base.predict(batch.latents, batch.times, replace(batch.states, states=states))
        return float((found - aim).pow(2).mean())

    assert away(moved) < min(away(clean), away(random))
    injection.remove()
    for name in ("latents", "times", "concept", "neutral", "anchor_latents", "anchor_predictions"):
        assert getattr(harmed, name) is getattr(batch, name)
    assert harmed.anchor_states is batch.anchor_states


def test_the_noise_is_the_goal_only_where_the_concept_has_led_from_it() -> None:
    """Drawn again from the same noise under the concept, a trajectory ends where it did, or another led it."""
    plan = recipe(x_t={"steps": 6, "trajectories": 4, "chunks": 1, "guidance": [1.5]})
    base, maker, anchors = room(plan)
    chunk = TrajectorySource(base, plan, maker, anchors).chunk(0)
    guidance = torch.full((4,), 1.5)
    empty, asked = base.encode([""])[0].expand(4), base.encode(chunk.prompts[:4])
    steps = len(chunk.owner) // 4
    with torch.no_grad():
        again = denoise(base, base.scheduler(steps), steps - 1, chunk.noise, empty, asked, guidance)
    same = [torch.allclose(one, other, atol=1e-4) for one, other in zip(again, chunk.latents[-4:], strict=True)]
    assert same == chunk.led.tolist() == [True, False, True, False]


def test_the_outer_loss_asks_the_harmed_states_for_the_clean_target() -> None:
    plan = recipe(method="race")
    base, batch = batch_of(plan)
    harmed = Attacker(plan.adversary, base, plan.seed).attacked(batch, 0)
    losses = ESD(2.0, "rewrite").losses(base, harmed)
    with torch.no_grad():
        student = base.predict(batch.latents, batch.times, harmed.states).double().numpy()
    concept, neutral = batch.concept.double().numpy(), batch.neutral.double().numpy()
    expected = np.mean((student - (neutral - 1.0 * (concept - neutral))) ** 2)
    assert float(losses.erase.detach()) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("source", ["trajectory", "student"])
def test_the_noise_of_a_batch_is_what_its_latents_began_as(source: str) -> None:
    plan = recipe(x_t={"source": source, "steps": 4, "trajectories": 4, "chunks": 2, "guidance": [1.0]}, batch_size=8)
    base, maker, anchors = room(plan)
    injection = TrainableLowRank(base.denoiser, 1, generator_for(0, 2, 0))
    made = (
        TrajectorySource(base, plan, maker, anchors)
        if source == "trajectory"
        else StudentSource(base, plan, maker, anchors, injection)
    )
    # Every group of trajectories has its own number of steps.
    groups = [int(made.chunk(index).times.max()) for index in (0, 1)] if source == "trajectory" else []
    first = max(groups, default=int(base.scheduler(4).timesteps[0]))
    seen = 0
    for step in range(18):
        batch = made.batch(step % plan.steps if source == "trajectory" else step)
        for row, time in enumerate(batch.times.tolist()):
            if time >= first:
                torch.testing.assert_close(batch.latents[row], batch.noise[row])
                seen += 1
    assert seen
    injection.remove()


def test_the_regulariser_is_the_sum_of_means() -> None:
    random = np.random.default_rng(4)
    now = {name: random.normal(size=shape) for name, shape in (("a", (3, 4)), ("b", (5,)), ("c", (2, 2, 1, 1)))}
    start = {name: random.normal(size=value.shape) for name, value in now.items()}
    expected = sum(np.abs(now[name] - start[name]).sum() / now[name].size for name in now)
    found = drift(*({name: torch.from_numpy(value) for name, value in each.items()} for each in (now, start)))
    assert float(found) == pytest.approx(expected, rel=1e-12)


def test_held_increments_move_less() -> None:
    moved = {}
    start = pico_eraser(pico_pipeline().unet)
    for hold in (0.0, 300.0):
        plan = recipe(steps=3, start_from="snoopy", adversary={"steps": 1, "hold": hold}).with_set("optimiser.warmup=0")
        made = train(plan, pipe=pico_pipeline(), start=start)
        moved[hold] = sum(
            float((made.increments[path].up - start.increments[path].up).abs().sum()) for path in start.increments
        )
    assert moved[300.0] < 0.8 * moved[0.0]


def as_dense(adapter: Adapter) -> Adapter:
    unet = pico_pipeline().unet
    dense = {
        path: Dense(found.delta_for(unet.get_submodule(path).weight)) for path, found in adapter.increments.items()
    }
    return Adapter(adapter.manifest.model_copy(update={"increment": increment_info(dense)}), dense)


@pytest.mark.parametrize("rank", [1, 3])
def test_a_low_rank_start_is_exact_and_further_ranks_add_nothing(rank: int) -> None:
    unet = pico_pipeline().unet
    start = pico_eraser(unet, rank=1)
    injection = TrainableLowRank(unet, rank, generator_for(0, 2, 0))
    begin_with(injection, start)
    for path, found in injection.increments().items():
        wanted = start.increments[path]
        assert torch.equal(found.up[:, :1].flatten(), wanted.up.flatten())
        assert torch.equal(found.down[:1].flatten(), wanted.down.flatten())
        assert not found.up[:, 1:].any()
        torch.testing.assert_close(
            found.delta_for(torch.empty(found.weight_shape)), wanted.delta_for(torch.empty(found.weight_shape))
        )
    injection.remove()


@pytest.mark.parametrize("kind", ["low_rank", "dense"])
def test_a_dense_increment_starts_exactly_from_either_kind(kind: str) -> None:
    unet = pico_pipeline().unet
    start = pico_eraser(unet, kind=kind, rank=2) if kind == "low_rank" else pico_eraser(unet, kind=kind)
    injection = TrainableDense(select_modules(unet, "targets"))
    begin_with(injection, start)
    for path, found in injection.increments().items():
        wanted = start.increments[path]
        assert torch.equal(found.delta, wanted.delta_for(found.delta))
        if isinstance(wanted, Dense) and wanted.delta_bias is not None:
            assert torch.equal(found.delta_bias, wanted.delta_bias)
    injection.remove()


def test_starts_that_do_not_fit_are_refused_and_nothing_is_set() -> None:
    unet = pico_pipeline().unet
    bare = pico_pipeline().unet
    injection = TrainableLowRank(unet, 1, generator_for(0, 2, 0), select_modules(unet, "esd-x"))
    before = {key: value.detach().clone() for key, value in injection.state().items()}
    cross = tuple(select_modules(bare, "esd-x"))
    with pytest.raises(RecipeError, match="which is not trained"):
        begin_with(injection, pico_eraser(bare))
    with pytest.raises(RecipeError, match="rank 2"):
        begin_with(injection, pico_eraser(bare, rank=2, paths=cross))
    with pytest.raises(RecipeError, match="a dense increment"):
        begin_with(injection, pico_eraser(bare, kind="dense", paths=cross))
    with pytest.raises(RecipeError, match="a mask increment"):
        begin_with(injection, pico_eraser(bare, kind="mask", paths=cross))
    assert all(torch.equal(value, before[key]) for key, value in injection.state().items())
    injection.remove()


def test_the_manifest_names_the_start_by_its_tensors() -> None:
    pipe = pico_pipeline()
    start = pico_eraser(pipe.unet)
    made = train(recipe(steps=1, start_from="some/where.safetensors"), pipe=pipe, start=start)
    assert made.manifest.recipe["start_from"] == "snoopy"
    assert made.manifest.recipe["start_sha256"] == tensors_sha256(start)
    again = Recipe.make(**made.manifest.recipe)
    same = train(again, pipe=pipe, start=start)
    for path, found in made.increments.items():
        assert torch.equal(found.up, same.increments[path].up)
    with pytest.raises(RecipeError, match="start_sha256"):
        train(again, pipe=pipe, start=pico_eraser(pipe.unet, seed=2))
    with pytest.raises(RecipeError, match="no eraser was given"):
        train(again, pipe=pipe)
    with pytest.raises(RecipeError, match="snoopy was given"):
        train(recipe(), pipe=pipe, start=start)
    assert tensors_sha256(as_dense(start)) != tensors_sha256(start)


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "race-spm", "adversary": {"steps": 2}},
        {"method": "race", "adversary": {"steps": 2, "hold": 0.1}, "x_t": {**SMALL["x_t"], "source": "student"}},
    ],
)  # fmt: skip
def test_a_resumed_run_is_the_same_run(tmp_path: Path, changes: dict[str, object]) -> None:
    plan = recipe(**changes)
    pipe = pico_pipeline()
    whole = train(plan, pipe=pipe)

    def interrupt(step: int, total: int, info: dict[str, float]) -> None:
        if step == 5:
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        train(plan, pipe=pipe, progress=interrupt, checkpoint_dir=tmp_path, checkpoint_every=4)
    resumed = train(plan, pipe=pipe, checkpoint_dir=tmp_path, resume=True)
    whole.save(tmp_path / "whole.safetensors")
    resumed.save(tmp_path / "resumed.safetensors")
    assert (tmp_path / "whole.safetensors").read_bytes() == (tmp_path / "resumed.safetensors").read_bytes()
    assert {type(found) for found in whole.increments.values()} == {
        Dense if plan.increment.kind == "dense" else LowRank
    }


def test_the_adversary_begins_when_it_is_told() -> None:
    assert recipe(steps=10).adversary_from == 5
    assert recipe(steps=10, start_from="x").adversary_from == 0
    assert recipe(steps=10, adversary={"begins": 0.9}).adversary_from == 9
    assert Recipe.make(target="snoopy", steps=10).adversary_from == 10
    early, late = (recipe(steps=3, adversary={"begins": begins, "steps": 2}) for begins in (0.0, 0.7))
    plain = Recipe.make(**{**early.model_dump(mode="json"), "method": "spm", "adversary": {}})
    losses: dict[str, list[float]] = {"early": [], "late": [], "plain": []}
    for name, plan in (("early", early), ("late", late), ("plain", plain)):
        train(plan, pipe=pico_pipeline(), progress=lambda step, total, info, n=name: losses[n].append(info["erase"]))
    assert losses["late"][:2] == losses["plain"][:2]
    assert losses["late"][2] != losses["plain"][2]
    assert losses["early"][0] != losses["plain"][0]


def test_keywords_are_trained_on_in_turn() -> None:
    plan = recipe(aliases=["beagle", "dog"], templates=False, adversary={"keywords": True})
    _, maker, _ = room(plan)
    generator = torch.Generator().manual_seed(0)
    drawn = [trained_prompt(plan, maker, generator) for _ in range(300)]
    assert set(drawn) == {"snoopy", "beagle", "dog"}
    assert all(70 < drawn.count(name) < 130 for name in set(drawn))


def test_the_door_loads_what_a_recipe_starts_from(tmp_path: Path) -> None:
    pipe = pico_pipeline()
    start = pico_eraser(pipe.unet)
    start.save(tmp_path / "start.safetensors")
    path = str(tmp_path / "start.safetensors")
    made = spm_hub.train("snoopy", pipe=pipe, method="race-spm", steps=1, start_from=path, x_t=SMALL["x_t"])
    assert made.manifest.recipe["start_sha256"] == tensors_sha256(start)
    assert made.manifest.recipe["start_from"] == "snoopy", "where it lies is nobody's business"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"method": "spm", "adversary": {"epsilon": 0.2}}, "steps is 0, there is no adversary"),
        ({"adversary": {"keywords": True}}, "it needs aliases"),
        ({"adversary": {"goal": "nois"}}, "adversary.goal: unknown goal 'nois'; did you mean noise"),
        ({"start_sha256": "00"}, "no start_from"),
        (
            {"method": "uce", "adversary": {"steps": 10}},
            "^recipe: adversary.steps 10 would change nothing: method 'uce' does not read it; it is a closed form",
        ),
        (
            {"method": "uce", "start_from": "x"},
            "^recipe: start_from 'x' would change nothing: method 'uce' does not read it",
        ),
    ],
)
def test_impossible_adversaries_are_refused(values: dict[str, object], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        Recipe.make(**{"target": "snoopy", "method": "race-spm", **values})


def test_a_model_that_does_not_predict_noise_needs_another_goal() -> None:
    pipe = pico_pipeline()
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, prediction_type="v_prediction")
    with pytest.raises(RecipeError, match="this one predicts v_prediction"):
        train(recipe(adversary={"goal": "noise"}), pipe=pipe)
    train(recipe(steps=2, adversary={"goal": "concept", "steps": 1}), pipe=pipe)
