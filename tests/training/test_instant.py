"""Instant: its closed form against searches and against a float64 transcription from the pipeline's own states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from pico import pico_pipeline
from pico_families import family_pipeline

from spm_hub.adapters.adapter import Adapter
from spm_hub.adapters.increments import LowRank
from spm_hub.attachment.attachment import attach
from spm_hub.errors import RecipeError
from spm_hub.training import Recipe, train
from spm_hub.training.base_model import TeacherModel
from spm_hub.training.loop.run import Task
from spm_hub.training.methods.instant import everything_else, nearest, sentences_of
from spm_hub.training.trainer import train_together

FEW = {"sentences": 20, "held": 30, "hold": 4.0}


def recipe(**values: Any) -> Recipe:
    return Recipe.make(**{"target": "snoopy", "method": "instant", "options": FEW, **values})


def problem(seed: int) -> tuple[np.ndarray, ...]:
    """A weight, states, goals and states to keep, whose directions differ in size as a text encoder's do."""
    dice = np.random.default_rng(seed)
    sizes = np.geomspace(1, 1e-2, 12)
    states, goals, kept = (dice.normal(size=(60, 12)) * sizes for _ in range(3))
    return dice.normal(size=(9, 12)), states, goals, kept


def metric_of(states: np.ndarray, kept: np.ndarray) -> np.ndarray:
    whole: np.ndarray = states.T @ states / 60 + 4 * kept.T @ kept / 60 + 1e-6 * np.eye(12)
    return whole


def loss(change: np.ndarray, weight: np.ndarray, states: np.ndarray, goals: np.ndarray, kept: np.ndarray) -> float:
    """What the increment is to make small, row by row: no matrix of moments in it."""
    missed = ((states @ change.T - (goals - states) @ weight.T) ** 2).sum() / 60
    return float(missed + 4 * ((kept @ change.T) ** 2).sum() / 60 + 1e-6 * (change**2).sum())


def solved(given: tuple[np.ndarray, ...], rank: int) -> LowRank:
    weight, states, goals, kept = given
    pull, metric = (goals - states).T @ states / 60, metric_of(states, kept)
    return nearest({"": torch.from_numpy(weight)}, torch.from_numpy(pull), torch.from_numpy(metric), rank)[""]


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_no_step_from_the_solution_makes_the_loss_less(rank: int) -> None:
    given = problem(rank)
    found = solved(given, rank)
    up, down = found.up.numpy(), found.down.numpy()
    best = loss(up @ down, *given)
    dice = np.random.default_rng(1)
    for size in (1e-1, 1e-2, 1e-3, 1e-4):
        for _ in range(40):
            moved = (part + size * np.abs(part).mean() * dice.normal(size=part.shape) for part in (up, down))
            left, right = moved
            assert loss(left @ right, *given) >= best * (1 - 1e-12)


@pytest.mark.parametrize("rank", [1, 3])
def test_descent_by_turns_from_anywhere_ends_no_lower(rank: int) -> None:
    """With one factor held the other is a least-squares solution; that search knows no singular vectors."""
    given = problem(10 + rank)
    weight, states, goals, kept = given
    found = solved(given, rank)
    best = loss((found.up @ found.down).numpy(), *given)
    metric = metric_of(states, kept)
    wanted = weight @ ((goals - states).T @ states / 60)
    ends = []
    for seed in range(4):
        up = np.random.default_rng(seed).normal(size=(9, rank))
        for _ in range(2000):
            down = np.linalg.solve(metric, (np.linalg.solve(up.T @ up, up.T @ wanted)).T).T
            up = wanted @ down.T @ np.linalg.inv(down @ metric @ down.T)
        ends.append(loss(up @ down, *given))
    assert min(ends) == pytest.approx(best, rel=1e-9)
    assert min(ends) >= best * (1 - 1e-12)


def encoded(pipe: Any, texts: Sequence[str]) -> np.ndarray:
    """States (n, tokens, d_text) by the pipeline's own public method."""
    with torch.no_grad():
        states = pipe.encode_prompt(
            list(texts), device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
        )
    found: np.ndarray = states[0].double().numpy()
    return found


def expected(pipe: Any, plan: Recipe, rank: int) -> dict[str, np.ndarray]:
    """Each module's change, by SVD and eigenvalues in numpy, from states and sentences."""
    task = Task(plan, TeacherModel(pipe), {})
    texts, new = sentences_of(task)
    states, judged = encoded(pipe, texts), encoded(pipe, new)
    bare = [task.prompts.without(text, plan.surrogate) if plan.surrogate else "" for text in (*texts, *new)]
    goals, wanted = np.split(encoded(pipe, bare), [len(texts)])
    others = [text for text in everything_else(task)[: plan.options.held] if "snoopy" not in text]  # type: ignore[union-attr]
    kept, one = encoded(pipe, others), encoded(pipe, ["snoopy"])[0]
    cosine = (kept * one).sum((1, 2)) / (np.linalg.norm(kept, axis=(1, 2)) * np.linalg.norm(one))
    weights = np.maximum(1 - np.abs(cosine), 1e-2) ** -2
    held = np.einsum("n,nti,ntj->ij", weights / weights.sum(), kept, kept) / kept.shape[1]
    rows = len(texts) * states.shape[1]
    metric = np.einsum("nti,ntj->ij", states, states) / rows + 4 * held
    metric += 1e-4 * np.trace(metric) / len(metric) * np.eye(len(metric))
    values, vectors = np.linalg.eigh(metric)
    root, inverse = (vectors * values**0.5) @ vectors.T, (vectors * values**-0.5) @ vectors.T
    pull = np.einsum("nti,ntj->ij", goals - states, states) / rows
    changes, gone, whole = {}, 0.0, 0.0
    for path, module in pipe.unet.named_modules():
        if path.endswith(("attn2.to_k", "attn2.to_v")):
            weight = module.weight.detach().double().numpy()
            left, sizes, right = np.linalg.svd(weight @ pull @ np.linalg.inv(metric) @ root, full_matrices=False)
            changes[path] = (left[:, :rank] * sizes[:rank]) @ right[:rank] @ inverse
            way = (wanted - judged) @ weight.T
            gone, whole = gone + ((judged @ changes[path].T) * way).sum(), whole + (way**2).sum()
    return {path: plan.options.reach * whole / gone * change for path, change in changes.items()}  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("family", "values", "rank"),
    [
        ("sd1", {"options": {"sentences": 70, "held": 90, "hold": 4.0}}, 1),
        ("sd1", {"surrogate": "cat", "increment": {"rank": 2}, "options": {**FEW, "reach": 0.5}}, 2),
        ("sdxl", {}, 1),
    ],
    ids=["sd1", "surrogate", "two encoders"],
)
def test_an_eraser_is_the_closed_form_of_its_states(family: str, values: dict[str, Any], rank: int) -> None:
    pipe = family_pipeline(family)
    plan = recipe(**values)
    before = {key: value.clone() for key, value in pipe.unet.state_dict().items()}
    adapter = train(plan, pipe=pipe)
    changes = expected(pipe, plan, rank)
    assert set(adapter.increments) == set(changes)
    for path, increment in adapter.increments.items():
        assert isinstance(increment, LowRank)
        assert increment.rank == rank
        found = (increment.up.double() @ increment.down.double()).numpy()
        np.testing.assert_allclose(found, changes[path], rtol=1e-3, atol=1e-4 * np.abs(changes[path]).max())
    assert all(torch.equal(value, before[key]) for key, value in pipe.unet.state_dict().items())


def test_the_weight_of_keeping_is_the_one_that_moves_new_sentences_least() -> None:
    pipe = pico_pipeline(text_width=64)
    few = {"sentences": 20, "held": 40}
    task = Task(recipe(options=few), TeacherModel(pipe), {})
    new = [text for text in everything_else(task)[40:] if "snoopy" not in text]
    states, one = encoded(pipe, new), encoded(pipe, ["snoopy"])[0]
    cosine = (states * one).sum((1, 2)) / (np.linalg.norm(states, axis=(1, 2)) * np.linalg.norm(one))
    weights = np.maximum(1 - np.abs(cosine), 1e-2) ** -2

    def leak(adapter: Adapter) -> float:
        deltas = [one.delta_for(pipe.unet.get_submodule(path).weight) for path, one in adapter.increments.items()]
        moved = sum(((states @ delta.double().numpy().T) ** 2).sum((1, 2)) for delta in deltas)
        return float((weights * moved).sum())

    by_hold = {hold: leak(train(recipe(options={**few, "hold": hold}), pipe=pipe)) for hold in (1.0, 4.0, 16.0, 64.0)}
    assert leak(train(recipe(options=few), pipe=pipe)) == pytest.approx(min(by_hold.values()), rel=1e-5)
    assert max(by_hold.values()) > 1.05 * min(by_hold.values()), "a choice that matters"


def movement(pipe: Any, adapter: Adapter, text: str) -> float:
    """How far keys and values of `text` move, over their size."""
    states = encoded(pipe, [text])[0]
    moved = whole = 0.0
    for path, increment in adapter.increments.items():
        weight = pipe.unet.get_submodule(path).weight
        moved += float(((states @ increment.delta_for(weight).double().numpy().T) ** 2).sum())
        whole += float(((states @ weight.detach().double().numpy().T) ** 2).sum())
    return float((moved / whole) ** 0.5)


def test_prompts_to_keep_are_kept_the_more_the_more_they_weigh() -> None:
    pipe = pico_pipeline(text_width=64)

    def kept(hold: float, **options: Any) -> tuple[float, float]:
        adapter = train(recipe(options={**FEW, "hold": hold, "ridge": 1e-12, **options}), pipe=pipe)
        return movement(pipe, adapter, "mickey mouse"), movement(pipe, adapter, "snoopy")

    free, some, much = (
        kept(1.0, held=1),
        kept(1.0, held=1, keep=["mickey mouse"]),
        kept(1e7, held=1, keep=["mickey mouse"]),
    )
    assert free[0] > some[0] > 100 * much[0]
    assert much[0] < 1e-3
    assert much[1] > 0.1, "the concept moves all the same"


def test_joint_erasers_leave_each_others_concepts_alone_more_than_single_ones() -> None:
    pipe = pico_pipeline(text_width=64)
    alone = train(recipe(options={**FEW, "held": 1}), pipe=pipe)
    plan = recipe(options={**FEW, "held": 1}, together=[{"target": "mickey", "aliases": ["mickey mouse"]}])
    snoopy, mickey = train_together(plan, pipe=pipe)
    assert (snoopy.name, mickey.name) == ("snoopy", "mickey")
    for name in ("mickey", "mickey mouse"):
        assert movement(pipe, snoopy, name) < 0.7 * movement(pipe, alone, name)
        assert movement(pipe, mickey, name) > 2 * movement(pipe, snoopy, name)


def test_new_sentences_are_none_of_those_computed_with() -> None:
    task = Task(recipe(options={"sentences": 150, "held": 300}), TeacherModel(pico_pipeline()), {})
    texts, new = sentences_of(task)
    assert len(set(texts)) == 150
    assert texts[0] == "snoopy"
    assert not set(texts) & set(new)
    assert all("snoopy" in text for text in (*texts, *new))
    others = everything_else(task)
    assert len(others) == len(set(others)) == 375
    elsewhere = Task(
        recipe(target="van gogh", options={"sentences": 5, "held": 300}), TeacherModel(pico_pipeline()), {}
    )
    assert everything_else(elsewhere) == others, "encoded once for all concepts"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"steps": 5}, "^recipe: steps 5 would change nothing: method 'instant' does not read it; it is a closed form"),
        ({"objective": {"eta": 2}}, "objective.eta 2.0 would change nothing(.|\n)*options.reach is how far it goes"),
        ({"anchoring": {"weight": 3}}, "anchoring.weight 3.0 would change nothing(.|\n)*options.held, options.hold"),
        ({"increment": {"kind": "dense"}}, "increment.kind 'dense' would change nothing(.|\n)*it gives a low_rank"),
        ({"options": {"keep": ["Snoopy "]}}, "options.keep: 'snoopy' is both to be erased and to be kept"),
        ({"options": {"reach": 0}}, "recipe key options.reach: Input should be greater than 0"),
        ({"options": {"reech": 1}}, "recipe key options.reech is unknown; did you mean reach"),
    ],
)  # fmt: skip
def test_a_recipe_that_would_change_nothing_is_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        recipe(**values)


def smaller(pipe: Any) -> dict[str, Any]:
    """What a call of pico PixArt needs: its pictures are of none of the sizes that the pipeline knows."""
    return {"use_resolution_binning": False} if type(pipe).__name__.startswith("PixArt") else {}


def read_by(pipe: Any, path: str, text: str) -> np.ndarray:
    """What a module of the denoiser is really given for a prompt, by the pipeline's own call; tokens (n, width)."""
    seen: list[torch.Tensor] = []
    denoiser = getattr(pipe, "unet", None) or pipe.transformer
    hook = denoiser.get_submodule(path).register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    with torch.no_grad():
        pipe(
            text,
            num_inference_steps=1,
            guidance_scale=1.0,
            output_type="latent",
            generator=torch.manual_seed(0),
            **smaller(pipe),
        )
    hook.remove()
    tokens: np.ndarray = seen[0][0].double().numpy()
    # PixArt masks its padding.
    return tokens[: len(pipe.tokenizer(text).input_ids)] if smaller(pipe) else tokens


@pytest.mark.parametrize(
    ("family", "count", "entry"),
    [
        ("sd2", 8, ""), ("sdxl", 16, ""), ("sd3", 1, "context_embedder"), ("flux-dev", 1, "context_embedder"),
        ("flux-schnell", 1, "context_embedder"), ("pixart", 4, ""),
    ],
)  # fmt: skip
def test_every_family_has_an_eraser_that_moves_the_concept_most(family: str, count: int, entry: str) -> None:
    """Judged by what the modules are given when the pipeline draws, not by what the method believes they read."""
    pipe = family_pipeline(family)
    adapter = train(recipe(options={"sentences": 40, "held": 60}), pipe=pipe)
    assert len(adapter.increments) == count
    assert all(path == entry if entry else path.endswith(("attn2.to_k", "attn2.to_v")) for path in adapter.increments)
    denoiser = getattr(pipe, "unet", None) or pipe.transformer
    gone, left = [], []
    for path, increment in adapter.increments.items():
        weight = denoiser.get_submodule(path).weight
        delta, whole = increment.delta_for(weight).double().numpy(), weight.detach().double().numpy()
        nothing = read_by(pipe, path, "")
        for name, found in (("snoopy", gone), ("dog", left), ("church", left)):
            states = read_by(pipe, path, name)
            way = (nothing[np.minimum(np.arange(len(states)), len(nothing) - 1)] - states) @ whole.T
            found.append(((states @ delta.T * way).sum(), (way**2).sum()))
    share = [sum(one for one, _ in found) / sum(other for _, other in found) for found in (gone, left)]
    assert share[0] > 0.1
    # Most of what SD3 reads is T5's padding, which random weights hardly tell apart.
    assert family == "sd3" or share[0] > 1.5 * share[1]
    with attach(pipe, [adapter], gate="always"):
        pipe("snoopy", num_inference_steps=1, output_type="latent", **smaller(pipe))


def test_a_concept_that_the_encoder_cannot_tell_from_its_surrogate_is_refused() -> None:
    pipe = pico_pipeline()
    with torch.no_grad():
        pipe.text_encoder.get_input_embeddings().weight.zero_()
    with pytest.raises(RecipeError, match=r"makes nothing of 'snoopy' that tells it from ''(.|\n)*--method spm"):
        train(recipe(), pipe=pipe)
