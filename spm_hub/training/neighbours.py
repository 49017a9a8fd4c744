"""Fills in the names nearest to a concept, where a recipe leaves them to the text encoder."""

from __future__ import annotations

from typing import TypeVar

from diffusers import DiffusionPipeline

from spm_hub.io.progress import phase
from spm_hub.training.base_model import TeacherModel
from spm_hub.training.data.nearest import nearest_names
from spm_hub.training.data.prompts import SMALL_VOCABULARY, PromptMaker, Words, vocabulary_words
from spm_hub.training.recipe.fields import RecipeFields
from spm_hub.training.recipe.schema import RecipePart

R = TypeVar("R", bound=RecipeFields)

_COUNT = 300
_SHOWN = 8


def with_neighbours_recorded(recipe: R, pipe: DiffusionPipeline) -> R:
    """Return the recipe with the nearest names in the place of null.

    The keys are `closed_form.preserve` and `protection.prompts`. The names are those of all its concepts together, so
    that each of several erasers keeps the same ones.
    """
    if recipe.closed_form.preserve is not None and recipe.protection.prompts is not None:
        return recipe
    with phase("looking for the nearest names"):
        names = _nearest(recipe, TeacherModel(pipe))
    found: dict[str, RecipePart] = {}
    if recipe.closed_form.preserve is None:
        found["closed_form"] = recipe.closed_form.model_copy(update={"preserve": names})
    if recipe.protection.prompts is None:
        found["protection"] = recipe.protection.model_copy(update={"prompts": names})
    return recipe.model_copy(update=found)


def held_names(plan: RecipeFields, recipe: RecipeFields) -> str | None:
    """Return in words which names `recipe` holds that `plan` left to the text encoder.

    None if there are none.
    """
    for before, names in (
        (plan.closed_form.preserve, recipe.closed_form.preserve), (plan.protection.prompts, recipe.protection.prompts),
    ):  # fmt: skip
        if before is None and names:
            return f"held: the {len(names)} names nearest to {plan.target!r}, {', '.join(names[:_SHOWN])} ..."
    return None


def _nearest(recipe: RecipeFields, base: TeacherModel) -> tuple[str, ...]:
    erased = [recipe.target, *recipe.aliases]
    for companion in recipe.together:
        erased += [companion.target, *companion.aliases]
    erased = list(dict.fromkeys(erased))
    words, vocabulary = Words.load(), vocabulary_words(base.pipe.tokenizer)
    maker = PromptMaker(tuple(erased), "other", words, ())
    known = dict.fromkeys((
        *words.things, *words.characters, *words.people, *words.artists,
        *(vocabulary if len(vocabulary) <= SMALL_VOCABULARY else ()),
    ))  # fmt: skip
    others = [one for one in known if not maker.mentions_concept(one)]
    return tuple(nearest_names(base, erased, others, _COUNT))
