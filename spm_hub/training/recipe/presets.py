"""Merges a method's preset with the values that a user gives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spm_hub.training.recipe.schema import PEFT_KINDS, EarlyStop, XtSource


def deep_merge(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return `under` with `over` laid over it, key by key, down through the mappings that both have."""
    both = {key: deep_merge(under[key], over[key]) for key in under if _are_mappings(under[key], over.get(key))}
    return {**under, **over, **both}


def _are_mappings(*values: Any) -> bool:
    return all(isinstance(value, Mapping) for value in values)


_BEFORE_REACH = frozenset({"below", "memory", "after"})
"""All keys of `stop` in manifests of versions without `stop.reach`: what they describe never stopped by it."""
_BEFORE_DRAWN = frozenset({"weight", "reach", "alpha", "source", "prompts", "per_target"})
"""All keys of `anchoring` in manifests of versions without `anchoring.drawn`."""


def with_preset(preset: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return `values` over a method's preset, adapted to the increment and the source in `values`."""
    implied: dict[str, Any] = {}
    parts = ("increment", "x_t", "stop", "anchoring")
    increment, x_t, stop, anchoring = (part if isinstance(part := values.get(one), dict) else {} for one in parts)
    if increment.get("kind") == "null_space" and preset.get("increment", {}).get("kind") != "null_space":
        # SepME's small beta belongs to its great learning rate.
        implied["increment"] = {"beta": 1.0}
    if increment.get("kind") in PEFT_KINDS and preset.get("regulariser"):
        implied["regulariser"] = {"l1": 0.0}
    if x_t.get("source") == "student" and len(preset.get("x_t", {}).get("guidance", XtSource().guidance)) > 1:
        implied["x_t"] = {"guidance": (3.0,)}
    before_reach = stop.keys() >= _BEFORE_REACH and "reach" not in stop
    if before_reach or ("reach" in stop and stop["reach"] is None):
        implied["stop"] = {"reach": None, "every": EarlyStop().every}
    if anchoring.keys() >= _BEFORE_DRAWN and "drawn" not in anchoring:
        implied["anchoring"] = {"drawn": 0}
    return deep_merge(deep_merge(preset, implied), values)
