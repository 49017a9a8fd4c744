"""The lock file: what one change at a time leaves is what writing all pins at once would."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spm_hub.errors import RegistryError
from spm_hub.registry import lockfile, storage
from spm_hub.registry.lockfile import LOCK_NAME, Pin, record

NAMES = st.sampled_from(["a", "a-b", "ab", "b", "c-1", "c-10", "c-2", "snoopy", "x", "z"])


def pin(number: int) -> Pin:
    return Pin(
        repo=f"someone/spm-{number}",
        commit=f"{number:040x}",
        revision=None if number % 2 else 'a "branch"\n    "b": {',
        sha256=f"{number:064x}",
    )


def as_json(pins: dict[str, Pin]) -> str:
    """The file that Python's json writes of all pins."""
    held = {name: one.model_dump() for name, one in sorted(pins.items())}
    return json.dumps({"schema_version": 1, "adapters": held}, indent=2) + "\n"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(NAMES, st.none() | st.integers(0, 5), st.booleans()), max_size=25))
def test_every_change_leaves_the_file_that_all_pins_make(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[str, int | None, bool]]
) -> None:
    root = tmp_path_factory.mktemp("registry")
    (root / storage.STATE).mkdir()
    pins: dict[str, Pin] = {}
    for name, number, forget in changes:
        if forget:
            (root / storage.STATE / "lockfile-stamp").unlink(missing_ok=True)
        record(root, name, None if number is None else pin(number))
        if number is None:
            pins.pop(name, None)
        else:
            pins[name] = pin(number)
        if pins or (root / LOCK_NAME).exists():
            assert (root / LOCK_NAME).read_text() == as_json(pins)
        assert lockfile.read(root) == pins


def test_a_file_that_somebody_else_wrote_is_read_whole(tmp_path: Path) -> None:
    (tmp_path / storage.STATE).mkdir()
    for number in range(5):
        record(tmp_path, f"name-{number}", pin(number))
    path = tmp_path / LOCK_NAME
    # As a merge may leave it: not sorted, and in other lines.
    held = dict(reversed(json.loads(path.read_text())["adapters"].items()))
    path.write_text(json.dumps({"adapters": held, "schema_version": 1}))
    record(tmp_path, "name-2", pin(9))
    assert path.read_text() == as_json({f"name-{number}": pin(9 if number == 2 else number) for number in range(5)})
    path.write_text(path.read_text().replace("name-3", "<<<<<<"))
    with pytest.raises(RegistryError, match="damaged"):
        record(tmp_path, "name-1", None)


def test_an_edit_in_place_of_equal_length_is_seen(tmp_path: Path) -> None:
    (tmp_path / storage.STATE).mkdir()
    record(tmp_path, "name", pin(1))
    path = tmp_path / LOCK_NAME
    before = path.stat().st_mtime_ns
    path.write_text(path.read_text().replace("name", "nbme"))
    os.utime(path, ns=(before + 1, before + 1))
    record(tmp_path, "other", pin(2))
    assert lockfile.read(tmp_path) == {"nbme": pin(1), "other": pin(2)}


def test_a_stamp_that_leads_elsewhere_is_replaced_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "registry" / storage.STATE).mkdir(parents=True)
    precious = tmp_path / "precious"
    precious.write_text("mine")
    stamp = tmp_path / "registry" / storage.STATE / "lockfile-stamp"
    stamp.symlink_to(precious)
    record(tmp_path / "registry", "name", pin(1))
    assert precious.read_text() == "mine"
    assert not stamp.is_symlink()
