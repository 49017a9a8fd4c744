"""The registry's lock file: records the Hub commit and sha256 of every pulled eraser.

The registry updates it whenever an eraser is added or removed. With the file under version control, `spmhub pull`
without a name downloads the same files on another machine.
"""

import errno
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from spm_hub.adapters.manifest import NAME, UNFOLDS, Manifest, Origin, Sha256
from spm_hub.errors import RegistryError
from spm_hub.io import untrusted_json as untrusted
from spm_hub.io.atomic import write_atomic
from spm_hub.io.small_files import read_small
from spm_hub.io.wording import quoted
from spm_hub.registry.storage import STATE

LOCK_NAME = "spmhub-lock.json"
MAX_BYTES = 8 * 2**20
"""Largest lock file that is read; an eraser takes about 300 bytes."""


_STAMP = "lockfile-stamp"
_HEAD, _FOOT = b'{\n  "schema_version": 1,\n  "adapters": {\n', b"\n  }\n}\n"
_EMPTY = b'{\n  "schema_version": 1,\n  "adapters": {}\n}\n'


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
    if pin is None and not (root / LOCK_NAME).is_file():
        return
    lines = _lines_written_last(root)
    if lines is None:
        lines = b",\n".join(_lines(known, one) for known, one in sorted(read(root).items()))
    before, held, after = _parted(lines, name)
    new = b"" if pin is None else _lines(name, pin)
    if new == held:
        return
    lines = b",\n".join(part for part in (before, new, after) if part)
    write_atomic(root / LOCK_NAME, _HEAD + lines + _FOOT if lines else _EMPTY)
    with suppress(OSError):
        # Without it the next change reads and checks the whole file.
        write_atomic(root / STATE / _STAMP, _stamp(root))


def _lines(name: str, pin: Pin) -> bytes:
    """Return the lines of one pin, without a comma."""
    first, *others = pin.model_dump_json(indent=2).splitlines()
    return "\n    ".join((f'    "{name}": {first}', *others)).encode()


def _parted(lines: bytes, name: str) -> tuple[bytes, bytes, bytes]:
    """Return the lines of all pins before a name, those of its own pin, and those after it.

    A search by halves looks at few of them, as reading all pins takes far longer than copying their lines.
    """
    low, high = 0, len(lines)
    while low < high:
        # A pin begins with its name, four spaces before it; its values have six.
        start = lines.rfind(b'\n    "', 0, (low + high) // 2 + 6) + 1
        end = lines.index(b"\n    }", start) + len(b"\n    }")
        there = lines[start + 5 : lines.index(b'"', start + 5)].decode()
        if there == name:
            return lines[: max(0, start - 2)], lines[start:end], lines[end + 2 :]
        low, high = (end + 2, high) if there < name else (low, start)
    return lines[: max(0, low - 2)], b"", lines[low:]


def _lines_written_last(root: Path) -> bytes | None:
    """Return the lines of all pins if `record` wrote the lock file last, None if it may be anybody's."""
    with suppress(OSError):
        if read_small(root / STATE / _STAMP, 200) == _stamp(root):
            return read_small(root / LOCK_NAME, MAX_BYTES).removeprefix(_HEAD).removesuffix(_FOOT).removeprefix(_EMPTY)
    return None


def _stamp(root: Path) -> bytes:
    """Return what tells the lock file from every other version of it. Raises OSError."""
    found = (root / LOCK_NAME).stat()
    return f"{found.st_ino} {found.st_size} {found.st_mtime_ns}".encode()


def _damaged(path: Path, what: str) -> RegistryError:
    return RegistryError(
        f"{path} is damaged: {what}",
        mend=f"rm {quoted(path)}; the manifest of each pulled eraser still names its origin",
    )
