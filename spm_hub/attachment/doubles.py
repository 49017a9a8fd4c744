"""Refuses or reports erasers that would act twice: attached twice, or baked into the model before."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from spm_hub.adapters.adapter import Adapter
from spm_hub.adapters.formats.lazy import StoredIncrements
from spm_hub.adapters.lookup import refuse_same_change
from spm_hub.adapters.presence import baked_as, remark_on_presence
from spm_hub.attachment.options import Eraser
from spm_hub.errors import UsageError
from spm_hub.io.wording import quoted


class Doubles:
    """The erasers that a pipeline has already.

    Attached ones are known by their content, baked ones by the checkpoint's record and by its weights.
    """

    def __init__(self, pipe: Any, denoiser: nn.Module, warn: Callable[[str], None]) -> None:
        """warn: called with each message that is no refusal."""
        self._warn = warn
        self._places = list(_places(pipe, denoiser))
        self._attached: dict[str, Adapter] = {}

    def admit(self, eraser: Eraser) -> None:
        """Check one more eraser, and remember it; the denoiser has its own weights meanwhile.

        Raises UsageError for one that is attached under another name, or that a checkpoint records as baked in. Warns
        of the same change for another concept, and of a change that the weights seem to contain.
        """
        adapter = eraser.adapter
        other = self._attached.get(adapter.content)
        if other is not None and other is not adapter:
            refuse_same_change(other, adapter)
            self._warn(f"{adapter.name} makes the same change as {other.name}: where both act, it is made twice")
        self._check_baked(eraser)
        if adapter.content:
            self._attached.setdefault(adapter.content, adapter)

    def forget(self, adapter: Adapter) -> None:
        """Forget an eraser that is attached no longer."""
        if self._attached.get(adapter.content) is adapter:
            del self._attached[adapter.content]

    def _check_baked(self, eraser: Eraser) -> None:
        adapter = eraser.adapter
        for place in self._places:
            found = baked_as(place, adapter)
            if found is None:
                continue
            name, same = found
            if same:
                raise UsageError(
                    f"{adapter.name} is baked into this model already ({place}): attached as well it would erase twice",
                    mend="leave it out; or take it out of the model: "
                    f"spmhub recover {name} --checkpoint {quoted(place)}",
                )
            self._warn(f"another eraser named {name} is baked into this model ({place}): both will act")
            return
        if isinstance(adapter.increments, StoredIncrements):
            return  # its numbers are read when a prompt needs them
        if (remark := remark_on_presence(adapter, eraser.modules, eraser.increments)) is not None:
            self._warn(remark)


def _places(pipe: Any, denoiser: nn.Module) -> dict[Path, None]:
    """Return the folders that a pipeline or its denoiser was loaded from."""
    named = [getattr(part, "config", {}).get("_name_or_path") for part in (pipe, denoiser)]
    named.append(getattr(pipe, "_pretrained_model_name_or_path", None))
    folders = [Path(str(name)) for name in named if name]
    return dict.fromkeys(folder for one in folders for folder in (one, one.parent))
