"""What a reference to an eraser names: a path, a name in a registry, or a repository of the Hub.

Above both registries and the Hub; the Hub's client is imported only where it is needed, as a registry is read in less
time than that takes.
"""

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from spm_hub.adapters.manifest import NAME, slug
from spm_hub.errors import NetworkError, NotFoundError, UsageError, ambiguous_eraser, unknown_eraser
from spm_hub.registry import lockfile, storage
from spm_hub.registry.entry import WEIGHTS_NAME, EraserEntry, entry_of
from spm_hub.registry.registry import HUB_REFERENCE, Registry, registries, requested_root

if TYPE_CHECKING:
    from spm_hub.adapters.adapter import Adapter

_SUFFIX = storage.SUFFIXES[storage.ADAPTERS]


def resolve(
    reference: str, registry: Path | None = None, *, progress: Callable[[int, int], None] | None = None
) -> EraserEntry:
    """Find what a reference names: a path, a name or concept in a registry, or owner/name[@revision] on the Hub.

    A name that no registry knows is pulled from the Hub, where `remote.owner` keeps it, into `registry` or the user's
    own. What is on the Hub and was pulled before is taken from the registry, at the commit it is pinned to there.
    `progress` is told the bytes of a download.
    Raises UsageError when it could be several things, NotFoundError with the nearest names when it is none,
    NetworkError when the Hub is needed and cannot be reached.
    """
    if not reference.strip():
        raise UsageError("the reference to an adapter is empty", mend="spmhub list")
    path = Path(reference).expanduser()
    looks_like_path = path.suffix == _SUFFIX or path.is_absolute() or reference.startswith(("./", "../", "~"))
    if looks_like_path or ("/" in reference and path.exists()):
        return _entry_at(path)
    known = registries(registry)
    if match := HUB_REFERENCE.fullmatch(reference):
        from spm_hub.hub.pull import download

        pinned = _pinned(match["repo"], match["revision"], known)
        return pinned or download(match["repo"], match["revision"], progress=progress)
    hit, names = None, []
    if re.fullmatch(NAME, reference):
        # A name in a later registry goes before a concept in an earlier one, which its manifest may call anything.
        hit = next((found for place in known if (found := place.find(reference))), None)
    for place in known if hit is None else ():
        try:
            hit = place.get(reference)
            break
        except NotFoundError:
            names += [entry.name for entry in place.entries()]
    if path.is_file() or (path / WEIGHTS_NAME).is_file():
        if hit is not None:
            raise ambiguous_eraser(reference, [f"./{reference} (a file here)", f"{hit.adapter_path} (in a registry)"])
        return _entry_at(path)
    return hit or _from_owner(reference, registry, names, progress)


def load(reference: str, registry: Path | None = None, *, lazy: bool = False) -> "Adapter":
    """The adapter that a reference names; see `resolve`, and `adapter.load_file` for `lazy`."""
    return resolve(reference, registry).load(lazy=lazy)


def _pinned(repo: str, revision: str | None, known: Iterable[Registry]) -> EraserEntry | None:
    """The entry that was pulled from there before, if any registry still holds it, and as its lock file names it."""
    for place in known:
        for name, pin in lockfile.read(place.root).items():
            if pin.repo == repo and revision in (pin.revision, pin.commit):
                entry = place.find(name)
                if entry is not None and entry.pin == pin:
                    return entry
    return None


def _from_owner(
    reference: str, registry: Path | None, names: list[str], progress: Callable[[int, int], None] | None
) -> EraserEntry:
    """A name that no registry knows, pulled from the Hub. Raises NotFoundError, HubError for one that is closed."""
    from spm_hub.hub import pull as remote

    known, whose = registries(registry), remote.owner()
    # Its manifest may have another name than its repository: then that is how it is held.
    if whose is not None and (held := _pinned(f"{whose}/{slug(reference)}", None, known)):
        return held
    where = ", ".join(str(place.root) for place in known)
    kept_in = known[-1] if requested_root(registry) is None else known[0]  # the last is the user's own
    try:
        found = remote.by_name(slug(reference), kept_in, progress)
    except NetworkError as error:
        raise unknown_eraser(reference, names, f"in {where}, and {error.message}") from error
    if found is None:
        raise unknown_eraser(
            reference, names, f"in {where}" + (f", nor on the Hub as {whose}/{slug(reference)}" if whose else "")
        )
    return found


def _entry_at(path: Path) -> EraserEntry:
    """The entry of a path: an adapter file, or a folder laid out as a repository of the Hub."""
    if path.is_dir():
        files = [path / WEIGHTS_NAME] if (path / WEIGHTS_NAME).is_file() else sorted(path.glob(f"*{_SUFFIX}"))
        if len(files) > 1:
            raise ambiguous_eraser(str(path), map(str, files))
        if not files:
            raise NotFoundError(f"{path}: there is no {_SUFFIX} file in this folder", mend="spmhub list")
        return entry_of(files[0])
    if not path.exists():
        siblings = [str(file) for file in path.parent.glob(f"*{_SUFFIX}")]
        raise unknown_eraser(str(path), siblings, "on this disk")
    return entry_of(path)
