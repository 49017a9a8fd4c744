"""A Hub, a working folder and a registry for the tests of one user's commands."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from loopback import LoopbackHub

from spm_hub.registry.registry import Registry


@pytest.fixture
def empty_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LoopbackHub]:
    """A Hub of nothing, and an empty folder to work in."""
    with LoopbackHub() as served:
        served.adopt(monkeypatch, tmp_path)
        (tmp_path / "work").mkdir()
        monkeypatch.chdir(tmp_path / "work")
        yield served


@pytest.fixture
def empty_registry(tmp_path: Path) -> Registry:
    """A registry whose folders are there already."""
    kept = Registry(tmp_path / "registry")
    (kept.root / "adapters").mkdir(parents=True)
    return kept
