"""Examines the installation and finds a command that mends each problem."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from spm_hub.adapters.formats.format import Format
from spm_hub.adapters.formats.reading import FORMATS
from spm_hub.evaluation.metrics.metric import NamedMetric
from spm_hub.evaluation.metrics.named import METRICS
from spm_hub.models.aliases import ALIASES
from spm_hub.models.architectures import FAMILIES, Family
from spm_hub.models.references import is_available
from spm_hub.plugins import Kind, examine
from spm_hub.training.methods import METHODS, Method

PACKAGE = "spm-hub"
LITTLE_SPACE = 2 * 10**9  # bytes: less than one checkpoint of Stable Diffusion in half precision


@dataclass(frozen=True)
class Finding:
    """Result of examining one thing: ok, a warning or a failure, and the command that mends it."""

    subject: str
    status: Literal["ok", "warn", "fail"]
    detail: str
    mend: str | None = None


def diagnose(registry: Path) -> Iterator[Finding]:
    """Examine everything and yield a finding for each; `registry` is the folder for new erasers."""
    yield Finding("python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    yield from _packages()
    yield from _devices()
    yield _folder("registry", registry, mend="choose another folder with --registry DIR or SPMHUB_REGISTRY")
    yield from _hub()
    yield from _plugins()
    for alias in ALIASES.values():
        if alias.embedded is not None:
            yield _embedded(alias.name, alias.embedded, present=is_available(alias))


def tested_versions() -> dict[str, Version]:
    """Return the versions that this release was tested with, by package, from constraints.txt."""
    here = Path(__file__).parents[1]
    pins = next((file for folder in (here, here.parent) if (file := folder / "constraints.txt").is_file()), None)
    if pins is None:
        return {}
    lines = (line.partition("#")[0].strip() for line in pins.read_text(encoding="utf-8").splitlines())
    pinned = (line.partition("==") for line in lines if line)
    return {canonicalize_name(name): Version(version) for name, _, version in pinned}


def _packages() -> Iterator[Finding]:
    tested = tested_versions()
    for requirement in sorted(map(Requirement, metadata.requires(PACKAGE) or ()), key=lambda one: one.name.lower()):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        name, upgrade = requirement.name, f'{Path(sys.executable).name} -m pip install -U "{requirement}"'
        try:
            installed = Version(metadata.version(name))
        except metadata.PackageNotFoundError:
            yield Finding(name, "fail", f"not installed; required: {requirement.specifier}", upgrade)
            continue
        pin = tested.get(canonicalize_name(name))
        if not requirement.specifier.contains(installed, prereleases=True):
            yield Finding(name, "fail", f"{installed}; required: {requirement.specifier}", upgrade)
        elif pin is not None and Version(installed.public) != pin:
            mend = f'{Path(sys.executable).name} -m pip install "{name}=={pin}"'
            yield Finding(name, "warn", f"{installed}; tested with {pin}", mend)
        else:
            yield Finding(name, "ok", str(installed))


def _devices() -> Iterator[Finding]:
    try:
        import torch
    except (ImportError, OSError) as error:
        yield Finding("torch", "fail", f"cannot be imported: {error}", "python -m pip install --force-reinstall torch")
        return
    yield Finding("cpu", "ok", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads for torch")
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        yield Finding(f"cuda:{index}", "ok", f"{about.name}, {about.total_memory / 1e9:.0f} GB")
    if torch.backends.mps.is_available():
        yield Finding("mps", "ok", "Apple GPU")


def _hub() -> Iterator[Finding]:
    from huggingface_hub import constants

    yield _folder("model cache", Path(constants.HF_HUB_CACHE), mend="set HF_HOME to a folder that can be written")
    if constants.is_offline_mode():
        yield Finding("network", "warn", "HF_HUB_OFFLINE is set, so nothing is downloaded", "unset HF_HUB_OFFLINE")
    else:
        yield Finding("network", "ok", f"downloads allowed, from {constants.ENDPOINT}")


def _plugins() -> Iterator[Finding]:
    groups: tuple[tuple[Kind, type[object], set[str]], ...] = (
        ("objectives", Method, set(METHODS)),
        ("families", Family, {family.name for family in FAMILIES}),
        ("formats", Format, {known.name for known in FORMATS}),
        ("metrics", NamedMetric, {metric.name for metric in METRICS}),
        ("judges", NamedMetric, {metric.name for metric in METRICS}),
    )
    for kind, expected, own in groups:
        for plugin in examine(kind, expected):
            broken = "spm-hub itself uses its name" if plugin.name in own else plugin.broken
            what = f"{kind}, of {plugin.distribution}"
            if broken is None:
                yield Finding(f"plug-in {plugin.name}", "ok", what)
            else:
                mend = f"{Path(sys.executable).name} -m pip uninstall {plugin.distribution}"
                yield Finding(f"plug-in {plugin.name}", "warn", f"{what}: ignored: {broken}", mend)


def _folder(subject: str, folder: Path, *, mend: str) -> Finding:
    """Check that `folder`, or its nearest existing parent, can be written and has free space."""
    existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)):
        return Finding(subject, "fail", f"{folder} cannot be written", mend)
    free = shutil.disk_usage(existing).free
    detail = f"{folder} ({free / 1e9:.1f} GB free)"
    return (
        Finding(subject, "warn", detail, "free some space") if free < LITTLE_SPACE else Finding(subject, "ok", detail)
    )


def _embedded(name: str, folder: Path, *, present: bool) -> Finding:
    if present:
        return Finding(f"model {name}", "ok", "embedded")
    return Finding(f"model {name}", "fail", f"{folder} is missing", "install the package again")
