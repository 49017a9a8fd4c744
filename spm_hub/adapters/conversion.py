"""Reads an adapter from a file of any format, and writes an adapter in any format."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from spm_hub.adapters.adapter import Adapter
from spm_hub.adapters.compatibility import resolve_modules
from spm_hub.adapters.description import Description, apply_description, make_manifest
from spm_hub.adapters.formats.format import WHOLE, BaseModel, Format, Source
from spm_hub.adapters.formats.lazy import with_dots
from spm_hub.adapters.formats.module_names import dotted, with_kernel
from spm_hub.adapters.formats.programs import PROGRAMS
from spm_hub.adapters.formats.reading import all_formats, open_source, recognise
from spm_hub.adapters.increments import Dense, Increment, LowRank, Mask, check_effect
from spm_hub.errors import GET_AGAIN, AdapterFileError, ManifestError, NotFoundError, UsageError, nearest
from spm_hub.io.atomic import Content, write_together
from spm_hub.io.progress import Progress, no_progress
from spm_hub.io.safetensors_file import Image
from spm_hub.io.wording import quoted
from spm_hub.models import architectures

# A model's id that is safe inside a command that the user is asked to type.
_PLAIN = re.compile(r"\w[\w./-]{0,199}")


def read(
    path: Path, said: Description, base: BaseModel | None = None, progress: Progress = no_progress
) -> tuple[Adapter, str]:
    """Return the adapter in a file or folder of any format, and the format's name.

    base: needed for whole weights (ESD, UCE, Concept Ablation) and DoRA; otherwise it checks that the file fits.
    Pickles (.pt, .pth, .ckpt, .bin) are read here and nowhere else, as tensors only.
    Raises AdapterFileError, NotFoundError, CompatibilityError, and UsageError if the caller has to say more.
    """
    with _mends_for_foreign_files():
        source = open_source(path, base, without_text_encoder=said.without_text_encoder, progress=progress)
        known = recognise(source)
        if known.needs_base and base is None:
            raise _base_needed(source, known)
        return _adapter(source, known, known.read(source), said), known.name


def writer_named(name: str) -> Format:
    """Return the format that `--to` names.

    Raises NotFoundError with the names of the formats that can be written.
    """
    written = {known.name: known for known in (*all_formats(), *PROGRAMS) if known.writer is not None}
    if name not in written:
        meant = nearest(name, written)
        raise NotFoundError(
            f"no format {name!r} is written" + (f"; did you mean {' or '.join(meant)}?" if meant else ""),
            mend=f"--to {', '.join(written)}",
        )
    return written[name]


def write(
    adapter: Adapter, target: Format, out: Path, base: BaseModel | None = None, *, replace: bool = False
) -> list[Path]:
    """Write an adapter in another program's format, all of its files or none, and return their paths.

    out: the file, or the folder for a format of several files.
    Raises UsageError if the format cannot hold the increments, naming what would help; RegistryError.
    """
    writer = target.writer
    assert writer is not None
    if base is None and writer.needs_base:
        raise UsageError(
            f"{target.name} files hold whole weights, not the difference to them",
            mend=f"--model M, the base that {adapter.name} is for",
        )
    # Both ways with a manifest of the numbers themselves: that of a lazily loaded file knows less (`load_file`).
    adapter = adapter.with_increments(dict(adapter.increments)) if base is None else _fitted(adapter, base)
    kind = adapter.manifest.increment.kind
    if kind == "mask" and kind not in writer.kinds:
        if base is None:
            raise UsageError(
                f"{adapter.name} switches neurons off, which {target.name} files cannot say",
                mend="--model M: together with its base it is a dense change",
            )
        adapter = densified(adapter, base)
        kind = adapter.manifest.increment.kind
    increments = dict(adapter.increments)
    if kind not in writer.kinds:
        others = ", ".join(known.name for known in all_formats() if known.writer and kind in known.writer.kinds)
        raise UsageError(
            f"{adapter.name} is a {kind} change of {len(increments)} modules, which {target.name} files cannot hold",
            mend=f"--svd-rank 8, a low-rank approximation whose relative error is stated; or --to one of: {others}",
        )
    files = writer.write(adapter.manifest, increments, {} if base is None else base.tensors)
    placed = {(out if name == WHOLE else out / name): content for name, content in files.items()}
    for path in placed:
        if path.exists() and not replace:
            raise UsageError(f"{path} exists already", mend="name another one with --out, or replace it with --force")
    write_together({path: _content(content) for path, content in placed.items()})
    return list(placed)


def densified(adapter: Adapter, base: BaseModel) -> Adapter:
    """Return the adapter with masks as dense changes of this base; other increments are unchanged."""
    fitted = _fitted(adapter, base)
    return fitted.with_increments({path: _densified(one, path, base) for path, one in fitted.increments.items()})


@contextmanager
def _mends_for_foreign_files() -> Iterator[None]:
    """Replace the mend for our own damaged files: a stranger's is in no repository of erasers."""
    try:
        yield
    except (AdapterFileError, ManifestError) as error:
        if error.mend != GET_AGAIN:
            raise
        again = "download it again from where it came; if it is the same then, ask its author for another"
        raise type(error)(error.message, mend=again) from error


def _adapter(source: Source, known: Format, increments: Mapping[str, Increment], said: Description) -> Adapter:
    """Return the adapter of increments that `known` read, with its manifest, under the base's own paths."""
    check_effect(increments, source.place, said.concept or "CONCEPT")
    about = known.describe(source)
    if about.manifest is not None:
        manifest = about.manifest.model_copy(update={"origin": None})
        increments = with_dots(increments, manifest.increment.modules)
        return apply_description(Adapter(manifest, increments, str(source.place)), said)
    increments = {dotted(name): _without_padding(increment) for name, increment in increments.items()}
    manifest = make_manifest(source, known, about, increments, said)
    increments = {name: with_kernel(name, one, manifest.base.family) for name, one in increments.items()}
    adapter = Adapter(manifest, increments, str(source.path if about.files else source.place))
    return adapter if source.base is None else _fitted(adapter, source.base)


def _base_needed(source: Source, known: Format) -> UsageError:
    named = source.metadata.get("base_model_id", "")
    return UsageError(
        f"{source.place} is a file of {known.name} ({known.about}): the change is computed as the difference to the "
        "base that it was trained on",
        mend=f"spmhub convert {quoted(source.place)} --model {named if _PLAIN.fullmatch(named) else 'M, that base'}",
    )


def _without_padding(increment: Increment) -> Increment:
    """Leave out the terms of a product that are zero: padding, and a fused module's rows of other parts."""
    if not isinstance(increment, LowRank):
        return increment
    used = increment.up.flatten(2).ne(0).any(-1).any(0) if increment.up.dim() > 2 else increment.up.ne(0).any(0)
    used &= increment.down.flatten(1).ne(0).any(1)
    if bool(used.all()):
        return increment
    kept = used.nonzero()[:, 0] if bool(used.any()) else torch.tensor([0])
    return LowRank(increment.down[kept].contiguous(), increment.up[:, kept].contiguous())


def _fitted(adapter: Adapter, base: BaseModel) -> Adapter:
    """Return the adapter under the base's own module paths. Raises CompatibilityError if it does not fit."""
    found = resolve_modules(adapter, base.denoiser)
    return adapter.with_increments(
        {
            path: _shaped(adapter.increments[name], architectures.shape_of(module))
            for path, (module, name) in found.items()
        }
    )


def _shaped(increment: Increment, weight: tuple[int, ...]) -> Increment:
    """Return the same change in its weight's own shape: a 1x1 convolution may be kept as a matrix or not."""
    if isinstance(increment, Mask) or increment.weight_shape == weight:
        return increment
    if isinstance(increment, Dense):
        return Dense(increment.delta.reshape(weight), increment.delta_bias)
    rank, kernel = increment.rank, [1] * (len(weight) - 2)
    return LowRank(increment.down.reshape(rank, *weight[1:]), increment.up.reshape(weight[0], rank, *kernel))


def _densified(increment: Increment, path: str, base: BaseModel) -> Increment:
    if not isinstance(increment, Mask):
        return increment
    weight, bias = base.tensors[f"{path}.weight"], base.tensors.get(f"{path}.bias")
    delta = increment.delta_for(weight)
    if increment.dim == 1 or bias is None:
        return Dense(delta)
    return Dense(delta, torch.where(increment.keep, torch.zeros_like(bias), -bias).float())


def _content(content: Image | bytes) -> Content:
    return content.write_to if isinstance(content, Image) else content
