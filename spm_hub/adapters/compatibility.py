"""Checks that an adapter fits a denoiser, and finds the modules that it changes."""

from collections.abc import Mapping

import torch
from torch import nn

from spm_hub.adapters.adapter import Adapter
from spm_hub.adapters.formats.module_names import flat
from spm_hub.errors import CompatibilityError, nearest
from spm_hub.models.architectures import (
    FAMILIES,
    GENERIC,
    bias_of,
    body_of,
    changeable,
    denoiser_of,
    family_of,
    shape_of,
)

_NAMED = frozenset(family.name for family in FAMILIES) - {GENERIC}


def resolve_modules(adapter: Adapter, denoiser: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Return the modules that an adapter changes, by dotted path, each with the adapter's own name for it.

    Paths are compared with . as _, as files of other programs keep no dots.
    Raises CompatibilityError that names the first module which is missing or of another shape, and both shapes; or both
    families, where the manifest states another than the denoiser's.
    """
    _check_family(adapter, denoiser)
    modules = changeable(denoiser)
    paths = {flat(path): path for path in modules}
    resolved: dict[str, tuple[nn.Module, str]] = {}
    for name, increment in adapter.outline.items():
        path = name if name in modules else paths.get(flat(name))
        if path is None:
            meant = nearest(flat(name), paths)
            raise _misfit(
                adapter,
                denoiser,
                f"{name}: the adapter has an increment for a weight {increment.weight_shape}, the model has no such "
                "module" + (f" (nearest: {_described(modules, paths[meant[0]])})" if meant else ""),
            )
        module = modules[path]
        try:
            increment.check_fits(path, torch.empty(shape_of(module), device="meta"), bias_of(module))
        except CompatibilityError as error:
            raise _misfit(adapter, denoiser, error.message) from error
        resolved[path] = module, name
    return resolved


def check(adapter: Adapter, pipe: object) -> None:
    """Raise CompatibilityError unless `adapter` can be attached to `pipe` (a pipeline or a denoiser)."""
    family_of(pipe)
    resolve_modules(adapter, denoiser_of(pipe))


def _check_family(adapter: Adapter, denoiser: nn.Module) -> None:
    """Raise CompatibilityError where the manifest states another family than the denoiser's."""
    stated = adapter.manifest.base.family
    if stated in _NAMED and (own := family_of(denoiser).name) in _NAMED and own != stated:
        raise _misfit(adapter, denoiser, f"its manifest says base.family {stated!r}, this model is of {own!r}")


def remark_on_fingerprint(adapter: Adapter, fingerprint: str) -> str | None:
    """Say that a manifest states a base of another fingerprint; None if it does not.

    Erasers are meant for other checkpoints of their base's layout, and those share its fingerprint.
    """
    stated = adapter.manifest.base.fingerprint
    if not stated or stated == fingerprint:
        return None
    return (
        f"{adapter.name} fits this model, but its manifest says that its base was of another layout "
        f"(fingerprint {stated[:12]}..., this model's is {fingerprint[:12]}...)"
    )


def _described(modules: Mapping[str, nn.Module], path: str) -> str:
    return f"{path} {shape_of(modules[path])}"


def _misfit(adapter: Adapter, denoiser: nn.Module, mismatch: str) -> CompatibilityError:
    return CompatibilityError(
        f"adapter {adapter.name} ({adapter.source}, trained on {adapter.manifest.base.family}) does not fit this "
        f"{type(body_of(denoiser)).__name__}: {mismatch}",
        mend=f"spmhub show {adapter.name}, and attach it to a checkpoint of its own base",
    )
