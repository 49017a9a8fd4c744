"""A training recipe: objective x increment x source of x_t x anchoring x optimiser, as ten lines of YAML.

Everything that decides the trained weights stands here, so that the manifest, which embeds the recipe whole, is enough
to train the same eraser again. Defaults are scaled by the trainer to the base model at hand, never tuned to one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, field_validator, model_validator

from spm_hub.errors import RecipeError, UsageError, nearest
from spm_hub.manifest import slug

from .concepts import known
from .methods import METHODS, merged, objective_of

NonBlank = Annotated[str, StringConstraints(pattern=r"\S", strip_whitespace=True)]
ConceptKind = Literal["object", "character", "person", "style", "nsfw", "other"]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Objective(_Part):
    """What the erased prediction is pulled to: a file in `objectives/`."""

    name: Literal["spm", "esd", "uce"] = "spm"
    eta: float = Field(default=1.0, ge=0, description="how far beyond the surrogate's prediction the target lies")
    convention: Literal["paper", "rewrite"] = Field(
        default="paper", description="rewrite: eta as ESD's authors count it since 2025, the paper's plus 1"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.convention == "rewrite" and self.name != "esd":
            raise ValueError(f"convention 'rewrite' belongs to objective 'esd', not {self.name!r}")
        if self.convention == "rewrite" and self.eta == 0:
            raise ValueError("convention 'rewrite' with eta 0 asks for the base's own prediction: nothing is erased")
        if self.name == "uce" and self.eta != 1.0:
            raise ValueError(f"'uce' is a closed form and has no eta (got {self.eta}); it has closed_form.ridge")
        return self


class ClosedForm(_Part):
    """What a closed form (UCE) is told in place of a training."""

    ridge: float = Field(default=0.5, gt=0, description="lambda: how hard everything else is held")
    preserve: tuple[NonBlank, ...] = Field(default=(), description="prompts held one by one")


class IncrementRecipe(_Part):
    """What is trained: low-rank of `rank` 1 is SPM's one-dimensional adapter; dense, full weights and biases."""

    kind: Literal["low_rank", "dense"] = "low_rank"
    rank: int = Field(default=1, ge=1, le=128, description="of low_rank; a closed form has its own")
    modules: Literal["targets", "esd-x", "esd-x-strict", "esd-x-strict-text", "esd-u", "esd-all", "esd-selfattn"] = (
        Field(default="targets", description="targets: SPM's, all of the attention blocks; the others: ESD's")
    )
    dtype: Literal["float32", "float16", "bfloat16"] = Field(default="float32", description="of the saved file")

    @classmethod
    def named(cls, text: str) -> dict[str, Any]:
        """Keys of a recipe's `increment` out of "spm", "lora:4" (a rank) or "dense". Raises UsageError."""
        kind, colon, rank = text.strip().lower().partition(":")
        if kind == "lora" and rank.isdecimal():
            return {"kind": "low_rank", "rank": int(rank)}
        if kind in ("spm", "dense") and not colon:
            return {"kind": "dense"} if kind == "dense" else {"kind": "low_rank", "rank": 1}
        raise UsageError(
            f"unknown increment {text!r}{_hint(kind, ('spm', 'lora:RANK', 'dense'))}", mend="--increment lora:4"
        )


class XtSource(_Part):
    """Where the noisy latents x_t come from.

    trajectory: trajectories of the frozen base, whose predictions are the free targets.
    student: the paper's own, sampled by the model being erased under `guidance` from noise to a random step.
    """

    source: Literal["trajectory", "student"] = "trajectory"
    steps: int = Field(default=16, ge=2, le=1000, description="denoising steps of a trajectory")
    guidance: tuple[float, ...] = Field(
        default=(0.0, 1.0, 3.0, 7.5),
        min_length=1,
        description="guidance scales a trajectory is driven with, one drawn for each; the student uses the first",
    )
    trajectories: int = Field(default=24, ge=1, description="trajectories run side by side")
    chunks: int = Field(default=4, ge=1, description="groups of trajectories over the whole training")


class Anchoring(_Part):
    """Latent anchoring (Eq. 7): what must stay, and how hard it is held."""

    weight: float = Field(default=40.0, ge=0, description="lambda; where it begins when there is a `reach`; 0: none")
    reach: float | None = Field(
        default=0.9,
        gt=0,
        description="lambda is steered so that the concept's predictions end this share of the way to the surrogate's; "
        "null keeps it as it is",
    )
    alpha: float = Field(default=1.0, ge=0, description="P(anchor) ~ (1 - |cos(anchor, target)|)^alpha")
    source: Literal["text", "gaussian", "given"] = Field(
        default="text",
        description="text: sentences about everything else; gaussian: the released code's; given: `prompts`",
    )
    prompts: tuple[NonBlank, ...] = ()
    per_target: int = Field(default=2, ge=0, description="anchors for each target row of a batch")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.source == "given") != bool(self.prompts):
            raise ValueError(
                f"source is {self.source!r} with {len(self.prompts)} prompts: prompts belong to source 'given'"
            )
        return self


class Optimiser(_Part):
    """AdamW over the increments."""

    lr: float = Field(default=3e-3, gt=0)
    schedule: Literal["cosine", "cosine_restarts", "constant"] = "cosine"
    warmup: int = Field(default=20, ge=0)
    cycles: int = Field(default=3, ge=1, description="of cosine_restarts")
    weight_decay: float = Field(default=0.0, ge=0)
    scale_lr: bool = Field(
        default=True, description="lr of `down` proportional to 1 / fan-in, so that one lr fits every width"
    )


class Recipe(_Part):
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
    optimiser: Optimiser = Optimiser()
    closed_form: ClosedForm = ClosedForm()
    steps: int = Field(default=240, ge=1)
    batch_size: int = Field(default=8, ge=1)
    templates: bool = Field(
        default=True, description="train on the concept in many sentences, not on its bare name alone"
    )
    resolution: int | None = Field(default=None, ge=8, description="pixels; the model's own unless given")
    seed: int = Field(default=0, ge=0, lt=2**31)
    strength: float = Field(
        default=1.0, description="gamma's factor when the eraser is attached (the paper doubles it for styles)"
    )

    @model_validator(mode="before")
    @classmethod
    def _of_method(cls, values: Any) -> Any:
        """What the method presets, under what is given."""
        preset = METHODS.get(values.get("method", "spm")) if isinstance(values, dict) else None
        return values if preset is None else merged(preset, values)

    @field_validator("method")
    @classmethod
    def _known(cls, method: str) -> str:
        if method not in METHODS:
            raise ValueError(f"unknown method{_hint(method, METHODS)}")
        return method

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        wanted = objective_of(self.method)
        if self.objective.name != wanted:
            raise ValueError(f"method {self.method!r} has the objective {wanted!r}, not {self.objective.name!r}")
        if self.erase_from is not None and self.templates:
            raise ValueError("erase_from is one whole prompt: templates has to be false with it")
        if self.objective.name == "uce":
            self._check_closed()
        elif self.closed_form != ClosedForm():
            raise ValueError(f"closed_form belongs to method 'uce', not to {self.method!r}")
        return self

    def _check_closed(self) -> None:
        fields = Recipe.model_fields
        loops = ("erase_from", "x_t", "anchoring", "optimiser", "steps", "batch_size", "templates", "seed")
        preset = METHODS[self.method]
        for key in loops:
            if getattr(self, key) != preset.get(key, fields[key].default):
                raise ValueError(f"method {self.method!r} is a closed form, without a training loop: it has no {key}")
        if self.increment.kind != "low_rank" or self.increment.rank != 1:
            raise ValueError(
                f"method {self.method!r} gives an exact low_rank increment of its own rank: "
                "increment.kind and increment.rank cannot be chosen"
            )
        if self.increment.modules != "esd-x-strict":
            raise ValueError(f"method {self.method!r} edits keys and values of cross-attention, 'esd-x-strict', only")

    @classmethod
    def make(cls, **values: Any) -> Recipe:
        """Checks `values`; RecipeError names the offending key and the nearest known one."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise RecipeError("\n".join(_explain(cls, dict(problem)) for problem in error.errors())) from None

    @classmethod
    def plan(cls, path: Path | None = None, sets: Sequence[str] = (), **given: Any) -> Recipe:
        """What a user asks for: a file, then options over it, then `--set`.

        Well-known concepts bring their kind and aliases along, unless the file or the options say otherwise.
        Raises RecipeError for what the recipe cannot hold, UsageError for an empty concept.
        """
        values = _read(path) if path is not None else {}
        values = merged(values, given)
        if not str(values.get("target") or "").strip():
            raise UsageError("the concept is empty: there is nothing to erase", mend='spmhub train "van gogh"')
        return cls.make(**{**known(str(values["target"])), **values}).with_set(*sets)

    @property
    def slug(self) -> str:
        """The eraser's name."""
        return self.name or slug(self.target)

    def to_yaml(self) -> str:
        """The concept, and whatever else differs from what the method presets."""
        preset = self.make(target=self.target, method=self.method).model_dump(mode="json")
        concept = self.model_dump(mode="json", include={"target", "aliases", "kind"})
        named = {} if self.method == "spm" else {"method": self.method}
        values = {**concept, **named, **_difference(self.model_dump(mode="json"), preset)}
        return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)

    def with_set(self, *assignments: str) -> Recipe:
        """`objective.eta=2`, `anchoring.prompts=[a dog, a cat]`: values are YAML. Raises RecipeError."""
        values = self.model_dump(mode="json")
        for assignment in assignments:
            key, separator, text = assignment.partition("=")
            if not separator or not key.strip():
                raise RecipeError(f"--set {assignment!r} is not KEY=VALUE", mend="for instance --set objective.eta=2")
            place = values
            *parents, last = key.strip().split(".")
            for parent in parents:
                if not isinstance(place.get(parent), dict):
                    raise RecipeError(f"--set {key}: there is no {parent!r}{_hint(parent, place)}")
                place = place[parent]
            if last not in place:
                raise RecipeError(f"--set {key}: unknown key {last!r}{_hint(last, place)}")
            try:
                place[last] = yaml.safe_load(text)
            except yaml.YAMLError as error:
                raise RecipeError(f"--set {key}: {text!r} is not YAML: {error}") from None
        return self.make(**values)

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
    return values


def _hint(key: str, known: Any) -> str:
    close = nearest(key, known)
    return f"; did you mean {' or '.join(close)}?" if close else f"; known: {', '.join(known)}"


def _explain(model: type[BaseModel], problem: dict[str, Any]) -> str:
    where = ".".join(str(step) for step in problem["loc"]) or "recipe"
    if problem["type"] == "literal_error":
        choices = re.findall(r"'([^']*)'", problem["ctx"]["expected"])
        given = str(problem["input"])
        return f"recipe key {where}: unknown {where.split('.')[-1]} {given!r}{_hint(given, choices)}"
    if problem["type"] == "value_error" and not problem["loc"]:
        return f"recipe: {problem['ctx']['error']}"
    if problem["type"] != "extra_forbidden":
        said = problem["msg"].removeprefix("Value error, ")
        return f"recipe key {where}: {said} (got {str(problem['input'])[:80]!r})"
    for step in problem["loc"][:-1]:
        annotation = model.model_fields[str(step)].annotation
        model = annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else model
    return f"recipe key {where} is unknown{_hint(str(problem['loc'][-1]), list(model.model_fields))}"
