"""A file of small results keeps what several processes put there, and is empty where it cannot be read."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from spm_hub.attachment.gates import kept_bytes
from spm_hub.attachment.gates.kept_bytes import KeptBytes

PUT = "import sys; from pathlib import Path; from spm_hub.attachment.gates.kept_bytes import KeptBytes\n" + (
    "for n in range(50): KeptBytes(Path(sys.argv[1])).put({f'{sys.argv[2]} {n}': bytes([n])})"
)


def test_what_is_put_is_found_by_its_key(tmp_path: Path) -> None:
    file = KeptBytes(tmp_path / "folder" / "kept.sqlite")
    assert file.get(["a"]) == {}
    values = {f"{number}": bytes([number % 256]) * number for number in range(1200)}
    file.put(values)
    file.put({"7": b"another"})
    assert file.get([*values, "absent"]) == values | {"7": b"another"}
    assert KeptBytes(tmp_path / "folder" / "kept.sqlite").get(["8"]) == {"8": b"\x08" * 8}


def test_two_processes_lose_nothing_of_each_other(tmp_path: Path) -> None:
    path = tmp_path / "kept.sqlite"
    both = [subprocess.Popen([sys.executable, "-c", PUT, str(path), name]) for name in "ab"]
    assert [one.wait(60) for one in both] == [0, 0]
    with sqlite3.connect(path) as file:
        assert file.execute("SELECT count(*) FROM kept").fetchone() == (100,)


def test_a_damaged_file_is_empty_and_begun_anew(tmp_path: Path) -> None:
    path = tmp_path / "kept.sqlite"
    path.write_bytes(b"something else entirely " * 100)
    file = KeptBytes(path)
    assert file.get(["a"]) == {}
    file.put({"a": b"1"})
    assert file.get(["a"]) == {"a": b"1"}


def test_a_file_that_has_grown_too_large_is_begun_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = KeptBytes(tmp_path / "kept.sqlite")
    file.put({"a": b"1" * 10_000})
    monkeypatch.setattr(kept_bytes, "_MOST_BYTES", 5000)
    file.put({"b": b"2"})
    assert file.get(["a", "b"]) == {"b": b"2"}


def test_a_folder_that_cannot_be_made_keeps_nothing(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    file = KeptBytes(tmp_path / "taken" / "kept.sqlite")
    file.put({"a": b"1"})
    assert file.get(["a"]) == {}
