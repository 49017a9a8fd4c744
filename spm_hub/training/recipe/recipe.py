"""A training recipe: objective x increment x source of x_t x anchoring x optimiser, as ten lines of YAML.

Everything that decides the trained weights stands here, so that the manifest, which embeds the recipe whole, is enough
to train the same eraser again. Defaults are scaled by the trainer to the base model at hand, never tuned to one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self, get_args

import yaml
from pydantic import BaseModel, ValidationError, field_validator, model_validator

from spm_hub.adapters.manifest import NAME, slug
from spm_hub.errors import RecipeError, UsageError
from spm_hub.training.recipe.fields import RecipeFields
from spm_hub.training.recipe.known_concepts import anchor_concept, known
from spm_hub.training.recipe.presets import known_methods, merged, objective_of, preset_of
from spm_hub.training.recipe.protected_prompts import folded
from spm_hub.training.recipe.schema import (
    PEFT_KINDS,
    Masks,
    XtSource,
    hint,
)
from spm_hub.training.recipe.validation import (
    check_closed,
    check_masks,
    check_separable,
    check_surrogate,
    check_trained,
)

_OF_TARGET = ("target", "aliases", "kind", "surrogate", "name")


class Recipe(RecipeFields):
    """The whole recipe."""

    @model_validator(mode="before")
    @classmethod
    def _of_method(cls, values: Any) -> Any:
        """What the method presets, under what is given; and the anchor concept, where the method needs one."""
        preset = preset_of(str(values.get("method", "spm"))) if isinstance(values, dict) else None
        if preset is None:
            return values
        if preset.get("objective", {}).get("paired") and "surrogate" not in values:
            values = {**values, "surrogate": anchor_concept(str(values.get("target")), values.get("kind"))}
        return merged(merged(preset, _implied(preset, values)), values)

    @field_validator("method")
    @classmethod
    def _known(cls, method: str) -> str:
        if preset_of(method) is None:
            raise ValueError(f"unknown method{hint(method, known_methods())}")
        return method

    @field_validator("name")
    @classmethod
    def _a_name(cls, name: str | None) -> str | None:
        if name is not None and not re.fullmatch(NAME, name):
            instead = f", for instance {slug(name)}" if name.strip() else ", or leave it out"
            raise ValueError(f"an eraser's name is of small letters, digits and hyphens, dots, underscores{instead}")
        return name

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        wanted = objective_of(self.method)
        if self.objective.name != wanted:
            raise ValueError(f"method {self.method!r} has the objective {wanted!r}, not {self.objective.name!r}")
        if self.erase_from is not None and self.templates:
            raise ValueError("erase_from is one whole prompt: templates has to be false with it")
        if self.adversary.keywords and (self.templates or not self.aliases or self.erase_from is not None):
            raise ValueError(
                "adversary.keywords trains on the bare target and its aliases in turn: it needs aliases, and goes with "
                "neither templates nor erase_from"
            )
        if self.start_sha256 is not None and self.start_from is None:
            raise ValueError("start_sha256 is given, but no start_from")
        if self.objective.name == "uce":
            check_closed(self)
        else:
            check_trained(self)
        if self.objective.name == "minimalist":
            check_masks(self)
        elif self.increment.kind == "mask" or self.masks != Masks():
            what = "increment.kind 'mask'" if self.increment.kind == "mask" else "masks"
            raise ValueError(f"{what} belongs to method 'minimalist', not to {self.method!r}")
        check_separable(self)
        check_surrogate(self)
        return self

    @classmethod
    def make(cls, **values: Any) -> Recipe:
        """Checks `values`; RecipeError names the offending key and the nearest known one."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            about_method = any(problem["loc"] == ("method",) for problem in error.errors())
            raise RecipeError(
                "\n".join(_explain(cls, dict(problem)) for problem in error.errors()),
                mend="spmhub train --help" if about_method else "spmhub show NAME, which has every key of a recipe",
            ) from None

    @classmethod
    def plan(cls, path: Path | None = None, sets: Sequence[str] = (), **given: Any) -> Recipe:
        """What a user asks for: a file, then options over it, then `--set`.

        Well-known concepts bring their kind and aliases along, unless the file or the options say otherwise. A file's
        own aliases, kind, surrogate and name are its target's: of another target nothing is taken from them.
        Raises RecipeError for what the recipe cannot hold, UsageError for an empty concept.
        """
        values = _read(path) if path is not None else {}
        over = merged(given, _assigned(sets))
        if {"target"} <= values.keys() & over.keys() and folded(str(values["target"])) != folded(str(over["target"])):
            values = {key: value for key, value in values.items() if key not in _OF_TARGET}
        values = merged(values, over)
        if not str(values.get("target") or "").strip():
            raise UsageError("the concept is empty: there is nothing to erase", mend='spmhub train "van gogh"')
        return cls.make(**{**known(str(values["target"])), **values})

    def to_yaml(self) -> str:
        """The concept, and whatever else differs from what the method presets."""
        preset = self.make(target=self.target, method=self.method, surrogate=self.surrogate).model_dump(mode="json")
        concept = self.model_dump(mode="json", include={"target", "aliases", "kind"})
        concept |= {"surrogate": self.surrogate} if self.surrogate else {}
        named = {} if self.method == "spm" else {"method": self.method}
        values = {**concept, **named, **_difference(self.model_dump(mode="json"), preset)}
        return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)

    def with_set(self, *assignments: str) -> Recipe:
        """`objective.eta=2`, `anchoring.prompts=[a dog, a cat]`: values are YAML. Raises RecipeError."""
        return self.make(**merged(self.model_dump(mode="json"), _assigned(assignments)))


def _implied(preset: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """What the given parts make of a preset that was made for others."""
    implied: dict[str, Any] = {}
    increment, x_t = (part if isinstance(part := values.get(name), dict) else {} for name in ("increment", "x_t"))
    if increment.get("kind") == "null_space" and preset.get("increment", {}).get("kind") != "null_space":
        # SepME's small beta belongs to its great learning rate.
        implied["increment"] = {"beta": 1.0}
    if increment.get("kind") in PEFT_KINDS and preset.get("regulariser"):
        implied["regulariser"] = {"l1": 0.0}
    if x_t.get("source") == "student" and len(preset.get("x_t", {}).get("guidance", XtSource().guidance)) > 1:
        implied["x_t"] = {"guidance": (3.0,)}
    return implied


def _assigned(assignments: Sequence[str]) -> dict[str, Any]:
    """KEY=VALUE, with dots down into the parts, as nested dictionaries."""
    values: dict[str, Any] = {}
    for assignment in assignments:
        key, separator, text = assignment.partition("=")
        if not separator or not key.strip():
            raise RecipeError(f"--set {assignment!r} is not KEY=VALUE", mend="for instance --set objective.eta=2")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise RecipeError(f"--set {key}: {text!r} is not YAML: {error}") from None
        for step in reversed(key.strip().split(".")):
            value = {step: value}
        values = merged(values, value)
    return values


def _difference(values: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _difference(value, base[key]) if isinstance(value, dict) else value
        for key, value in values.items()
        if value != base[key]
    }


def _read(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"the recipe {path} cannot be read: {error.strerror}", mend="check the path") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(
            f"the recipe {path} is not YAML: {error}", mend="see the recipe in `spmhub show NAME`"
        ) from None
    if not isinstance(values, dict):
        raise RecipeError(f"the recipe {path} holds {type(values).__name__}, not keys and values")
    if odd := next((key for key in values if not isinstance(key, str)), None):
        raise RecipeError(
            f"the recipe {path} has the key {odd!r}, which YAML reads as {type(odd).__name__}, not as a name",
            mend="see the recipe in `spmhub show NAME`",
        )
    return values


def _explain(model: type[BaseModel], problem: dict[str, Any]) -> str:
    where = ".".join(str(step) for step in problem["loc"]) or "recipe"
    if problem["type"] == "literal_error":
        choices = re.findall(r"'([^']*)'", problem["ctx"]["expected"])
        given = str(problem["input"])
        return f"recipe key {where}: unknown {where.split('.')[-1]} {given!r}{hint(given, choices)}"
    if problem["type"] == "value_error" and not problem["loc"]:
        return f"recipe: {problem['ctx']['error']}"
    if problem["type"] != "extra_forbidden":
        said = problem["msg"].removeprefix("Value error, ")
        return f"recipe key {where}: {said} (got {str(problem['input'])[:80]!r})"
    for step in problem["loc"][:-1]:
        if not isinstance(step, int):
            annotation = model.model_fields[str(step)].annotation
            within = (annotation, *get_args(annotation))
            model = next((one for one in within if isinstance(one, type) and issubclass(one, BaseModel)), model)
    return f"recipe key {where} is unknown{hint(str(problem['loc'][-1]), list(model.model_fields))}"
