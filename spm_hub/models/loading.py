"""Loads a base model as a pipeline: a diffusers folder, a single file, or a Hub repository."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, reduce
from pathlib import Path
from typing import TYPE_CHECKING

from spm_hub.errors import ModelError, NetworkError
from spm_hub.models import snapshots
from spm_hub.models.mapped import WORTH_IT, mark_mapped
from spm_hub.models.placement import AUTO, STORED, WIDE, automatic_dtype, choose_device, parse_dtype
from spm_hub.models.references import ModelRef, cached_snapshot, is_embedded, parse_reference
from spm_hub.models.single_file import loading
from spm_hub.models.single_file.inspection import Checkpoint

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline


def load_pipeline(
    reference: str,
    *,
    config: str | None = None,
    dtype: torch.dtype | str | None = AUTO,
    device: str | torch.device | None = AUTO,
) -> DiffusionPipeline:
    """Load a base model as a diffusers pipeline in evaluation mode, without a safety checker.

    reference: an alias (`spmhub models` lists them), a diffusers folder, a single .safetensors file, or owner/name on
    the Hugging Face Hub, also with @revision. config: for a single file, as in `parse_reference`.
    device: where to load it; "auto" means an accelerator that this machine has, else the CPU.
    dtype: torch.float16 or "float16", for instance. "auto" means float16 or bfloat16 where the denoiser is stored in it
    (float16 on an accelerator only), otherwise float32, as for the sketchbook. "wide" is the same without float16, for
    training. "stored" keeps the precision of the files: each part of a folder has its own, a single file that of its
    denoiser.
    Only safetensors weights are read. A download happens once; later calls need no network. There is no safety checker
    because it would replace pictures that are to be compared by black ones.

    Raises NotFoundError (unknown alias, file, repository or revision), NetworkError (a download is needed and there is
    no network), ModelError (the folder, file or its weights cannot be used), UsageError (no such device or dtype).
    """
    return _load(reference, config, dtype, device, mapped=False)


def load_mapped(
    reference: str,
    *,
    config: str | None = None,
    dtype: torch.dtype | str | None = AUTO,
    device: str | torch.device | None = AUTO,
) -> DiffusionPipeline:
    """Load a base model as `load_pipeline` does, but leave the denoiser's weights in their file.

    That is enough to read some of them, and the pipeline cannot draw; see `models.mapped`. On an accelerator, and where
    there are few weights, they are loaded all the same.
    """
    return _load(reference, config, dtype, device, mapped=True)


def _load(
    reference: str,
    config: str | None,
    dtype: torch.dtype | str | None,
    device: str | torch.device | None,
    *,
    mapped: bool,
) -> DiffusionPipeline:
    import torch

    wanted = parse_reference(reference, config=config)
    place = choose_device(device)
    precision = _Precision(dtype if dtype is not None else AUTO, place)
    mapped = mapped and place.type == "cpu"
    if wanted.file is not None:
        mapped = mapped and wanted.file.path.stat().st_size >= WORTH_IT
        pipe = loading.load(wanted.file, _configuration(wanted), precision.of_file(wanted.file), mapped=mapped)
    else:
        pipe = _load_folder(wanted, precision, mapped=mapped)
    pipe.to(place)
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval().requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)  # a caller that draws shows one bar for everything
    return pipe


@dataclass(frozen=True)
class _Precision:
    """The precision that a caller asked for, by its name or as a torch dtype, on a device."""

    asked: torch.dtype | str
    device: torch.device

    @cached_property
    def fixed(self) -> torch.dtype | None:
        """The dtype, unless it follows from the files. Raises UsageError for a name that is no precision."""
        return None if self.asked in (AUTO, WIDE, STORED) else parse_dtype(self.asked)

    @property
    def half(self) -> bool:
        """True if the variant of a repository in half precision is wanted, where there is one."""
        import torch

        if self.asked == AUTO:
            return self.device.type != "cpu"
        return self.fixed in (torch.float16, torch.bfloat16)

    def of_file(self, file: Checkpoint) -> torch.dtype:
        if self.fixed is not None:
            return self.fixed
        stored = loading.precision_of(file)
        return stored if self.asked == STORED else self._automatic(stored)

    def of_folder(self, folder: Path, variant: str | None) -> torch.dtype | dict[str, torch.dtype]:
        import torch

        if self.fixed is not None:
            return self.fixed
        try:
            stored = stored_dtypes(folder, variant)
        except ModelError:
            if self.asked == STORED:
                raise
            return torch.float32  # loading the damaged folder reports more
        return stored if self.asked == STORED else self._automatic(stored["default"])

    def _automatic(self, stored: torch.dtype) -> torch.dtype:
        return automatic_dtype(stored, self.device, wide=self.asked == WIDE)


def _load_folder(wanted: ModelRef, precision: _Precision, *, mapped: bool) -> DiffusionPipeline:
    import torch
    from diffusers import DiffusionPipeline

    half = precision.half and wanted.fp16
    folder = wanted.folder or _download(wanted, half=half)
    loading.check_configurations(folder)
    variant = snapshots.variant_of(snapshots.names_in(folder), half=half)
    dtype = precision.of_folder(folder, variant)
    if precision.asked == AUTO and is_embedded(wanted):  # its files are float16 to be small
        dtype = torch.float32
    # In the precisions of the files everything is left in them anyway.
    intended = dtype if isinstance(dtype, torch.dtype) else None
    stored = _left_in_files(folder, variant) if mapped and intended is not None else {}
    with _reading(wanted.text):
        pipe: DiffusionPipeline = DiffusionPipeline.from_pretrained(
            folder,
            dtype={"default": dtype, **stored} if stored else dtype,
            use_safetensors=True,
            variant=variant,
            local_files_only=True,
            **loading.without_checker(folder),
        )
    if intended is not None:
        for part in stored:
            mark_mapped(getattr(pipe, part), intended)
    return pipe


def _left_in_files(folder: Path, variant: str | None) -> dict[str, torch.dtype]:
    """Return the stored precision of the parts to leave in their files: denoiser and VAE.

    In this precision diffusers copies no weight. Empty if the denoiser is small, or if the files do not state their
    precision; loading them reports why.
    """
    files = [file for part in ("unet", "transformer") for file in (folder / part).glob("*.safetensors")]
    if sum(file.stat().st_size for file in files) < WORTH_IT:
        return {}
    try:
        stored = stored_dtypes(folder, variant)
    except ModelError:
        return {}
    return {part: stored[part] for part in ("unet", "transformer", "vae") if part in stored}


def stored_dtypes(folder: Path, variant: str | None = None) -> dict[str, torch.dtype]:
    """Return the precision of each part of a diffusers folder, read from the headers of its files.

    A part whose tensors differ gets the least precision that holds them all. "default", for parts whose files state no
    precision, is the denoiser's.  variant: the files to load, for parts that have files of this variant.
    Raises ModelError if there is no denoiser as safetensors, or a file is truncated.
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


def _configuration(wanted: ModelRef) -> Path:
    """Return the folder with the configuration for a single file.

    It is the one that the caller named, or that of a base of the file's family. The bases are looked for in the Hub's
    cache first; otherwise the small files of the best base are downloaded.
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
        about = file.kind.about if file.kind else f"of no family known by its tensors ({min(file.keys)}, ...)"
        raise ModelError(
            f"{file.path} is {about}: its configuration is needed",
            mend="--config for a diffusers folder of its family, an alias, or owner/name on the Hub",
        )
    repositories: list[tuple[str, tuple[str | None, ...]]] = []
    for base in bases:
        # If an alias names a commit that was never downloaded, another commit's configuration does as well.
        others = () if base.revision is None or "@" in base.text else (None,)
        repositories.append((str(base.hub_id), (base.revision, *others)))
    return loading.configuration(file, repositories)


def _download(wanted: ModelRef, *, half: bool) -> Path:
    """Return the folder of a Hub repository in the cache; download it unless it is complete there.

    The request keeps the name of the revision, so that the cache knows it by that name when there is no network;
    diffusers resolves the name to one commit before it fetches anything.
    """
    from diffusers import DiffusionPipeline

    from spm_hub.io.hub_client import is_commit, repository_info, translate_errors

    repo, revision = str(wanted.hub_id), wanted.revision
    cached = cached_snapshot(repo, revision)
    # Half precision is no substitute: if full precision is wanted and may exist, the Hub is asked.
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
    with translate_errors(repo, revision, otherwise=otherwise):
        return Path(
            DiffusionPipeline.download(
                repo, revision=revision, use_safetensors=True, variant=variant, safety_checker=None
            )
        )


@contextmanager
def _reading(reference: str) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    # The last four where an index names something that is no class, or no part, of diffusers.
    except (
        OSError, ValueError, RuntimeError, SafetensorError, LookupError, AttributeError, TypeError, ImportError
    ) as error:  # fmt: skip
        raise ModelError(f"model {reference!r} cannot be loaded: {_first_line(error)}", mend="spmhub doctor") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
