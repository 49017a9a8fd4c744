"""Signs erasers and checks signatures, with the library model-signing.

A signature covers a folder with the adapter file and its manifest, with its name, its gate and the date of the
signature. Two manifest fields that differ between copies are left out: the adapter's file name, and the origin on the
Hub, which is therefore believed only where the registry's own lock file agrees.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from spm_hub.adapters.manifest import Manifest
from spm_hub.errors import NotFoundError, RegistryError, SignatureError, UsageError
from spm_hub.io.environment import KEY_VARIABLE
from spm_hub.io.wording import quoted

SIGNATURE_NAME = "model.sig"
"""Name of the signature in a repository of the Hub, the default of model-signing."""

MAX_BYTES = 2**20
"""Largest signature that is read; ours have 2 kB."""

_FILES = ("pytorch_lora_weights.safetensors", "manifest.json")
_MAKE_KEYS = (
    "openssl ecparam -name prime256v1 -genkey -noout -out key.pem && openssl ec -in key.pem -pubout -out key.pub"
)


def required_key() -> Path | None:
    """Return the public key that every eraser must be signed for, if the environment variable names one."""
    return Path(named) if (named := os.environ.get(KEY_VARIABLE)) else None


def sign(adapter: Path, manifest: Manifest, key: Path) -> bytes:
    """Sign an adapter file and its manifest and return the signature.

    key: an elliptic-curve private key (PEM, not encrypted).
    Raises UsageError if the extra `sign` is not installed or the key is of another kind, NotFoundError if there is no
    key file.
    """
    signing = _library("signing")
    config = _with_key(key, "private", lambda: signing.Config().use_elliptic_key_signer(private_key=key))
    with _signed_folder(adapter, manifest) as folder:
        signature = folder.with_name(SIGNATURE_NAME)
        config.sign(folder, signature)
        return signature.read_bytes()


def read(signature: Path) -> bytes:
    """Read a signature file. Raises SignatureError if it is larger than MAX_BYTES, RegistryError."""
    try:
        with open(signature, "rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise RegistryError(
            f"cannot read {signature}: {error.strerror}", mend=f"chmod u+r {quoted(signature)}"
        ) from error
    if len(content) > MAX_BYTES:
        raise SignatureError(f"{signature} is larger than the limit of {MAX_BYTES} bytes for a signature")
    return content


def check(adapter: Path, manifest: Path | None, signature: Path | None, key: Path) -> Manifest:
    """Check that adapter and manifest were signed with the private key of the public `key` (PEM).

    Returns the manifest that was checked. Raises SignatureError, which names the file that was altered, and the other
    errors of `sign`.
    """
    verifying = _library("verifying")
    config = _with_key(key, "public", lambda: verifying.Config().use_elliptic_key_verifier(public_key=key))
    if signature is None or manifest is None:
        raise SignatureError(f"{adapter} is not signed, but a signature that {key} verifies is required")
    content = read(signature)
    described = Manifest.read(manifest)
    with _signed_folder(adapter, described) as folder:
        try:
            config.verify(folder, _write(folder.with_name(SIGNATURE_NAME), content))
        except Exception as error:  # a hostile signature can make the library raise anything
            said = str(error)
            altered = [path for name, path in zip(_FILES, (adapter, manifest), strict=True) if name in said]
            if altered:
                raise SignatureError(
                    f"{' and '.join(map(str, altered))} was altered after it was signed ({signature})",
                    mend="download it again; if you changed it yourself, sign it again: spmhub sign",
                ) from error
            raise SignatureError(
                f"{signature} was not made with the private key of {key} ({said or type(error).__name__:.200})",
                mend="--key with the public key of the signer",
            ) from error
    return described


def next_date(earlier: datetime | None) -> datetime:
    """Return the date of a signature made now; it is later than that of the `earlier` one."""
    now = datetime.now(UTC)
    return now if earlier is None else max(now, earlier + timedelta(microseconds=1))


def _write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@contextmanager
def _signed_folder(adapter: Path, manifest: Manifest) -> Iterator[Path]:
    """Make a temporary folder of the files that a signature covers; it is deleted when the block ends."""
    with tempfile.TemporaryDirectory(prefix="spmhub-") as temporary:
        folder = Path(temporary) / "adapter"
        folder.mkdir()
        weights, described = (folder / name for name in _FILES)
        try:
            os.link(adapter.resolve(), weights)
        except OSError:  # a hard link fails across disks and for another user's file
            shutil.copyfile(adapter, weights)
        increment = manifest.increment.model_copy(update={"file": None})
        described.write_text(manifest.model_copy(update={"increment": increment, "origin": None}).to_json())
        yield folder


def _library(module: str) -> Any:
    try:
        from importlib import import_module

        return import_module(f"model_signing.{module}")
    except ImportError as error:
        raise UsageError(
            f"signatures need the package model-signing, but it cannot be imported ({error})",
            mend='python -m pip install "spm-hub[sign]"',
        ) from error


def _with_key(key: Path, kind: str, configure: Any) -> Any:
    if not key.is_file():
        raise NotFoundError(f"{key}: no such {kind} key", mend=_MAKE_KEYS)
    try:
        return configure()
    except Exception as error:  # errors of model-signing and of the libraries that read the key
        raise UsageError(
            f"{key} is not a {kind} elliptic-curve key in PEM, or it is encrypted ({error!s:.200})", mend=_MAKE_KEYS
        ) from error
