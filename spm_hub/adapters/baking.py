"""Bakes erasers into a plain diffusers checkpoint, from which each can still be recovered exactly.

A baked folder is what `save_pretrained` writes, with the changed weights replaced, and in addition

    spmhub.json                     the erasers and their strengths
    spmhub/erasers/NAME.safetensors the erasers themselves
    spmhub/originals.safetensors    the base's own values of every changed weight

Recovering never subtracts (that is inexact in every floating-point format): the remaining erasers are folded again into
the originals. Erasers act in the order of their names, so a baked folder does not depend on the order of the arguments.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError
from torch import Tensor

from spm_hub.adapters.adapter import Adapter, increment_info, load_file
from spm_hub.adapters.checkpoint_folder import FolderWeights, clone_folder, forget_places, staged_folder
from spm_hub.adapters.compatibility import resolve_modules
from spm_hub.adapters.folding import effective
from spm_hub.adapters.lookup import resolve_names
from spm_hub.adapters.manifest import NAME, UNFOLDS, excess_of, factor_of
from spm_hub.errors import (
    AdapterFileError,
    CompatibilityError,
    ModelError,
    NotFoundError,
    RegistryError,
    UsageError,
    nearest,
)
from spm_hub.io import untrusted_json as untrusted
from spm_hub.io.atomic import write_atomic
from spm_hub.io.hashing import sha256_of
from spm_hub.io.safetensors_file import encode, read_tensors
from spm_hub.io.wording import quoted
from spm_hub.models.architectures import denoiser_of, family_of

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

PROVENANCE = "spmhub.json"
ORIGINALS = "spmhub/originals.safetensors"
_LARGEST_RECORD = 2**20
"""Bytes; an eraser takes about 150."""

# What a stranger's record names is written to: one folder inside the checkpoint, and files that erasers may have.
_Folder = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_]\w{0,63}$")]
_Name = Annotated[str, StringConstraints(pattern=NAME)]


class Baked(BaseModel):
    """One eraser in a baked checkpoint; `sha256` is of its file in `spmhub/erasers/`."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: _Name
    strength: float
    sha256: str


class Provenance(BaseModel):
    """The content of `spmhub.json`: the base, its denoiser, and the erasers folded into it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    base: str
    family: str
    denoiser: _Folder
    erasers: tuple[Baked, ...]


def bake(
    pipe: DiffusionPipeline,
    adapters: Sequence[Adapter],
    out: Path,
    *,
    strength: float | Mapping[str, float] | None = None,
    base: str = "",
    replace: bool = False,
) -> Provenance:
    """Write `pipe` to the folder `out` with `adapters` folded in at gamma 1 times their strength.

    `pipe` is not changed. strength: one number, numbers by adapter name, or None for each manifest's own.
    base: the name of the base that the provenance records.  replace: replace an existing checkpoint.
    The sum is taken in float32 and rounded once to the denoiser's own precision; every other part is written as `pipe`
    holds it. The folder appears whole or not at all.

    Raises UsageError (no adapter, one twice, a base that was baked itself, strengths that no float holds),
    NotFoundError (a strength for none of them), CompatibilityError (an adapter that does not fit), RegistryError (`out`
    exists or cannot be written).
    """
    strengths = factors_of(adapters, strength)
    check_place(out, replace=replace)
    _check_base(pipe, adapters)
    family = family_of(pipe)
    denoiser = denoiser_of(pipe)
    in_order = sorted(adapters, key=lambda adapter: adapter.name)
    resolved = [_with_model_paths(adapter, resolve_modules(adapter, denoiser)) for adapter in in_order]

    with staged_folder(out) as stage:
        pipe.save_pretrained(stage, safe_serialization=True)
        forget_places(stage)
        weights = FolderWeights(stage / family.denoiser)
        originals = weights.read(_changed_keys(resolved, weights))
        weights.write(_fold(originals, resolved, strengths))
        baked = []
        for adapter in resolved:
            saved = adapter.save(eraser_file(stage, adapter.name))
            baked.append(Baked(name=adapter.name, strength=strengths[adapter.name], sha256=str(saved.increment.sha256)))
        write_atomic(stage / ORIGINALS, encode(originals, {}).write_to)
        provenance = Provenance(base=base, family=family.name, denoiser=family.denoiser, erasers=tuple(baked))
        _write_provenance(stage, provenance)
    return provenance


def check_place(out: Path, *, replace: bool = False) -> None:
    """Refuse a folder `out` that exists, is not empty, and may not be replaced.

    Raises RegistryError. Only a checkpoint may be replaced, never a folder with other content.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / "model_index.json").is_file():
        raise RegistryError(f"{out} exists already, and is no checkpoint", mend="name another folder with --out")
    if not replace:
        raise RegistryError(f"{out} exists already", mend="name another folder with --out, or add --force")


def _check_base(pipe: DiffusionPipeline, adapters: Sequence[Adapter]) -> None:
    """Refuse a base that was baked itself, since its own erasers could not be taken out again."""
    place = Path(str(pipe.config.get("_name_or_path") or ""))
    if not (place / PROVENANCE).is_file():
        return
    held = read_provenance(place)
    inside = [eraser.name for eraser in held.erasers]
    both = ",".join(sorted({*inside, *(adapter.name for adapter in adapters)}))
    raise UsageError(
        f"{place} holds {', '.join(inside)} already, which could not be taken out of it any more if others were baked "
        "on top",
        mend=f"spmhub bake --model {quoted(held.base or 'BASE')} --adapters {both} --out DIR, all at once",
    )


def recover(
    checkpoint: Path, name: str, *, check: Callable[[Adapter], None] | None = None, force: bool = False
) -> Provenance:
    """Take the eraser `name` out of a baked folder, which then equals, byte for byte, a bake without it.

    With the last one the folder becomes the plain base again, without provenance. Needs no pipeline. The folder is
    replaced as a whole, so that a failure leaves it as it was. Returns the record of the erasers that remain.
    check: called with each of these; what it raises ends the recovery. force: fold also erasers whose recorded strength
    is outside of the limits of manifests, 0 to 4.

    Raises ModelError (not a baked folder, altered, or with strengths outside of the limits), NotFoundError (no such
    eraser in it), RegistryError.
    """
    before = read_provenance(checkpoint)
    names = [eraser.name for eraser in before.erasers]
    if name not in names:
        meant = nearest(name, names)
        hint = f"; did you mean {' or '.join(meant)}?" if meant else f"; it has {', '.join(names)}"
        raise NotFoundError(
            f"no eraser {name!r} is baked into {checkpoint}{hint}",
            mend=f"spmhub recover {(*meant, *names, 'NAME')[0]} --checkpoint {quoted(checkpoint)}",
        )
    kept = tuple(eraser for eraser in before.erasers if eraser.name != name)
    if not force:
        _check_strengths(checkpoint, name, kept)
    remaining = [_read_eraser(checkpoint, eraser) for eraser in kept]
    if check is not None:
        for one in remaining:
            check(one)
    changed = _changed_keys(remaining, FolderWeights(checkpoint / before.denoiser))
    originals = _read_originals(checkpoint, changed)
    still = {key: originals[key] for key in changed}

    with staged_folder(checkpoint) as stage:
        clone_folder(checkpoint, stage, rewritten=(Path(before.denoiser), Path("spmhub"), Path(PROVENANCE)))
        weights = FolderWeights(stage / before.denoiser)
        weights.write({**originals, **_fold(still, remaining, {eraser.name: eraser.strength for eraser in kept})})
        after = before.model_copy(update={"erasers": kept})
        if kept:
            eraser_file(stage, name).unlink()
            write_atomic(stage / ORIGINALS, encode(still, {}).write_to)
            _write_provenance(stage, after)
        else:
            shutil.rmtree(stage / "spmhub")
            (stage / PROVENANCE).unlink()
    return after


def _check_strengths(checkpoint: Path, name: str, erasers: Iterable[Baked]) -> None:
    """Raise ModelError for an eraser that a record gives more strength than a stranger's manifest may."""
    for eraser in erasers:
        if (excess := excess_of(eraser.strength)) is not None:
            raise ModelError(
                f"{checkpoint / PROVENANCE} would fold {eraser.name} again, and {excess}",
                mend=f"if you baked it so: spmhub recover {name} --checkpoint {quoted(checkpoint)} --force",
            )


def read_provenance(checkpoint: Path) -> Provenance:
    """Return the record of the erasers in the folder `checkpoint`.

    Raises ModelError if the folder is not baked, or its record cannot be read.
    """
    file = checkpoint / PROVENANCE
    try:
        if file.exists() and not file.is_file():
            raise ModelError(f"{file} is no file", mend="bake the checkpoint again")
        with open(file, "rb") as content:  # which may be a link, as in the Hub's cache
            text = content.read(_LARGEST_RECORD + 1)
        if len(text) > _LARGEST_RECORD:
            raise ModelError(f"{file} has more than {_LARGEST_RECORD} bytes", mend="bake the checkpoint again")
        untrusted.parse(text, unfolds=UNFOLDS)
        return Provenance.model_validate_json(text)
    except FileNotFoundError as error:
        raise ModelError(
            f"{checkpoint} is no baked checkpoint: it has no {PROVENANCE}",
            mend=f"spmhub bake --model M --adapters NAME --out {quoted(checkpoint)}",
        ) from error
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "(whole file)"
        raise ModelError(f"{file}: {key[:200]}: {first['msg'][:200]}", mend="bake the checkpoint again") from error
    except ValueError as error:
        raise ModelError(f"{file}: {str(error)[:200]}", mend="bake the checkpoint again") from error


def _fold(
    originals: Mapping[str, Tensor], adapters: Sequence[Adapter], strengths: Mapping[str, float]
) -> dict[str, Tensor]:
    """Return the new value of every original under all `adapters`, at gamma 1 times their strength."""
    folded = {}
    for path in {key.rpartition(".")[0] for key in originals}:
        parts = [(one.increments[path], strengths[one.name]) for one in adapters if path in one.increments]
        weight, bias = originals[f"{path}.weight"], originals.get(f"{path}.bias")
        new_weight, new_bias = effective(weight, bias, parts)
        if not bool(new_weight.isfinite().all()) and bool(weight.isfinite().all()):
            given = ", ".join(f"{one.name} at {strengths[one.name]:g}" for one in adapters if path in one.increments)
            raise UsageError(
                f"{path}: its weights under {given} are beyond what {str(weight.dtype).removeprefix('torch.')} holds",
                mend="smaller --strength",
            )
        folded[f"{path}.weight"] = new_weight
        if new_bias is not None:
            folded[f"{path}.bias"] = new_bias
    return folded


def _changed_keys(adapters: Sequence[Adapter], weights: FolderWeights) -> list[str]:
    """Return the sorted keys of every weight and bias that one of `adapters` may change.

    Raises CompatibilityError if the folder has no such weight.
    """
    keys = set()
    for adapter in adapters:
        for path, increment in adapter.increments.items():
            if f"{path}.weight" not in weights:
                raise CompatibilityError(
                    f"{path} is not saved under its own name: the pipeline carries other adapters (a LoRA?)",
                    mend="pipe.unload_lora_weights() before baking",
                )
            keys.add(f"{path}.weight")
            if increment.kind != "low_rank" and f"{path}.bias" in weights:
                keys.add(f"{path}.bias")
    return sorted(keys)


def _with_model_paths(adapter: Adapter, modules: Mapping[str, tuple[object, str]]) -> Adapter:
    """Return the adapter under the model's own module paths; other programs write . as _."""
    increments = {path: adapter.increments[name] for path, (_, name) in modules.items()}
    manifest = adapter.manifest.model_copy(update={"increment": increment_info(increments)})
    return Adapter(manifest, increments, adapter.source)


def factors_of(adapters: Sequence[Adapter], asked: float | Mapping[str, float] | None) -> dict[str, float]:
    """Return the factor of each adapter's change at gamma 1.

    It is that of the strength asked for, else of its manifest's.

    Raises UsageError (no adapter, one twice, a strength that no float holds), NotFoundError (a strength for none).
    """
    names = [adapter.name for adapter in adapters]
    if not names:
        raise UsageError("no adapter is named: there is nothing to bake", mend="spmhub list")
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"adapter {name!r} is given twice", mend="name every adapter once, or set its strength")
    given = resolve_names(asked, names, "strength") if isinstance(asked, Mapping) else dict.fromkeys(names, asked)
    gates = {adapter.name: adapter.manifest.gate for adapter in adapters}
    strengths = {name: float(one if (one := given.get(name)) is not None else gates[name].strength) for name in names}
    return {name: factor_of(gates[name].law, 1.0, strength) for name, strength in strengths.items()}


def eraser_file(folder: Path, name: str) -> Path:
    """Return the place of a baked eraser's file in a checkpoint folder."""
    return folder / "spmhub" / "erasers" / f"{name}.safetensors"


def _read_eraser(checkpoint: Path, baked: Baked) -> Adapter:
    """Read the file of a baked eraser.

    Raises ModelError if it is missing, or another file than the one that was baked.
    """
    file = eraser_file(checkpoint, baked.name)
    try:
        found = sha256_of(file)
    except OSError as error:
        raise ModelError(
            f"the eraser {baked.name} is lost: {file}: {error.strerror}", mend="bake the checkpoint again"
        ) from error
    if found != baked.sha256:
        raise ModelError(
            f"{file} was altered after it was baked: its sha256 is {found}, {PROVENANCE} says {baked.sha256}",
            mend="bake the checkpoint again",
        )
    return load_file(file)


def _read_originals(checkpoint: Path, keys: Iterable[str]) -> dict[str, Tensor]:
    """Return the base's values of all changed weights.

    Raises ModelError if the file was altered or lacks one of `keys`.
    """
    try:
        _, originals, _ = read_tensors(checkpoint / ORIGINALS)
    except (AdapterFileError, NotFoundError) as error:
        raise ModelError(f"the originals are lost: {error.message}", mend="bake the checkpoint again") from error
    if lost := sorted(set(keys) - set(originals)):
        raise ModelError(f"{checkpoint / ORIGINALS} lacks {lost[0]}", mend="bake the checkpoint again")
    return originals


def _write_provenance(folder: Path, provenance: Provenance) -> None:
    text = json.dumps(provenance.model_dump(mode="json"), indent=2) + "\n"
    write_atomic(folder / PROVENANCE, text.encode())
