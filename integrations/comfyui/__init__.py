"""ComfyUI nodes of spm-hub: concept erasers that a gate turns on and off for each prompt."""

from .nodes import comfy_entrypoint

__all__ = ["comfy_entrypoint"]
