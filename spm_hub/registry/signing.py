"""Signatures by model-signing: whoever holds the key vouches for an adapter file and for what its manifest says.

Signed is a folder as the Hub has it: the adapter file, and the manifest less what differs from copy to copy (the name
of the file beside it, and where it was pulled from).
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from spm_hub.adapters.manifest import Manifest
from spm_hub.errors import NotFoundError, RegistryError, SignatureError, UsageError
from spm_hub.io.environment import KEY_VARIABLE

SIGNATURE_NAME = "model.sig"
"""The signature in a repository of the Hub, as model-signing itself names it."""

MAX_BYTES = 2**20
"""Of a signature; ours have 2 kB."""

_FILES = ("pytorch_lora_weights.safetensors", "manifest.json")
_MAKE_KEYS = (
    "openssl ecparam -name prime256v1 -genkey -noout -out key.pem && openssl ec -in key.pem -pubout -out key.pub"
)


def required_key() -> Path | None:
    """The public key that every eraser has to be signed for, where the environment names one."""
    return Path(named) if (named := os.environ.get(KEY_VARIABLE)) else None


def sign(adapter: Path, manifest: Path, key: Path) -> bytes:
    """The signature of an adapter file and its manifest with an elliptic-curve private key (PEM, not encrypted).

    Raises UsageError without the extra `sign` and for what is no such key, NotFoundError, ManifestError.
    """
    signing = _library("signing")
    config = _with_key(key, "private", lambda: signing.Config().use_elliptic_key_signer(private_key=key))
    with _as_signed(adapter, Manifest.read(manifest)) as folder:
        signature = folder.with_name(SIGNATURE_NAME)
        config.sign(folder, signature)
        return signature.read_bytes()


def read(signature: Path) -> bytes:
    """The bytes of a signature. Raises SignatureError for more than any has, RegistryError."""
    try:
        with open(signature, "rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise RegistryError(f"cannot read {signature}: {error.strerror}", mend=f"chmod u+r {signature}") from error
    if len(content) > MAX_BYTES:
        raise SignatureError(f"{signature} has more than the {MAX_BYTES} bytes that a signature may have")
    return content


def check(adapter: Path, manifest: Path | None, signature: Path | None, key: Path) -> Manifest:
    """The manifest, as it was read, if the holder of the public `key` (PEM) has signed it and the file.

    Raises SignatureError that names the one that was altered, UsageError and the others as `sign` does.
    """
    verifying = _library("verifying")
    config = _with_key(key, "public", lambda: verifying.Config().use_elliptic_key_verifier(public_key=key))
    if signature is None or manifest is None:
        raise SignatureError(f"{adapter} is not signed, and a signature by the holder of {key} is required")
    content = read(signature)
    described = Manifest.read(manifest)
    with _as_signed(adapter, described) as folder:
        try:
            config.verify(folder, _written(folder.with_name(SIGNATURE_NAME), content))
        except Exception as error:  # whatever a hostile signature makes the library say
            said = str(error)
            altered = [path for name, path in zip(_FILES, (adapter, manifest), strict=True) if name in said]
            if altered:
                raise SignatureError(
                    f"{' and '.join(map(str, altered))} was altered after it was signed ({signature})",
                    mend="fetch it again; if it is you who changed it: spmhub sign",
                ) from error
            raise SignatureError(
                f"{signature} was not made with the key of {key} ({said or type(error).__name__:.200})",
                mend="--key with the public key of whoever signed it",
            ) from error
    return described


def _written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@contextmanager
def _as_signed(adapter: Path, manifest: Manifest) -> Iterator[Path]:
    """A folder of what is signed, for as long as the block."""
    with tempfile.TemporaryDirectory(prefix="spmhub-") as temporary:
        folder = Path(temporary) / "adapter"
        folder.mkdir()
        weights, described = (folder / name for name in _FILES)
        try:
            os.link(adapter.resolve(), weights)
        except OSError:  # on another disk, or another user's
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
            f"signatures need the package model-signing, which cannot be imported ({error})",
            mend='python -m pip install "spm-hub[sign]"',
        ) from error


def _with_key(key: Path, kind: str, configure: Any) -> Any:
    if not key.is_file():
        raise NotFoundError(f"{key}: there is no such {kind} key", mend=_MAKE_KEYS)
    try:
        return configure()
    except Exception as error:  # the library's own, and those of what reads the key
        raise UsageError(
            f"{key} is no {kind} elliptic-curve key in PEM, or is encrypted ({error!s:.200})", mend=_MAKE_KEYS
        ) from error
