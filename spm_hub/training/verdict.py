"""Says in words how a training went. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping

from spm_hub.adapters.manifest import Evaluation, Manifest, Training

_NEAR = 0.05
"""A goal that is missed by less counts as reached: the training steers to it, and ends a little above or below."""
_ENOUGH, _HALF = 0.25, 0.5
"""A method without a goal of its own is called short only below the first: how far it should go is not known.

Below the second its verdict says that this is little.
"""

QUICK_LOOK, RECOGNISED = "quick-look", "recognised_by_the_base"
"""The protocol and metric of the share of erased pictures in which the base recognises the concept."""
OTHERS_RECOGNISED = "others_recognised_by_the_base"
"""The metric of the share of other names that the base recognises with the eraser fully on, of those it knew before."""
MANY = 0.1
"""Share of recognised pictures from which on it is said."""
_FEW, _NAMES = 0.8, 4
"""An eraser that leaves a smaller share of other names recognised needs its gate; of fewer names nothing is said."""
KNOWN = 0.5
"""A concept that the base recognises in a smaller share of its own pictures cannot be looked for by it."""


def way(figures: Mapping[str, float]) -> str:
    """Return "87 % of the way, goal 90 %" of a training's figures "reached" and "goal"; "" without them."""
    if "reached" not in figures:
        return ""
    goal = f", goal {_percent(figures['goal'])}" if "goal" in figures else ""
    return f"{_percent(max(0.0, figures['reached']))} of the way{goal}"


def is_short(training: Training | None) -> bool:
    """Return whether a training ended clearly before its goal."""
    if training is None or training.reached is None:
        return False
    return training.reached < (_ENOUGH if training.goal is None else training.goal - _NEAR)


def is_recognised(erased: float, own: float) -> bool:
    """Return whether a base recognises a concept in more erased pictures than by accident.

    erased, own: shares of erased pictures, and of its own, in which it does.
    """
    return own >= KNOWN and erased >= MANY


def are_few(kept: int, known: int) -> bool | None:
    """Return whether a base recognises too few other names for an eraser without a gate.

    kept: names that it recognises with the eraser fully on, of the `known` ones. None if these are too few to say.
    """
    return None if known < _NAMES else kept < _FEW * known


def needs_gate(manifest: Manifest) -> str | None:
    """Return in a sentence what an eraser costs without a gate, if its quick look saw that it costs much."""
    for row in manifest.evaluation:
        if (row.protocol, row.metric) == (QUICK_LOOK, OTHERS_RECOGNISED):
            kept = round(row.value * row.samples)
            if are_few(kept, row.samples):
                return (
                    f"{manifest.name} costs other things without a gate: fully on, the base recognised {kept} of "
                    f"{row.samples} other names (a quick look)"
                )
    return None


def still_recognised(manifest: Manifest) -> Evaluation | None:
    """Return the row of a quick look that found the concept still there.

    None if the base recognises it in no more pictures than by accident, or was not asked.
    """
    for row in manifest.evaluation:
        if (row.protocol, row.metric) == (QUICK_LOOK, RECOGNISED):
            return row if is_recognised(row.value, row.reference or 0.0) else None
    return None


def verdict(manifest: Manifest) -> str:
    """Return the outcome of a training as a clause: "snoopy is trained: 93 % of the way, goal 90 %"."""
    row = still_recognised(manifest)
    if row is None:
        return _ended(manifest)
    seen = f"{row.value * row.samples:.0f} of {row.samples} pictures"
    return f"{_ended(manifest)}, and the base still recognises it in {seen}"


def _ended(manifest: Manifest) -> str:
    training, name = manifest.training, manifest.name
    if training is None or training.ended == "closed form":
        return f"{name} is computed"
    figures = {"reached": training.reached, "goal": training.goal}
    gone = way({key: value for key, value in figures.items() if value is not None})
    if training.ended == "callback":
        at = f"a callback ended it at step {training.steps} of {training.planned}"
        return f"{name} is not fully trained: {at}" + (f", {gone}" if gone else "")
    if is_short(training):
        return f"{name} is not erased enough after {training.steps} steps: {gone}"
    if training.goal is None and training.reached is not None and training.reached < _HALF:
        return f"{name} is trained, but only {gone}"
    return f"{name} is trained" + (f": {gone}" if gone else "")


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
