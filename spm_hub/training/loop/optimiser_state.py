"""What a training changes, as tensors for a checkpoint: an increment's parameters and what AdamW keeps of each."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from spm_hub.training.trainable.low_rank import Trainable

_ADAM = ("step", "exp_avg", "exp_avg_sq")


def tensors_of(injection: Trainable, optimiser: torch.optim.AdamW) -> dict[str, Tensor]:
    """All of it, by name. The optimiser has taken a step; it knows nothing of what the loss does not depend on."""
    tensors: dict[str, Tensor] = {}
    for key, parameter in injection.state().items():
        tensors[f"increment.{key}"] = parameter
        if known := optimiser.state.get(parameter):
            tensors |= {f"optimiser.{name}.{key}": known[name] for name in _ADAM}
    return tensors


def restore(injection: Trainable, optimiser: torch.optim.AdamW, tensors: Mapping[str, Tensor]) -> None:
    """Puts back what `tensors_of` gave."""
    parameters = injection.state()
    injection.load_state({key: tensors[f"increment.{key}"] for key in parameters})
    for key, parameter in parameters.items():
        for name in _ADAM if f"optimiser.step.{key}" in tensors else ():
            value = tensors[f"optimiser.{name}.{key}"]
            optimiser.state[parameter][name] = value if name == "step" else value.to(parameter.device)
