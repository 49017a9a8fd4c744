"""From any format to an adapter, and from an adapter to any format."""

import hashlib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from pydantic import JsonValue
from torch import Tensor, nn

from spm_hub.adapters.adapter import UNKNOWN_FAMILY, Adapter, increment_info, load_file
from spm_hub.adapters.compatibility import resolve_modules
from spm_hub.adapters.formats import cloneofsimo, full_weights, minimalist, peft, spm
from spm_hub.adapters.formats import module_names as names
from spm_hub.adapters.formats import other_components as text_encoder
from spm_hub.adapters.formats import reading as layouts
from spm_hub.adapters.formats.diffusers_lora import scaling_in
from spm_hub.adapters.formats.format import WHOLE, Format
from spm_hub.adapters.increments import Dense, Increment, LowRank, Mask
from spm_hub.adapters.manifest import Base, Concept, Manifest, slug
from spm_hub.errors import AdapterFileError, NotFoundError, UsageError, nearest
from spm_hub.io import pickles
from spm_hub.io.atomic import Content, write_together
from spm_hub.io.safetensors_file import MANIFEST_KEY, Image, read_tensors
from spm_hub.models import architectures

Progress = Callable[[int, int], None]

# Other programs call every file this; what it erases is then said by the folder, if by anything.
_NAMELESS = {"adapter_model", "pytorch_lora_weights", "diffusion_pytorch_model", "model"}
# What scales tensors, where a training script puts it beside them, and each reads in its own way.
_STRENGTHS = {"alpha", "lora_alpha", "network_alpha", "scale", "lora_scale", "multiplier"}
# What training scripts put a denoiser's tensors into.
_HOLDERS = {"state_dict", "unet", "transformer", "model"}
_TEXT_ENCODERS = {"text_encoder", "text_encoder_2", "text_encoder_3"}
# A model's id as it may stand in a command that a user is told to type.
_PLAIN = re.compile(r"\w[\w./-]{0,199}")
_CANDIDATES = (peft.WEIGHTS, "pytorch_lora_weights.safetensors", "adapter_model.bin", "pytorch_lora_weights.bin")


@dataclass(frozen=True)
class BaseModel:
    """The base that a file was trained on, for formats that need its weights; `id` and `revision` go to manifests."""

    denoiser: nn.Module
    id: str
    revision: str | None = None

    @cached_property
    def tensors(self) -> Mapping[str, Tensor]:
        """Its weights, by state-dict key."""
        return architectures.body_of(self.denoiser).state_dict()


@dataclass(frozen=True)
class Description:
    """What the user says of a file, over whatever the file says of itself.

    without_text_encoder: what it holds for text encoders may be left out; unless said, such a file is refused.
    """

    name: str | None = None
    concept: str | None = None
    family: str | None = None
    without_text_encoder: bool = False


def _no_progress(step: int, total: int) -> None:
    pass


def read(
    path: Path, said: Description, base: BaseModel | None = None, progress: Progress = _no_progress
) -> tuple[Adapter, str]:
    """The adapter in a file of any format, and the format's name; `path` may be the folder that holds it.

    base: needed for full tensors (ESD, UCE, Concept Ablation) and DoRA; otherwise it checks that the file fits.
    Pickles (.pt, .pth, .ckpt, .bin) are read here and nowhere else, as tensors only.
    Raises AdapterFileError, NotFoundError, CompatibilityError, and UsageError where something has to be said by hand.
    """
    if files := minimalist.mask_files(path):
        masks = minimalist.read_masks(files)
        origin = _origin(minimalist.FORMAT.name, path, _sha256(*files))
        manifest = _manifest(path, {"family": "flux"}, masks, said, base, origin)
        return _placed(Adapter(manifest, masks, str(path)), base), minimalist.FORMAT.name
    path = _file_of(path)
    if path.suffix in pickles.SUFFIXES:
        metadata: Mapping[str, str] = {}
        tensors, sha256 = _tensors_of(path, pickles.read(path), said), _sha256(path)
    else:
        header, tensors, sha256 = read_tensors(path)
        metadata = header.metadata
        if MANIFEST_KEY in metadata:
            return described(load_file(path), said), spm.FORMAT.name
    left_out: Mapping[str, int] = {}
    if said.without_text_encoder:
        tensors, left_out = text_encoder.divided(tensors)
        if not tensors:
            count = sum(left_out.values())
            raise AdapterFileError(f"{path} holds nothing but parts of a text encoder ({count} tensors)")
    text_encoder.refuse(path, tensors)
    beside = None if base is None else base.tensors
    if any(peft.parse_key(key) for key in tensors):
        format_name = peft.FORMAT.name
        scaling = scaling_in(metadata, path) or peft.read_scaling(path)
        increments = layouts.read_increments(path, tensors, scaling, explicit=True, base=beside)
    elif cloneofsimo.matches(tensors):
        format_name = cloneofsimo.NAME
        increments = layouts.read_increments(path, cloneofsimo.named(path, tensors, metadata), explicit=True)
    elif full_weights.matches(tensors):
        format_name = full_weights.method_of(tensors, metadata)
        increments = _full(path, tensors, metadata, base, progress)
    else:
        increments = layouts.read_increments(path, tensors, scaling_in(metadata, path), explicit=True, base=beside)
        format_name = layouts.format_of(tensors)
    increments = {names.dotted(name): _compact(increment) for name, increment in increments.items()}
    origin = _origin(format_name, path, sha256, left_out)
    if (method := metadata.get("train_method")) and format_name == full_weights.FORMAT.name:
        origin["method"] = method
    manifest = _manifest(path, metadata, increments, said, base, origin)
    increments = {name: names.shaped(name, one, manifest.base.family) for name, one in increments.items()}
    return _placed(Adapter(manifest, increments, str(path)), base), format_name


def described(adapter: Adapter, said: Description) -> Adapter:
    """An adapter with a manifest of its own, under what the user says of it. Raises UsageError for another family."""
    manifest = adapter.manifest
    update: dict[str, Any] = {}
    if said.name:
        update["name"] = said.name
    if said.concept:
        update["concept"] = manifest.concept.model_copy(update={"target": said.concept})
    if said.family:
        if manifest.base.family not in (said.family, UNKNOWN_FAMILY):
            raise UsageError(f"--base {said.family}, but its manifest says {manifest.base.family}")
        update["base"] = manifest.base.model_copy(update={"family": said.family})
    return Adapter(manifest.model_copy(update=update), adapter.increments, adapter.source)


def writer_named(name: str) -> Format:
    """The format that `--to` names. Raises NotFoundError with those there are."""
    written = {known.name: known for known in layouts.all_formats() if known.writer is not None}
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
    """Write an adapter in another program's format, all of its files or none; returns where they are.

    out: the file, or the folder for a format of several files.
    Raises UsageError where the format cannot hold the increments, naming what would help; RegistryError.
    """
    writer = target.writer
    assert writer is not None
    if base is None and writer.needs_base:
        raise UsageError(
            f"{target.name} files hold whole weights, not what was added to them",
            mend=f"--model M, the base that {adapter.name} is for",
        )
    # Either way with a manifest of the numbers themselves: one that was loaded lazily knows less of them (`load_file`).
    adapter = adapter.with_increments(dict(adapter.increments)) if base is None else _fitted(adapter, base)
    increments = dict(adapter.increments)
    kind = adapter.manifest.increment.kind
    if kind == "mask" and kind not in writer.kinds:
        if base is None:
            raise UsageError(
                f"{adapter.name} switches neurons off, which {target.name} files cannot say",
                mend="--model M: beside its base it is a dense change",
            )
        increments = {path: _densified(increment, path, base) for path, increment in increments.items()}
        adapter = adapter.with_increments(increments)
        kind = adapter.manifest.increment.kind
    if kind not in writer.kinds:
        others = ", ".join(known.name for known in layouts.all_formats() if known.writer and kind in known.writer.kinds)
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
    """Masks as the dense changes that they are on this base; other increments stay as they are."""
    fitted = _fitted(adapter, base)
    return fitted.with_increments({path: _densified(one, path, base) for path, one in fitted.increments.items()})


def _file_of(path: Path) -> Path:
    if not path.is_dir():
        return path
    found = [path / name for name in _CANDIDATES if (path / name).is_file()] or sorted(path.glob("*.safetensors"))
    if len(found) != 1 and not (found and found[0].name in _CANDIDATES):
        listed = ", ".join(file.name for file in found) or "none"
        raise NotFoundError(f"{path} is a folder without one adapter file ({listed})", mend="name the file itself")
    return found[0]


def _tensors_of(path: Path, content: Any, said: Description) -> dict[str, Tensor]:
    """The tensors of a pickled state dict, out of the dictionary that training scripts put around it."""
    if not isinstance(content, dict):
        raise AdapterFileError(f"{path} holds {type(content).__name__}, not tensors by name")
    named = {str(key): _as_tensor(str(key), value) for key, value in content.items()}
    holding = {key: value for key, value in named.items() if _holds_tensors(value)}
    if strength := sorted(key for key, value in named.items() if key in _STRENGTHS and isinstance(value, int | float)):
        raise AdapterFileError(
            f"{path}: it holds {strength[0]} = {named[strength[0]]} for all its modules, and what that scales is said "
            "by the program that wrote it alone",
            mend="ask its author for a safetensors file, or multiply the up matrices by what it stands for",
        )
    if said.without_text_encoder:
        holding = {key: value for key, value in holding.items() if key not in _TEXT_ENCODERS}
    if holding.keys() <= _HOLDERS and len(holding) == 1:
        return _tensors_of(path, next(iter(holding.values())), said)
    for key, value in holding.items():
        if not isinstance(value, Tensor) and key not in _HOLDERS:
            raise AdapterFileError(
                f"{path}: it holds {key!r} too, which is no part of a denoiser; an eraser changes the denoiser only",
                mend=text_encoder.LEFT_OUT if key in _TEXT_ENCODERS else None,
            )
    tensors = {key: value.detach() for key, value in holding.items() if isinstance(value, Tensor)}
    if not tensors or len(tensors) < len(holding):
        beside = [*holding.keys() - tensors.keys(), *(["tensors"] if tensors else [])]
        raise AdapterFileError(f"{path} holds {' and '.join(beside) or 'no tensors'}, not the tensors of one denoiser")
    return tensors


def _as_tensor(key: str, value: Any) -> Any:
    """A plain number under the name of a module's part as the tensor that it would be in any other file."""
    if "." not in key or isinstance(value, bool) or not isinstance(value, int | float):
        return value
    return torch.tensor(float(value) if abs(value) < 2**1000 else math.inf)


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, dict | list | tuple):
        return any(_holds_tensors(inner) for inner in (value.values() if isinstance(value, dict) else value))
    return isinstance(value, Tensor)


def _full(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    base: BaseModel | None,
    progress: Progress,
) -> dict[str, Increment]:
    if base is None:
        named = metadata.get("base_model_id", "")
        raise UsageError(
            f"{path} holds whole weights (as ESD, UCE and Concept Ablation save them): what they erase is the "
            "difference to the base that they were trained on",
            mend=f"spmhub convert {path} --model {named if _PLAIN.fullmatch(named) else 'M, that base'}",
        )
    changeable = frozenset(architectures.changeable(base.denoiser))
    return full_weights.read(path, tensors, base.tensors, changeable, progress)


def _compact(increment: Increment) -> Increment:
    """Without the terms of a product that are zero: padding, and what a fused module holds for its other parts."""
    if not isinstance(increment, LowRank):
        return increment
    used = increment.up.flatten(2).ne(0).any(-1).any(0) if increment.up.dim() > 2 else increment.up.ne(0).any(0)
    used &= increment.down.flatten(1).ne(0).any(1)
    if bool(used.all()):
        return increment
    kept = used.nonzero()[:, 0] if bool(used.any()) else torch.tensor([0])
    return LowRank(increment.down[kept].contiguous(), increment.up[:, kept].contiguous())


def _manifest(
    path: Path,
    metadata: Mapping[str, str],
    increments: Mapping[str, Increment],
    said: Description,
    base: BaseModel | None,
    recipe: dict[str, JsonValue],
) -> Manifest:
    prompts = [prompt.strip() for prompt in metadata.get("prompts", "").split(",") if prompt.strip()]
    stem = path.parent.resolve().name if path.stem in _NAMELESS else path.stem
    target = said.concept or metadata.get("erase_concept", "").strip() or (prompts[0] if prompts else stem)
    family = _family(path, metadata, increments, said, base)
    names.check_roots(path, family, increments)
    return Manifest(
        name=said.name or slug(said.concept or stem),
        concept=Concept(target=target, aliases=tuple(prompt for prompt in prompts[1:] if not said.concept)),
        increment=increment_info(increments),
        base=Base(
            family=family,
            id=base.id if base else metadata.get("base_model_id", ""),
            revision=base.revision if base else None,
            fingerprint=architectures.fingerprint_of(base.denoiser) if base else "",
        ),
        recipe=recipe,
        licence=metadata.get("modelspec.license", "unknown"),
        author=metadata.get("modelspec.author", ""),
    )


def _family(
    path: Path,
    metadata: Mapping[str, str],
    increments: Mapping[str, Increment],
    said: Description,
    base: BaseModel | None,
) -> str:
    """What is said, else the base's, else what names and widths tell, else what the header claims."""
    known = list(dict.fromkeys(family.name for family in architectures.all_families()))
    if said.family is not None and said.family not in known:
        raise UsageError(f"--base {said.family!r} is no family", mend=f"--base {', '.join(known)}")
    told = names.family_of(increments)
    own = base and architectures.family_of(base.denoiser).name
    for other, where in ((own, "the model"), (told, "the file's tensors")):
        if said.family and other and other not in (said.family, "generic"):
            raise UsageError(f"--base {said.family}, but {where}: {other}", mend="leave --base out")
    family = said.family or own or told or spm.family_in(metadata)
    if family is None:
        raise UsageError(
            f"{path}: neither names nor widths tell which family of models it is for, and its header is silent",
            mend=f"--base {', '.join(known)}",
        )
    return family


def _origin(
    format_name: str, path: Path, sha256: str, left_out: Mapping[str, int] | None = None
) -> dict[str, JsonValue]:
    """What stands for the recipe of a file that another program trained."""
    about: dict[str, JsonValue] = {"format": format_name, "file": path.name, "sha256": sha256}
    return {"converted": about | {f"{part}_tensors_left_out": count for part, count in (left_out or {}).items()}}


def _sha256(*paths: Path) -> str:
    """Of the files one behind the other."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    return digest.hexdigest()


def _placed(adapter: Adapter, base: BaseModel | None) -> Adapter:
    return adapter if base is None else _fitted(adapter, base)


def _fitted(adapter: Adapter, base: BaseModel) -> Adapter:
    """The adapter under the base's own module paths. Raises CompatibilityError where it does not fit."""
    found = resolve_modules(adapter, base.denoiser)
    return adapter.with_increments(
        {
            path: _shaped(adapter.increments[name], architectures.shape_of(module))
            for path, (module, name) in found.items()
        }
    )


def _shaped(increment: Increment, weight: tuple[int, ...]) -> Increment:
    """The same change in its weight's own shape: a matrix may stand for a 1x1 convolution, or the other way round."""
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
