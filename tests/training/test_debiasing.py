"""UCE's debiasing in closed form, against a float64 transcription of its rounds of edits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pico import pico_pipeline

from spm_hub.adapters.increments import LowRank
from spm_hub.errors import RecipeError
from spm_hub.training import Recipe, train
from spm_hub.training.trainer import train_together

PAPER = {"tokens": "last", "sentences": 0, "held": 0, "rank": None, "preserve": (), "erase_scale": 1.0}
MIX = ({"prompt": "a red person", "weight": 0.5}, {"prompt": "blue dog", "weight": -0.4})


def last_state(pipe: Any, prompt: str) -> np.ndarray:
    """The text encoder's state of a prompt's last token, float64."""
    window = pipe.tokenizer(prompt, padding="max_length", max_length=12, return_tensors="pt")
    end = int((window.input_ids[0] == pipe.tokenizer.eos_token_id).nonzero()[0])
    with torch.no_grad():
        found: np.ndarray = pipe.text_encoder(window.input_ids)[0][0, end - 1].double().numpy()
    return found


def test_debiasing_is_the_papers_closed_form_after_several_rounds_in_float64() -> None:
    """Every round adds to v* = W c_e + sum_i w_i W c_i; the authors' script agreed to 2.2e-14 of the largest number."""
    pipe, ridge, erase, preserve, kept = pico_pipeline(), 0.7, 1.5, 0.5, ("church", "picasso")
    rounds = {"a snoopy": ((0.3, -0.3), (0.2, -0.1)), "mickey": ((0.1, -0.2), (0.05, 0.0))}
    attributes = [one["prompt"] for one in MIX]
    found: dict[str, Any] = {}
    for target, other in (("a snoopy", "mickey"), ("mickey", "a snoopy")):
        whole = np.sum(rounds[target], axis=0)
        closed_form = {
            **PAPER, "ridge": ridge, "erase_scale": erase, "preserve_scale": preserve, "preserve": kept,
            "attributes": [{"prompt": name, "weight": weight} for name, weight in zip(attributes, whole, strict=True)],
        }  # fmt: skip
        plan = Recipe.make(target=target, together=[{"target": other}], method="uce", closed_form=closed_form)
        (mine,) = [one for one in train_together(plan, pipe=pipe) if one.manifest.concept.target == target]
        assert {one.rank for one in mine.increments.values() if isinstance(one, LowRank)} == {1}
        for path, increment in mine.increments.items():
            delta = increment.delta_for(pipe.unet.get_submodule(path).weight).double().numpy()
            found[path] = found.get(path, 0) + delta
    for path, delta in found.items():
        w = pipe.unet.get_submodule(path).weight.detach().double().numpy()
        left, m = ridge * w, ridge * np.eye(w.shape[1])
        for target, steps in rounds.items():
            c = last_state(pipe, target)
            value = w @ c
            for step in steps:
                for name, weight in zip(attributes, step, strict=True):
                    value = value + weight * (w @ last_state(pipe, name))
            left, m = left + erase * np.outer(value, c), m + erase * np.outer(c, c)
        for c in (last_state(pipe, name) for name in kept):
            left, m = left + preserve * np.outer(w @ c, c), m + preserve * np.outer(c, c)
        expected = left @ np.linalg.inv(m) - w
        np.testing.assert_allclose(delta, expected, rtol=1e-3, atol=1e-5 * np.abs(expected).max())


def test_an_edit_is_linear_in_its_weights_in_sentences_too() -> None:
    pipe = pico_pipeline()

    def delta(first: float, second: float) -> torch.Tensor:
        attributes = [{**MIX[0], "weight": first}, {**MIX[1], "weight": second}]
        closed_form = {"sentences": 4, "held": 3, "rank": None, "attributes": attributes}
        made = train(Recipe.make(target="snoopy", method="uce", closed_form=closed_form), pipe=pipe)
        path = next(iter(made.increments))
        return made.increments[path].delta_for(pipe.unet.get_submodule(path).weight)

    both, one, other = delta(0.5, -0.25), delta(1.0, 0.0), delta(0.0, 1.0)
    assert float(one.abs().max()) > 1e-3
    torch.testing.assert_close(both, 0.5 * one - 0.25 * other, rtol=1e-3, atol=1e-5 * float(both.abs().max()))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"surrogate": "dog"}, "surrogate 'dog' would replace it"),
        ({"kind": "style"}, "leave kind out"),
        ({"aliases": ["Blue  dog"]}, "'blue dog' is both to be erased and to be kept"),
        ({"closed_form": {"attributes": [MIX[0], {**MIX[0], "weight": 2}]}}, "names 'a red person' twice"),
        ({"closed_form": {"attributes": [{**MIX[0], "weight": 0}]}}, "all weights are 0(.|\n)*--balance"),
        ({"closed_form": {"attributes": [{"prompt": "a dog"}]}}, "closed_form.attributes.0.weight"),
        ({"method": "spm"}, "method 'spm' does not read it(.|\n)*: 'uce'\n"),
    ],
)
def test_attributes_that_balance_nothing_are_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        Recipe.make(**{"target": "snoopy", "method": "uce", "closed_form": {"attributes": MIX}, **values})


def test_attributes_survive_a_recipes_yaml(tmp_path: Any) -> None:
    plan = Recipe.make(target="snoopy", method="uce", closed_form={"attributes": MIX})
    (path := tmp_path / "recipe.yaml").write_text(plan.to_yaml(), encoding="utf-8")
    assert Recipe.plan(path) == plan
