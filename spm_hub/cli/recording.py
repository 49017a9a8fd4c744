"""Keeps measured numbers in the manifest of an eraser, for --record."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from spm_hub.cli.output import Output
from spm_hub.errors import RegistryError, UsageError
from spm_hub.io.wording import quoted

if TYPE_CHECKING:
    from spm_hub.adapters.manifest import Evaluation
    from spm_hub.registry.entry import EraserEntry


def keep_numbers(out: Output, entry: "EraserEntry", found: "Sequence[Evaluation]", *, replace: bool) -> None:
    """Write measured numbers into the manifest of an eraser in a registry. Raises RegistryError."""
    from spm_hub.registry.registry import Registry

    root = entry.adapter_path.parent.parent
    Registry(root).record_evaluation(entry.name, found, replace=replace)
    out.say(f"kept in the manifest of {entry.name}: spmhub show {entry.name} --registry {quoted(root)}")


def check_recordable(entries: list["EraserEntry"], asked: tuple[object, ...]) -> None:
    """Refuse to record numbers unless they are those of one eraser in a registry, used as it asks to be.

    Raises UsageError, RegistryError.
    """
    from spm_hub.registry import storage

    if len(entries) > 1:
        raise UsageError(
            f"--record is for one eraser, but {len(entries)} are named",
            mend="name one, and run it again for each other",
        )
    if any(given is not None for given in asked):
        raise UsageError(
            "--record keeps the effect of an eraser with its own settings: --gate and --strength would change the "
            "numbers, and without --protocol --judge too",
            mend="leave them out, or leave --record out",
        )
    path: Path = entries[0].adapter_path
    if path.parent.name != storage.ADAPTERS or entries[0].manifest_path is None:
        raise RegistryError(
            f"{path} is in no registry, so there is no manifest to keep the numbers in",
            mend=f"spmhub convert {quoted(path)}",
        )
