"""Pictures for a card that are none, or whose metadata is not as we write it: a sentence, and never a traceback."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from spm_hub.errors import UsageError
from spm_hub.hub.card import read_pairs


def pair(folder: Path, metadata: str | None) -> None:
    for condition in ("with", "without"):
        info = PngInfo()
        if metadata is not None:
            info.add_text("spmhub", metadata)
        Image.new("RGB", (2, 2)).save(folder / f"a-{condition}.png", pnginfo=info)


@pytest.mark.parametrize(
    "metadata",
    [
        '{"gates": [1, 2]}', '{"gates": {"snoopy": "much"}}', '{"adapters": 3}', '{"adapters": [["snoopy"]]}',
        '{"prompt": {"a": 1}}', '{"strength": "all"}', "[" * 200_000, '{"a": ' * 50_000, '{"a": 1, "a": 2}', "{",
        '{"gates": {"snoopy": NaN}}',
    ],
)  # fmt: skip
@pytest.mark.parametrize("explicit", [False, True])
def test_odd_metadata_is_a_sentence(metadata: str, explicit: bool, tmp_path: Path) -> None:
    pair(tmp_path, metadata)
    with pytest.raises(UsageError, match="cannot be read as a PNG picture") as refused:
        read_pairs(tmp_path, "snoopy", explicit=explicit)
    assert len(str(refused.value)) < 2000


@pytest.mark.parametrize("metadata", [None, "[1, 2]", "3", '{"prompt": null, "strength": {"snoopy": null}}'])
def test_other_programs_pictures_have_no_metadata_of_ours(metadata: str | None, tmp_path: Path) -> None:
    pair(tmp_path, metadata)
    (found,) = read_pairs(tmp_path, "snoopy")
    assert found.prompt == "a"


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


@pytest.mark.parametrize("kind", ["enormous", "cut", "text"])
def test_pictures_that_are_none_are_a_sentence(kind: str, tmp_path: Path) -> None:
    content: dict[str, Any] = {
        "enormous": b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)),
        "cut": b"\x89PNG\r\n\x1a\n\0\0",
        "text": b"not a picture",
    }
    for condition in ("with", "without"):
        (tmp_path / f"a-{condition}.png").write_bytes(content[kind])
    with pytest.raises(UsageError, match="cannot be read as a PNG picture"):
        read_pairs(tmp_path, "snoopy")
