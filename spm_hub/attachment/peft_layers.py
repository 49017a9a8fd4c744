"""Other adapters on the same denoiser: PEFT's layers, each around a module that erasers may change."""

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from spm_hub.errors import UsageError


def unmerge_disabled(body: nn.Module, modules: Iterable[nn.Module], bare: Callable[[], None]) -> None:
    """To be called before erasers act: the weights become those that PEFT's layers would compute with.

    What is fused and then switched off, PEFT subtracts from the weight when the layer is next called: from one that
    erasers were folded into, and their originals would bring it back. It is made to do so now. A DoRA scales by the
    norm of the weight that it finds, and a sum with it would not be one: raises UsageError.
    modules: those that erasers change.  bare: puts their own weights back.
    """
    if not getattr(body, "peft_config", None):
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers: list[Any] = [module for module in body.modules() if isinstance(module, BaseTunerLayer)]
    if late := [layer for layer in layers if layer.merged and layer.disable_adapters]:
        bare()
        for layer in late:
            layer.unmerge()
    changed = set(map(id, modules))
    for layer in (layer for layer in layers if id(layer.get_base_layer()) in changed):
        scaling = set(getattr(layer, "lora_magnitude_vector", ())).intersection(layer.active_adapters)
        if scaling and not layer.merged and not layer.disable_adapters:
            raise UsageError(
                f"the pipeline's LoRA {min(scaling)!r} is a DoRA, which scales by the norm of the weights: erasers can "
                "be added to what it makes of them, not to what it has yet to make",
                mend="pipe.fuse_lora()",
            )
