"""Makes the same seed give the same bits on a GPU.

Its kernels otherwise add numbers up in the order in which they finish.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
_FILLING: Any = torch.utils.deterministic


@contextmanager
def deterministic() -> Iterator[None]:
    """Make operations on a GPU give the same bits every time, or raise.

    See `lacks_deterministic_kernel`. Nothing changes on a CPU, where the bits are the same in any case.
    """
    if not torch.cuda.is_available():
        yield
        return
    before = (
        torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.backends.cudnn.benchmark, _FILLING.fill_uninitialized_memory,
    )  # fmt: skip
    workspace = os.environ.get(_CUBLAS)
    # Not warn_only: memory-efficient attention adds up its gradients in order only without warn_only.
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    _FILLING.fill_uninitialized_memory = False
    os.environ.setdefault(_CUBLAS, ":4096:8")
    try:
        yield
    finally:
        enabled, warn_only, torch.backends.cudnn.benchmark, filled = before
        _FILLING.fill_uninitialized_memory = filled
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        if workspace is None:
            os.environ.pop(_CUBLAS, None)


def lacks_deterministic_kernel(error: RuntimeError) -> bool:
    """Return whether torch raised `error` for an operation without a deterministic kernel."""
    return "deterministic" in str(error)
