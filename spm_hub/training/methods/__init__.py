"""All methods: one file for each paper, and one line here."""

from __future__ import annotations

from dataclasses import replace

from spm_hub.plugins import plugins
from spm_hub.training.methods import ca, esd, fmn, instant, minimalist, race, sdd, sepme, spm, uce
from spm_hub.training.methods.method import Method

__all__ = ["AT_ONCE", "METHODS", "Method", "all_methods", "find_method"]

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        spm.METHOD,
        instant.METHOD,
        *race.METHODS,
        *esd.METHODS,
        minimalist.METHOD,
        sepme.METHOD,
        ca.METHOD,
        sdd.METHOD,
        fmn.METHOD,
        uce.METHOD,
    )
}
"""The methods that come with spm-hub, by name."""
AT_ONCE = "instant"
"""The method that makes an eraser in the moment when it is first wanted."""


def find_method(name: str) -> Method | None:
    """Return the method of that name, of spm-hub or of a plug-in, or None."""
    if name in METHODS:
        return METHODS[name]
    found = plugins("objectives", Method).get(name)
    return None if found is None else _plugin_method(name, found)


def all_methods() -> dict[str, Method]:
    """Return all methods by name, those of plug-ins last."""
    found = {name: _plugin_method(name, one) for name, one in plugins("objectives", Method).items()}
    return METHODS | {name: method for name, method in found.items() if name not in METHODS}


def _plugin_method(name: str, found: Method) -> Method:
    """Return a plug-in's method, whose objective always has the method's own name.

    A `Method` without a name is of the older form: an objective of the recipe's `objective` part, and a preset.
    """
    preset = {**found.preset, "objective": {**found.preset.get("objective", {}), "name": name}}
    make = found.objective
    if found.name or make is None:
        return replace(found, name=name, preset=preset)
    return replace(found, name=name, title=name, preset=preset, objective=lambda recipe: make(recipe.objective))
