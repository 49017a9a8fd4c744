"""Training: losses against float64 transcriptions, free targets against the base itself, resumption bit for bit."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from pico import pico_pipeline

from spm_hub.errors import RecipeError, SpmHubError
from spm_hub.training import Recipe, train
from spm_hub.training.base_model import TeacherModel
from spm_hub.training.data.anchors import AnchorSource, anchor_weights
from spm_hub.training.data.prompts import PromptMaker, Words, vocabulary_words
from spm_hub.training.data.sampling import generator_for
from spm_hub.training.data.student import StudentSource
from spm_hub.training.data.trajectories import TrajectorySource
from spm_hub.training.methods.spm import SPM
from spm_hub.training.trainable.low_rank import TrainableLowRank

pytestmark = pytest.mark.slow


def recipe(**values: object) -> Recipe:
    small = {"target": "snoopy", "steps": 6, "batch_size": 4, "x_t": {"steps": 5, "trajectories": 4, "chunks": 3}}
    return Recipe.make(**{**small, **values})


def room(plan: Recipe, seed: int = 0) -> tuple[TeacherModel, PromptMaker, AnchorSource]:
    base = TeacherModel(pico_pipeline(seed))
    maker = PromptMaker((plan.target, *plan.aliases), plan.kind, Words.load(), vocabulary_words(base.pipe.tokenizer))
    return base, maker, AnchorSource(base, plan.anchoring, plan.target, maker)


def test_erase_loss_is_equation_4_in_float64() -> None:
    generator = np.random.default_rng(0)
    prediction, concept, neutral = generator.normal(size=(3, 2, 4, 8, 8))
    for eta in (0.0, 1.0, 3.0):
        goal = neutral - eta * (concept - neutral)
        expected = float(((prediction - goal) ** 2).sum() / prediction.size)
        given = [torch.from_numpy(array) for array in (prediction, concept, neutral)]
        assert float(SPM(eta).erase(*given)) == pytest.approx(expected, rel=1e-12)


def test_total_loss_is_erase_plus_lambda_anchor() -> None:
    generator = np.random.default_rng(1)
    now, kept = generator.normal(size=(2, 3, 4, 8, 8))
    spm = SPM(1.0)
    anchor = spm.anchor(torch.from_numpy(now), torch.from_numpy(kept))
    assert float(anchor) == pytest.approx(float(np.mean((now - kept) ** 2)), rel=1e-12)
    assert float(spm.loss(torch.tensor(0.25, dtype=torch.float64), anchor, 1000.0)) == pytest.approx(
        0.25 + 1000 * float(np.mean((now - kept) ** 2)), rel=1e-12
    )


def test_anchor_probabilities_are_the_papers() -> None:
    generator = np.random.default_rng(2)
    target, candidates = generator.normal(size=(5, 6)), generator.normal(size=(7, 5, 6))
    flat = candidates.reshape(7, -1)
    cosine = flat @ target.ravel() / np.linalg.norm(flat, axis=1) / np.linalg.norm(target)
    for alpha in (-4.0, 0.0, 1.0, 2.5):
        found = anchor_weights(torch.from_numpy(candidates), torch.from_numpy(target), alpha).numpy()
        np.testing.assert_allclose(found, (1 - np.abs(cosine)) ** alpha, rtol=1e-12)


def test_pieces_of_words_are_no_words() -> None:
    class Vocabulary:
        def get_vocab(self) -> dict[str, int]:
            clip = ["par", "achute</w>", "dog</w>", "parachute</w>", "ute</w>", "it</w>", "2nd</w>"]
            other = ["▁horse", "shoe", "▁shoe", "Ġrocket"]
            return {token: number for number, token in enumerate(clip + other)}

    assert vocabulary_words(Vocabulary()) == ("dog", "parachute", "horse", "shoe", "rocket")


@pytest.mark.parametrize("alpha", [-4.0, 1.0])
def test_the_concept_under_another_name_is_no_likelier_an_anchor_than_its_neighbours_can_be(alpha: float) -> None:
    target = torch.randn(5, 6, generator=torch.Generator().manual_seed(3))
    weights = anchor_weights(torch.stack([target, target * 2, -target]), target, alpha)
    assert torch.isfinite(weights).all()
    assert float(weights.max()) <= (1e-6 if alpha > 0 else 1e8 * (1 + 1e-9))


def test_trajectories_hand_out_the_bases_own_predictions() -> None:
    plan = recipe(surrogate="dog", anchoring={"per_target": 2})
    base, maker, anchors = room(plan)
    chunk = TrajectorySource(base, plan, maker, anchors).chunk(0)
    neutral, empty = base.encode(["dog", ""])
    for row in range(0, len(chunk), 7):
        asked = [chunk.target_states[row], neutral, empty, *chunk.anchor_states[row]]
        told = [chunk.concept[row], chunk.neutral[row], chunk.empty[row], *chunk.anchors[row]]
        for states, prediction in zip(asked, told, strict=True):
            with torch.no_grad():
                again = base.predict(chunk.latents[row][None], chunk.times[row][None], states[None])[0]
            torch.testing.assert_close(prediction, again, rtol=1e-4, atol=1e-5)
    of_first = [chunk.anchor_states[row].states for row in range(len(chunk)) if int(chunk.owner[row]) == 0]
    assert all(torch.equal(states[0], of_first[0][0]) for states in of_first), "the anchor that drives stays"
    assert not all(torch.equal(states[1], of_first[0][1]) for states in of_first), "the others change at every step"


def test_where_nothing_is_held_the_base_is_asked_for_no_anchor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Concept and empty prompt only; a seed's noise is the same as with anchors."""
    rows: dict[float, set[int]] = {}
    noises = []
    for weight in (0.0, 40.0):
        plan = recipe(anchoring={"weight": weight, "reach": None, "per_target": 3 if weight else 0, "drawn": 0})
        base, maker, anchors = room(plan)
        predict, asked = base.predict, rows.setdefault(weight, set())

        def counted(latents: torch.Tensor, *told: object, predict=predict, asked=asked) -> torch.Tensor:
            asked.add(len(latents))
            return predict(latents, *told)

        monkeypatch.setattr(base, "predict", counted)
        chunk = TrajectorySource(base, plan, maker, anchors).chunk(0)
        assert chunk.anchors.shape[:2] == (len(chunk), 3 if weight else 0)
        assert len(chunk.anchor_states) == len(chunk)
        noises.append(chunk.noise)
    assert rows == {0.0: {4 * 2}, 40.0: {4 * (2 + 3)}}
    assert torch.equal(*noises)


def test_a_pipeline_is_asked_once_where_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = pico_pipeline()
    asked = []
    where = type(pipe)._execution_device.fget
    monkeypatch.setattr(type(pipe), "_execution_device", property(lambda self: (asked.append(1), where(self))[1]))
    base = TeacherModel(pipe)
    known = len(asked)
    assert known
    base.encode(["a dog", "a cat"])
    base.scheduler(3)
    assert len(asked) == known
    pipe("a dog", num_inference_steps=1, output_type="latent")
    assert len(asked) > known, "the caller's own pipeline is what it was"


def test_trajectories_visit_many_timesteps_and_begin_in_noise() -> None:
    plan = recipe(x_t={"steps": 10, "trajectories": 8, "chunks": 3})
    base, maker, anchors = room(plan)
    source = TrajectorySource(base, plan, maker, anchors)
    times = {int(time) for index in range(3) for time in source.chunk(index).times}
    assert len(times) > 10
    first = source.chunk(2)
    assert float(first.latents[:8].std()) == pytest.approx(1.0, abs=0.1)


def test_student_x_t_is_sampled_by_the_student() -> None:
    plan = recipe(x_t={"source": "student", "steps": 6, "guidance": [3.0]}, anchoring={"per_target": 2})
    base, maker, anchors = room(plan)
    injection = TrainableLowRank(base.denoiser, 1, generator_for(0, 2, 0))
    source = StudentSource(base, plan, maker, anchors, injection)
    steps = [step for step in range(12) if int(source.batch(step).times[0]) < 800][:2]
    before = [source.batch(step) for step in steps]
    with torch.no_grad():
        for up in injection.ups.values():
            up.add_(0.3)
    for step, was in zip(steps, before, strict=True):
        batch = source.batch(step)
        assert not torch.equal(batch.latents, was.latents)
        assert batch.anchor_states.shape[0] == 2 * plan.batch_size
        with injection.frozen(), torch.no_grad():
            again = base.predict(batch.latents, batch.times, batch.states)
        torch.testing.assert_close(batch.concept, again, rtol=1e-4, atol=1e-5)
    injection.remove()


def test_injection_changes_nothing_before_training_and_nothing_after_removal() -> None:
    pipe = pico_pipeline()
    unet = pipe.unet
    before = {key: value.clone() for key, value in unet.state_dict().items()}
    kinds = {path: type(module) for path, module in unet.named_modules()}
    latents, states = torch.randn(2, 4, 8, 8), torch.randn(2, 12, 16)
    with torch.no_grad():
        plain = unet(latents, 500, states).sample
        injection = TrainableLowRank(unet, 1, torch.Generator().manual_seed(1))
        assert torch.equal(unet(latents, 500, states).sample, plain)
    injection.remove()
    after = unet.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert kinds == {path: type(module) for path, module in unet.named_modules()}


def test_training_lowers_the_erase_loss_and_the_anchor_holds() -> None:
    losses: list[dict[str, float]] = []
    # The pico encoder reads twelve tokens: most sentences end before they come to the concept.
    plan = recipe(steps=40, batch_size=8, templates=False)
    adapter = train(plan, pipe=pico_pipeline(), progress=lambda step, total, info: losses.append(dict(info)))
    first, last = losses[:5], losses[-5:]
    assert sum(x["erase"] for x in last) < 0.9 * sum(x["erase"] for x in first)
    assert adapter.manifest.concept.target == "snoopy"
    assert any(bool(increment.up.any()) for increment in adapter.increments.values())


@pytest.mark.parametrize("source", ["trajectory", "student"])
def test_same_seed_same_file_other_seed_other_file(tmp_path: Path, source: str) -> None:
    files = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        plan = recipe(seed=seed, x_t={"source": source, "steps": 4, "trajectories": 4, "chunks": 2})
        train(plan, pipe=pico_pipeline()).save(tmp_path / f"{name}.safetensors")
        files.append((tmp_path / f"{name}.safetensors").read_bytes())
    assert files[0] == files[1]
    assert files[0] != files[2]


def test_interrupt_saves_and_leaves_the_pipeline_as_it_was(tmp_path: Path) -> None:
    pipe = pico_pipeline()
    before = {key: value.clone() for key, value in pipe.unet.state_dict().items()}

    def interrupt(step: int, total: int, info: dict[str, float]) -> None:
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(SpmHubError, match=r"step 3 of 6.*saved"):
        train(recipe(), pipe=pipe, progress=interrupt, checkpoint_dir=tmp_path)
    after = pipe.unet.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    resumed = train(recipe(), pipe=pipe, checkpoint_dir=tmp_path, resume=True)
    whole = train(recipe(), pipe=pipe)
    for path, increment in whole.increments.items():
        assert torch.equal(increment.up, resumed.increments[path].up)
        assert torch.equal(increment.down, resumed.increments[path].down)


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path: Path) -> None:
    def stop(step: int, total: int, info: dict[str, float]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(SpmHubError):
        train(recipe(), pipe=pico_pipeline(), progress=stop, checkpoint_dir=tmp_path)
    with pytest.raises(RecipeError, match="another recipe"):
        train(recipe(seed=5), pipe=pico_pipeline(), checkpoint_dir=tmp_path, resume=True)


@pytest.mark.parametrize(("seed", "dtype", "key"), [(1, "float32", "weights"), (0, "float64", "dtype")])
def test_a_checkpoint_of_another_base_is_refused(tmp_path: Path, seed: int, dtype: str, key: str) -> None:
    def stop(step: int, total: int, info: dict[str, float]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(SpmHubError):
        train(recipe(), pipe=pico_pipeline(), progress=stop, checkpoint_dir=tmp_path)
    other = pico_pipeline(seed, dtype=getattr(torch, dtype))
    with pytest.raises(RecipeError, match=f"belongs to another base: its base-{key} is"):
        train(recipe(), pipe=other, checkpoint_dir=tmp_path, resume=True)


@pytest.mark.parametrize("values", [{}, {"method": "esd-x"}, {"method": "minimalist", "x_t": {"steps": 3}}])
def test_training_leaves_the_denoiser_as_trainable_as_it_was(values: dict[str, object]) -> None:
    pipe = pico_pipeline()
    pipe.unet.conv_in.requires_grad_(True)
    before = {name: parameter.requires_grad for name, parameter in pipe.unet.named_parameters()}
    train(recipe(steps=1, batch_size=2, **values), pipe=pipe)
    assert {name: parameter.requires_grad for name, parameter in pipe.unet.named_parameters()} == before


def test_a_damaged_checkpoint_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "training.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    with pytest.raises(SpmHubError, match="cannot be read"):
        train(recipe(), pipe=pico_pipeline(), checkpoint_dir=tmp_path, resume=True)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"anchorin": {}}, "anchorin.*did you mean anchoring"),
        ({"objective": {"etta": 1}}, "objective.etta is unknown; did you mean eta"),
        ({"anchoring": {"source": "given"}}, "prompts belong to source 'given'"),
        ({"steps": 0}, "steps"),
        ({"method": "esdx"}, "method"),
        ({"objective": {"eta": float("nan")}}, "eta"),
    ],
)
def test_bad_recipes_name_the_key(changes: dict[str, object], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        recipe(**changes)


def test_set_changes_one_key_and_refuses_unknown_ones() -> None:
    changed = recipe().with_set("objective.eta=2.5", "x_t.source=student", "x_t.guidance=[2.0]", "anchoring.alpha=0")
    assert (changed.objective.eta, changed.x_t.source, changed.anchoring.alpha) == (2.5, "student", 0.0)
    with pytest.raises(RecipeError, match="did you mean eta"):
        recipe().with_set("objective.etaa=2")
    with pytest.raises(RecipeError, match="KEY=VALUE"):
        recipe().with_set("objective.eta")


def test_recipe_survives_yaml(tmp_path: Path) -> None:
    plan = recipe(surrogate="dog", objective={"eta": 3}).with_set("anchoring.weight=0.5")
    (tmp_path / "recipe.yaml").write_text(plan.to_yaml())
    assert Recipe.plan(tmp_path / "recipe.yaml") == plan


def test_a_files_names_are_its_own_targets(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(
        "{target: nudity, aliases: [nude], kind: nsfw, surrogate: clothed, name: bare, steps: 7, objective: {eta: 3}}"
    )
    same, other = (Recipe.plan(tmp_path / "recipe.yaml", target=target) for target in ("Nudity", "van gogh"))
    assert (same.aliases, same.kind, same.surrogate, same.name) == (("nude",), "nsfw", "clothed", "bare")
    assert (other.aliases, other.kind, other.surrogate, other.name) == ((), "style", "", None)
    assert same.steps == other.steps == 7
    assert same.objective == other.objective


@pytest.mark.parametrize("text", ["on: true", "1: 2"])
def test_keys_that_yaml_takes_for_something_else_are_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(f"target: snoopy\n{text}\n")
    with pytest.raises(RecipeError, match=r"recipe\.yaml has the key '(True|1)', which YAML reads as (bool|int)"):
        Recipe.plan(tmp_path / "recipe.yaml")


def test_the_student_draws_under_one_guidance_and_unless_told_under_the_papers() -> None:
    """Under the first of the trajectories', 0, it would draw nothing of the concept."""
    assert Recipe.make(target="snoopy", x_t={"source": "student"}).x_t.guidance == (3.0,)
    assert Recipe.make(target="snoopy", x_t={"source": "student", "guidance": [2.0]}).x_t.guidance == (2.0,)
    assert Recipe.make(target="snoopy", method="fmn", x_t={"source": "student"}).x_t.guidance == (3.0,)
    with pytest.raises(RecipeError, match="'student' draws under one guidance"):
        Recipe.make(target="snoopy", x_t={"source": "student", "guidance": [0.0, 3.0]})


def test_well_known_concepts_bring_their_names_and_a_user_may_differ() -> None:
    assert Recipe.plan(target="nudity").aliases == ("nude", "naked")
    assert Recipe.plan(target="van gogh").kind == "style"
    assert Recipe.plan(target="nudity", aliases=("bare",)).aliases == ("bare",)


@pytest.mark.parametrize("kind", ["character", "style", "other"])
def test_anchors_never_mention_the_concept_and_targets_always_do(kind: str) -> None:
    names = ("golf ball", "dog")
    maker = PromptMaker(names, kind, Words.load(), ("dog", "cat", "ball", "golf"))
    generator = torch.Generator().manual_seed(3)
    for _ in range(400):
        anchor = maker.anchor(generator)
        assert anchor.strip()
        assert "dog" not in anchor.split()
        assert "ball" not in anchor.split()
        target = maker.target(generator)
        assert any(name in target for name in names)


def test_a_run_does_not_touch_the_global_random_state() -> None:
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    started = time.monotonic()
    train(recipe(steps=2), pipe=pico_pipeline())
    assert time.monotonic() - started < 60
    assert torch.equal(torch.rand(3), expected)
