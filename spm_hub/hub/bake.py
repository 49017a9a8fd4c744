"""Bakes erasers into a checkpoint, and takes one out again, from references to a model and to erasers."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from spm_hub.errors import UsageError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from spm_hub.adapters.adapter import Adapter
    from spm_hub.adapters.baking import Provenance


def bake(
    adapters: str | Path | Adapter | Sequence[str | Path | Adapter],
    out: str | Path,
    *,
    model: str | None = None,
    config: str | None = None,
    pipe: DiffusionPipeline | None = None,
    strength: float | Mapping[str, float] | None = None,
    registry: str | Path | None = None,
    replace: bool = False,
    force: bool = False,
) -> Provenance:
    """Write a plain diffusers checkpoint with erasers folded in, and return its record of them.

    Any program can load it. It erases at gamma 1, for every prompt. Each part of the base keeps its precision, and the
    folder has the data that `spm_hub.adapters.baking.recover` needs to take an eraser out again.

    adapters: one eraser or several: Adapters, files, names in a registry, or owner/name[@revision] on the Hub.
    out: the folder to write.  replace: replace a checkpoint that is there.
    model: the base: an alias, folder, file or Hub id; unless given, the sketchbook.  config: as in `load_pipeline`, for
    a model that is a single file.  pipe: the base, already loaded, which is not changed; the record names it by `model`
    if given, else by where it was loaded from.
    strength: one number, numbers by eraser, or None for each manifest's own.
    registry: the folder in which names are looked up before the user's own registry.
    force: bake erasers although one takes back what another changes, with a warning.

    Raises UsageError (no eraser, one twice, one that undoes another, a base that was baked itself, strengths that no
    float holds),
    AdapterFileError (an eraser that changes nothing), NotFoundError (an unknown eraser or model), CompatibilityError
    (an eraser of another base), ModelError, RegistryError (`out` exists or cannot be written). Warns of an eraser whose
    change the base seems to contain, and of one that costs other things without a gate.
    """
    from spm_hub.adapters import baking
    from spm_hub.adapters.adapter import Adapter
    from spm_hub.adapters.compatibility import resolve_modules
    from spm_hub.adapters.lookup import check_names
    from spm_hub.adapters.presence import remark_on_presence
    from spm_hub.attachment import is_attached
    from spm_hub.hub.resolve import resolve
    from spm_hub.models.architectures import denoiser_of
    from spm_hub.models.loading import load_pipeline
    from spm_hub.models.references import identity_of_pipeline, parse_reference
    from spm_hub.training.verdict import needs_gate

    if config is not None and pipe is not None:
        raise UsageError("config is for a model to be loaded, and pipe is loaded already", mend="leave config out")
    reference = model or "sketchbook"
    source = None if pipe is not None and model is None else parse_reference(reference, config=config)
    several = [adapters] if isinstance(adapters, str | Path | Adapter) else list(adapters)
    folder = None if registry is None else Path(registry)
    entries = [one if isinstance(one, Adapter) else resolve(str(one), folder) for one in several]
    erasers = [one if isinstance(one, Adapter) else one.load() for one in entries]
    check_names(erasers, strength if isinstance(strength, Mapping) else ())
    for eraser in erasers:
        eraser.check_effect()
    _check_undoing(erasers, strength, force=force)
    baking.check_place(Path(out), replace=replace)
    pipe = pipe or load_pipeline(reference, config=config, dtype="stored", device="cpu")
    for cost in filter(None, (needs_gate(eraser.manifest) for eraser in erasers)):
        warnings.warn(f"spm_hub: {cost}; a baked checkpoint has no gate", UserWarning, stacklevel=2)
    for eraser in erasers if not is_attached(pipe) else ():
        found = resolve_modules(eraser, denoiser_of(pipe))
        modules = {name: module for module, name in found.values()}
        if (remark := remark_on_presence(eraser, modules, eraser.increments)) is not None:
            warnings.warn(f"spm_hub: {remark}", UserWarning, stacklevel=2)
    base = identity_of_pipeline(pipe)[0] if source is None else source.public_name
    return baking.bake(pipe, erasers, Path(out), strength=strength, base=base, replace=replace)


def _check_undoing(erasers: Sequence[Adapter], strength: float | Mapping[str, float] | None, *, force: bool) -> None:
    """Refuse an eraser that takes back the change of another; with `force` that is a warning."""
    from spm_hub.adapters.baking import factors_of
    from spm_hub.adapters.overlap import products_and_opposed, squared_norms, undoings

    increments = [eraser.increments for eraser in erasers]
    names, strengths = [eraser.name for eraser in erasers], list(factors_of(erasers, strength).values())
    products, opposed = products_and_opposed(increments)
    for one in undoings(products, strengths, list(map(squared_norms, increments)), opposed):
        said = one.describe(names)
        if not force:
            raise UsageError(
                f"{said}; nothing was written",
                mend="bake only one of them; if it is meant: force=True, or the same command with --force",
            )
        warnings.warn(f"spm_hub: {said}", UserWarning, stacklevel=3)


def recover(checkpoint: Path, name: str, registry: Path | None = None, *, force: bool = False) -> Provenance:
    """Take one eraser out of a baked checkpoint, as `adapters.baking.recover` does.

    Where a signature is required, each eraser that stays has to be one that a registry holds signed: a checkpoint keeps
    erasers without their signatures. registry: a folder to look for them in first. force: fold the others at any
    strength that the checkpoint records.
    Raises SignatureError, and the errors of `adapters.baking.recover`.
    """
    from spm_hub.adapters import baking
    from spm_hub.registry import signing

    if signing.required_key() is None:
        return baking.recover(checkpoint, name, force=force)
    return baking.recover(
        checkpoint, name, check=lambda eraser: _check_signed(eraser, checkpoint, registry), force=force
    )


def _check_signed(baked: Adapter, checkpoint: Path, registry: Path | None) -> None:
    """Refuse a baked eraser whose tensors are not those of a signed one of its name."""
    import torch

    from spm_hub.adapters.increments import tensors_of
    from spm_hub.errors import SignatureError
    from spm_hub.registry.registry import registries

    held = next((entry for place in registries(registry) if (entry := place.find(baked.name)) is not None), None)
    if held is None:
        raise SignatureError(
            f"{checkpoint} holds {baked.name}, whose signature cannot be checked: no registry has that eraser",
            mend=f"spmhub pull OWNER/{baked.name}, or --registry with the folder that has it",
        )
    # A checkpoint names modules as its model does, and another program's file may write . as _ in them.
    signed = {path.replace(".", "_"): increment for path, increment in held.load().increments.items()}
    found = {path.replace(".", "_"): increment for path, increment in baked.increments.items()}
    one, other = tensors_of(found), tensors_of(signed)
    if one.keys() != other.keys() or not all(torch.equal(one[key], other[key]) for key in one):
        raise SignatureError(
            f"{checkpoint} holds another eraser under the name {baked.name} than {held.adapter_path}, which is signed",
            mend="bake the checkpoint again from the signed erasers",
        )
