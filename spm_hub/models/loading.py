"""Base models by name: aliases, diffusers folders, single files and Hub repositories, each loaded as a pipeline."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from spm_hub.errors import ModelError, NetworkError, NotFoundError, UsageError, nearest
from spm_hub.io.hashing import sha256_of
from spm_hub.models import snapshots
from spm_hub.models.aliases import ALIASES, Alias
from spm_hub.models.single_file import inspection, loading
from spm_hub.models.single_file.loading import INDEX

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

_HUB_ID = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*?)(?:@(?P<revision>[\w./-]+))?")

_SNAPSHOT = re.compile(r"/models--(?P<repo>[^/]+)/snapshots/(?P<commit>[0-9a-f]{40})$")


@dataclass(frozen=True)
class ModelRef:
    """What a model reference stands for: a diffusers folder, a single file, or a repository of the Hub at a revision.

    `config` is the model whose configuration a single file is read with; None leaves it to the file's family.
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
        """What others may read of it: never where a folder or a file lies on this machine."""
        place = self.file.path if self.file else self.folder
        return self.text if place is None or self.text in ALIASES else place.resolve().name

    @property
    def remark(self) -> str | None:
        """What a user should know before it is used: the parts that a single file borrows."""
        if self.file is None or not self.file.lacks:
            return None
        return f"{self.public_name} has no {' and no '.join(self.file.lacks)} of its own; its base lends them"


def parse_reference(text: str, *, config: str | None = None) -> ModelRef:
    """Read `alias[@rev]`, a path to a diffusers folder or a single file, or `owner/name[@rev]`.

    Of a single file the header is read, no weights, and nothing from the network. `config`, for a single file only, is
    a reference to a model of its family.
    Raises NotFoundError for an alias that is not known or a file that is not there (with the nearest names), UsageError
    for an empty reference and for a `config` that is not needed, ModelError for a path that holds no model.
    """
    if not text.strip():
        raise UsageError("the model reference is empty", mend="spmhub models")
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
                    f"model {name!r} is part of this package and has no revisions, but @{revision} was asked"
                )
            return ModelRef(text, folder=_checked_folder(alias.embedded, embedded=True))
        return ModelRef(text, hub_id=alias.hub_id, revision=revision or alias.revision, fp16=alias.fp16)
    if path.exists():
        return ModelRef(text, folder=_checked_folder(path))
    if "://" in text:
        raise UsageError(f"model {text!r} is an address", mend="download the file, then --model FILE.safetensors")
    if revision and Path(name).expanduser().exists():
        raise UsageError(f"{name} lies on this machine and has no revisions, but @{revision} was asked")
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


def load_pipeline(
    reference: str,
    *,
    config: str | None = None,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device = "cpu",
) -> DiffusionPipeline:
    """Load a base model as a diffusers pipeline in evaluation mode, without a safety checker.

    reference: an alias (`spmhub models` lists them), a diffusers folder, a single .safetensors file, or owner/name on
    the Hugging Face Hub, also with @revision. config: for a single file, as in `parse_reference`.
    dtype: torch.float16 or "float16", for instance; None means float32. "stored" keeps the precision of the files:
    each part of a folder has its own, a single file that of its denoiser.
    Only safetensors weights are read. A download happens once; later calls need no network. There is no safety checker
    because it would replace pictures that are to be compared by black ones.

    Raises NotFoundError (unknown alias, file, repository or revision), NetworkError (a download is needed and there is
    no network), ModelError (the folder, file or its weights cannot be used), UsageError (no such device or dtype).
    """
    import torch

    wanted = parse_reference(reference, config=config)
    place = _existing_device(device)
    precision: torch.dtype | Literal["stored"]
    precision = "stored" if dtype == "stored" else parse_dtype(dtype or torch.float32)
    if wanted.file is not None:
        of_file = loading.precision_of(wanted.file) if precision == "stored" else precision
        pipe = loading.load(wanted.file, _configuration(wanted), of_file)
    else:
        pipe = _load_folder(wanted, precision)
    pipe.to(place)
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval().requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)  # whoever draws shows one bar for everything
    return pipe


def parse_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """Return the torch dtype of that name, such as "float16".

    Raises UsageError unless it is a floating-point type.
    """
    import torch

    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        close = nearest(str(dtype), ("float32", "float16", "bfloat16", "float64"))
        raise UsageError(
            f"dtype is {dtype!r}, which is no precision to compute in", mend=f'dtype="{(*close, "float16")[0]}"'
        )
    return found


def _load_folder(wanted: ModelRef, dtype: torch.dtype | Literal["stored"]) -> DiffusionPipeline:
    import torch
    from diffusers import DiffusionPipeline

    half = dtype in (torch.float16, torch.bfloat16) and wanted.fp16
    folder = wanted.folder or _download(wanted, half=half)
    variant = snapshots.variant_of(snapshots.names_in(folder), half=half)
    precision = stored_dtypes(folder, variant) if dtype == "stored" else dtype
    with _reading(wanted.text):
        pipe: DiffusionPipeline = DiffusionPipeline.from_pretrained(
            folder,
            torch_dtype=precision,
            use_safetensors=True,
            variant=variant,
            local_files_only=True,
            **loading.without_checker(folder),
        )
    return pipe


def local_folder(wanted: ModelRef) -> Path | None:
    """The diffusers folder that `wanted` is loaded from, where that is known without a network."""
    if wanted.hub_id is None or wanted.folder is not None:
        return wanted.folder
    return _cached(wanted.hub_id, wanted.revision)


def local_files(wanted: ModelRef) -> frozenset[str]:
    """The files of that folder; a later download of another precision adds to them."""
    folder = local_folder(wanted)
    return frozenset(str(path) for path in folder.rglob("*") if path.is_file()) if folder else frozenset()


def identity_of(reference: str, pipe: DiffusionPipeline) -> tuple[str, str | None]:
    """The name and the revision under which a manifest records the base `pipe`, which `reference` was loaded as.

    The revision is the commit of a Hub repository, "sha256:<hex>" of a single file, and None for a folder. Names of
    folders and files leave out where they lie.
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


def whence(reference: str, pipe: DiffusionPipeline, *, fetched: bool = False) -> str:
    """Where the files of `pipe` are from, which `reference` was loaded as, and where they lie, for a person.

    fetched: whether some of them were not there before.
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


def is_available(alias: Alias) -> bool:
    """Whether the alias can be loaded without a network: embedded in this package, or in the Hub's cache."""
    if alias.embedded is not None:
        return (alias.embedded / INDEX).is_file()
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(str(alias.hub_id), INDEX, revision=alias.revision), str)


def stored_dtypes(folder: Path, variant: str | None = None) -> dict[str, torch.dtype]:
    """The precision of each part of a diffusers folder, from the headers of the files that it is loaded from.

    A part whose tensors differ is in the least precision that holds them all. "default", for parts whose files say
    nothing, is the denoiser's. `variant`: which files are loaded, of the parts that have some of it.
    Raises ModelError where no denoiser is there as safetensors, or a file is cut short.
    """
    import torch
    from safetensors import safe_open

    precisions = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    found: dict[str, torch.dtype] = {}
    for part in loading.components(folder):
        files = list((folder / part).glob("*.safetensors"))
        chosen = [file for file in files if snapshots.variant_in(file.name) == (variant or "")] or files
        stored: set[str] = set()
        for file in chosen:
            with _reading(str(folder)), safe_open(file, framework="pt") as tensors:
                stored |= {tensors.get_slice(key).get_dtype() for key in tensors.keys()}  # noqa: SIM118 - no mapping
        if known := [precisions[name] for name in sorted(stored & precisions.keys())]:
            found[part] = reduce(torch.promote_types, known)
    for denoiser in ("unet", "transformer"):
        if denoiser in found:
            return {**found, "default": found[denoiser]}
    raise ModelError(f"{folder} holds no denoiser weights as safetensors (looked in unet/ and transformer/)")


def _existing_device(name: str | torch.device) -> torch.device:
    import torch

    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UsageError(
            f"device {str(name)!r} cannot be used here: {_first_line(error)}", mend="spmhub doctor"
        ) from error


def _checked_folder(path: Path, *, embedded: bool = False) -> Path:
    if (path / INDEX).is_file():
        return path
    if embedded:
        raise ModelError(
            f"the embedded model is not in this installation: {path / INDEX} is missing",
            mend="python -m spm_hub.sketchbook.train, or install the package again",
        )
    raise ModelError(f"{path} is no diffusers pipeline: it has no {INDEX}")


def _configuration(wanted: ModelRef) -> Path:
    """The folder whose configuration a single file is read with: the one asked for, or that of a base of its family.

    The bases are looked for in the Hub's cache first; of the best one the small files are downloaded otherwise.
    Raises ModelError, NotFoundError, NetworkError.
    """
    file = wanted.file
    assert file is not None
    if wanted.config is not None and wanted.config.folder is not None:
        return wanted.config.folder
    if wanted.config is not None:
        bases = [wanted.config]
    elif file.kind is not None and file.kind.bases:
        bases = [parse_reference(base) for base in file.kind.bases]
    else:
        about = file.kind.about if file.kind else f"of no family that its tensors tell ({min(file.keys)}, ...)"
        raise ModelError(
            f"{file.path} is {about}: its configuration is needed",
            mend="--config for a diffusers folder of its family, an alias, or owner/name on the Hub",
        )
    repositories: list[tuple[str, tuple[str | None, ...]]] = []
    for base in bases:
        # Where an alias means a commit that was never downloaded, another commit's configuration does as well.
        others = () if base.revision is None or "@" in base.text else (None,)
        repositories.append((str(base.hub_id), (base.revision, *others)))
    return loading.configuration(file, repositories)


def _download(wanted: ModelRef, *, half: bool) -> Path:
    """The folder of a Hub repository in the cache, downloaded where it is not complete there.

    It is asked for by the revision as it was named, so that the cache knows it by that name when there is no network;
    diffusers resolves the name to one commit before it fetches anything.
    """
    from diffusers import DiffusionPipeline

    from spm_hub.io.hub_client import is_commit, reaching, repository_info

    repo, revision = str(wanted.hub_id), wanted.revision
    cached = _cached(repo, revision)
    # Rounded weights are no others: where full precision is asked for and there may be some, the Hub is asked.
    if is_commit(revision) and cached and (half or snapshots.has_full_precision(snapshots.names_in(cached))):
        return cached
    otherwise = "use --model sketchbook, which needs none"
    try:
        info = repository_info(repo, revision, otherwise=otherwise)
    except NetworkError:
        if cached:
            return cached
        raise
    names = [sibling.rfilename for sibling in info.siblings or ()]
    if pickles := snapshots.pickled(names):
        raise ModelError(
            f"{repo} has the weights of {', '.join(pickles)} as pickles only, which can run code and are never loaded",
            mend="another revision of it that has safetensors: --model OWNER/NAME@REVISION",
        )
    variant = snapshots.variant_of(names, half=half)
    with reaching(repo, revision, otherwise=otherwise):
        return Path(
            DiffusionPipeline.download(
                repo, revision=revision, use_safetensors=True, variant=variant, safety_checker=None
            )
        )


def _cached(repo: str, revision: str | None) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import IncompleteSnapshotError

    try:
        folder = Path(snapshot_download(repo, revision=revision, local_files_only=True))
    except IncompleteSnapshotError as error:
        # The client misses whatever the repository has beside: the other precision, the safety checker.
        folder = Path(error.snapshot_path)
    except (OSError, ValueError):
        return None
    return folder if snapshots.is_whole(folder) else None


@contextmanager
def _reading(reference: str) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"model {reference!r} cannot be loaded: {_first_line(error)}", mend="spmhub doctor") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
