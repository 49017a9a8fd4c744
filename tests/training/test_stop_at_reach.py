"""A training that ends when its predictions went the wanted share of the way, and names that the encoder chooses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pico import pico_pipeline

from spm_hub.errors import RecipeError
from spm_hub.models.base_choice import BaseChoice
from spm_hub.training import Recipe, train
from spm_hub.training.base_model import TeacherModel
from spm_hub.training.data.nearest import nearest_names
from spm_hub.training.forecast import forecasts, rows_without_gradient
from spm_hub.training.loop import prediction_run
from spm_hub.training.loop.early_stopping import share_of_way
from spm_hub.training.neighbours import held_names, with_neighbours_recorded
from spm_hub.training.recipe.comparison import is_made_by
from spm_hub.training.verdict import is_short, verdict

RECIPES = sorted(Path(__file__).parents[2].glob("manifests/recipes/*.yaml"))
SMALL: dict[str, Any] = {
    "target": "snoopy", "method": "esd-x", "steps": 30, "batch_size": 2, "templates": False,
    "optimiser": {"lr": 1e-2, "warmup": 0, "ema": None}, "x_t": {"steps": 3, "trajectories": 2, "chunks": 2},
}  # fmt: skip


def small(**stop: object) -> Recipe:
    return Recipe.make(**SMALL, stop=stop)


def test_the_share_of_the_way_is_the_projection_in_float64() -> None:
    random = np.random.default_rng(3)
    concept, neutral, predicted = random.normal(size=(3, 5, 4, 8, 8))
    way = (neutral - concept).ravel()
    expected = (predicted - concept).ravel() @ way / (way @ way)
    tensors = [torch.from_numpy(one) for one in (predicted, concept, neutral)]
    assert share_of_way(*tensors) == pytest.approx(expected, rel=1e-12)
    assert share_of_way(tensors[1], *tensors[1:]) == 0.0
    assert share_of_way(tensors[2], *tensors[1:]) == pytest.approx(1.0)
    sideways = random.normal(size=way.size)
    sideways -= sideways @ way / (way @ way) * way
    moved = tensors[1] + torch.from_numpy(sideways.reshape(concept.shape))
    assert abs(share_of_way(moved, *tensors[1:])) < 1e-12


def test_a_training_ends_at_the_first_measurement_at_its_reach() -> None:
    seen: dict[int, dict[str, float]] = {}
    adapter = train(
        small(reach=0.2, every=2),
        pipe=pico_pipeline(),
        progress=lambda step, total, figures: seen.update({step: figures}),
    )
    done = adapter.manifest.training
    assert done is not None
    assert (done.ended, done.planned, done.goal) == ("early stop", 30, 0.2)
    assert done.steps < 30
    assert done.steps % 2 == 0
    assert done.reached == seen[done.steps]["reached"]
    assert done.reached >= 0.2
    assert all(seen[step]["reached"] < 0.2 for step in range(2, done.steps, 2)), "it ended at the first one"
    assert not is_short(done)
    assert "goal 20 %" in verdict(adapter.manifest)


def test_a_reach_that_is_not_met_leaves_all_steps_and_is_called_short() -> None:
    adapter = train(small(reach=40.0), pipe=pico_pipeline())
    assert adapter.manifest.training is not None
    assert adapter.manifest.training.ended == "all steps"
    assert "is not erased enough after 30 steps" in verdict(adapter.manifest)


def test_held_out_states_are_apart_and_the_same_for_every_run_of_a_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[prediction_run.PredictionRun] = []
    made = prediction_run.PredictionRun.__init__

    def noted(self: prediction_run.PredictionRun, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        runs.append(self)

    monkeypatch.setattr(prediction_run.PredictionRun, "__init__", noted)
    for reach in (0.2, 0.3):
        train(small(reach=reach, every=2), pipe=pico_pipeline())
    first, second = (run.held_out._batch for run in runs)
    assert torch.equal(first.latents, second.latents)
    assert torch.equal(first.concept, second.concept)
    runs[0].trainable.remove()
    trained_on = torch.cat([runs[0].source.batch(step).noise.flatten(1) for step in (0, 29)])
    assert not (first.noise.flatten(1)[:, None] == trained_on[None]).all(2).any(), "no trajectory is shared"


def test_a_reach_is_measured_on_the_average_that_is_saved() -> None:
    """An average of decay 0 is the parameters themselves; one of 0.999 is still near the base after ten steps."""
    reached = []
    for ema in (None, 0.0, 0.999):
        values = {**SMALL, "steps": 10, "optimiser": {**SMALL["optimiser"], "ema": ema}}
        done = train(Recipe.make(**values, stop={"reach": 40.0}), pipe=pico_pipeline()).manifest.training
        assert done is not None
        reached.append(done.reached)
    assert reached[0] == reached[1]
    assert abs(reached[2]) < 0.3 * abs(reached[0])


@pytest.mark.parametrize(
    ("stop", "words"),
    [
        ({"every": 3, "reach": None}, "every 3 says how often the reach is measured"),
        ({"reach": 0.0}, "greater than 0"),
        ({"reach": 0.5, "after": 3}, "memory 0.9 and after 3 say how to stop"),
    ],
)
def test_stops_that_would_do_nothing_are_refused(stop: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        Recipe.make(target="snoopy", stop=stop)


def test_a_manifest_of_a_version_without_a_reach_never_stops_by_one() -> None:
    now = Recipe.make(target="snoopy", method="esd-x")
    assert now.stop.reach == 0.9
    dumped = json.loads(now.model_dump_json())
    assert Recipe.make(**dumped) == now
    for key in ("reach", "every"):
        del dumped["stop"][key]
    assert Recipe.make(**dumped).stop.reach is None


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_of_papers_get_neither_the_stop_nor_the_names_of_presets(path: Path) -> None:
    plan = Recipe.plan(path, target="church")
    assert plan.stop.reach is None
    assert plan.closed_form.preserve == ()
    assert plan.protection.prompts == ()
    assert plan.protection.directions is None


def test_the_nearest_names_are_those_of_the_largest_cosine() -> None:
    base = TeacherModel(pico_pipeline())
    names = ["mickey", "a dog", "church", "picasso", "tench"]
    states = base.encode(["snoopy", "cat", *names], literally=True).states.double().flatten(1).numpy()
    unit = states / np.linalg.norm(states, axis=1, keepdims=True)
    order = np.argsort(-(unit[2:] @ unit[:2].T).max(1))
    assert nearest_names(base, ["snoopy", "cat"], names, 3) == [names[row] for row in order[:3]]


def test_uce_holds_the_nearest_names_unless_others_or_none_are_given() -> None:
    pipe = pico_pipeline()
    plan = Recipe.make(target="snoopy", aliases=("beagle",), method="uce")
    assert plan.closed_form.preserve is None
    recipe = with_neighbours_recorded(plan, pipe)
    names = recipe.closed_form.preserve
    assert names
    assert not {"snoopy", "beagle"} & set(names)
    assert held_names(plan, recipe) == f"held: the {len(names)} names nearest to 'snoopy', {', '.join(names[:8])} ..."
    made = train(plan, pipe=pipe).manifest.recipe
    assert made["closed_form"]["preserve"] == list(names)
    assert is_made_by(made, plan.model_dump(mode="json"), ("model",))
    for given in ((), ("mickey",)):
        chosen = Recipe.make(target="snoopy", method="uce", closed_form={"preserve": given})
        assert with_neighbours_recorded(chosen, pipe) == chosen
        assert held_names(chosen, chosen) is None
        assert not is_made_by(made, chosen.model_dump(mode="json"), ("model",))


def test_a_plan_says_which_names_are_held() -> None:
    plans = [Recipe.make(target="snoopy", method="uce")]
    said = [str(one) for one in forecasts(plans, BaseChoice(None, pipe=pico_pipeline()), None)]
    assert said[0].startswith("snoopy: uce takes no steps")
    assert said[1].startswith("held: the ")


def test_a_forecast_counts_the_rows_of_the_measurements() -> None:
    def rows(**stop: object) -> int:
        pipe, seen = pico_pipeline(), [0]

        def count(module: object, args: object, output: Any) -> None:
            if not torch.is_grad_enabled():
                seen.append(len(output[0]))

        pipe.unet.register_forward_hook(count)
        train(small(**stop), pipe=pipe)
        return sum(seen)

    measured = rows(reach=99.0, every=7) - rows(reach=None)
    assert measured == rows_without_gradient(small(reach=99.0, every=7)) - rows_without_gradient(small(reach=None))
