"""Parses model references: an alias, a diffusers folder, a single file, or a Hub repository."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spm_hub.errors import ModelError, NotFoundError, UsageError, nearest
from spm_hub.io.hashing import sha256_of
from spm_hub.io.web_addresses import hub_reference
from spm_hub.models import snapshots
from spm_hub.models.aliases import ALIASES, Alias
from spm_hub.models.single_file import inspection
from spm_hub.models.snapshots import INDEX

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

_HUB_ID = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*?)(?:@(?P<revision>[\w./-]+))?")
_SNAPSHOT = re.compile(r"/models--(?P<repo>[^/]+)/snapshots/(?P<commit>[0-9a-f]{40})$")


@dataclass(frozen=True)
class ModelRef:
    """A parsed model reference: a folder, a single file, or a repository of the Hub at a revision.

    config: the model whose configuration a single file is read with; None chooses by the file's family.
    """

    text: str
    folder: Path | None = None
    file: inspection.Checkpoint | None = None
    config: ModelRef | None = None
    hub_id: str | None = None
    revision: str | None = None
    fp16: bool = False

    @property
    def public_name(self) -> str:
        """The model's name for other people; it leaves out the path on this machine."""
        place = self.file.path if self.file else self.folder
        return self.text if place is None or self.text in ALIASES else place.resolve().name

    @property
    def remark(self) -> str | None:
        """A note for the user about the parts that a single file takes from its base, or None."""
        if self.file is None or not self.file.lacks:
            return None
        return f"{self.public_name} has no {' and no '.join(self.file.lacks)} of its own; they are taken from its base"


def parse_reference(text: str, *, config: str | None = None) -> ModelRef:
    """Parse `alias[@rev]`, a path to a diffusers folder or a single file, or `owner/name[@rev]`.

    The header of a single file is read, but no weights, and nothing from the network.
    config: a reference to a model of the file's family, for a single file only.
    Raises NotFoundError for an unknown alias or a missing file (with the nearest names), UsageError for an empty
    reference and for a `config` that is not needed, ModelError for a path that holds no model.
    """
    if not text.strip():
        raise UsageError("the model reference is empty", mend="spmhub models")
    if not Path(text).expanduser().exists():
        text = hub_reference(text, use="--model FILE.safetensors")
    path = Path(text).expanduser()
    if text.partition("@")[0] not in ALIASES and path.is_file():
        of = None if config is None else parse_reference(config)
        if of is not None and of.file is not None:
            raise UsageError(
                f"--config {config} is a single file, which holds no configuration",
                mend="--config for a diffusers folder, an alias, or owner/name on the Hub",
            )
        return ModelRef(text, file=inspection.inspect(path), config=of)
    found = _parse_without_config(text, path)
    if config is not None:
        raise UsageError(f"--config {config} is for single files; {text} brings its own configuration")
    return found


def _parse_without_config(text: str, path: Path) -> ModelRef:
    name, _, revision = text.partition("@")
    if alias := ALIASES.get(name):
        if alias.embedded is not None:
            if revision:
                raise UsageError(
                    f"model {name!r} is part of this package and has no revisions, but @{revision} was asked for"
                )
            return ModelRef(text, folder=_checked_folder(alias.embedded, embedded=True))
        return ModelRef(text, hub_id=alias.hub_id, revision=revision or alias.revision, fp16=alias.fp16)
    if path.exists():
        return ModelRef(text, folder=_checked_folder(path))
    if revision and Path(name).expanduser().exists():
        raise UsageError(f"{name} is a path on this machine and has no revisions, but @{revision} was asked for")
    if path.suffix.lower() in inspection.SUFFIXES:
        raise inspection.missing_file(path)
    if match := _HUB_ID.fullmatch(text):
        return ModelRef(text, hub_id=match["repo"], revision=match["revision"])
    if "/" in text or text.startswith("."):
        raise NotFoundError(
            f"model {text!r} is neither a folder, nor a file, nor of the form owner/name", mend="spmhub models"
        )
    suggestions = nearest(name, ALIASES)
    hint = f"; did you mean {' or '.join(suggestions)}?" if suggestions else ""
    raise NotFoundError(f"unknown model {text!r}{hint}", mend="spmhub models")


def local_folder(wanted: ModelRef) -> Path | None:
    """Return the diffusers folder that `wanted` is loaded from, or None if only the network knows it."""
    if wanted.hub_id is None or wanted.folder is not None:
        return wanted.folder
    return cached_snapshot(wanted.hub_id, wanted.revision)


def local_files(wanted: ModelRef) -> frozenset[str]:
    """Return the files of that folder; a later download of another precision adds to them."""
    folder = local_folder(wanted)
    return frozenset(str(path) for path in folder.rglob("*") if path.is_file()) if folder else frozenset()


def identity_of(reference: str, pipe: DiffusionPipeline) -> tuple[str, str | None]:
    """Return the name and revision, for the manifest, of the base `pipe` that was loaded from `reference`.

    The revision is the commit of a Hub repository, "sha256:<hex>" of a single file, and None for a folder. The names of
    folders and files leave out their paths.
    """
    from spm_hub.io.hub_client import is_commit

    wanted = parse_reference(reference)
    if wanted.file is not None:
        return wanted.public_name, f"sha256:{sha256_of(wanted.file.path)}"
    folder = Path(str(pipe.config.get("_name_or_path", "")))
    is_snapshot = folder.parent.name == "snapshots" and is_commit(folder.name)
    return wanted.public_name, folder.name if is_snapshot else None


def identity_of_pipeline(pipe: DiffusionPipeline) -> tuple[str, str | None]:
    """Return the name and the revision for the manifest, of a base that the caller made or loaded.

    The name is the alias of these files if there is one, else the Hub repository or the name of the folder that the
    pipeline was loaded from, else its class. The revision is the commit of a Hub repository, else None.
    """
    from spm_hub.models.architectures import denoiser_of

    text = str(pipe.config.get("_name_or_path") or "")
    if not text:
        return type(pipe).__name__, None
    folder, is_hub_id = Path(text), False
    if not folder.is_dir():
        is_hub_id = _HUB_ID.fullmatch(text) is not None
        # Loaded by owner/name: only the parts of the pipeline know the folder in the cache.
        configuration: Any = denoiser_of(pipe).config
        folder = Path(str(configuration.get("_name_or_path") or "")).parent
    snapshot = _SNAPSHOT.search(folder.as_posix())
    repo, commit = (snapshot["repo"].replace("--", "/"), snapshot["commit"]) if snapshot else (None, None)
    for alias in ALIASES.values():
        if folder == alias.embedded or (repo is not None and (alias.hub_id, alias.revision) == (repo, commit)):
            return alias.name, commit
    if repo is not None and (repo == text or not is_hub_id):
        return repo, commit
    return text if is_hub_id else Path(text).name, None


def describe_source(reference: str, pipe: DiffusionPipeline, *, fetched: bool = False) -> str:
    """Return in words where the files of `pipe`, loaded from `reference`, come from and are kept.

    fetched: True if some of them were downloaded for it.
    """
    wanted = parse_reference(reference)
    if wanted.file is not None:
        return str(wanted.file.path)
    folder = str(pipe.config.get("_name_or_path", ""))
    _, revision = identity_of(reference, pipe)
    if wanted.hub_id is None or revision is None:
        return f"part of this package, {folder}" if reference in ALIASES else folder
    how = "downloaded just now to" if fetched else "kept in"
    return f"{wanted.hub_id}@{revision[:12]}, {how} {folder}"


def is_embedded(wanted: ModelRef) -> bool:
    """Return True for a base model that is part of this package."""
    alias = ALIASES.get(wanted.text)
    return alias is not None and alias.embedded is not None


def is_available(alias: Alias) -> bool:
    """Return True if the alias loads without a network: from this package, or from the Hub's cache."""
    if alias.embedded is not None:
        return (alias.embedded / INDEX).is_file()
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(str(alias.hub_id), INDEX, revision=alias.revision), str)


def cached_snapshot(repo: str, revision: str | None) -> Path | None:
    """Return the folder of a repository in the Hub's cache, or None if no whole pipeline is there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import IncompleteSnapshotError

    try:
        folder = Path(snapshot_download(repo, revision=revision, local_files_only=True))
    except IncompleteSnapshotError as error:
        # The client also misses files that we do not load: the other precision, the safety checker.
        folder = Path(error.snapshot_path)
    except (OSError, ValueError):
        return None
    return folder if snapshots.is_whole(folder) else None


def _checked_folder(path: Path, *, embedded: bool = False) -> Path:
    if (path / INDEX).is_file():
        return path
    if embedded:
        raise ModelError(
            f"the embedded model is not in this installation: {path / INDEX} is missing",
            mend="python -m spm_hub.sketchbook.train, or install the package again",
        )
    raise ModelError(f"{path} is no diffusers pipeline: it has no {INDEX}")
