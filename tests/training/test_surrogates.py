"""The surrogate that is chosen where a recipe says auto."""

from __future__ import annotations

from pathlib import Path

import pytest
from pico import pico_pipeline

from spm_hub.errors import RecipeError
from spm_hub.training import Recipe, train
from spm_hub.training.recipe.known_concepts import AUTO


@pytest.mark.parametrize(
    ("target", "values", "expected"),
    [
        ("church", {"kind": "object"}, "a picture"),
        ("gadget", {}, "a picture"),
        ("snoopy", {}, "a dog"),
        ("pikachu", {}, "a picture"),
        ("ada", {"kind": "person"}, "a person"),
        ("nudity", {}, "a picture"),
        ("van gogh", {}, "a picture"),
        ("snoopy", {"method": "ca"}, "dog"),
        ("van gogh", {"method": "ca"}, "painting"),
    ],
)
def test_auto_is_a_word_for_the_concepts_kind(target: str, values: dict[str, str], expected: str) -> None:
    assert Recipe.plan(target=target, surrogate=AUTO, **values).surrogate == expected
    assert Recipe.plan(target=target, surrogate="a tree", **values).surrogate == "a tree"


def test_nothing_is_drawn_unless_a_surrogate_is_asked_for() -> None:
    assert Recipe.plan(target="snoopy").surrogate == ""
    assert Recipe.plan(target="snoopy", method="ca").surrogate == "dog"


def test_a_surrogate_that_is_to_be_erased_is_refused() -> None:
    with pytest.raises(RecipeError, match="surrogate 'a person' is itself to be erased"):
        Recipe.make(target="a person", kind="person", surrogate=AUTO)


def test_what_was_chosen_is_in_the_manifest_and_in_a_recipes_yaml(tmp_path: Path) -> None:
    plan = Recipe.plan(target="snoopy", surrogate=AUTO, method="instant")
    (tmp_path / "recipe.yaml").write_text(plan.to_yaml(), encoding="utf-8")
    assert Recipe.plan(tmp_path / "recipe.yaml") == plan
    assert train(plan, pipe=pico_pipeline()).manifest.concept.surrogate == "a dog"
