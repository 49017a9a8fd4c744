"""Converts an eraser from and to the formats of other programs, and keeps it in a registry."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from spm_hub.adapters.manifest import GammaLaw, slug
from spm_hub.errors import SignatureError, UsageError
from spm_hub.hub.resolve import resolve
from spm_hub.io.environment import KEY_VARIABLE
from spm_hub.io.progress import Bars, Reporter
from spm_hub.registry import signing
from spm_hub.registry.entry import WEIGHTS_NAME, entry_of
from spm_hub.registry.registry import registry_for_new
from spm_hub.training.verdict import needs_gate

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from spm_hub.adapters.adapter import Adapter
    from spm_hub.adapters.description import Description
    from spm_hub.adapters.formats.format import BaseModel, Format
    from spm_hub.adapters.manifest import Manifest


@dataclass(frozen=True)
class Conversion:
    """A converted eraser and its files.

    read_as, written_as: names of formats; written_as is None if nothing was written.  files: those that were written.
    relative_error: of a low-rank approximation, sqrt(sum |dW - dW_r|^2 / sum |dW|^2); None without one.
    biases_left_out: the number of changed biases and norms that the approximation cannot hold; None without one.
    """

    adapter: Adapter
    read_as: str
    written_as: str | None = None
    files: tuple[Path, ...] = ()
    relative_error: float | None = None
    biases_left_out: int | None = None


def convert(
    source: str | Path | Adapter,
    *,
    to: str | None = None,
    out: str | Path | None = None,
    keep: bool = False,
    svd_rank: int | None = None,
    name: str | None = None,
    concept: str | None = None,
    family: str | None = None,
    law: GammaLaw | None = None,
    model: str | None = None,
    config: str | None = None,
    pipe: DiffusionPipeline | None = None,
    without_text_encoder: bool = False,
    registry: str | Path | None = None,
    replace: bool = False,
    progress: bool | Callable[[int, int, Mapping[str, float]], object] = True,
    reporter: Reporter | None = None,
) -> Conversion:
    """Convert an eraser from or to another program's format; exact unless `svd_rank` is given.

    It reads the files of docs/formats.md, those of plug-ins, and pickles (.pt, .ckpt, .bin) as tensors only. Nothing is
    written unless `to` or `keep` is given.

    source: a file or folder of any format, an eraser's name in a registry or on the Hub, or an Adapter.
    to: the format ("diffusers" ...) or the program ("comfyui", "webui", "invoke") to write for.  out: the file, or the
    folder for a format of several files; unless given, a name in the working folder.
    keep: store it in a registry.  registry: for this, and for names; unless given, the user's own.  replace: overwrite.
    svd_rank: approximate every module's change by at most this rank, and state the relative error.
    name, concept, family: the eraser's name, concept and model family (sd1 ...), unless the file's are right.  law:
    "squared" draws with gamma squared, as the code released with SPM does.
    model: the base it was trained on, for whole weights, DoRA, masks, and `to="esd"`: an alias, folder, file or Hub
    id.  config: as in `load_pipeline`, for a model that is a single file.  pipe: that base, already loaded; it is not
    changed, and the manifest names it by `model` if given, else by where it was loaded from.
    without_text_encoder: leave out tensors of text encoders; a file with such tensors is refused otherwise.
    progress: True for bars in terminals and notebooks, False for none, or a function of (steps done, steps in all, {}).
    reporter: takes remarks and progress in place of `progress`.

    Raises UsageError (contradicting arguments, an existing file, or more to be said about the file), NotFoundError,
    AdapterFileError (a broken or unknown file), SignatureError (an unsigned file where signatures are required),
    CompatibilityError (another base), ModelError, RegistryError.
    """
    from spm_hub.adapters import conversion, low_rank_approximation
    from spm_hub.adapters.description import Description

    if config is not None and (model is None or pipe is not None):
        raise UsageError("config is for a model that is a single file, and there is none to load", mend="model=FILE")
    if out is not None and to is None:
        raise UsageError("out names the file of a format, and there is no format", mend='to="diffusers"')
    folder, reporter = None if registry is None else Path(registry), reporter or Bars(progress)
    target = None if to is None else conversion.writer_named(to)
    base = _base(model, config, pipe, reporter)
    description = Description(None if name is None else slug(name), concept, family, without_text_encoder, law)
    adapter, read_as = _read(source, folder, description, base, reporter)
    files, error, biases = [], None, None
    if svd_rank is not None:
        if base is not None:
            adapter = conversion.densified(adapter, base)
        with reporter.progress(f"rank {svd_rank}") as move:
            near = low_rank_approximation.truncate(adapter, svd_rank, move)
        adapter, error, biases = near.adapter, near.relative_error, near.biases_left_out
    if keep:
        files.append(registry_for_new(folder).add(adapter, replace=replace).adapter_path)
    if target is not None and target.writer is not None:
        here = f"{adapter.name}-{target.name}{target.writer.suffix}"
        files += conversion.write(adapter, target, Path(out or here), base, replace=replace)
        for caveat in _caveats(target, adapter.manifest):
            reporter.say(caveat)
    return Conversion(adapter, read_as, to or ("spm" if keep else None), tuple(files), error, biases)


def _caveats(target: Format, manifest: Manifest) -> Iterator[str]:
    """Yield what a written file does not do, or does otherwise than the eraser."""
    from spm_hub.adapters.formats.spm import FORMAT

    if target.writer is not None and (caveat := target.writer.caveat(manifest)) is not None:
        yield caveat
    if target is not FORMAT and (cost := needs_gate(manifest)) is not None:  # our own files keep the gate
        yield f"warning: {cost}; a {target.name} file has no gate"


def _read(
    source: str | Path | Adapter, registry: Path | None, description: Description, base: BaseModel | None, to: Reporter
) -> tuple[Adapter, str]:
    """Read an eraser from a file, a reference or an Adapter; return it with the name of its format."""
    from spm_hub.adapters import conversion
    from spm_hub.adapters.description import apply_description

    if isinstance(source, str | Path) and (path := Path(source).expanduser()).exists():
        if (key := signing.required_key()) is not None:
            _check_signature(path, key)
        with to.progress("reading") as move:
            return conversion.read(path, description, base, move)
    known = resolve(str(source), registry).load() if isinstance(source, str | Path) else source
    known.check_effect()
    return apply_description(known, description), "spm"


def _check_signature(path: Path, key: Path) -> None:
    """Raise SignatureError for a file or folder, of any program, that is not signed for `key`."""
    weights = path / WEIGHTS_NAME
    try:
        entry_of(weights if weights.is_file() else path).load(signed_by=key)
    except SignatureError as error:
        raise SignatureError(
            f"{error.message}; nothing is converted while {KEY_VARIABLE} is set",
            mend=f"if you trust the file: convert it with {KEY_VARIABLE} unset, and sign the result with spmhub sign",
        ) from error


def _base(
    model: str | None, config: str | None, pipe: DiffusionPipeline | None, reporter: Reporter
) -> BaseModel | None:
    """Return the base model, loading it if `pipe` is None; None if neither `model` nor `pipe` is given."""
    from spm_hub.adapters.formats.format import BaseModel
    from spm_hub.models.architectures import denoiser_of
    from spm_hub.models.loading import load_pipeline
    from spm_hub.models.references import identity_of, identity_of_pipeline

    if pipe is None and model is not None:
        reporter.say(f"reading {model} ...")
        pipe = load_pipeline(model, config=config, dtype="float32", device="cpu")
    if pipe is None:
        return None
    identity = identity_of_pipeline(pipe) if model is None else identity_of(model, pipe)
    return BaseModel(denoiser_of(pipe), *identity)
