"""Judges a diffusers repository by its file names: precisions, missing parts, pickles."""

import json
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from spm_hub.io.small_files import read_small

INDEX = "model_index.json"
LARGEST_INDEX = 2**20
"""Bytes of an index, or of the configuration of a part, that are read. They have a thousandth of it."""
_PICKLES = (".bin", ".ckpt", ".pt", ".pth")
_NOT_LOADED = frozenset({"safety_checker"})
FP16 = "fp16"


def variant_of(names: Iterable[str], *, half: bool) -> str | None:
    """Return the variant to load, None for full precision.

    It is half precision if that is wanted and present, or the only variant that some model has.
    """
    models = _variants(names)
    if half and any(FP16 in variants for variants in models.values()):
        return FP16
    for _, variants in sorted(models.items()):
        if "" not in variants:
            return FP16 if FP16 in variants else min(variants)
    return None


def variant_in(name: str) -> str:
    """Return fp16 for model.fp16.safetensors or model.fp16-00001-of-00002.safetensors, else ""."""
    _, *between, _ = name.split(".")
    return between[0].partition("-")[0] if between else ""


def has_full_precision(names: Iterable[str]) -> bool:
    """Return True if every model has weights in more than half precision."""
    return all(variants != {FP16} for variants in _variants(names).values())


def pickled(names: Iterable[str]) -> list[str]:
    """Return the folders of models whose weights exist as pickles only."""
    names = list(names)
    folders = {PurePosixPath(name).parent.as_posix() for name in names if name.endswith(_PICKLES)}
    return sorted(folders - set(_variants(names)) - _NOT_LOADED - {"."})


def names_in(folder: Path) -> list[str]:
    """Return the names of a folder's files, as a repository lists them."""
    return [path.relative_to(folder).as_posix() for path in folder.glob("**/*") if path.is_file()]


def is_whole(folder: Path) -> bool:
    """Return True if a folder of the Hub's cache holds a whole pipeline.

    A download that broke off leaves less.
    """
    # The client's own mark of an unfinished download.
    if any((folder.parent.parent / "blobs").glob("*.incomplete")):
        return False
    try:
        index = json.loads(read_small(folder / INDEX, LARGEST_INDEX, follow=True))
    except (OSError, ValueError, RecursionError):
        return False
    if not isinstance(index, dict) or not index:
        return False
    parts = [
        folder / name
        for name, kind in index.items()
        if isinstance(kind, list) and kind and kind[0] is not None and name not in _NOT_LOADED
    ]
    return all(map(_is_whole_part, parts))


def _is_whole_part(part: Path) -> bool:
    try:
        names = {path.name for path in part.glob("*")} if part.is_dir() else set()
    except OSError:  # of a name that no file can have
        return False
    weights = {name for name in names if name.endswith(".safetensors")}
    # Tokenizers and schedulers have neither; a model has both, and of several files all.
    if not names or ("config.json" in names) != bool(weights):
        return False
    try:
        indices = [json.loads((part / name).read_bytes()) for name in names if name.endswith(".safetensors.index.json")]
        needed = {shard for index in indices for shard in index["weight_map"].values()}
    except (OSError, ValueError, LookupError, AttributeError, TypeError):
        return False
    return needed <= weights


def _variants(names: Iterable[str]) -> dict[str, set[str]]:
    """Return the variants of weights in each model's folder."""
    found: dict[str, set[str]] = {}
    for path in map(PurePosixPath, names):
        if path.suffix == ".safetensors" and len(path.parts) == 2 and path.parts[0] not in _NOT_LOADED:
            found.setdefault(path.parts[0], set()).add(variant_in(path.name))
    return found
