"""All formats: finds the format of a source, and reads adapter files whose keys say everything.

A new format is one file with a `Format`, and its line in `FORMATS`.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from spm_hub.adapters.formats import (
    cloneofsimo,
    diffusers_lora,
    full_weights,
    kohya,
    lycoris,
    minimalist,
    other_components,
    peft,
    spm,
    xlabs,
)
from spm_hub.adapters.formats.format import BaseModel, Format, Source, describe, slot_of
from spm_hub.adapters.formats.keys import read_by_keys, unknown_key
from spm_hub.adapters.formats.lora_config import Scaling
from spm_hub.adapters.formats.slots import Slot
from spm_hub.adapters.formats.wrapped_names import unwrapped
from spm_hub.adapters.increments import Increment
from spm_hub.errors import GET_AGAIN, AdapterFileError, NotFoundError
from spm_hub.io.progress import Progress, no_progress
from spm_hub.plugins import plugins

# In the order in which they are asked for a source, and for a key.
FORMATS: tuple[Format, ...] = (
    minimalist.FORMAT,
    spm.FORMAT,
    peft.FORMAT,
    cloneofsimo.FORMAT,
    full_weights.ESD,
    full_weights.FULL_WEIGHTS,
    kohya.FORMAT,
    lycoris.FORMAT,
    xlabs.FORMAT,
    diffusers_lora.FORMAT,
)


def all_formats() -> Iterator[Format]:
    """Yield every format, ours first; plug-ins are imported when the iteration reaches them."""
    yield from FORMATS
    yield from plugins("formats", Format).values()


def open_source(
    path: Path,
    base: BaseModel | None = None,
    *,
    without_text_encoder: bool = False,
    progress: Progress = no_progress,
) -> Source:
    """Return the source at `path`, whose keys are looked up in all formats."""
    return Source(path, base, without_text_encoder, progress, all_formats)


def recognise(source: Source) -> Format:
    """Return the first format that matches.

    Raises AdapterFileError with the formats there are, NotFoundError for a folder in which no file can be chosen.
    """
    if found := next((known for known in all_formats() if known.matches(source)), None):
        return found
    if source.weights is None:
        listed = ", ".join(file.name for file in source.files if file.suffix == ".safetensors") or "none"
        raise NotFoundError(
            f"{source.path} is a folder without one adapter file ({listed})", mend="name the file itself"
        )
    if not source.tensors:
        raise AdapterFileError(f"{source.weights}: it holds no tensors", mend=GET_AGAIN)
    raise unknown_key(source.weights, next(iter(source.tensors)), source.tensors, describe(all_formats()))


def read_increments(path: Path, tensors: Mapping[str, Tensor], scaling: Scaling | None = None) -> dict[str, Increment]:
    """Return the increments of a file that needs no conversion, by module path as in `read_by_keys`.

    Raises AdapterFileError for a key of no known layout or of one that only a conversion reads, a module with missing
    parts, or a file without tensors.
    """
    tensors = unwrapped(path, tensors)
    # First: some layouts would take a text encoder's layer for one of a denoiser.
    other_components.refuse(path, tensors)
    slots: dict[str, Slot] = {}
    for key in tensors:
        loaded = (known for known in all_formats() if not known.converted_only)
        if (found := slot_of(loaded, key)) is None:
            raise unknown_key(path, key, tensors, describe(all_formats()), converting=False)
        slots[key] = found[1]
    return read_by_keys(path, tensors, slots, scaling)
