"""The input of a conversion (`Source`), and file formats that read and write themselves (`Format`)."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from torch import Tensor, nn

from spm_hub.adapters.formats import eight_bit, other_components, state_dicts
from spm_hub.adapters.formats.differences import added, differences, is_whole
from spm_hub.adapters.formats.keys import is_refused, read_by_keys, unknown_key
from spm_hub.adapters.formats.lora_config import Scaling, scaling_in
from spm_hub.adapters.formats.slots import KeyParser, Slot
from spm_hub.adapters.formats.wrapped_names import unwrapped
from spm_hub.adapters.increments import Increment
from spm_hub.adapters.manifest import Manifest
from spm_hub.errors import AdapterFileError
from spm_hub.io import first_bytes, pickles
from spm_hub.io.hashing import sha256_of
from spm_hub.io.progress import Progress, no_progress
from spm_hub.io.safetensors_file import Image, read_tensors
from spm_hub.io.wording import quoted
from spm_hub.models import architectures

# The names that programs give to the one adapter file of a folder, in the order in which they are looked for.
_WEIGHTS = (
    "adapter_model.safetensors",
    "pytorch_lora_weights.safetensors",
    "adapter_model.bin",
    "pytorch_lora_weights.bin",
)

Files = Mapping[str, Image | bytes]
"""The files that are written, by name inside the output folder; a format of one file has the one name `WHOLE`."""
WHOLE = ""


@dataclass(frozen=True)
class BaseModel:
    """The base that a file was trained on; manifests record its `id` and `revision`."""

    denoiser: nn.Module
    id: str
    revision: str | None = None

    @cached_property
    def tensors(self) -> Mapping[str, Tensor]:
        """The denoiser's weights by state-dict key."""
        return architectures.body_of(self.denoiser).state_dict()


@dataclass(frozen=True)
class _Weights:
    """The content of one file of tensors. left_out: the number of omitted tensors, by component."""

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    sha256: str
    left_out: Mapping[str, int]
    scales: Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Source:
    """A file, or a folder of files, to be converted, and the base model if the caller named one.

    path: the file or folder as the caller gave it.  without_text_encoder: leave out tensors of text encoders.
    progress: for a format that takes long.  formats: lists all formats, since one file may mix the keys of several.
    Tensors are read when they are first asked for, so that a format which goes by file names reads its own files.
    """

    path: Path
    base: BaseModel | None = None
    without_text_encoder: bool = False
    progress: Progress = no_progress
    formats: Callable[[], "Iterable[Format]"] = tuple

    @cached_property
    def files(self) -> tuple[Path, ...]:
        """The file itself, or the files of the folder, sorted."""
        return tuple(sorted(filter(Path.is_file, self.path.iterdir()))) if self.path.is_dir() else (self.path,)

    @cached_property
    def weights(self) -> Path | None:
        """The file of `tensors`; None for a folder that has none, or several and none with a usual name."""
        if not self.path.is_dir():
            return self.path
        named = [self.path / name for name in _WEIGHTS if (self.path / name).is_file()]
        found = named[:1] or sorted(self.path.glob("*.safetensors"))
        return found[0] if len(found) == 1 else None

    @property
    def place(self) -> Path:
        """The path for messages: the file of `tensors`, or else what the caller gave."""
        return self.weights or self.path

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """The tensors of `weights` by key; none without such a file.

        Pickles are known by their first bytes, and read as tensors only. Raises AdapterFileError, also for tensors of
        other components than the denoiser.
        """
        return {} if self._opened is None else self._opened.tensors

    @property
    def metadata(self) -> Mapping[str, str]:
        """The metadata in the header of `weights`; empty for pickles."""
        return {} if self._opened is None else self._opened.metadata

    @property
    def left_out(self) -> Mapping[str, int]:
        """The number of tensors that were left out, by component."""
        return {} if self._opened is None else self._opened.left_out

    @property
    def scales(self) -> Mapping[str, Tensor]:
        """The scales of tensors in eight-bit floats, by the key of the tensor."""
        return {} if self._opened is None else self._opened.scales

    @property
    def sha256(self) -> str | None:
        """The hash of `weights`, None without such a file."""
        return None if self._opened is None else self._opened.sha256

    @cached_property
    def layouts(self) -> frozenset[str]:
        """The names of the formats that a key belongs to; a key belongs to the first format that knows it."""
        found = (slot_of(self.formats(), key) for key in self.tensors)
        return frozenset(name for name, slot in filter(None, found))

    def read_keys(
        self, tensors: Mapping[str, Tensor] | None = None, scaling: Scaling | None = None, *, converting: bool = True
    ) -> dict[str, Increment]:
        """Return the increments of the tensors, or of others in their place, by the keys of all formats.

        scaling, converting: as in `keys.read_by_keys`. Raises AdapterFileError for a key that no format knows, or as
        `read_by_keys` does.
        """
        tensors = self.tensors if tensors is None else tensors
        slots: dict[str, Slot] = {}
        whole: dict[str, Tensor] = {}
        for key in tensors:
            found = slot_of(self.formats(), key)
            if found is not None:
                slots[key] = found[1]
            elif is_whole(key) and not is_refused(key):
                whole[key] = tensors[key]
            else:
                raise unknown_key(self.place, key, tensors, describe(self.formats()))
        small = {key: eight_bit.widened(tensors[key], self.scales.get(key)) for key in slots}
        base = None if self.base is None else self.base.tensors
        if whole and self.base is None:
            raise AdapterFileError(
                f"{self.place}: {next(iter(whole))!r} is a whole tensor among small changes; its change is the "
                "difference to the base",
                mend=f"spmhub convert {quoted(self.place)} --model M, the base that it was trained on",
            )
        increments = read_by_keys(self.place, small, slots, scaling, converting=converting, base=base)
        if not whole or self.base is None:
            return increments
        more = differences(self.place, whole, self.base.denoiser, self.scales, self.progress)
        return {**added(increments, more)} if more else increments

    @cached_property
    def _opened(self) -> _Weights | None:
        path = self.weights
        if path is None:
            return None
        metadata: Mapping[str, str] = {}
        left_out: Mapping[str, int] = {}
        tensors: Mapping[str, Tensor]
        kind = first_bytes.kind_of(path)
        if kind in (first_bytes.TORCH, first_bytes.PICKLE) or (kind is None and path.suffix in pickles.SUFFIXES):
            content = pickles.read(path)
            tensors = state_dicts.tensors_in(path, content, without_text_encoder=self.without_text_encoder)
            sha256 = sha256_of(path)
        else:
            header, tensors, sha256 = read_tensors(path)
            metadata = header.metadata
        tensors = unwrapped(path, tensors)
        if self.without_text_encoder and other_components.alone(tensors) is None:
            tensors, left_out = other_components.split_off(tensors)
            if not tensors:
                raise AdapterFileError(
                    f"{path} holds nothing of a denoiser, but tensors of: {', '.join(sorted(left_out))}",
                    mend=other_components.FOR_DENOISERS,
                )
        other_components.refuse(path, tensors)
        tensors, scales = eight_bit.split_scales(path, tensors)
        return _Weights(tensors, metadata, sha256, left_out, scales)


@dataclass(frozen=True)
class About:
    """Facts about an eraser that its files state outside the metadata of their header.

    files: those that were read, where `Source.weights` is not the only one.  manifest: ours, complete; all the other
    facts are then taken from it.
    """

    family: str | None = None
    concept: str | None = None
    method: str | None = None
    files: tuple[Path, ...] = ()
    manifest: Manifest | None = None


def _nothing_more(source: Source) -> About:
    return About()


@dataclass(frozen=True)
class Writer:
    """The writing side of a format. `kinds`: the kinds of increments that it can hold.

    write: returns the files for a manifest, its increments by dotted path, and the base's tensors by state-dict key;
    these are given if `needs_base` is True. Raises AdapterFileError for a module that the format has no name for.
    suffix: the ending of the file's name; empty for a format that writes a folder.
    caveat: returns what other programs do not load of such a file, or None.
    """

    kinds: tuple[Literal["low_rank", "dense", "mask"], ...]
    write: Callable[[Manifest, Mapping[str, Increment], Mapping[str, Tensor]], Files]
    needs_base: bool = False
    suffix: str = ".safetensors"
    caveat: Callable[[Manifest], str | None] = lambda manifest: None


@dataclass(frozen=True)
class Format:
    """A file format: it recognises, reads and writes its own files.

    name: for `spmhub convert --to`.  about: one line for people.
    matches: returns True for a source of this format. Our own formats are asked first, and the first match reads.
    read: returns the increments by module path, dotted or with . as _ ; raises AdapterFileError.
    writer: None for a format that is read only.  needs_base: `read` takes weights from `source.base`, which a
    conversion then requires.  describe: returns what else the files say about the eraser.
    parse_key: for a format that names every tensor by its module (`by_keys`); its keys may occur in files of others,
    and `spm_hub.load` reads its files without a conversion unless `converted_only` is True.
    """

    name: str
    about: str
    matches: Callable[[Source], bool]
    read: Callable[[Source], Mapping[str, Increment]]
    writer: Writer | None = None
    needs_base: bool = False
    describe: Callable[[Source], About] = _nothing_more
    parse_key: KeyParser | None = None
    converted_only: bool = False

    @classmethod
    def by_keys(
        cls, name: str, about: str, parse_key: KeyParser, writer: Writer | None = None, *, converted_only: bool = False
    ) -> "Format":
        """Return a format of keys that each name a module and a part; `parse_key` is all it takes to read it.

        converted_only: because another file holds half of the content, or a small file makes much more.
        """
        return cls(
            name, about, lambda source: name in source.layouts, read_keys, writer,
            parse_key=parse_key, converted_only=converted_only,
        )  # fmt: skip


def read_keys(source: Source) -> dict[str, Increment]:
    """Return the increments of a file by its keys, scaled as diffusers' header says if there is one."""
    return source.read_keys(scaling=scaling_in(source.metadata, source.place))


def slot_of(formats: Iterable[Format], key: str) -> tuple[str, Slot] | None:
    """Return the name of the first of these formats that knows the key, and the key's slot."""
    for known in formats:
        if known.parse_key is not None and (slot := known.parse_key(key)) is not None:
            return known.name, slot
    return None


def describe(formats: Iterable[Format]) -> str:
    """Return the names of these formats, each with a line about it, for a message."""
    return "; ".join(f"{known.name} ({known.about})" for known in formats)
