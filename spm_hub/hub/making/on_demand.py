"""Finds erasers of concepts for the model at hand, and makes those that no registry has."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING

from spm_hub.adapters.manifest import slug
from spm_hub.errors import SpmHubError, UsageError
from spm_hub.hub.making.quick_look import looked
from spm_hub.io.progress import Reporter
from spm_hub.io.wording import quoted
from spm_hub.models.base_choice import BaseChoice
from spm_hub.registry import signing
from spm_hub.registry.registry import Registry, registries, registry_for_new, requested_root

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from spm_hub.registry.entry import EraserEntry


def erasers_for(
    concepts: Sequence[str],
    pipe: DiffusionPipeline,
    model: str | None,
    reporter: Reporter,
    registry: Path | None = None,
    *,
    look: bool = True,
) -> list[EraserEntry]:
    """Return erasers of all concepts that fit this pipeline, those of a registry or new ones.

    concepts: in words; spellings of one concept give one eraser. model: the name of the base for manifests, None for
    where the pipeline was loaded from. registry: searched first, and where new erasers are kept; None is the user's.
    New erasers are computed at once from the pipeline's own text encoder and weights (`--method instant`), and kept
    under the concept's name or, if that is taken, under one with the base's name in it.
    look: whether a quick look says what each new one does, where that takes seconds.
    Raises UsageError for an empty concept, where new erasers would have to be signed, and for a pipeline with erasers
    attached; RecipeError for a pipeline that this cannot be done on; RegistryError.
    """
    from spm_hub.models.architectures import denoiser_of, fingerprint_of

    wanted = list(dict.fromkeys(" ".join(concept.split()) for concept in concepts))
    if not all(wanted):
        raise UsageError("one of the concepts to erase is empty", mend='--erase snoopy; in Python erase=["snoopy"]')
    base = BaseChoice(model, pipe=pipe)
    shapes, target = fingerprint_of(denoiser_of(pipe)), registry_for_new(registry)
    # The folder for new erasers need not exist yet.
    places = registries(registry) if requested_root(registry) is None or target.root.is_dir() else (target,)
    found = {concept: entry for concept in wanted if (entry := _kept(concept, places, shapes, base.name(pipe)))}
    for concept, entry in found.items():
        reporter.say(f"{concept!r}: {entry.name}, {entry.describe_source()}")
    if missing := [concept for concept in wanted if concept not in found]:
        found |= dict(zip(missing, _made(missing, base, pipe, target, reporter, look=look), strict=True))
    return list({found[concept].adapter_path: found[concept] for concept in wanted}.values())


def _kept(concept: str, places: Iterable[Registry], shapes: str, model: str) -> EraserEntry | None:
    """Return an eraser of the concept for a denoiser with this fingerprint, the model's own before others."""
    fitting = []
    for entry in (entry for place in places for entry in place.erasing(concept)):
        with suppress(SpmHubError):  # a damaged eraser is none; loading it by name reports the error
            base = entry.read_manifest().base
            if base.fingerprint == shapes:
                fitting.append((base.id != model, entry))
    return min(fitting, key=lambda one: one[0])[1] if fitting else None


def _made(
    concepts: Sequence[str],
    base: BaseChoice,
    pipe: DiffusionPipeline,
    target: Registry,
    reporter: Reporter,
    *,
    look: bool,
) -> list[EraserEntry]:
    """Compute an eraser of each concept, all in one run, and keep them."""
    from spm_hub.adapters.adapter import Adapter
    from spm_hub.attachment.pipeline_hooks import is_attached
    from spm_hub.training.methods import AT_ONCE
    from spm_hub.training.planning import plan_runs
    from spm_hub.training.session import Session

    if is_attached(pipe):
        raise UsageError(
            "this pipeline has erasers attached, which would change what new ones are computed from",
            mend="erasers.detach() first, or attach all of them in one call",
        )
    if (key := signing.required_key()) is not None:
        raise UsageError(
            f"no registry has an eraser of {concepts[0]!r} for this model, and {key} asks for signatures, which a new "
            "one would not have",
            mend=f"spmhub train {quoted(concepts[0])} --method {AT_ONCE}, then spmhub sign, where the private key is",
        )
    model = base.name(pipe)
    names = _free_names(concepts, model, target)
    for name in names:
        target.check_room_for(name)
    began = time.monotonic()
    plans = plan_runs(concepts, {"method": AT_ONCE})
    session = Session(plans, base, reporter, target.get, look=looked if look else None)
    session.check()
    entries = []
    for name, adapter in zip(names, session.train(), strict=True):
        assert isinstance(adapter, Adapter), "a session without a registry returns adapters"
        manifest = adapter.manifest.model_copy(update={"name": name})
        entries.append(target.add(Adapter(manifest, adapter.increments, adapter.source)))
    reporter.say(
        f"no registry had an eraser of {', '.join(map(repr, concepts))} for {model}: computed {', '.join(names)} from "
        f"its text encoder in {time.monotonic() - began:.1f} s, and kept in {target.root}; to measure them: "
        "spmhub eval"
    )
    return entries


def _free_names(concepts: Sequence[str], model: str, target: Registry) -> list[str]:
    """Return a new name for each concept: its own or, if that is taken, one with the base's in it."""
    names: list[str] = []
    for concept in concepts:
        numbered = (f"{concept} {model} {number}" for number in count(2))
        tried = map(slug, chain((concept, f"{concept} {model}"), numbered))
        names.append(next(name for name in tried if name not in names and target.find(name) is None))
    return names
