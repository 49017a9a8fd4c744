"""Bakes erasers into a checkpoint, from references to a model and to erasers."""

from __future__ import annotations

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
    registry: the folder in which names are looked up; unless given, the working folder if it is a registry, and the
    user's own.

    Raises UsageError (no eraser, one twice, a base that was baked itself, strengths that no float holds),
    NotFoundError (an unknown eraser or model), CompatibilityError (an eraser of another base), ModelError,
    RegistryError (`out` exists or cannot be written).
    """
    from spm_hub.adapters import baking
    from spm_hub.adapters.adapter import Adapter
    from spm_hub.adapters.lookup import check_names
    from spm_hub.hub.resolve import resolve
    from spm_hub.models.loading import load_pipeline
    from spm_hub.models.references import identity_of_pipeline, parse_reference

    if config is not None and pipe is not None:
        raise UsageError("config is for a model to be loaded, and pipe is loaded already", mend="leave config out")
    reference = model or "sketchbook"
    source = None if pipe is not None and model is None else parse_reference(reference, config=config)
    several = [adapters] if isinstance(adapters, str | Path | Adapter) else list(adapters)
    folder = None if registry is None else Path(registry)
    entries = [one if isinstance(one, Adapter) else resolve(str(one), folder) for one in several]
    erasers = [one if isinstance(one, Adapter) else one.load() for one in entries]
    check_names(erasers, strength if isinstance(strength, Mapping) else ())
    baking.check_place(Path(out), replace=replace)
    pipe = pipe or load_pipeline(reference, config=config, dtype="stored", device="cpu")
    base = identity_of_pipeline(pipe)[0] if source is None else source.public_name
    return baking.bake(pipe, erasers, Path(out), strength=strength, base=base, replace=replace)
