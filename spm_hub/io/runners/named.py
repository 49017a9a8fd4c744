"""The runner that a user names."""

from __future__ import annotations

from spm_hub.errors import UsageError, did_you_mean
from spm_hub.io.runners.on_ray import OnRay
from spm_hub.io.runners.processes import Processes
from spm_hub.io.runners.runner import Runner, Serial

RUNNERS = ("serial", "processes", "ray")


def runner_named(text: str, workers: int | None = None) -> Runner:
    """Return the runner "serial", "processes" or "ray[:ADDRESS]".

    workers: None for one on each GPU of this machine, or two. Raises UsageError.
    """
    name, colon, address = text.partition(":")
    if name not in RUNNERS or (colon and (name != "ray" or not address)):
        raise UsageError(
            f"there is no runner {text!r}{did_you_mean(name, RUNNERS)}; known: serial, processes, ray[:ADDRESS]",
            mend="--runner processes",
        )
    if name == "serial":
        if workers not in (None, 1):
            raise UsageError(f"--workers {workers} has no effect on --runner serial", mend="--runner processes")
        return Serial()
    if workers is not None and workers < 1:
        raise UsageError(f"--workers is {workers}, not 1 or more", mend="--workers 2")
    count = workers or _usual_workers()
    return Processes(count) if name == "processes" else OnRay(count, address or None)


def _usual_workers() -> int:
    import torch

    return torch.cuda.device_count() or 2
