"""The training recipe: its schema, presets and checks. Imports no torch."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spm_hub.training.recipe.recipe import Recipe as Recipe

_EXPORTS = {"Recipe": "recipe"}
__all__ = ["Recipe"]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)
