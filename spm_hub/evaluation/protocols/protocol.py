"""A protocol: prompt sets, drawing, judges and metrics as data, with a version and a hash."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from importlib.resources import files
from typing import Annotated, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from spm_hub.errors import NotFoundError, did_you_mean
from spm_hub.evaluation.records.rows import Role

Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9-]*$")]


class _Part(BaseModel):
    """Strict and immutable: an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Nearest(_Part):
    """The names of a list that the base's text encoder puts nearest to the erased concept."""

    count: int = Field(ge=1)
    among: tuple[str, ...] = Field(min_length=2)


class RowSet(_Part):
    """Rows of one role.

    subjects: names to draw, "erased" for those of the erasers; `nearest` chooses them instead. Erased names are left
    out of the other roles. kinds: of the erased concepts that the set is for; empty for all. templates: sentences with
    {} for the subject, in turn. also: for each template what its sentence shows next to the subject; judges look for
    it in place of the subject. names: what a subject is called in the templates' language. group: as in `PromptRow`.
    samples: pictures of each subject. sentences: whole prompts without a subject, in place of subjects and templates.
    file: the published set that the paper used; the user brings it, and the templates or sentences take its place where
    nobody has brought it.
    """

    role: Role
    subjects: Literal["erased"] | tuple[str, ...] = ()
    nearest: Nearest | None = None
    kinds: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    names: dict[str, str] = {}
    group: str | None = None
    sentences: tuple[str, ...] = ()
    samples: int = Field(ge=1)
    file: Name | None = None

    @model_validator(mode="after")
    def _complete(self) -> Self:
        chosen = [bool(self.subjects), self.nearest is not None, bool(self.sentences)]
        if sum(chosen) != 1:
            raise ValueError("a set has one of subjects, nearest and sentences")
        if bool(self.templates) == bool(self.sentences):
            raise ValueError("a set has templates for its subjects, or sentences")
        if wrong := [one for one in self.templates if one.count("{}") != 1]:
            raise ValueError(f"template {wrong[0]!r} has not one place for the subject")
        if self.also and len(self.also) != len(self.templates):
            raise ValueError(f"also has {len(self.also)} names, for {len(self.templates)} templates")
        if self.kinds and self.subjects != "erased":
            raise ValueError("kinds are those of erased concepts")
        return self


class Drawing(_Part):
    """Settings of all pictures whose rows have none of their own; None for the pipeline's."""

    steps: int = Field(ge=1)
    guidance: float | None = None
    negative: str | None = None
    width: int | None = None
    height: int | None = None


class Variant(_Part):
    """The rows, drawing and metrics of a protocol on one kind of base."""

    drawing: Drawing
    sets: tuple[RowSet, ...] = Field(min_length=1)
    measure: tuple[str, ...] = Field(min_length=1, description="metrics and judges, by the text that names them")


class Quick(_Part):
    """A first look: at most so many pictures of each subject, and so many steps.

    tries, iterations: of each attack, where the protocol attacks; it then attacks `samples` prompts.
    """

    samples: int = Field(ge=1)
    steps: int = Field(ge=1)
    tries: int | None = Field(default=None, ge=1)
    iterations: int | None = Field(default=None, ge=1)


class Attacked(_Part):
    """Attacks on the first target rows, judged by the first judge.

    attacks: by the names of `spmhub attack --with`, with the settings of their papers. prompts: how many rows. fresh:
    pictures at fresh seeds of each try that succeeds.
    """

    attacks: tuple[str, ...] = Field(min_length=1)
    prompts: int = Field(ge=1)
    fresh: int = Field(default=4, ge=0)


class Published(_Part):
    """One number of a paper.

    measure: the name of the metric or judge that it belongs to, before its colon. quantity: the paper's name for it.
    method, erased, subject: whose picture it is; erased is None for the base itself. condition: "with" the erasers, or
    "restored". where: table or figure.
    """

    measure: str
    quantity: str
    method: str
    erased: str | None
    subject: str
    value: float
    where: str
    condition: Literal["with", "restored"] = "with"


class Protocol(_Part):
    """A way to evaluate erasers, as a paper or this project defines it.

    version: rises with every change that changes numbers. base: the model that the paper used. usual: what is drawn
    and measured on any base but the sketchbook; sketchbook: on it, with its own names and probe. restores: also draw
    with the first eraser taken away again. elsewhere: meant for another base than the eraser's own. attacked: how it
    is attacked. differs: where this protocol is not the paper's. published: the paper's numbers.
    """

    name: Name
    version: int = Field(ge=1)
    about: str
    paper: str | None = None
    base: str | None = None
    kinds: tuple[str, ...] = ()
    usual: Variant
    sketchbook: Variant
    quick: Quick
    restores: bool = False
    elsewhere: bool = False
    attacked: Attacked | None = None
    differs: tuple[str, ...] = ()
    published: tuple[Published, ...] = ()

    @property
    def sha256(self) -> str:
        """The hash of everything that decides pictures and numbers; those of papers do not."""
        decides = self.model_dump(mode="json", exclude={"published", "about", "paper", "differs"})
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


@cache
def protocols() -> dict[str, Protocol]:
    """Return the protocols that come with spm-hub, by name."""
    folder = files("spm_hub.evaluation.protocols").joinpath("data")
    found = (
        Protocol.model_validate(yaml.safe_load(one.read_text(encoding="utf-8")))
        for one in sorted(folder.iterdir(), key=lambda one: one.name)
        if one.name.endswith(".yaml")
    )
    return {one.name: one for one in found}


def protocol_named(name: str) -> Protocol:
    """Return the protocol of that name. Raises NotFoundError."""
    known = protocols()
    if name not in known:
        raise NotFoundError(f"no protocol {name!r}{did_you_mean(name, known)}", mend="spmhub protocols")
    return known[name]
