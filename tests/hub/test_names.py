"""Names of erasers as people spell and mistype them."""

from __future__ import annotations

from pathlib import Path

import pytest
from loopback import LoopbackHub
from pico import pico_eraser, pico_pipeline

from spm_hub.adapters.adapter import Adapter
from spm_hub.errors import NotFoundError, UsageError
from spm_hub.hub.resolve import resolve
from spm_hub.registry.registry import Registry


@pytest.mark.parametrize(
    "reference",
    ["van-gogh", "van_gogh", "Van Gogh", "VAN-GOGH", "van gogh", "van-gogh.safetensors", "van_gogh.safetensors"],
)
def test_an_eraser_is_found_as_people_spell_it(reference: str, tmp_path: Path) -> None:
    kept = Registry(tmp_path / "registry")
    kept.add(pico_eraser(pico_pipeline().unet, "van gogh"))
    assert resolve(reference, kept.root).name == "van-gogh"


def test_spellings_that_two_erasers_share_are_not_guessed(tmp_path: Path) -> None:
    kept = Registry(tmp_path / "registry")
    for name in ("van-gogh", "van_gogh"):
        adapter = pico_eraser(pico_pipeline().unet, "van gogh")
        kept.add(Adapter(adapter.manifest.model_copy(update={"name": name}), adapter.increments))
    assert resolve("van_gogh", kept.root).name == "van_gogh"
    with pytest.raises(UsageError, match="could be any of"):
        resolve("Van-Gogh", kept.root)


def test_a_typing_error_is_said_without_asking_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Registry(tmp_path / "registry")
    kept.add(pico_eraser(pico_pipeline().unet, "van gogh"))
    with LoopbackHub() as hub:
        hub.adopt(monkeypatch, tmp_path)
        for typed in ("van-goh", "vangogh", "van_gogk"):
            with pytest.raises(NotFoundError, match="did you mean van-gogh"):
                resolve(typed, kept.root)
        assert hub.requests == []
        with pytest.raises(NotFoundError, match="nor on the Hub"):
            resolve("nobody-made-this", kept.root, pull=True)
        assert hub.requests
    with pytest.raises(NotFoundError, match=r"missing\.safetensors"):
        resolve("missing.safetensors", kept.root)
