"""A training recipe: objective x increment x source of x_t x anchoring x optimiser, as ten lines of YAML.

Everything that decides the trained weights stands here, so that the manifest, which embeds the recipe whole, is enough
to train the same eraser again. Defaults are scaled by the trainer to the base model at hand, never tuned to one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from spm_hub.errors import RecipeError, UsageError
from spm_hub.adapters.manifest import NAME, slug

from spm_hub.training.recipe.known_concepts import anchor_concept, known
from spm_hub.training.recipe.unused_keys import check_idle
from spm_hub.training.recipe.presets import known_methods, merged, objective_of, preset_of
from spm_hub.training.recipe.schema import PEFT_KINDS, Adversary, Anchoring, ClosedForm, Companion, ConceptKind, EarlyStop, IncrementRecipe, Masks, NonBlank, Objective, Optimiser, Part, Protection, Regulariser, XtSource, hint
from spm_hub.training.recipe.protected_prompts import check_separable, folded

_OF_TARGET = ("target", "aliases", "kind", "surrogate", "name")


class Recipe(Part):
    """The whole recipe."""

    target: NonBlank
    aliases: tuple[NonBlank, ...] = ()
    kind: ConceptKind = "other"
    surrogate: str = ""
    erase_from: NonBlank | None = Field(
        default=None, description="erase the target out of this prompt only, which is trained on in its place (ESD)"
    )
    name: str | None = Field(default=None, description="of the eraser; made from the target unless given")
    model: NonBlank = "sketchbook"
    method: str = Field(default="spm", description="a preset of the parts below, each of which may be changed")
    objective: Objective = Objective()
    increment: IncrementRecipe = IncrementRecipe()
    x_t: XtSource = XtSource()
    anchoring: Anchoring = Anchoring()
    adversary: Adversary = Adversary()
    start_from: NonBlank | None = Field(
        default=None, description="an eraser that the training begins with, in place of nothing erased"
    )
    start_sha256: str | None = Field(
        default=None, description="of that eraser's tensors; checked where given, and recorded"
    )
    optimiser: Optimiser = Optimiser()
    regulariser: Regulariser = Regulariser()
    protection: Protection = Protection()
    together: tuple[Companion, ...] = Field(
        default=(), description="concepts erased in the same run, into erasers of their own (sepme, uce)"
    )
    stop: EarlyStop = EarlyStop()
    closed_form: ClosedForm = ClosedForm()
    masks: Masks = Masks()
    steps: int = Field(default=300, ge=1)
    batch_size: int = Field(default=8, ge=1)
    templates: bool = Field(
        default=True, description="train on the concept in many sentences, not on its bare name alone"
    )
    resolution: int | None = Field(
        default=None, ge=8, multiple_of=8, description="pixels; the model's own unless given"
    )
    seed: int = Field(default=0, ge=0, lt=2**31)
    strength: float = Field(
        default=1.0, description="gamma's factor when the eraser is attached (the paper doubles it for styles)"
    )

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
            self._check_closed()
        else:
            self._check_trained()
        if self.objective.name == "minimalist":
            self._check_masks()
        elif self.increment.kind == "mask" or self.masks != Masks():
            what = "increment.kind 'mask'" if self.increment.kind == "mask" else "masks"
            raise ValueError(f"{what} belongs to method 'minimalist', not to {self.method!r}")
        check_separable(self)
        self._check_surrogate()
        return self

    def _check_surrogate(self) -> None:
        names = [self.target, *self.aliases]
        for companion in self.together:
            names += [companion.target, *companion.aliases]
        if (put := folded(self.surrogate)) in map(folded, names):
            raise ValueError(
                f"surrogate {put!r} is itself to be erased, so that nothing would change: surrogate is what is drawn "
                "in the concept's place; leave it out for nothing at all"
            )

    def _check_trained(self) -> None:
        if self.closed_form != ClosedForm():
            raise ValueError(f"closed_form belongs to method 'uce', not to {self.method!r}")
        held = set(map(folded, self.anchoring.prompts))
        if clash := held.intersection(map(folded, (self.target, *self.aliases))):
            raise ValueError(f"anchoring.prompts: {sorted(clash)[0]!r} is both to be erased and to be held")
        if self.increment.kind in PEFT_KINDS:
            for what, given in (
                ("start_from", self.start_from is not None),
                ("regulariser.l1", self.regulariser.l1 > 0),
            ):
                if given:
                    raise ValueError(
                        f"{what} goes with increment.kind 'low_rank' or 'dense', not with {self.increment.kind!r}: "
                        f"try --increment lora:{min(self.increment.rank, 16)}"
                    )
        if self.erase_from is not None and self.objective.teacher == "student":
            raise ValueError(
                f"erase_from {self.erase_from!r} needs what the frozen base predicts, and objective.teacher is "
                "'student', the model being erased: method 'esd-x' has it, or objective.teacher 'base'"
            )
        if self.erase_from is not None and self.objective.paired:
            raise ValueError(
                f"erase_from {self.erase_from!r} has the empty prompt beside it, and objective.paired another "
                "sentence: choose one of them"
            )
        if self.objective.name == "ca" and not self.surrogate:
            raise ValueError(
                "method 'ca' makes the concept into an anchor concept, which surrogate has to name: "
                "surrogate: dog for snoopy, surrogate: painting for a style; method 'sdd' needs none"
            )
        if (self.objective.paired or self.anchoring.source == "surrogate") and not self.surrogate:
            raise ValueError("objective.paired and anchoring.source 'surrogate' need a surrogate, and it is empty")
        if self.objective.name == "fmn":
            if self.erase_from is not None:
                raise ValueError(
                    "method 'fmn' looks away from the concept's own words and has no erase_from; esd-x has"
                )
            if self.anchoring.weight and self.anchoring.reach is not None:
                raise ValueError("method 'fmn' has no prediction to steer by: anchoring.reach has to be null with it")
        check_idle(self)

    def _check_masks(self) -> None:
        unused = {"trajectories", "chunks", "source", "driver", "told"}
        if self.increment != IncrementRecipe(kind="mask"):
            raise ValueError(
                f"method {self.method!r} switches neurons off: its increment is of kind 'mask'; "
                "another increment has method 'spm' or 'esd-x'"
            )
        if self.anchoring != Anchoring():
            raise ValueError(f"method {self.method!r} has no anchoring: it holds the rest by masks.beta")
        for key, other in (
            ("erase_from", "esd-x"),
            ("start_from", "esd-x"),
            ("adversary", "race"),
            ("regulariser", "sepme"),
            ("stop", "sepme"),
            ("together", "sepme"),
            ("protection", "sepme"),
        ):
            if getattr(self, key) != Recipe.model_fields[key].default:
                raise ValueError(f"method {self.method!r} has no {key}; method {other!r} has")
        if self.x_t.model_dump(include=unused) != XtSource().model_dump(include=unused):
            raise ValueError(
                f"method {self.method!r} draws whole pictures: of x_t it has steps and guidance, not {sorted(unused)}"
            )
        if len(self.x_t.guidance) != 1 or self.x_t.guidance[0] < 1:
            raise ValueError(
                f"method {self.method!r} draws under one guidance of 1 or more, for instance x_t.guidance=[3.0] "
                f"(got {list(self.x_t.guidance)})"
            )
        if self.optimiser.ema is not None:
            raise ValueError(f"method {self.method!r} keeps no moving average: optimiser.ema has to be null")
        if self.optimiser.scale_lr:
            raise ValueError(f"method {self.method!r} has one lr for all neurons: optimiser.scale_lr has to be false")
        if self.batch_size * self.masks.accumulate % 2:
            raise ValueError(
                f"method {self.method!r} trains on the concept and on anything else by turns: batch_size "
                f"{self.batch_size} times masks.accumulate {self.masks.accumulate} has to be even"
            )

    def _check_closed(self) -> None:
        names = [self.target, *self.aliases]
        for companion in self.together:
            names += [companion.target, *companion.aliases]
        if clash := set(map(folded, names)).intersection(map(folded, self.closed_form.preserve)):
            raise ValueError(f"closed_form.preserve: {sorted(clash)[0]!r} is both to be erased and to be held")
        fields = Recipe.model_fields
        loops = (
            "erase_from", "x_t", "anchoring", "adversary", "start_from", "optimiser", "regulariser", "stop",
            "steps", "batch_size", "templates",
        )  # fmt: skip
        preset = preset_of(self.method) or {}
        for key in loops:
            if getattr(self, key) != preset.get(key, fields[key].default):
                raise ValueError(f"method {self.method!r} is a closed form, without a training loop: it has no {key}")
        if self.increment.kind != "low_rank" or self.increment.rank != 1:
            raise ValueError(
                f"method {self.method!r} gives an exact low_rank increment: increment.kind cannot be chosen, "
                "and in place of increment.rank it has closed_form.rank"
            )
        if self.increment.modules != "esd-x-strict":
            raise ValueError(f"method {self.method!r} edits keys and values of cross-attention, 'esd-x-strict', only")

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

    @property
    def slug(self) -> str:
        """The eraser's name."""
        return self.name or slug(self.target)

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

    @property
    def adversary_from(self) -> int:
        """The first step that is attacked; `steps` where there is no adversary."""
        if self.adversary.steps == 0:
            return self.steps
        begins = self.adversary.begins
        if begins is None:
            begins = 0.5 if self.start_from is None else 0.0
        return int(begins * self.steps)

    def learning_rate(self, step: int) -> float:
        """Factor of the learning rate at `step` (from 0)."""
        warmup = min(self.optimiser.warmup, self.steps - 1)
        if step < warmup:
            return (step + 1) / (warmup + 1)
        progress = (step - warmup) / max(1, self.steps - warmup)
        match self.optimiser.schedule:
            case "constant":
                return 1.0
            case "cosine":
                return 0.5 * (1 + math.cos(math.pi * progress))
            case "cosine_restarts":
                return 0.5 * (1 + math.cos(math.pi * ((progress * self.optimiser.cycles) % 1.0)))


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
