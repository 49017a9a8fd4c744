"""Methods by name: what each one presets of a recipe's parts. Whoever trains may change every part on its own.

A new method is one file in `objectives/`, its line there, and its entry here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from spm_hub.plugins import plugins

# For the sketchbook, in SPM's time; the papers' own settings are in manifests/recipes. Its text encoder is a small one:
# trained on the bare name alone, the concept stays in sentences.
_ESD: dict[str, Any] = {
    "objective": {"name": "esd", "eta": 2.0, "convention": "rewrite"},
    "x_t": {"guidance": (3.0,)},
    "anchoring": {"weight": 0.0, "reach": None, "per_target": 0},
    "optimiser": {"lr": 1e-3},
}

_RACE: dict[str, Any] = {"steps": 10, "unit": "rms"}
_SEPME: dict[str, Any] = {
    "objective": {"name": "sepme"},
    "increment": {"kind": "null_space", "modules": "esd-x-strict", "beta": 1e-2},
    "x_t": {"source": "q_sample", "guidance": (3.0, 7.5)},
    "anchoring": {"weight": 0.0, "reach": None, "per_target": 0},
    "regulariser": {"l1": 1e-6},
    "stop": {"below": 0.0},
    "optimiser": {"lr": 0.1, "schedule": "constant", "warmup": 0, "scale_lr": False},
}

METHODS: dict[str, dict[str, Any]] = {
    "spm": {},
    "race": {**_ESD, "increment": {"kind": "dense", "modules": "esd-x"}, "adversary": _RACE},
    # Aimed at what the base predicts of the concept: the noise that a trajectory began with is only near to that.
    "race-spm": {"adversary": {**_RACE, "epsilon": 0.3, "goal": "concept"}},
    **{
        name: {**_ESD, "increment": {"kind": "dense", "modules": name}}
        for name in ("esd-x", "esd-x-strict", "esd-x-strict-text", "esd-u", "esd-all", "esd-selfattn")
    },
    "minimalist": {
        "objective": {"name": "minimalist"},
        "increment": {"kind": "mask"},
        "x_t": {"steps": 5, "guidance": (5.0,)},
        "masks": {"groups": ("linear",), "beta": 0.05},
        "optimiser": {"lr": 0.5, "schedule": "constant", "warmup": 10, "scale_lr": False},
        "steps": 50,
    },
    "sepme": _SEPME,
    # The surrogate is the anchor concept, and the prior loss the anchoring on its sentences.
    "ca": {
        "objective": {"name": "ca", "teacher": "student", "paired": True},
        "increment": {"kind": "dense", "modules": "esd-x-strict"},
        "x_t": {"guidance": (3.0,)},
        "anchoring": {"source": "surrogate", "weight": 1.0, "reach": None, "per_target": 1},
        "optimiser": {"lr": 1e-3},
    },
    "sdd": {
        "objective": {"name": "sdd", "teacher": "student"},
        "increment": {"kind": "dense", "modules": "esd-x"},
        "x_t": {"guidance": (3.0,)},
        "anchoring": {"weight": 0.0, "reach": None, "per_target": 0},
        "optimiser": {"lr": 1e-3, "ema": 0.95},
    },
    "fmn": {
        "objective": {"name": "fmn", "tokens": "onwards"},
        "increment": {"kind": "dense", "modules": "esd-x"},
        "anchoring": {"weight": 0.0, "reach": None, "per_target": 0},
        "optimiser": {"lr": 1e-3, "schedule": "constant", "warmup": 0},
        "x_t": {"guidance": (3.0,), "chunks": 1},
        "steps": 35,
    },
    "uce": {
        "objective": {"name": "uce"},
        "increment": {"modules": "esd-x-strict"},
        "closed_form": {"tokens": "onwards", "sentences": 40, "held": 20, "rank": 32},
        "templates": False,
    },
}


@dataclass(frozen=True)
class Method:
    """What a plug-in adds under its own name: an objective, and what a recipe with it presets of the other parts.

    objective: given the recipe's `objective` part (`schema.Objective`), an `objectives.base.Objective`.
    """

    objective: Callable[[Any], Any]
    preset: Mapping[str, Any] = field(default_factory=dict)


def plugged(name: str) -> Method | None:
    """The plug-in of that name, None for a method of our own and where there is none."""
    return None if name in METHODS else plugins("objectives", Method).get(name)


def known_methods() -> list[str]:
    """The names of all methods, plug-ins included."""
    return [*METHODS, *(name for name in plugins("objectives", Method) if name not in METHODS)]


def preset_of(method: str) -> dict[str, Any] | None:
    """What a method presets, None where there is no such method."""
    if (plugin := plugged(method)) is not None:
        return merged(dict(plugin.preset), {"objective": {"name": method}})
    return METHODS.get(method)


def objective_of(method: str) -> str:
    """The name of the objective a method is made of."""
    name: str = (preset_of(method) or {}).get("objective", {}).get("name", "spm")
    return name


def merged(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` wins, key by key, down through the dictionaries that both have."""
    both = {key: merged(under[key], over[key]) for key in under if _parts(under[key], over.get(key))}
    return {**under, **over, **both}


def _parts(*values: Any) -> bool:
    return all(isinstance(value, dict) for value in values)
