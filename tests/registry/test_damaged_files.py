"""A damaged file names what brings it back: the command for where it came from, and no other."""

from pathlib import Path

import pytest
from pico import pico_eraser, pico_pipeline

from spm_hub.errors import AdapterFileError
from spm_hub.registry.entry import EraserEntry, entry_of
from spm_hub.registry.lockfile import Pin
from spm_hub.registry.registry import Registry


@pytest.fixture
def damaged(tmp_path: Path) -> EraserEntry:
    registry = Registry(tmp_path / "my registry")
    registry.add(pico_eraser(pico_pipeline().unet))
    entry = registry.get("snoopy")
    data = bytearray(entry.adapter_path.read_bytes())
    data[-1] ^= 1
    entry.adapter_path.write_bytes(data)
    return entry


def test_one_that_was_made_here(damaged: EraserEntry) -> None:
    with pytest.raises(AdapterFileError) as refused:
        damaged.load()
    assert "spmhub remove snoopy" in str(refused.value)
    assert "OWNER/NAME" not in str(refused.value)


@pytest.mark.parametrize(("revision", "of"), [(None, "someone/spm-snoopy"), ("v2", "someone/spm-snoopy@v2")])
def test_one_that_was_pulled(
    damaged: EraserEntry, revision: str | None, of: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pin = Pin(repo="someone/spm-snoopy", commit="0" * 40, revision=revision, sha256="0" * 64)
    monkeypatch.setattr(EraserEntry, "pin", property(lambda self: pin))
    with pytest.raises(AdapterFileError) as refused:
        damaged.load()
    root = damaged.adapter_path.parent.parent
    assert str(refused.value.mend) == f"spmhub pull {of} --registry '{root}' --force"


def test_a_file_somewhere(damaged: EraserEntry, tmp_path: Path) -> None:
    copy = tmp_path / "a.safetensors"
    copy.write_bytes(damaged.adapter_path.read_bytes())
    with pytest.raises(AdapterFileError) as refused:
        entry_of(copy).load()
    assert "download it again" in str(refused.value)
    assert "spmhub" not in str(refused.value.mend)
