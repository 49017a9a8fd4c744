"""Makes a pipeline from a single file and the configuration in a diffusers folder.

The tensors are read by diffusers' `from_single_file`, which here never downloads, guesses, or leaves a weight empty.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spm_hub.errors import ModelError, NetworkError, NotFoundError
from spm_hub.io.small_files import read_small
from spm_hub.io.untrusted_text import one_line
from spm_hub.models.mapped import mark_mapped
from spm_hub.models.single_file import bare_text_encoders
from spm_hub.models.single_file.inspection import UNET, Checkpoint
from spm_hub.models.snapshots import INDEX, LARGEST_INDEX

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

CONFIGURATION = ("*.json", "*.txt", "*.model")
"""The small files of a diffusers repository: everything but weights."""

_FOLDER = re.compile(r"\w[\w.-]{0,99}")
# By a word in the name of a part's class; every other class keeps its configuration in config.json.
_CONFIGURED_IN = {
    "Scheduler": "scheduler_config.json",
    "Processor": "preprocessor_config.json",
    "Extractor": "preprocessor_config.json",
}


def lost_files(folder: Path) -> list[str]:
    """Return the small files that a diffusers folder lacks to serve as a configuration.

    Raises ModelError if it has no index.
    """
    lost = []
    for name, (_, kind) in components(folder).items():
        have = {file.name for file in (folder / name).glob("*.*")}
        if "Tokenizer" in kind:
            whole = have & {"tokenizer.json", "spiece.model", "tokenizer.model"} or have >= {"vocab.json", "merges.txt"}
            lost += [] if whole else [f"{name}/vocab.json", f"{name}/merges.txt"]
        else:
            file = next((file for word, file in _CONFIGURED_IN.items() if word in kind), "config.json")
            lost += [] if file in have else [f"{name}/{file}"]
    return lost


def components(folder: Path) -> dict[str, tuple[str, str]]:
    """Return (library, class) by name for the parts of a diffusers folder's pipeline.

    Parts that are left out, such as a safety checker, are not among them. Raises ModelError for an index that cannot be
    read, and for a part whose name is not that of a folder in `folder`.
    """
    index = _index(folder)
    odd = next((name for name, part in index.items() if isinstance(part, list) and not _FOLDER.fullmatch(name)), None)
    if odd is not None:
        raise ModelError(
            f"{folder} cannot be loaded: its {INDEX} names a part {one_line(odd[:40])!r}, which is no folder's name",
            mend="fetch it again",
        )
    return {
        name: (part[0], part[1])
        for name, part in index.items()
        if isinstance(part, list)
        and len(part) == 2
        and all(isinstance(word, str) for word in part)
        and name != "safety_checker"
    }


def check_configurations(folder: Path) -> None:
    """Raise ModelError for a part's configuration in a diffusers folder that is larger than any."""
    for name in components(folder):
        for file in (folder / name / one for one in ("config.json", *sorted({*_CONFIGURED_IN.values()}))):
            if file.is_file() and (size := file.stat().st_size) > LARGEST_INDEX:
                raise ModelError(f"{file} has {size} bytes; at most {LARGEST_INDEX} are read", mend="fetch it again")


def without_checker(folder: Path) -> dict[str, Any]:
    """Return the arguments that leave a safety checker out, if the pipeline has one (SD1)."""
    return {"safety_checker": None, "requires_safety_checker": False} if "safety_checker" in _index(folder) else {}


def configuration(checkpoint: Checkpoint, bases: Sequence[tuple[str, tuple[str | None, ...]]]) -> Path:
    """Return a folder with the small files of one of `bases`.

    bases: repositories of the Hub, each with its suitable revisions. All are looked for in the Hub's cache, in this
    order; if none is there, the small files of the first are downloaded.
    Raises NotFoundError, NetworkError, ModelError.
    """
    from huggingface_hub import snapshot_download

    from spm_hub.io.hub_client import repository_info, translate_errors

    for repo, revisions in bases:
        for revision in revisions:
            try:
                # Of all files the index alone is asked for: the cache need not hold a repository whole.
                cached = Path(snapshot_download(repo, revision=revision, allow_patterns=INDEX, local_files_only=True))
            except (OSError, ValueError):
                continue
            if (cached / INDEX).is_file() and not lost_files(cached):
                return cached
    repo, (revision, *others) = bases[0]
    names = " ".join(f'--include "{pattern}"' for pattern in CONFIGURATION)
    pin = f" --revision {revision}" if revision and not others else ""
    otherwise = f"fetch it where there is one: hf download {repo}{pin} {names}; or --config for a diffusers folder"
    try:
        repository_info(repo, revision, otherwise=otherwise)
        with translate_errors(repo, revision, otherwise=otherwise):
            return Path(snapshot_download(repo, revision=revision, allow_patterns=list(CONFIGURATION)))
    except (NetworkError, NotFoundError) as error:
        about = f" is {checkpoint.kind.about} and" if checkpoint.kind else ""
        raise type(error)(
            f"{checkpoint.path}{about} holds no configuration and no vocabulary; {error.message}",
            mend=error.mend,
        ) from error


def load(checkpoint: Checkpoint, folder: Path, precision: torch.dtype, *, mapped: bool = False) -> DiffusionPipeline:
    """Return the pipeline of a checkpoint under the configuration in `folder`.

    The folder also provides the parts that the file lacks. The file is memory-mapped; each weight is copied at most
    once, into `precision`. Nothing is downloaded. mapped: the denoiser's weights stay in the file; see `models.mapped`.
    Raises ModelError if the two do not fit, or a part is neither in the file nor in the folder.
    """
    import diffusers
    from diffusers.loaders.single_file_utils import SingleFileComponentError

    if lost := lost_files(folder):
        raise ModelError(f"the configuration {folder} lacks {', '.join(lost)}", mend="--config for a whole one")
    name = str(_index(folder).get("_class_name"))
    pipeline_class: Any = getattr(diffusers, name, None)
    if not hasattr(pipeline_class, "from_single_file"):
        raise ModelError(f"{folder} is the configuration of {name}, which is not made from single files")
    _check_width(checkpoint, folder)
    lent = _lent(checkpoint, folder, pipeline_class, precision)
    lent |= bare_text_encoders.load(checkpoint.path, checkpoint.keys, folder, precision)
    try:
        lent |= _mapped_denoiser(checkpoint, folder, precision) if mapped else {}
        pipe = pipeline_class.from_single_file(
            str(checkpoint.path),
            config=str(folder),
            dtype=precision,
            local_files_only=True,
            **lent,
            **without_checker(folder),
        )
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RuntimeError, SingleFileComponentError) as error:
        raise _misfit(
            checkpoint, folder, f"{type(error).__name__}: {str(error).strip() or 'no reason given'}"
        ) from error
    _check_whole(pipe, checkpoint, folder)
    changes: dict[str, Any] = {}
    if checkpoint.prediction is not None:
        changes["prediction_type"] = checkpoint.prediction
    if checkpoint.zero_snr:
        changes["rescale_betas_zero_snr"] = True
    if any(pipe.scheduler.config.get(key) != value for key, value in changes.items()):
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **changes)
    whole: DiffusionPipeline = pipe
    return whole


def _mapped_denoiser(checkpoint: Checkpoint, folder: Path, precision: torch.dtype) -> dict[str, Any]:
    """Return the denoiser, whose weights stay in the file, by its name. Raises as diffusers does."""
    import diffusers

    for name, (_, kind) in components(folder).items():
        made: Any = getattr(diffusers, kind, None)
        if name in ("unet", "transformer") and hasattr(made, "from_single_file"):
            denoiser = made.from_single_file(
                str(checkpoint.path), config=str(folder), subfolder=name, dtype=precision_of(checkpoint),
                local_files_only=True,
            )  # fmt: skip
            mark_mapped(denoiser, precision)
            return {name: denoiser}
    return {}


def precision_of(checkpoint: Checkpoint) -> torch.dtype:
    """Return the precision of the denoiser in the file.

    8-bit floats count as bfloat16, which holds them exactly. Raises ModelError for a dtype of integers.
    """
    import torch

    known = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    known |= dict.fromkeys(("F8_E4M3", "F8_E5M2"), torch.bfloat16)
    if checkpoint.dtype not in known:
        raise ModelError(
            f"{checkpoint.path} keeps its denoiser as {checkpoint.dtype}, which is no precision to compute in"
        )
    return known[checkpoint.dtype]


def _lent(checkpoint: Checkpoint, folder: Path, pipeline_class: Any, precision: torch.dtype) -> dict[str, Any]:
    """Read the VAE and text encoders that the file does not hold from the folder."""
    parts = components(folder)
    missing = [name for name, (_, kind) in parts.items() if not checkpoint.holds(name, kind)]
    if not missing:
        return {}
    if bare := [name for name in missing if not any((folder / name).glob("*.safetensors"))]:
        cached = folder.parent.name == "snapshots"  # ../models--OWNER--NAME/snapshots/COMMIT
        repo = folder.parent.parent.name.removeprefix("models--").replace("--", "/", 1)
        parts_of_it = " ".join(f'--include "{name}/*"' for name in bare)
        raise ModelError(
            f"{checkpoint.path} holds no {' and no '.join(bare)}, and its configuration {folder} has no weights for it",
            mend=f"hf download {repo} --revision {folder.name} {parts_of_it}"
            if cached
            else "--config for a whole base",
        )
    files = [file.name for name in missing for file in (folder / name).glob("*.safetensors")]
    try:
        lender = pipeline_class.from_pretrained(
            folder,
            dtype=precision,
            use_safetensors=True,
            variant="fp16" if all(".fp16." in file for file in files) else None,
            local_files_only=True,
            **dict.fromkeys((name for name in parts if name not in missing), None),
            **without_checker(folder),
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"{folder} cannot lend its {', '.join(missing)}: {error}") from error
    return {name: getattr(lender, name) for name in missing}


def _check_width(checkpoint: Checkpoint, folder: Path) -> None:
    """Refuse a UNet of another family, which would fail later with a less helpful message."""
    settings = folder / "unet" / "config.json"
    if checkpoint.text_width and settings.is_file():
        expected = json.loads(settings.read_bytes()).get("cross_attention_dim")
        if expected != checkpoint.text_width:
            raise _misfit(
                checkpoint,
                folder,
                f"text states are {checkpoint.text_width} wide in the file, {expected} in the configuration",
            )


def _check_whole(pipe: DiffusionPipeline, checkpoint: Checkpoint, folder: Path) -> None:
    """Refuse a pipeline with an empty weight, or a UNet that did not use every tensor of the file.

    Raises ModelError.
    """
    import torch

    for name, part in pipe.components.items():
        if isinstance(part, torch.nn.Module):
            empty = next((key for key, tensor in part.state_dict().items() if tensor.is_meta), None)
            if empty is not None:
                raise _misfit(checkpoint, folder, f"{name} has {empty}, which the file does not hold")
    unet = getattr(pipe, "unet", None)
    if unet is not None:
        held, used = sum(key.startswith(UNET) for key in checkpoint.keys), len(unet.state_dict())
        if held != used:
            raise _misfit(checkpoint, folder, f"the file's UNet has {held} tensors, the configuration's {used}")


def _misfit(checkpoint: Checkpoint, folder: Path, reason: str) -> ModelError:
    kind = checkpoint.kind
    return ModelError(
        f"{checkpoint.path}{f' ({kind.about})' if kind else ''} does not fit the configuration {folder}: {reason}",
        mend=f"--config {kind.bases[0]}"
        if kind and kind.bases
        else "--config for a diffusers folder of its own family",
    )


def _index(folder: Path) -> dict[str, Any]:
    try:
        index = json.loads(read_small(folder / INDEX, LARGEST_INDEX, follow=True).decode())
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ModelError(f"{folder} cannot be loaded: its {INDEX}: {reason}", mend="fetch it again") from error
    if not isinstance(index, dict) or not index.get("_class_name"):
        raise ModelError(f"{folder} cannot be loaded: its {INDEX} names no pipeline", mend="fetch it again")
    return index
