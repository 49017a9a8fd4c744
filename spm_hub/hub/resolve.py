"""Resolves a reference to an eraser: a path, a name in a registry, or a repository of the Hub.

The Hub's client is imported only when it is needed: importing it takes longer than reading a registry.
"""

import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from spm_hub.adapters.manifest import NAME, slug
from spm_hub.errors import NetworkError, NotFoundError, UsageError, ambiguous_eraser, nearest, unknown_eraser
from spm_hub.io.progress import ProgressCallback
from spm_hub.io.web_addresses import hub_reference
from spm_hub.registry import lockfile, storage
from spm_hub.registry.entry import WEIGHTS_NAME, EraserEntry, entry_of
from spm_hub.registry.registry import HUB_REFERENCE, Registry, registries, requested_root

if TYPE_CHECKING:
    from spm_hub.adapters.adapter import Adapter

_SUFFIX = storage.SUFFIXES[storage.ADAPTERS]
_TYPING_ERROR = 0.8
"""Similarity, of 1, from which a name is taken for a mistyped one: one letter in five."""


def resolve(reference: str, registry: Path | None = None, *, progress: ProgressCallback | None = None) -> EraserEntry:
    """Find an eraser by path, by name or concept in a registry, or by its name on the Hub.

    On the Hub it is owner/name[@revision], or the address of its page.
    A name may be spelt as people do: `van_gogh` and `van-gogh.safetensors` find the eraser van-gogh.
    A name that is nearly one of a registry is refused as a typing error. Another unknown
    name is pulled from the repositories of `pull.owner()` into `registry` or the user's own registry. A Hub repository
    that was pulled before is taken from the registry, at its pinned commit.
    progress: called with the bytes done and the total of a download.
    Raises UsageError if several erasers match, NotFoundError with the nearest names if none does, NetworkError if the
    Hub is needed and out of reach.
    """
    if not reference.strip():
        raise UsageError("the reference to an adapter is empty", mend="spmhub list")
    path = Path(reference).expanduser()
    if not path.exists():
        reference = hub_reference(reference)
        path = Path(reference).expanduser()
    looks_like_path = path.suffix == _SUFFIX or path.is_absolute() or reference.startswith(("./", "../", "~"))
    if looks_like_path or ("/" in reference and path.exists()):
        is_name = path.name == reference and path.stem != reference and not path.exists()
        named = _by_name(path.stem, registries(registry)) if is_name else None
        return named or _entry_at(path)
    known = registries(registry)
    if match := HUB_REFERENCE.fullmatch(reference):
        from spm_hub.hub.pull import download

        pinned = _pinned(match["repo"], match["revision"], known)
        return pinned or download(match["repo"], match["revision"], progress=progress)
    hit = _by_name(reference, known)
    if path.is_file() or (path / WEIGHTS_NAME).is_file():
        if hit is not None:
            raise ambiguous_eraser(reference, [f"./{reference} (a file here)", f"{hit.adapter_path} (in a registry)"])
        return _entry_at(path)
    return hit or _from_owner(reference, registry, progress)


def load(reference: str, registry: Path | None = None, *, lazy: bool = False) -> "Adapter":
    """Load the adapter that a reference names; see `resolve`, and `adapter.load_file` for `lazy`."""
    return resolve(reference, registry).load(lazy=lazy)


def _by_name(reference: str, known: Iterable[Registry]) -> EraserEntry | None:
    """Return the eraser of that name or concept in the first registry that has one, or None.

    Raises UsageError if several erase the concept.
    """
    if re.fullmatch(NAME, reference):
        # A name, even in a later registry, takes precedence over a concept: any manifest can claim any concept.
        for find in (Registry.find, Registry.find_spelt):
            if found := next((entry for place in known if (entry := find(place, reference))), None):
                return found
    for place in known:
        with suppress(NotFoundError):
            return place.get(reference)
    return None


def _pinned(repo: str, revision: str | None, known: Iterable[Registry]) -> EraserEntry | None:
    """Return the eraser that was pulled from `repo` at `revision`, if a registry still has it."""
    for place in known:
        for name, pin in lockfile.read(place.root).items():
            if pin.repo == repo and revision in (pin.revision, pin.commit):
                entry = place.find(name)
                if entry is not None and entry.pin == pin:
                    return entry
    return None


def _from_owner(reference: str, registry: Path | None, progress: ProgressCallback | None) -> EraserEntry:
    """Pull a name that no registry has from the Hub.

    Raises NotFoundError, without a request if a registry has nearly that name; HubError for a closed repository.
    """
    from spm_hub.hub import pull as hub_pull

    known, user = registries(registry), hub_pull.owner()
    # The eraser may have another name than its repository, so the name alone does not find a pulled one.
    if user is not None and (entry := _pinned(f"{user}/{slug(reference)}", None, known)):
        return entry
    where = ", ".join(str(place.root) for place in known)
    names = [entry.name for place in known for entry in place.entries()]
    if user is not None and nearest(slug(reference).replace("_", "-"), names, cutoff=_TYPING_ERROR):
        raise unknown_eraser(reference, names, f"in {where}")
    target = known[-1] if requested_root(registry) is None else known[0]  # the last is the user's own
    try:
        found = hub_pull.pull_by_name(slug(reference), target, progress)
    except NetworkError as error:
        raise unknown_eraser(reference, names, f"in {where}, and {error.message}") from error
    if found is None:
        raise unknown_eraser(
            reference, names, f"in {where}" + (f", nor on the Hub as {user}/{slug(reference)}" if user else "")
        )
    return found


def _entry_at(path: Path) -> EraserEntry:
    """Return the eraser at a path: an adapter file, or a folder laid out as a repository of the Hub."""
    if path.is_dir():
        files = [path / WEIGHTS_NAME] if (path / WEIGHTS_NAME).is_file() else sorted(path.glob(f"*{_SUFFIX}"))
        if len(files) > 1:
            raise ambiguous_eraser(str(path), map(str, files))
        if not files:
            raise NotFoundError(f"{path}: this folder has no {_SUFFIX} file", mend="spmhub list")
        return entry_of(files[0])
    if not path.exists():
        siblings = [str(file) for file in path.parent.glob(f"*{_SUFFIX}")]
        raise unknown_eraser(str(path), siblings, "on this disk")
    return entry_of(path)
