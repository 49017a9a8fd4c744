"""Erasers on a diffusers pipeline: attach, gate per prompt, recover, detach."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spm_hub.attachment.attachment import Attachment as Attachment
    from spm_hub.attachment.attachment import attach as attach
    from spm_hub.attachment.pipeline_hooks import is_attached as is_attached

_EXPORTS = {"attach": "attachment", "Attachment": "attachment", "is_attached": "pipeline_hooks"}
__all__ = ["Attachment", "attach", "is_attached"]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)
