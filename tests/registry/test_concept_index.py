"""Finding and removing one eraser of many: what is read, and that nothing stale is ever found."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from test_registry import alone, named

from spm_hub.errors import NotFoundError
from spm_hub.registry import storage
from spm_hub.registry.entry import EraserEntry
from spm_hub.registry.registry import Registry, registry_with

__all__ = ["alone"]


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    kept = Registry(tmp_path / "registry")
    for number in range(12):
        kept.add(named(f"eraser-{number}", concept=f"Thing {number}"))
    return kept


def settle(registry: Registry) -> None:
    """As if nothing had changed for a while."""
    for folder in (storage.ADAPTERS, storage.MANIFESTS):
        before = time.time_ns() - 10**10
        os.utime(registry.root / folder, ns=(before, before))


@contextmanager
def manifests_read(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    read, whole = list[str](), EraserEntry.read_manifest
    with monkeypatch.context() as patch:
        patch.setattr(EraserEntry, "read_manifest", lambda entry: read.append(entry.name) or whole(entry))
        yield read


def test_a_concept_is_found_without_reading_every_manifest(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    settle(registry)
    assert registry.get("thing 7").name == "eraser-7"
    with manifests_read(monkeypatch) as read:
        assert [entry.name for entry in registry.erasing("THING-3")] == ["eraser-3"]
        assert registry.get("Thing 7").name == "eraser-7"
    assert set(read) == {"eraser-3", "eraser-7"}


def test_what_changed_is_found_at_once(registry: Registry) -> None:
    settle(registry)
    assert registry.get("thing 7").name == "eraser-7"
    registry.add(named("another", concept="thing 7"))
    assert {entry.name for entry in registry.erasing("thing 7")} == {"another", "eraser-7"}
    registry.remove("eraser-7")
    assert registry.get("thing 7").name == "another"
    settle(registry)
    assert registry.get("thing 1").name == "eraser-1"
    registry.add(named("another", concept="thing 1"), replace=True)
    with pytest.raises(NotFoundError):
        registry.get("thing 7")
    assert {entry.name for entry in registry.erasing("thing 1")} == {"another", "eraser-1"}


def test_a_manifest_written_in_place_is_read_again(registry: Registry) -> None:
    settle(registry)
    assert registry.get("thing 7").name == "eraser-7"
    place = storage.part_path(registry.root, storage.MANIFESTS, "eraser-7")
    place.write_text(place.read_text().replace("Thing 7", "Thing 99"))
    assert registry.get("thing 99").name == "eraser-7"
    with pytest.raises(NotFoundError):
        registry.get("thing 7")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "sorted",
        "sorted, of folders changed at [1, 2]\nthing-7\teraser-1\n",
        "sorted, of folders changed at NOW\n",
        "sorted, of folders changed at NOW\nthing-7\t",
        "sorted, of folders changed at NOW\nthing-7\t\n",
        "sorted, of folders changed at NOW\n\n\n",
        "\udcff",
    ],
)
def test_a_damaged_index_is_none(registry: Registry, text: str) -> None:
    settle(registry)
    changed = [(registry.root / folder).stat().st_mtime_ns for folder in (storage.ADAPTERS, storage.MANIFESTS)]
    file = registry.root / storage.STATE / "concepts.tsv"
    file.write_text(text.replace("NOW", str(changed)), errors="surrogateescape")
    assert registry.get("thing 7").name == "eraser-7"


def test_an_index_that_lies_names_no_other_eraser(registry: Registry) -> None:
    settle(registry)
    assert registry.get("thing 7").name == "eraser-7"
    file = registry.root / storage.STATE / "concepts.tsv"
    assert "\nthing-7\teraser-7\n" in file.read_text()
    file.write_text(file.read_text().replace("\teraser-7", "\teraser-1\t../adapters/eraser-2\tgone"))
    assert registry.get("thing 7").name == "eraser-7"


def test_removing_one_lists_none(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Registry, "entries", lambda registry: pytest.fail("listed every eraser"))
    with manifests_read(monkeypatch) as read:
        registry_with("eraser-3", registry.root).remove("eraser-3")
    assert not read
    assert registry.find("eraser-3") is None


@pytest.mark.parametrize("name", ["../registry/adapters/eraser-3", "adapters/../eraser-3", ".", "..", ""])
def test_a_path_is_no_name(registry: Registry, name: str) -> None:
    assert registry.find(name) is None
    with pytest.raises(NotFoundError):
        registry.remove(name)
