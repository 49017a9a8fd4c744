"""An eraser: a manifest and the increments it speaks of, loaded from and saved to one safetensors file."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import reduce
from pathlib import Path
from types import MappingProxyType

import torch

from spm_hub.adapters.formats import spm
from spm_hub.adapters.formats.header import header_metadata
from spm_hub.adapters.formats.lazy import StoredIncrements, with_dots
from spm_hub.adapters.formats.lora_config import scaling_in
from spm_hub.adapters.formats.module_names import check_roots, family_of
from spm_hub.adapters.formats.reading import read_increments
from spm_hub.adapters.increments import Increment, LowRank
from spm_hub.adapters.manifest import Base, Concept, IncrementInfo, Manifest, slug
from spm_hub.errors import GET_AGAIN, AdapterFileError, ManifestError
from spm_hub.io.atomic import Content, write_together
from spm_hub.io.safetensors_file import MANIFEST_KEY, Header, Image, encode, read_header, read_tensors

UNKNOWN_FAMILY = "unknown"
"""Of a file that no header and no tensor tells the base of."""

# What decides on which prompts and models an eraser acts, and how; into the rest, people write (author, licence).
_DECISIVE = ("concept", "increment", "base", "gate")


@dataclass(frozen=True, eq=False, repr=False)
class Adapter:
    """One eraser. `increments` maps the dotted path of a module inside the denoiser to what is added to it.

    Files of other programs may know their modules only with . as _ (`formats.spm.flat`); models are matched by it.
    `source` says where the adapter came from, for messages.
    """

    manifest: Manifest
    increments: Mapping[str, Increment]
    source: str = "memory"

    def __post_init__(self) -> None:
        if not isinstance(self.increments, StoredIncrements):
            object.__setattr__(self, "increments", MappingProxyType(dict(self.increments)))
        stated, actual = self.manifest.increment, increment_info(self.outline)
        if missing := sorted(set(stated.modules) ^ set(actual.modules)):
            where = "manifest" if missing[0] in stated.modules else "increments"
            raise ManifestError(
                f"{self.source}: {missing[0]} is named by the {where} only ({len(missing)} such modules)"
            )
        for key in ("kind", "rank", "dtype"):
            said, found = getattr(stated, key), getattr(actual, key)
            if said != found:
                raise ManifestError(
                    f"{self.source}: increment.{key} is {said!r} in the manifest, the tensors say {found!r}"
                )

    @property
    def name(self) -> str:
        return self.manifest.name

    def __repr__(self) -> str:
        about, base = self.manifest.increment, self.manifest.base
        kind = about.kind if about.rank is None else f"{about.kind} of rank {about.rank}"
        modules = f"{len(about.modules)} module{'s' if len(about.modules) > 1 else ''}"
        of = f"{base.id} ({base.family})" if base.id else base.family
        target = self.manifest.concept.target
        return f"<Adapter {self.name}: erases {target!r}, {kind} on {modules}, {about.dtype}, for {of}, {self.source}>"

    @property
    def outline(self) -> Mapping[str, Increment]:
        """The increments for whoever asks for their kinds and shapes only: those of a file may be unread, on meta."""
        return self.increments.outline if isinstance(self.increments, StoredIncrements) else self.increments

    def with_increments(self, increments: Mapping[str, Increment]) -> "Adapter":
        """The same eraser with other increments, and a manifest that says so."""
        manifest = self.manifest.model_copy(update={"increment": increment_info(increments)})
        return Adapter(manifest, increments, self.source)

    def save(self, path: Path | str, manifest_path: Path | str | None = None) -> Manifest:
        """Write the adapter, and the manifest beside it when `manifest_path` is given: both wholly, or neither.

        Returns the manifest as it stands in that file. Raises as `encoded` does, and RegistryError when the files
        cannot be written.
        """
        path = Path(path)
        image, written = self.encoded(path.name)
        files: dict[Path, Content] = {path: image.write_to}
        if manifest_path is not None:
            files[Path(manifest_path)] = written.to_json().encode()
        write_together(files)
        return written

    def encoded(self, file_name: str) -> tuple[Image, Manifest]:
        """The adapter file, and the manifest to stand beside it, with name, size and sha256 of that file.

        The adapter file depends on increments and manifest alone: no clock, no path.
        Raises AdapterFileError when a tensor is not finite.
        """
        for module, increment in self.increments.items():
            for part, tensor in increment.tensors().items():
                if not torch.isfinite(tensor).all():
                    raise AdapterFileError(
                        f"{self.name}: {part} of {module} is not finite, nothing was written",
                        mend="train with a smaller learning rate",
                    )
        # From the numbers themselves: the manifest of a lazily loaded file knows less of them (`load_file`).
        manifest = self.manifest.model_copy(update={"increment": increment_info(self.increments)})
        image = encode(spm.to_tensors(self.increments), header_metadata(manifest))
        about_file = {"file": file_name, "bytes": image.nbytes, "sha256": image.sha256}
        return image, manifest.model_copy(
            update={
                "increment": manifest.increment.model_copy(update=about_file),
                "created": manifest.created or datetime.now(UTC).replace(microsecond=0),
            }
        )


def load_file(path: Path | str, manifest_path: Path | str | None = None, *, lazy: bool = False) -> Adapter:
    """Load an adapter file, checked against `manifest_path` where one is given, and against the hashes in its header.

    lazy: read the header only, and the increments, with all checks of their numbers and hashes, when they are first
    needed (`formats.stored`). A file of another program gets a manifest made from its header, name and tensors; where
    its scales lead to a wider dtype than the tensors have, the manifest of a lazy one says that of the tensors.
    Raises AdapterFileError (truncated, altered, not finite, unknown layout), NotFoundError, and ManifestError: not
    valid, of other tensors, or one beside the file that contradicts the one inside.
    """
    path = Path(path)
    sidecar = None if manifest_path is None else Manifest.read(Path(manifest_path))
    if sidecar is not None and sidecar.increment.sha256 is None:
        raise AdapterFileError(
            f"{manifest_path} tells {path} from no other file: its increment.sha256 is None", mend=GET_AGAIN
        )
    if sidecar is not None and path.is_file() and sidecar.increment.bytes not in (None, size := path.stat().st_size):
        raise AdapterFileError(
            f"{path} is not the file that {manifest_path} describes: increment.bytes is {sidecar.increment.bytes}, "
            f"the file has {size}",
            mend=GET_AGAIN,
        )
    if lazy:
        header = read_header(path)
        own = _manifest_of(path, header, sidecar)
        known = own or sidecar
        stored = StoredIncrements(
            path, header, None if sidecar is None else sidecar.increment.sha256,
            () if known is None else known.increment.modules,
        )  # fmt: skip
        return Adapter(own or _manifest_of_foreign(path, header, stored.outline, sidecar), stored, str(path))
    header, tensors, sha256 = read_tensors(path)
    if sidecar is not None and sidecar.increment.sha256 != sha256:
        raise AdapterFileError(
            f"{path} is not the file that {manifest_path} describes: increment.sha256 is {sidecar.increment.sha256}, "
            f"the file's is {sha256}",
            mend=GET_AGAIN,
        )
    increments = read_increments(path, tensors, scaling_in(header.metadata, path))
    manifest = _manifest_of(path, header, sidecar) or _manifest_of_foreign(path, header, increments, sidecar)
    return Adapter(manifest, with_dots(increments, manifest.increment.modules), str(path))


def increment_info(increments: Mapping[str, Increment]) -> IncrementInfo:
    """What a manifest says about these increments. Raises AdapterFileError when there are none, or several kinds."""
    kinds = sorted({increment.kind for increment in increments.values()})
    if len(kinds) != 1:
        raise AdapterFileError(f"an adapter holds increments of one kind, not of {' and '.join(kinds) or 'none'}")
    dtype = reduce(torch.promote_types, (increment.dtype for increment in increments.values()))
    ranks = [increment.rank for increment in increments.values() if isinstance(increment, LowRank)]
    return IncrementInfo(
        kind=kinds[0],
        rank=max(ranks, default=None),
        dtype=str(dtype).removeprefix("torch."),
        modules=tuple(sorted(increments)),
    )


def disagreement(
    beside: Manifest, embedded: str, path: Path, keys: Iterable[str] = tuple(Manifest.model_fields)
) -> str | None:
    """What the manifest inside the file at `path` says otherwise than the one beside it, of `keys`; None for nothing.

    A copy may be kept under another name, and what is learnt of a file once it is written does not stand in it.
    Raises ManifestError where the one inside is none.
    """
    if embedded == beside.to_embedded_json():
        return None
    inside = Manifest.from_json(embedded, source=f"{path} ({MANIFEST_KEY})")
    theirs, ours = (json.loads(one.to_embedded_json()) for one in (inside, beside))
    differing = [key for key in keys if key != "name" and theirs.get(key) != ours.get(key)]
    if not differing:
        return None
    said, but = (str([one[key] for key in differing])[:200] for one in (theirs, ours))
    return f"{', '.join(differing)}: {said} inside, {but} beside"


def _manifest_of(path: Path, header: Header, beside: Manifest | None) -> Manifest | None:
    """Of a file with a manifest inside: that beside it, where there is one, or else that inside; None of others."""
    embedded = header.metadata.get(MANIFEST_KEY)
    if embedded is None:
        return None
    if beside is None:
        # Where a file was pulled from is known to whoever pulled it, and never to the file.
        return Manifest.from_json(embedded, source=f"{path} ({MANIFEST_KEY})").model_copy(update={"origin": None})
    if said := disagreement(beside, embedded, path, _DECISIVE):
        raise ManifestError(f"{path}: its manifests contradict each other in {said}", mend=GET_AGAIN)
    return beside


def _manifest_of_foreign(
    path: Path, header: Header, increments: Mapping[str, Increment], beside: Manifest | None
) -> Manifest:
    """A manifest for a file that brings none: SPM's legacy `prompts` or the file's name say what it erases.

    One beside it is right in all but the dtype, which is that of the increments as they were read, lazily or not.
    """
    try:
        info = increment_info(increments)
    except AdapterFileError as error:
        raise AdapterFileError(f"{path}: {error.message}", mend=f"spmhub convert {path}") from error
    if beside is not None:
        return beside.model_copy(update={"increment": beside.increment.model_copy(update={"dtype": info.dtype})})
    family = family_of(increments) or UNKNOWN_FAMILY
    check_roots(path, family, increments)
    # SPM joins several targets with commas; they are names of one eraser, so the gate listens to each.
    prompts = [prompt.strip() for prompt in header.metadata.get("prompts", "").split(",") if prompt.strip()] or [
        path.stem
    ]
    return Manifest(
        name=slug(path.stem),
        concept=Concept(target=prompts[0], aliases=tuple(prompts[1:])),
        increment=info,
        base=Base(family=family, id="", fingerprint=""),
        recipe={},
        licence=header.metadata.get("modelspec.license", "unknown"),
        author=header.metadata.get("modelspec.author", ""),
    )
