"""Chooses the device that a base model computes on, and its precision there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from spm_hub.errors import UsageError, nearest

if TYPE_CHECKING:
    import torch

AUTO = "auto"
WIDE = "wide"
STORED = "stored"


def choose_device(name: str | torch.device | None) -> torch.device:
    """Return the device of that name; for "auto" or None an accelerator that works here, else the CPU.

    Raises UsageError if this machine has no such device.
    """
    import torch

    if name is None or name == AUTO:
        return _working_accelerator() or torch.device("cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(
            f"device {str(name)!r} cannot be used here: {reason}",
            mend="--device auto; spmhub doctor lists the devices of this machine",
        ) from error


def automatic_dtype(stored: torch.dtype, device: torch.device, *, wide: bool = False) -> torch.dtype:
    """Return the precision to compute in for weights that are stored in `stored`.

    That is float16 or bfloat16 where the weights are, and otherwise float32. float16 becomes float32 on a CPU, which
    takes minutes for one step in it, and if `wide`, as for training, whose gradients vanish in it.
    """
    import torch

    if stored == torch.bfloat16 or (stored == torch.float16 and device.type != "cpu" and not wide):
        return stored
    return torch.float32


def parse_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """Return the torch dtype of that name, such as "float16".

    Raises UsageError unless it is a floating-point type.
    """
    import torch

    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        close = nearest(str(dtype), ("float32", "float16", "bfloat16", "float64"))
        raise UsageError(
            f"dtype is {dtype!r}, which is no precision to compute in", mend=f'dtype="{(*close, "float16")[0]}"'
        )
    return found


def refuse_half_on_cpu(dtype: torch.dtype | str | None, device: str | torch.device | None) -> None:
    """Refuse to compute in float16 on a CPU. Raises UsageError."""
    if str(dtype).removeprefix("torch.") not in ("float16", "half") or choose_device(device).type != "cpu":
        return
    raise UsageError(
        "float16 on a CPU takes minutes for one step, as CPUs do not compute in it",
        mend="--dtype auto, or --dtype bfloat16 for half the memory; in Python dtype=",
    )


def _working_accelerator() -> torch.device | None:
    import torch

    found = torch.accelerator.current_accelerator(check_available=True)
    if found is None:
        return None
    try:
        # A card may be there that this build of torch has no programs for.
        torch.ones(2, device=found).sum().item()
    except (RuntimeError, AssertionError):
        return None
    return torch.empty(0, device=found).device
