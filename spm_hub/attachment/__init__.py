"""Erasers on a running pipeline: attach, gate per prompt, recover, detach; and baking them in."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spm_hub.attachment.attachment import Attachment as Attachment
    from spm_hub.attachment.attachment import attach as attach

_EXPORTS = {"attach": "attachment", "Attachment": "attachment"}
__all__ = ["Attachment", "attach"]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)
