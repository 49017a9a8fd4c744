"""Trains erasers: a recipe, a base model, and the loop between them. Importing it imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spm_hub.training.recipe.recipe import Recipe
    from spm_hub.training.trainer import train

__all__ = ["Recipe", "train"]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    rooms = {"Recipe": ".recipe.recipe", "train": ".trainer"}
    if name not in rooms:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(rooms[name], __name__), name)
