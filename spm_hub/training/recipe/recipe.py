"""A training recipe: objective, increment, source of x_t, anchoring, optimiser; ten lines of YAML.

It holds everything that decides the trained weights, so that the manifest, which embeds the whole recipe, is enough to
train the same eraser again. The trainer scales defaults to the base model; they are never tuned to one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self, get_args

import yaml
from pydantic import BaseModel, ValidationError, ValidationInfo, field_validator, model_validator
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError
from yaml.events import AliasEvent
from yaml.nodes import Node, ScalarNode

from spm_hub.adapters.manifest import NAME, slug
from spm_hub.errors import RecipeError, UsageError
from spm_hub.io.untrusted_text import one_line
from spm_hub.training.methods import METHODS, Method, all_methods, find_method
from spm_hub.training.recipe.fields import RecipeFields
from spm_hub.training.recipe.known_concepts import AUTO, anchor_concept, general_word, known
from spm_hub.training.recipe.presets import deep_merge, with_preset
from spm_hub.training.recipe.protected_prompts import normalise_prompt
from spm_hub.training.recipe.schema import RecipePart, hint
from spm_hub.training.recipe.validation import (
    ImpossibleRecipeError,
    check_combinations,
    check_idle_keys,
    check_protection,
    check_surrogate,
    check_unused_keys,
)

_MOST_BYTES = 2**20
"""Bytes of a recipe's file; ours have some hundred."""
_OF_TARGET = ("target", "aliases", "kind", "surrogate", "name")
_RENAMED = (("x_t", "told", "guidance_embedding"),)  # (part, the key's old name, its present name)


class Recipe(RecipeFields):
    """The whole recipe."""

    @model_validator(mode="before")
    @classmethod
    def _over_preset(cls, values: Any) -> Any:
        """Lay `values` over the method's preset; choose the surrogate if it is "auto" or the method needs one."""
        usual = cls.model_fields["method"].default
        method = find_method(str(values.get("method", usual))) if isinstance(values, dict) else None
        if method is None:
            return values
        values = _renamed(values)
        usual_surrogate = AUTO if method.preset.get("objective", {}).get("paired") else ""
        if values.get("surrogate", usual_surrogate) == AUTO:
            choose = anchor_concept if usual_surrogate else general_word
            values = {**values, "surrogate": choose(str(values.get("target")), values.get("kind"))}
        return with_preset(method.preset, values)

    @field_validator("method")
    @classmethod
    def _known(cls, method: str) -> str:
        if find_method(method) is None:
            raise ValueError(f"unknown method{hint(method, all_methods())}")
        return method

    @field_validator("name")
    @classmethod
    def _a_name(cls, name: str | None) -> str | None:
        if name is not None and not re.fullmatch(NAME, name):
            instead = f", for instance {slug(name)}" if name.strip() else ", or leave it out"
            raise ValueError(f"an eraser's name is of small letters, digits and hyphens, dots, underscores{instead}")
        return name

    @field_validator("options", mode="plain")
    @classmethod
    def _of_the_method(cls, given: Any, info: ValidationInfo) -> RecipePart | None:
        """Read the method's own keys; unknown ones are refused with the nearest name."""
        name = info.data.get("method", "")
        kind = None if (method := find_method(name)) is None else method.options
        if kind is None:
            if given:
                raise ValueError(f"method {name!r} has no options of its own: leave them out")
            return None
        try:
            return kind.model_validate({} if given is None else given)
        except ValidationError as error:
            raise ValueError("\n".join(_explain(kind, dict(one), "options") for one in error.errors())) from None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        method = self._method
        if self.objective.name != method.objective_name:
            known = {one.objective_name for one in METHODS.values()} | {method.objective_name}
            raise ValueError(
                f"method {self.method!r} has the objective {method.objective_name!r}, not {self.objective.name!r}"
                + ("" if self.objective.name in known else hint(self.objective.name, sorted(known)))
            )
        check_unused_keys(
            self, method.preset, method.reads, method.reason,
            lambda key: [name for name, one in METHODS.items() if one.reads(key)],
        )  # fmt: skip
        method.check(self)
        check_combinations(self)
        check_idle_keys(self, method.preset)
        check_protection(self, self.trains_jointly)
        check_surrogate(self)
        return self

    @property
    def _method(self) -> Method:
        method = find_method(self.method)
        assert method is not None, "checked by _known"
        return method

    @property
    def trains_jointly(self) -> bool:
        """True if one run makes an eraser of each concept, without effect on the other concepts."""
        return self._method.together(self)

    @classmethod
    def make(cls, **values: Any) -> Recipe:
        """Return the checked recipe; RecipeError names the offending key and the nearest known one."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            problems = error.errors()
            causes = [problem.get("ctx", {}).get("error") for problem in problems]
            mends = [cause.mend for cause in causes if isinstance(cause, ImpossibleRecipeError)]
            if any(problem["loc"] == ("method",) for problem in problems):
                mends.append("spmhub methods")
            raise RecipeError(
                "\n".join(_explain(cls, dict(problem)) for problem in problems),
                mend=mends[0] if mends else "spmhub show NAME --full, which has every key of a recipe",
            ) from None

    @classmethod
    def plan(cls, path: Path | None = None, sets: Sequence[str] = (), **given: Any) -> Recipe:
        """Return the recipe that a user asks for: a file, options over it, and `--set` over both.

        Well-known concepts bring their kind and aliases along, unless the file or the options say otherwise. A file's
        own aliases, kind, surrogate and name belong to its target: they are dropped for another target.
        Raises RecipeError for an unknown key or an impossible value, UsageError for an empty concept.
        """
        values = _read(path) if path is not None else {}
        over = deep_merge(_renamed(given), _assigned(sets))
        if {"target"} <= values.keys() & over.keys() and normalise_prompt(str(values["target"])) != normalise_prompt(
            str(over["target"])
        ):
            values = {key: value for key, value in values.items() if key not in _OF_TARGET}
        values = deep_merge(values, over)
        if not str(values.get("target") or "").strip():
            raise UsageError("the concept is empty: there is nothing to erase", mend='spmhub train "van gogh"')
        return cls.make(**{**known(str(values["target"])), **values})

    def to_yaml(self) -> str:
        """Return YAML of the concept, and of everything that differs from the method's preset."""
        preset = self.make(target=self.target, method=self.method, surrogate=self.surrogate).model_dump(mode="json")
        concept = self.model_dump(mode="json", include={"target", "aliases", "kind"})
        concept |= {"surrogate": self.surrogate} if self.surrogate else {}
        usual = type(self).model_fields["method"].default
        named = {} if self.method == usual else {"method": self.method}
        values = {**concept, **named, **_difference(self.model_dump(mode="json"), preset)}
        return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)

    def with_set(self, *assignments: str) -> Recipe:
        """Return the recipe with changes such as `objective.eta=2`; values are YAML. Raises RecipeError."""
        return self.make(**deep_merge(self.model_dump(mode="json"), _assigned(assignments)))


class _PlainLoader(yaml.SafeLoader):
    """Reads YAML without anchors and without integers of more than 64 bits.

    A few lines of anchors unfold into more text than a memory holds, and Python does not write integers of thousands of
    digits.
    """

    def compose_node(self, parent: Node | None, index: int) -> Node | None:
        """Return the next node. Raises yaml.YAMLError for an anchor, or for a reference to one."""
        parser: Any = self  # whose methods are not annotated
        event = parser.peek_event()
        if isinstance(event, AliasEvent) or getattr(event, "anchor", None) is not None:
            raise ComposerError(None, None, "it has an anchor (& or *), which recipes do not use", event.start_mark)
        return super().compose_node(parent, index)

    def integer(self, node: ScalarNode) -> int:
        """Return the integer of a node. Raises yaml.YAMLError for one of more than 64 bits."""
        value = int(self.construct_yaml_int(node))
        if value.bit_length() > 64:
            raise ConstructorError(None, None, f"an integer of {value.bit_length()} bits; 64 are read", node.start_mark)
        return value


_PlainLoader.add_constructor("tag:yaml.org,2002:int", _PlainLoader.integer)


def _assigned(assignments: Sequence[str]) -> dict[str, Any]:
    """Return assignments KEY=VALUE, with dots down into the parts, as nested dictionaries."""
    values: dict[str, Any] = {}
    for assignment in assignments:
        key, separator, text = assignment.partition("=")
        if not separator or not key.strip():
            raise RecipeError(f"--set {assignment!r} is not KEY=VALUE", mend="for instance --set objective.eta=2")
        try:
            value = _parsed(text)
        except yaml.YAMLError as error:
            raise RecipeError(f"--set {key}: {text!r} is not YAML: {error}") from None
        for step in reversed(key.strip().split(".")):
            value = {step: value}
        values = deep_merge(values, value)
    return _renamed(values)


def _renamed(values: dict[str, Any]) -> dict[str, Any]:
    """Return `values` with the present names of keys. Raises RecipeError if old and new are given."""
    for part, old, new in _RENAMED:
        keys = values.get(part)
        if isinstance(keys, dict) and old in keys:
            if new in keys:
                raise RecipeError(
                    f"recipe key {part}.{old} is the old name of {part}.{new}: both are given",
                    mend=f"--set {part}.{new}=...",
                )
            values = {**values, part: {new if key == old else key: value for key, value in keys.items()}}
    return values


def _difference(values: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _difference(value, base[key]) if isinstance(value, dict) else value
        for key, value in values.items()
        if value != base[key]
    }


def _parsed(text: str) -> Any:
    """Return the value of a YAML text. Raises yaml.YAMLError, whatever the parser raises."""
    try:
        return yaml.load(text, _PlainLoader)
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
        # Dates that are none, numbers of thousands of digits, tags with other content than they name, deep nesting.
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else f"{type(error).__name__}: {error}"
        raise yaml.YAMLError(one_line(reason[:200])) from error


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MOST_BYTES or (path.exists() and not path.is_file()):
            raise RecipeError(f"the recipe {path} is no file of at most {_MOST_BYTES} bytes", mend="check the path")
        values = _parsed(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"the recipe {path} cannot be read: {error.strerror}", mend="check the path") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(
            f"the recipe {path} is not YAML: {error}", mend="see the recipe in `spmhub show NAME --full`"
        ) from None
    if not isinstance(values, dict):
        raise RecipeError(f"the recipe {path} holds {type(values).__name__}, not keys and values")
    for odd in (key for key in values if not isinstance(key, str)):
        raise RecipeError(
            f"the recipe {path} has the key {_shown(odd)!r}, which YAML reads as {type(odd).__name__}, not as a name",
            mend="see the recipe in `spmhub show NAME --full`",
        )
    return _renamed(values)


def _shown(value: object) -> str:
    """Return the first 80 characters of a value, or the size of an integer too long to write."""
    if isinstance(value, int) and value.bit_length() > 256:
        return f"an integer of {value.bit_length()} bits"
    return str(value)[:80]


def _explain(model: type[BaseModel], problem: dict[str, Any], part: str = "") -> str:
    """Return one line for a problem that pydantic found; `part` is the recipe key of `model`, if any."""
    where = ".".join(str(step) for step in ((part,) if part else ()) + problem["loc"]) or "recipe"
    if problem["type"] == "literal_error":
        choices = re.findall(r"'([^']*)'", problem["ctx"]["expected"])
        given = _shown(problem["input"])
        return f"recipe key {where}: unknown {where.split('.')[-1]} {given!r}{hint(given, choices)}"
    if problem["type"] == "value_error" and problem["loc"] in ((), ("options",)):
        said = str(problem["ctx"]["error"])
        return (
            said
            if said.startswith("recipe key")
            else f"{'recipe' if where == 'recipe' else f'recipe key {where}'}: {said}"
        )
    if problem["type"] != "extra_forbidden":
        said = problem["msg"].removeprefix("Value error, ")
        return f"recipe key {where}: {said} (got {_shown(problem['input'])!r})"
    for step in problem["loc"][:-1]:
        if not isinstance(step, int):
            annotation = model.model_fields[str(step)].annotation
            within = (annotation, *get_args(annotation))
            model = next((one for one in within if isinstance(one, type) and issubclass(one, BaseModel)), model)
    return f"recipe key {where} is unknown{hint(str(problem['loc'][-1]), list(model.model_fields))}"
