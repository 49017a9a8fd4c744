"""Compares recipes; one may leave names to the text encoder. Imports no torch."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

_LEFT_TO_THE_ENCODER = (("closed_form", "preserve"), ("protection", "prompts"))


def is_made_by(made: dict[str, Any], wanted: dict[str, Any], apart_from: Collection[str] = ()) -> bool:
    """Return whether a manifest's recipe `made` is what training by `wanted` leaves; both dumped.

    Names that `wanted` leaves to the text encoder may be any in `made`.
    apart_from: keys that are not compared.
    """
    for part, key in _LEFT_TO_THE_ENCODER:
        if wanted[part][key] is None:
            wanted = {**wanted, part: {**wanted[part], key: made[part][key]}}
    return all(made[key] == value for key, value in wanted.items() if key not in apart_from)
