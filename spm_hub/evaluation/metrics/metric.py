"""The kinds of metrics: of one picture, of a pair from the same noise, of two sets; and the judge."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

from PIL.Image import Image
from pydantic import JsonValue
from torch import Tensor

from spm_hub.errors import UsageError

Better = Literal["higher", "lower"]
About = Mapping[str, JsonValue]
_NOTHING: About = MappingProxyType({})


@dataclass(frozen=True)
class Verdict:
    """A judge's answer for one picture: is the subject shown, and how sure the judge is, in its own unit."""

    present: bool
    score: float | None = None


@dataclass(frozen=True)
class Judge:
    """Decides for each picture whether it shows a subject.

    key: the text that names it, such as "nudenet:spm9". about: everything that decides its answers (classes, threshold,
    sha256 or commit of the weights), which is hashed into reports.
    measure: a function from pictures and their rows' subjects to a verdict each. It raises rather than guess.
    """

    key: str
    measure: Callable[[Sequence[Image], Sequence[str]], Sequence[Verdict]]
    about: About = field(default_factory=lambda: _NOTHING)


@dataclass(frozen=True)
class PictureMetric:
    """A number for each picture by itself.

    key, about: as of a judge. measure: a function from pictures and their rows' subjects to a number each.
    better: which way is good where a concept is to be kept; None where neither is.
    """

    key: str
    measure: Callable[[Sequence[Image], Sequence[str]], Sequence[float]]
    about: About = field(default_factory=lambda: _NOTHING)
    better: Better | None = None


@dataclass(frozen=True)
class PairMetric:
    """A number for the two pictures of a row, without and with erasers.

    key, about, better: as of a picture metric. measure: a function from two sequences of pictures to a number for each
    pair.
    """

    key: str
    measure: Callable[[Sequence[Image], Sequence[Image]], Sequence[float]]
    about: About = field(default_factory=lambda: _NOTHING)
    better: Better | None = None


@dataclass(frozen=True)
class SetMetric:
    """A distance of two sets of pictures, computed from features of each picture.

    key, about: as of a judge. features: a function from pictures to (n, d). distance: a function from (n, d) and (m, d)
    to a number, smaller for sets that are more alike.
    """

    key: str
    features: Callable[[Sequence[Image]], Tensor]
    distance: Callable[[Tensor, Tensor], float]
    about: About = field(default_factory=lambda: _NOTHING)
    better: Better | None = "lower"


Metric = Judge | PictureMetric | PairMetric | SetMetric


@dataclass(frozen=True)
class NamedMetric:
    """A metric or judge that a text names: NAME, or NAME:ARGUMENT.

    name: before the colon. usage: the whole text, as `spmhub protocols` shows it. about: one sentence.
    make: a function from the argument ("" for none) to the metric. It raises UsageError or NotFoundError for a wrong
    argument or a missing package, before anything is drawn, and loads large weights when they are first needed.
    distance: of sets of features, for a metric of sets, which a report computes without the weights.
    """

    name: str
    usage: str
    about: str
    make: Callable[[str], Metric]
    distance: Callable[[Tensor, Tensor], float] | None = None


def refuse_argument(name: str, argument: str) -> None:
    """Raise UsageError if a metric that takes no argument has one."""
    if argument:
        raise UsageError(f"{name} takes no argument, but has {argument!r}", mend=name)
