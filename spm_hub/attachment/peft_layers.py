"""Prepares PEFT's layers, which wrap modules that erasers change."""

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from spm_hub.errors import UsageError


def unmerge_disabled(body: nn.Module, modules: Iterable[nn.Module], restore: Callable[[], None]) -> None:
    """Un-merge fused LoRAs that were disabled since, before erasers act on the weights.

    PEFT un-merges a disabled adapter lazily, on the next forward. Un-merging after a fold would corrupt the weight, so
    it is done now. modules: those that erasers change.  restore: restores the weights of these modules.
    Raises UsageError for an active DoRA on one of the modules: it scales by the norm of the weight that it finds, so
    its output is not a sum with the erasers' increments.
    """
    if not getattr(body, "peft_config", None):
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers: list[Any] = [module for module in body.modules() if isinstance(module, BaseTunerLayer)]
    if late := [layer for layer in layers if layer.merged and layer.disable_adapters]:
        restore()
        for layer in late:
            layer.unmerge()
    changed = set(map(id, modules))
    for layer in (layer for layer in layers if id(layer.get_base_layer()) in changed):
        scaling = set(getattr(layer, "lora_magnitude_vector", ())).intersection(layer.active_adapters)
        if scaling and not layer.merged and not layer.disable_adapters:
            raise UsageError(
                f"the pipeline's LoRA {min(scaling)!r} is a DoRA, which scales by the norm of the weights: erasers can "
                "be added to the weights after its scaling, not before",
                mend="pipe.fuse_lora()",
            )
