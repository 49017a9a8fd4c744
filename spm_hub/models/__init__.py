"""Base models: their names, their files, and the modules of their denoisers."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spm_hub.models.loading import load_pipeline as load_pipeline
    from spm_hub.models.references import parse_reference as parse_reference

_EXPORTS = {"load_pipeline": "loading", "parse_reference": "references"}
__all__ = ["load_pipeline", "parse_reference"]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)
