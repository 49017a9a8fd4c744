"""Resolves a reference to an eraser: a path, a name in a registry, or a repository of the Hub.

A name means an eraser's own name or its target, never somebody's alias. The Hub's client is imported only when it is
needed: importing it takes longer than reading a registry.
"""

import logging
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from spm_hub.adapters.manifest import NAME, Manifest, plain_name
from spm_hub.errors import NetworkError, NotFoundError, SpmHubError, UsageError, ambiguous_eraser, unknown_eraser
from spm_hub.hub import first_party
from spm_hub.io.progress import ProgressCallback
from spm_hub.io.web_addresses import hub_reference
from spm_hub.registry import lockfile, signing, storage
from spm_hub.registry.entry import WEIGHTS_NAME, EraserEntry, entry_of
from spm_hub.registry.registry import HUB_REFERENCE, Registry, is_registry, registries, requested_root, user_registry

if TYPE_CHECKING:
    from spm_hub.adapters.adapter import Adapter

_SUFFIX = storage.SUFFIXES[storage.ADAPTERS]
_SAFE_LENGTH = 5
"""Names of at least so many letters are mistaken for each other if they differ by two; shorter ones by one."""


def _note(text: str) -> None:
    logging.getLogger("spm_hub").info(text)


@dataclass(frozen=True)
class _Asking:
    """The arguments of `resolve`, for the functions that it consists of."""

    registry: Path | None
    pull: bool
    progress: ProgressCallback | None
    say: Callable[[str], object]

    def resolve(self, reference: str) -> EraserEntry:
        """Return the eraser that a reference means; see the function of this name."""
        if not reference.strip():
            raise UsageError("the reference to an adapter is empty", mend="spmhub list")
        path = Path(reference).expanduser()
        if not path.exists():
            reference = hub_reference(reference)
            path = Path(reference).expanduser()
        written = path.suffix == _SUFFIX
        looks_like_path = written or path.is_absolute() or reference.startswith(("./", "../", "~"))
        is_missing_file = written and path.name == reference and not path.exists()
        if (looks_like_path and not is_missing_file) or ("/" in reference and path.exists()):
            return _entry_at(path)
        known = registries(self.registry)
        if match := HUB_REFERENCE.fullmatch(reference):
            return self._at_hub(match["repo"], match["revision"], known)
        name = path.stem if is_missing_file else reference
        hit, place = _held(name, known)
        if is_missing_file and hit is None:
            return _entry_at(path)
        if path.is_file() or (path / WEIGHTS_NAME).is_file():
            if hit is not None:
                places = [f"./{reference} (a file here)", f"{hit.adapter_path} (in a registry)"]
                raise ambiguous_eraser(reference, places)
            return _entry_at(path)
        if hit is None or place is None:
            return self._from_hub(name, known)
        if hit.name != reference:
            self.say(f"{reference} means {hit.name}, {hit.adapter_path}")
        elif place.root != (requested_root(self.registry) or user_registry().root):
            self.say(f"{reference} is the one of the registry {place.root}")
        return hit

    def _at_hub(self, repo: str, revision: str | None, known: Sequence[Registry]) -> EraserEntry:
        """Return the eraser of a repository: the one that was pulled from it, or its download."""
        from spm_hub.attachment.objections import beyond_limits
        from spm_hub.hub import pull as hub_pull
        from spm_hub.io.hub_client import is_commit

        if (pinned := _pinned(repo, revision, known)) is not None:
            return replace(pinned, asked=repo)
        found = hub_pull.download(repo, revision, progress=self.progress)
        for remark in beyond_limits(found.read_manifest()) if found.manifest_path is not None else ():
            self.say(f"{repo}: {remark}")
        # Who names a commit means that one, however old it is.
        if signing.required_key() is not None and not is_commit(revision):
            name = found.read_manifest().name
            held = (entry for place in known if (entry := place.find(name)) is not None)
            found.check_not_older([*held, *hub_pull.cached_versions(repo)])
        return found

    def _from_hub(self, name: str, known: Sequence[Registry]) -> EraserEntry:
        """Pull a name that no registry has from the Hub, if there is a repository for it."""
        held = list(_manifests(known))
        names = list(dict.fromkeys(name for one in held for name in (one.name, one.concept.target) if name))
        repo = first_party.repository_of(name, pull=self.pull)
        where = "in " + ", ".join(str(place.root) for place in known)
        if near := [one for one in names if _is_mistakable(name, one)]:
            meant = " or ".join(dict.fromkeys(near))
            raise NotFoundError(
                f"no eraser {name!r} {where}; did you mean {meant}? The Hub was not asked, as the names are so close",
                mend=f"the name {near[0]}; or, in full, spmhub pull {repo or f'OWNER/{plain_name(name)}'}",
            )
        if repo is None:
            raise _not_here(name, names, held, where)
        from spm_hub.hub import pull as hub_pull

        self.say(f"{name} is in no registry; pulling {repo} ...")
        target = user_registry() if requested_root(self.registry) is None else known[0]
        try:
            found = hub_pull.pull_by_name(name, repo, target, self.progress)
        except NetworkError as error:
            raise unknown_eraser(name, names, f"{where}, and {error.message}") from error
        if found is None:
            raise unknown_eraser(name, names, f"{where}, nor on the Hub as {repo}")
        return found


def resolve(
    reference: str,
    registry: Path | None = None,
    *,
    pull: bool = False,
    progress: ProgressCallback | None = None,
    say: Callable[[str], object] = _note,
) -> EraserEntry:
    """Find an eraser by path, by name or target in a registry, or on the Hub.

    On the Hub it is owner/name[@revision], or the address of its page; a repository that was pulled before is taken
    from the registry, at its pinned commit. A name that no registry has is pulled into `registry` or the user's own one
    if `first_party.repository_of` knows a repository for it. It is refused, before the Hub is asked, if it is one or
    two letters from a name that is there.
    pull: whether such a name may be looked up on the Hub although nobody configured an account.  progress: called with
    the bytes done and the total of a download.  say: called with what a reference came to mean, where that is not
    plain; unless given, the logger "spm_hub" gets it.
    Raises UsageError if several erasers match, NotFoundError with the nearest names if none does, NetworkError if the
    Hub is needed and out of reach, HubError for a repository whose eraser is not the one that was asked for.
    """
    return _Asking(registry, pull, progress, say).resolve(reference)


def load(reference: str, registry: Path | None = None, *, lazy: bool = False) -> "Adapter":
    """Load the adapter that a reference names; see `resolve`, and `adapter.load_file` for `lazy`."""
    return resolve(reference, registry).load(lazy=lazy)


def _not_here(name: str, names: Sequence[str], held: Sequence[Manifest], where: str) -> NotFoundError:
    """Return the error for a name that no registry has and that the Hub is not asked for."""
    error = unknown_eraser(name, names, where)
    claims = [one.name for one in held if plain_name(name) in map(plain_name, one.concept.aliases)]
    if claims:
        error = NotFoundError(f"{error.message}; it is an alias of {' and '.join(claims)}, which is another name")
    repo = f"{first_party.DEFAULT_OWNER}/{plain_name(name)}"
    mend = f"spmhub search {plain_name(name)}; --pull, in Python the name {repo!r}, asks the Hub for {repo}"
    here = Path.cwd()
    if is_registry(here) and any(one.is_called(name) for one in _manifests([Registry(here)])):
        mend = "the working folder is a registry that has it, if you trust it: --registry ."
    return NotFoundError(error.message, mend=mend)


def _held(name: str, known: Sequence[Registry]) -> tuple[EraserEntry | None, Registry | None]:
    """Return the eraser that `name` means, and its registry; (None, None) if there is none."""
    # A name, even in a later registry, takes precedence over a target: any manifest can claim any target.
    for place in known if re.fullmatch(NAME, name) else ():
        if (entry := place.find(name)) is not None:
            return entry, place
    for place in known:
        if (entry := place.find_spelt(name)) is not None:
            return entry, place
    for place in known:
        try:
            return place.get(name), place
        except NotFoundError:
            continue
    return None, None


def _manifests(known: Iterable[Registry]) -> Iterable[Manifest]:
    """Yield the manifests of the erasers in the registries that can be read."""
    for place in known:
        for entry in place.entries():
            try:
                yield entry.read_manifest()
            except SpmHubError:
                continue


def _is_mistakable(name: str, other: str) -> bool:
    """Return whether `name` is another name than `other`, one or two letters from it."""
    one, two = plain_name(name), plain_name(other)
    most = 2 if min(len(one), len(two)) >= _SAFE_LENGTH else 1
    return 0 < letters_apart(one, two) <= most


def letters_apart(one: str, other: str) -> int:
    """Return the distance between two words: letters added, dropped, changed, or swapped with the next.

    It is that of optimal string alignment.
    """
    earlier: list[int] = []
    before = list(range(len(other) + 1))
    for row, letter in enumerate(one, start=1):
        now = [row]
        for column, opposite in enumerate(other, start=1):
            least = min(before[column] + 1, now[-1] + 1, before[column - 1] + (letter != opposite))
            if row > 1 and column > 1 and letter == other[column - 2] and one[row - 2] == opposite:
                least = min(least, earlier[column - 2] + 1)
            now.append(least)
        earlier, before = before, now
    return before[-1]


def _pinned(repo: str, revision: str | None, known: Iterable[Registry]) -> EraserEntry | None:
    """Return the eraser that was pulled from `repo` at `revision`, if a registry still has it."""
    for place in known:
        for name, pin in lockfile.read(place.root).items():
            if pin.repo == repo and revision in (pin.revision, pin.commit):
                entry = place.find(name)
                if entry is not None and entry.pin == pin:
                    return entry
    return None


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
