"""The bodies of requests, their limits, and the orders that they become."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from spm_hub.adapters.manifest import slug
from spm_hub.errors import ForbiddenError, NotFoundError, UsageError, did_you_mean
from spm_hub.evaluation.pictures import SEEDS
from spm_hub.serving.drawing import Order

MOST_STRENGTH = 100.0
"""Greatest absolute strength that a request may give an eraser."""
MOST_GUIDANCE = 100.0
MOST_NAMES = 1000
MOST_PROMPTS = 64
"""Most prompts of one request for gates."""

Name = Annotated[str, Field(min_length=1, max_length=200)]
Strength = Annotated[float, Field(ge=-MOST_STRENGTH, le=MOST_STRENGTH, allow_inf_nan=False)]
Names = Annotated[list[Name], Field(max_length=MOST_NAMES)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class ImagesRequest(_Body):
    """The body of POST /v1/images/generations."""

    prompt: str
    model: str | None = Field(default=None, description="the served model's id, as GET /v1/models has it")
    n: int = Field(default=1, ge=1)
    size: str | None = Field(default=None, description='WIDTHxHEIGHT in pixels, such as "512x512", or "auto"')
    seed: int | None = Field(default=None, ge=0, description="of the first picture; the next has the next seed")
    response_format: Literal["b64_json"] = "b64_json"
    negative_prompt: str | None = None
    steps: int | None = Field(default=None, ge=1)
    guidance: float | None = Field(default=None, ge=0, le=MOST_GUIDANCE, allow_inf_nan=False)
    erasers: Names | Annotated[dict[Name, Strength], Field(max_length=MOST_NAMES)] | None = Field(
        default=None, description="names of the erasers that act, or their strengths by name; default: all attached"
    )
    recover: Names = Field(default=[], description="names of erasers that do not act on these pictures")
    exact: bool = Field(default=False, description="draw each picture alone, bit for bit as the pipeline does")


class GatesRequest(_Body):
    """The body of POST /v1/gates."""

    prompt: str | Annotated[list[str], Field(min_length=1, max_length=MOST_PROMPTS)]
    erasers: Names | None = Field(default=None, description="default: all attached")


class EraserRequest(_Body):
    """The body of POST /v1/erasers."""

    name: Name = Field(description="a name or a concept in the server's registry")
    force: bool = Field(default=False, description="attach it although it undoes another, or is undone")


B = TypeVar("B", bound=_Body)


def parse(kind: type[B], body: bytes) -> B:
    """Return the body of a request. Raises UsageError, which names the first wrong field."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise _wrong_field(kind, error) from error


def _wrong_field(kind: type[_Body], error: ValidationError) -> UsageError:
    # Of a field that has two forms, the form that the value nearly has is the one whose error lies deepest.
    first = max(error.errors(include_url=False, include_context=False), key=lambda one: len(one["loc"]))
    field = ".".join(str(part) for part in first["loc"] if "[" not in str(part))
    if first["type"] == "extra_forbidden":
        hint = did_you_mean(field, kind.model_fields)
        return UsageError(f"unknown field {field!r}{hint}", mend=f"fields are {', '.join(kind.model_fields)}")
    if first["type"] == "missing":
        return UsageError(f"the field {field!r} is missing", mend=f'{{"{field}": ...}}')
    if not field:
        return UsageError(f"the body has another form than expected: {first['msg']}", mend='{"prompt": "a dog"}')
    return UsageError(f"{field} is {str(first['input'])[:100]!r}: {first['msg']}")


@dataclass(frozen=True)
class Limits:
    """The most that one request may ask for.

    side: of a picture, in pixels.  pictures: of one request.  steps: of a picture.  prompt: characters.  body: bytes.
    """

    side: int
    pictures: int = 8
    steps: int = 100
    prompt: int = 2000
    body: int = 2**18

    def check(self, key: str, value: int, most: int) -> None:
        """Raise UsageError for a value above its limit."""
        if value > most:
            raise UsageError(f"{key} is {value}, and this server allows {most} at most")

    def check_prompt(self, key: str, text: str) -> str:
        """Return a prompt. Raises UsageError for one that is empty or too long."""
        if not text.strip():
            raise UsageError(f"{key} is empty", mend=f'"{key}": "a dog"')
        self.check(f"the length of {key}", len(text), self.prompt)
        return text


@dataclass(frozen=True)
class Menu:
    """The offer of one server: its base, limits and defaults.

    model: the name of its base.  steps, guidance: of a request that names none; None is the pipeline's default.
    required: erasers that no request can leave out or weaken.
    """

    model: str
    limits: Limits
    steps: int | None = None
    guidance: float | None = None
    required: frozenset[str] = frozenset()

    def orders(self, request: ImagesRequest) -> list[Order]:
        """Return one order for each picture of a request.

        Raises UsageError for something impossible or above a limit, NotFoundError for another model, ForbiddenError for
        leaving a required eraser out.
        """
        limits = self.limits
        if request.model not in (None, self.model):
            raise NotFoundError(f"there is no model {request.model!r} here", mend=f'"model": {self.model!r}')
        limits.check_prompt("prompt", request.prompt)
        negative = request.negative_prompt
        if negative is not None:
            limits.check("the length of negative_prompt", len(negative), limits.prompt)
        limits.check("n", request.n, limits.pictures)
        steps = self.steps if request.steps is None else request.steps
        limits.check("steps", steps or 1, limits.steps)
        seed = secrets.randbelow(2**32) if request.seed is None else request.seed
        if seed + request.n > SEEDS:
            raise UsageError(f"seed is {seed}; seeds are below 2^64", mend='"seed": 0')
        erasers = self._erasers(request)
        return [
            Order(
                request.prompt,
                seed + index,
                negative=negative,
                size=self._size(request.size),
                steps=steps,
                guidance=self.guidance if request.guidance is None else request.guidance,
                erasers=erasers,
                recover=frozenset(request.recover),
                exact=request.exact,
            )
            for index in range(request.n)
        ]

    def _size(self, text: str | None) -> tuple[int, int] | None:
        if text in (None, "auto"):
            return None
        width, separator, height = str(text).partition("x")
        if not separator or not (width.isascii() and width.isdigit() and height.isascii() and height.isdigit()):
            raise UsageError(f"size is {text!r}; it has the form WIDTHxHEIGHT", mend='"size": "auto"')
        sides = (int(width[:9]), int(height[:9]))
        for side in sides:
            self.limits.check("a side of size", side, self.limits.side)
            if side < 8 or side % 8:
                raise UsageError(f"size is {text!r}; both sides are multiples of 8", mend='"size": "auto"')
        return sides

    def _erasers(self, request: ImagesRequest) -> Mapping[str, float | None] | None:
        """Return the erasers that a request names.

        Raises ForbiddenError if a required one would not act as it is attached.
        """
        named: Any = request.erasers
        chosen = dict.fromkeys(named) if isinstance(named, list) else named
        for name in sorted(self.required):
            given = None if chosen is None else [chosen[one] for one in chosen if name in (one, slug(one))]
            if given not in (None, [None]) or any(name in (one, slug(one)) for one in request.recover):
                raise ForbiddenError(
                    f"the eraser {name} acts on every picture of this server, at its own strength",
                    mend=f"take {name!r} out of recover, and name it, without a strength, in erasers if you give any",
                )
        return chosen
