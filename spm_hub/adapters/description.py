"""Makes a manifest for a file of another program, from its content, the base and the caller's words."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from spm_hub.adapters.adapter import UNKNOWN_FAMILY, Adapter, increment_info
from spm_hub.adapters.formats.format import About, Format, Source
from spm_hub.adapters.formats.header import concept_in, family_in
from spm_hub.adapters.formats.module_names import check_roots, family_of
from spm_hub.adapters.increments import Increment
from spm_hub.adapters.manifest import Base, Concept, GammaLaw, GateDefaults, Manifest, slug
from spm_hub.errors import UsageError
from spm_hub.models import architectures

# Names that other programs give to every file; the folder's name then says more about the eraser.
_NAMELESS = {"adapter_model", "pytorch_lora_weights", "diffusion_pytorch_model", "model"}


@dataclass(frozen=True)
class Description:
    """The caller's statements about a file, which outrank the file's own.

    family: name of a model family.  without_text_encoder: leave out the tensors of text encoders; a file with such
    tensors is refused unless this is True.  law: how the change follows from gamma.
    """

    name: str | None = None
    concept: str | None = None
    family: str | None = None
    without_text_encoder: bool = False
    law: GammaLaw | None = None


def apply_description(adapter: Adapter, said: Description) -> Adapter:
    """Return an adapter that has a manifest, changed as described; another concept gives it another name.

    Raises UsageError for another family.
    """
    if said.concept:
        before, adapter = adapter.manifest.concept, adapter.with_concept(said.concept)
        if adapter.manifest.concept.target not in before.names and said.name is None:
            said = replace(said, name=slug(said.concept))
    manifest = adapter.manifest
    update: dict[str, Any] = {}
    if said.name:
        update["name"] = said.name
    if said.law:
        update["gate"] = manifest.gate.model_copy(update={"law": said.law})
    if said.family:
        if manifest.base.family not in (said.family, UNKNOWN_FAMILY):
            raise UsageError(f"--base {said.family}, but its manifest says {manifest.base.family}")
        update["base"] = manifest.base.model_copy(update={"family": said.family})
    return Adapter(manifest.model_copy(update=update), adapter.increments, adapter.source)


def make_manifest(
    source: Source, known: Format, about: About, increments: Mapping[str, Increment], said: Description
) -> Manifest:
    """Return the manifest of a converted file; its recipe records the file's name, format and hash.

    Its concept is unknown where neither the caller nor the file names one.

    Raises UsageError if nothing determines the model family, AdapterFileError for modules of another family.
    """
    metadata = {} if about.files else source.metadata
    base, place = source.base, source.path if about.files else source.place
    stem = place.parent.resolve().name if place.stem in _NAMELESS else place.stem
    given = said.concept or about.concept
    family = _family(source, about.family or family_in(metadata), increments, said)
    check_roots(place, family, increments)
    return Manifest(
        name=said.name or slug(said.concept or stem),
        concept=Concept.of((given,) if given else concept_in(metadata)),
        increment=increment_info(increments),
        base=Base(
            family=family,
            id=base.id if base else metadata.get("base_model_id", ""),
            revision=base.revision if base else None,
            fingerprint=architectures.fingerprint_of(base.denoiser) if base else "",
        ),
        recipe=_origin(source, known, about, place),
        gate=GateDefaults(law=said.law or "linear"),
        licence=metadata.get("modelspec.license", "unknown"),
        author=metadata.get("modelspec.author", ""),
    )


def _family(source: Source, stated: str | None, increments: Mapping[str, Increment], said: Description) -> str:
    """Return the family that the caller names, else that of the base, of the tensors, or the `stated` one."""
    families = list(dict.fromkeys(family.name for family in architectures.all_families()))
    if said.family is not None and said.family not in families:
        raise UsageError(f"--base {said.family!r} is no family", mend=f"--base {', '.join(families)}")
    found = family_of(increments)
    own = source.base and architectures.family_of(source.base.denoiser).name
    for other, where in ((own, "the model"), (found, "the file's tensors")):
        if said.family and other and other not in (said.family, "generic"):
            raise UsageError(f"--base {said.family}, but {where}: {other}", mend="leave --base out")
    family = said.family or own or found or stated
    if family is None:
        raise UsageError(
            f"{source.place}: its names and widths fit several families of models, and its header names none",
            mend=f"--base {', '.join(families)}",
        )
    return family


def _origin(source: Source, known: Format, about: About, place: Path) -> dict[str, JsonValue]:
    """Return the record that takes the place of a recipe for a file of another program."""
    sha256 = None if about.files else source.sha256
    converted: dict[str, JsonValue] = {
        "format": known.name,
        "file": place.name,
        "sha256": sha256 or _sha256(about.files or source.files),
    }
    left_out = {} if about.files else source.left_out
    converted |= {f"{part}_tensors_left_out": count for part, count in left_out.items()}
    return {"converted": converted} | ({"method": about.method} if about.method else {})


def _sha256(files: Iterable[Path]) -> str:
    """Return the hash of the files' contents, one after the other."""
    digest = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    return digest.hexdigest()
