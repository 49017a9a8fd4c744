"""The registry's lock file: records the Hub commit and sha256 of every pulled eraser.

The registry updates it whenever an eraser is added or removed. With the file under version control, `spmhub pull`
without a name downloads the same files on another machine.
"""

import errno
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from spm_hub.adapters.manifest import NAME, UNFOLDS, Manifest, Origin, Sha256
from spm_hub.errors import RegistryError
from spm_hub.io import untrusted_json as untrusted
from spm_hub.io.atomic import write_atomic
from spm_hub.io.small_files import read_small
from spm_hub.io.wording import quoted

LOCK_NAME = "spmhub-lock.json"
MAX_BYTES = 8 * 2**20
"""Largest lock file that is read; an eraser takes about 300 bytes."""


class Pin(Origin):
    """An eraser's origin on the Hub, and the sha256 of its adapter file."""

    sha256: Sha256


class _LockFile(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    adapters: dict[Annotated[str, StringConstraints(pattern=NAME)], Pin] = Field(
        default={}, description="by the eraser's name in this registry"
    )


def pin_of(manifest: Manifest) -> Pin | None:
    """Return the lock file's entry for an adapter with this manifest; None for one that was not pulled."""
    if manifest.origin is None or manifest.increment.sha256 is None:
        return None
    return Pin(**manifest.origin.model_dump(), sha256=manifest.increment.sha256)


def read(root: Path) -> Mapping[str, Pin]:
    """Return the pins of the registry at `root`, by name; none if it has no lock file.

    Raises RegistryError if the file cannot be read or is damaged.
    """
    path = root / LOCK_NAME
    try:
        text = read_small(path, MAX_BYTES)
        untrusted.parse(text, unfolds=UNFOLDS)
        return _LockFile.model_validate_json(text, strict=True).adapters
    except FileNotFoundError:
        return {}
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EINVAL, errno.EFBIG):
            raise _damaged(path, str(error.strerror)) from error
        raise RegistryError(f"cannot read {path}: {error.strerror}", mend=f"chmod u+r {quoted(path)}") from error
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(map(str, problem["loc"])) or "(whole file)"
        raise _damaged(path, f"{key[:200]}: {problem['msg'][:200]}") from error
    except ValueError as error:
        raise _damaged(path, str(error)) from error


def record(root: Path, name: str, pin: Pin | None) -> None:
    """Set the pin of the eraser `name`, or delete it where `pin` is None (made here, or removed).

    Call it under `storage.write_lock`. Raises RegistryError.
    """
    pins = dict(read(root))
    if pins.get(name) == pin:
        return
    pins.pop(name, None)
    if pin is not None:
        pins[name] = pin
    text = _LockFile(adapters=dict(sorted(pins.items()))).model_dump_json(indent=2)
    write_atomic(root / LOCK_NAME, text.encode() + b"\n")


def _damaged(path: Path, what: str) -> RegistryError:
    return RegistryError(
        f"{path} is damaged: {what}",
        mend=f"rm {quoted(path)}; the manifest of each pulled eraser still names its origin",
    )
