"""The device on which judges and metrics run their networks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

from spm_hub.errors import UsageError

_DEVICE: ContextVar[str] = ContextVar("device of judges", default="cpu")


@contextmanager
def metrics_on(device: str | None) -> Iterator[None]:
    """Let networks that are loaded in this block run on a device; None leaves it as it is.

    Raises UsageError for a device that this machine does not have.
    """
    if device is None:
        yield
        return
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(
            f"--judge-device {device}: {str(error).splitlines()[0]}", mend="--judge-device cpu, or spmhub doctor"
        ) from error
    before = _DEVICE.set(device)
    try:
        yield
    finally:
        _DEVICE.reset(before)


def placed(network: Any) -> Any:
    """Return a network on the device of judges, ready to be asked."""
    return network.to(_DEVICE.get()).eval()
