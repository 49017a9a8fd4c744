"""What formats are made of: which part of which module a key holds, and how increments become files."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from spm_hub.adapters.increments import Increment
from spm_hub.adapters.manifest import Manifest
from spm_hub.io.safetensors_file import Image

Part = Literal[
    "down", "mid", "up", "alpha", "delta", "delta_bias", "keep_out", "keep_in",
    "hada_w1_a", "hada_w1_b", "hada_t1", "hada_w2_a", "hada_w2_b", "hada_t2",
    "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2",
    "dora_scale", "magnitude",
]  # fmt: skip


@dataclass(frozen=True)
class Slot:
    """Where a tensor belongs: `module` is the dotted path in the denoiser, or that path with . as _ ."""

    module: str
    part: Part


KeyParser = Callable[[str], Slot | None]
"""A format's reading side: the slot of a key, or None when the key is not of this format."""

Files = Mapping[str, Image | bytes]
"""What is written, by file name inside the output folder; a format of one file has the one name `WHOLE`."""
WHOLE = ""


@dataclass(frozen=True)
class Writer:
    """A format's writing side. `kinds`: the increments it can hold.

    write: the files of a manifest, its increments by dotted path, and the base's tensors by state-dict key, which are
    given where `needs_base` says so. Raises AdapterFileError for a module that the format has no name for.
    """

    kinds: tuple[Literal["low_rank", "dense", "mask"], ...]
    write: Callable[[Manifest, Mapping[str, Increment], Mapping[str, Tensor]], Files]
    needs_base: bool = False


@dataclass(frozen=True)
class Format:
    """A file format under the name that `spmhub convert --to` knows; a new one is a file here and a line in `layouts`.

    parse_key: of files that are read key by key.  writer: None where it is read only.  explicit: read by a conversion
    only, never when an adapter is loaded: because another file says half of it, or because little unfolds to much.
    """

    name: str
    about: str
    parse_key: KeyParser | None = None
    writer: Writer | None = None
    explicit: bool = False
