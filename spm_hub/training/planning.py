"""Plan the runs that erase the given concepts: one recipe for each run. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spm_hub.adapters.manifest import slug
from spm_hub.errors import UsageError
from spm_hub.training.recipe.known_concepts import known
from spm_hub.training.recipe.presets import deep_merge
from spm_hub.training.recipe.recipe import Recipe


def plan(concept: str | Recipe | Sequence[str], keys: Mapping[str, Any]) -> tuple[Recipe, ...]:
    """Return one recipe for each run, as `plan_runs` does.

    concept: one concept, a list of them, or a recipe to change.
    keys: keys of the recipe; of a part given as a dictionary, the keys that are not in it keep their values.
    Raises UsageError for anything else, and as `plan_runs` does.
    """
    if isinstance(concept, Recipe):
        return plan_runs((), deep_merge(concept.model_dump(mode="json"), dict(keys)))
    concepts = [concept] if isinstance(concept, str) else concept
    if not isinstance(concepts, list | tuple) or not concepts or not all(isinstance(one, str) for one in concepts):
        raise UsageError(
            f"train takes a concept, a list of concepts or a Recipe, not {concept!r}", mend='spm_hub.train("van gogh")'
        )
    return plan_runs(concepts, keys)


def plan_runs(
    concepts: Sequence[str], given: Mapping[str, Any], *, file: Path | None = None, sets: Sequence[str] = ()
) -> tuple[Recipe, ...]:
    """Return one recipe for each run.

    That is one for all concepts if the method trains them jointly, else one for each concept.
    given: keys of the recipe, over those of `file`; `sets` are KEY=VALUE assignments over both. Without concepts the
    file or the keys name the target.
    Raises UsageError for an empty concept, for two of one name, and for keys that belong to one eraser alone;
    RecipeError for anything that no recipe can hold.
    """
    if any(not concept.strip() for concept in concepts):
        raise UsageError("the concept is empty: there is nothing to erase", mend='spmhub train "van gogh"')
    if concepts and any(one.partition("=")[0].strip() == "target" for one in sets):
        raise UsageError(
            f"--set target and {concepts[0]!r} both say what to erase", mend="name every concept as an argument"
        )
    first = Recipe.plan(file, sets, **given, **({"target": concepts[0]} if concepts else {}))
    if len(concepts) < 2:
        return (first,)
    _check_shared(first, concepts, named="name" in given)
    if not first.trains_jointly:
        return (first, *(Recipe.plan(file, sets, **given, target=concept) for concept in concepts[1:]))
    # A kind from the file or from --set counts for all concepts, as it does where they are trained one by one.
    given_kind = {} if first.kind == known(first.target).get("kind", "other") else {"kind": first.kind}
    others = [{"target": concept, **known(concept), **given_kind} for concept in concepts[1:]]
    return (Recipe.plan(file, sets, **given, target=concepts[0], together=others),)


def _check_shared(first: Recipe, concepts: Sequence[str], *, named: bool) -> None:
    """Refuse keys that belong to one eraser where there are several, and concepts that share a name."""
    if named or first.name is not None:
        raise UsageError(
            f"a name belongs to one eraser, but there are {len(concepts)} concepts",
            mend="leave --name out, in Python name=: each eraser gets the name of its concept",
        )
    if first.aliases != known(first.target).get("aliases", ()):
        raise UsageError(
            f"aliases belong to one concept, but there are {len(concepts)}", mend="train the concepts one by one"
        )
    slugs = [slug(concept) for concept in concepts]
    if twice := next((one for one in concepts if slugs.count(slug(one)) > 1), None):
        raise UsageError(f"{twice!r} is to be erased twice", mend="name every concept once")
    if first.together:
        raise UsageError(
            f"together names {first.together[0].target!r}, in addition to the {len(concepts)} concepts to erase",
            mend="name every concept as an argument, and leave together out",
        )
