"""What a file is, whatever its name ends in: told to whoever converts it, loads it, or takes it for a model."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from spm_hub.adapters import conversion
from spm_hub.adapters.adapter import load_file
from spm_hub.adapters.conversion import Description
from spm_hub.errors import AdapterFileError, ModelError
from spm_hub.io import first_bytes
from spm_hub.io.first_bytes import SAFETENSORS, TORCH
from spm_hub.models.references import parse_reference

TENSORS = {
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight": torch.ones(1, 768),
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.lora_B.weight": torch.ones(320, 1),
}


def made(kind: str) -> bytes:
    buffer = io.BytesIO()
    match kind:
        case "zip":
            with zipfile.ZipFile(buffer, "w") as archive:
                archive.writestr("style.safetensors", save(TENSORS))
        case "tar":
            with tarfile.open(fileobj=buffer, mode="w") as tar:
                info = tarfile.TarInfo("style.safetensors")
                info.size = 4
                tar.addfile(info, io.BytesIO(b"abcd"))
        case "gz":
            return gzip.compress(save(TENSORS))
        case _:
            return FOREIGN[kind]
    return buffer.getvalue()


FOREIGN = {
    "page": b"\xef\xbb\xbf\n<!doctype html><html lang=en><title>Log in</title>" + b" " * 900,
    "page without doctype": b"<html><body>403</body></html>",
    "xml": b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>",
    "json": b'{"error":"Unauthorized","message":"log in first"}',
    "json list": b'[{"message": "not found"}]',
    "gguf": b"GGUF\x03\0\0\0" + bytes(900),
    "7z": b"7z\xbc\xaf'\x1c\0\4" + bytes(900),
    "rar": b"Rar!\x1a\x07\x01\0" + bytes(900),
    "xz": b"\xfd7zXZ\0" + bytes(900),
    "png": b"\x89PNG\r\n\x1a\n" + bytes(900),
    "jpeg": b"\xff\xd8\xff\xe0\0\x10JFIF" + bytes(900),
    "webp": b"RIFF\x10\0\0\0WEBPVP8 " + bytes(900),
    "pdf": b"%PDF-1.7\n" + bytes(900),
    "lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 9\n",
    "text": b"Too many requests. Try again later.\n",
    "short text": b"404",
    "commented page": b"<!-- saved from url=(0014)about:internet -->\n<html lang=en>",
    "page in utf-16": "<!DOCTYPE html><html><title>Anmelden</title>".encode("utf-16"),
    "packed page": gzip.compress(b"<!doctype html><html><title>Log in</title>" + b" " * 900),
    "packed json": gzip.compress(b'{"error":"Unauthorized"}'),
    "zeros": bytes(900),
    "empty": b"",
}
WORDS = {
    "page": "a web page", "page without doctype": "a web page", "xml": "an XML document", "json": "JSON text",
    "json list": "JSON text", "gguf": "GGUF", "7z": "a 7z archive", "rar": "a RAR archive", "xz": "an xz archive",
    "png": "a picture", "jpeg": "a picture", "webp": "a picture", "pdf": "a PDF", "lfs": "Git LFS pointer",
    "text": "plain text", "empty": "an empty file", "zip": "a zip archive", "tar": "a tar archive",
    "gz": "a gzip archive", "short text": "plain text: '404'", "commented page": "a web page",
    "page in utf-16": "a web page", "packed page": "a web page, packed with gzip",
    "packed json": "JSON text.*packed with gzip", "zeros": "begins with zeros",
}  # fmt: skip


@pytest.mark.parametrize("kind", WORDS)
@pytest.mark.parametrize("ending", ["safetensors", "ckpt", "bin", "gguf", "download"])
def test_files_of_another_kind_are_named(kind: str, ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"style.{ending}"
    path.write_bytes(made(kind))
    for read in (
        lambda: conversion.read(path, Description()),
        lambda: load_file(path),
        lambda: parse_reference(str(path)),
    ):
        with pytest.raises((AdapterFileError, ModelError), match=WORDS[kind]) as refused:
            read()
        assert refused.value.mend
        assert "OWNER/NAME" not in str(refused.value)
        assert str(refused.value).isascii()


@pytest.mark.parametrize("ending", ["safetensors", "ckpt", "pt", "bin", "zip", "weights"])
@pytest.mark.parametrize("written", ["safetensors", "torch"])
def test_files_are_converted_under_any_ending(ending: str, written: str, tmp_path: Path) -> None:
    path = tmp_path / f"style.{ending}"
    if written == "torch":
        torch.save(TENSORS, path)
    else:
        path.write_bytes(save(TENSORS))
    assert first_bytes.kind_of(path) is (TORCH if written == "torch" else SAFETENSORS)
    adapter, _ = conversion.read(path, Description(concept="style"))
    (increment,) = adapter.increments.values()
    assert torch.equal(increment.delta_for(torch.zeros(320, 768)), torch.ones(320, 768))


@pytest.mark.parametrize("cut", [1, 7, 8, 9, 100, -1])
def test_a_cut_file_is_still_a_sentence(cut: int, tmp_path: Path) -> None:
    path = tmp_path / "style.safetensors"
    path.write_bytes(save(TENSORS)[:cut])
    with pytest.raises(AdapterFileError, match=r"style\.safetensors") as refused:
        conversion.read(path, Description())
    assert "download it again" in str(refused.value)


def test_an_honest_header_may_begin_like_anything(tmp_path: Path) -> None:
    """The length of a header of 0x4b50 bytes begins as a zip does, and one of 0x8b1f as a gzip."""
    path = tmp_path / "style.safetensors"
    for length in (0x4B50, 0x8B1F, 0xD8FF):
        text = json.dumps({"__metadata__": {"pad": ""}, "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}})
        text = text.replace('"pad": ""', f'"pad": "{"x" * (length - len(text))}"')
        path.write_bytes(len(text).to_bytes(8, "little") + text.encode() + bytes(4))
        assert first_bytes.kind_of(path) is SAFETENSORS
