"""Limits for strangers' manifests: what a pull refuses without --force, and honest manifests that it takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from loopback import LoopbackHub
from pico import pico_eraser, pico_pipeline

import spm_hub
from spm_hub.adapters.manifest import Concept, Manifest
from spm_hub.attachment.objections import beyond_limits
from spm_hub.errors import HubError
from spm_hub.hub import pull as hub_pull
from spm_hub.registry.entry import MANIFEST_NAME, WEIGHTS_NAME
from spm_hub.registry.registry import Registry

ROOT = Path(__file__).resolve().parents[2]


def manifest(target: str = "snoopy", aliases: tuple[str, ...] = (), **gate: Any) -> Manifest:
    made = pico_eraser(pico_pipeline().unet).manifest
    changed = made.gate.model_copy(update=gate)
    return made.model_copy(update={"concept": Concept(target=target, aliases=aliases), "gate": changed})


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (manifest(strength=-1.0), "adds what it claims to erase"),
        (manifest(strength=4.5), "strength is 4.5"),
        (manifest(aliases=tuple(f"snoopy{'x' * index}" for index in range(64))), "65 names"),
        (manifest(aliases=("be",)), "fewer than 3 letters"),
        (manifest(aliases=("12 34",)), "fewer than 3 letters"),
        (manifest(aliases=("the",)), "every other sentence"),
        (manifest(aliases=("and with the",)), "every other sentence"),
        (manifest("<|endoftext|>"), "tokenizer's own sign"),
        (manifest(aliases=("woman</w>",)), "tokenizer's own sign"),
        (manifest(aliases=("sno\u200bopy",)), "not seen"),
        (manifest(aliases=("snoopy\nerror: forged",)), "not seen"),
        (manifest(protected=tuple(f"a dog {index}" for index in range(257))), "257 prompts"),
        (manifest(protected=("a dog", "Snoopy's house")), "names its own concept"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_manifest_beyond_the_limits(asked: Manifest, said: str) -> None:
    (found,) = beyond_limits(asked)
    assert said in found
    assert found.isprintable()


@pytest.mark.parametrize(
    "asked",
    [
        manifest(strength=4.0, protected=("a dog", "a cat on the beach"), aliases=("the beagle of the Peanuts",)),
        manifest("史努比", aliases=("猫",)),
        manifest("The Who"),
        manifest("van gogh", aliases=tuple(f"gogh{'x' * index}" for index in range(63))),
        *(spm_hub.load(str(ROOT / "adapters" / f"{name}.safetensors")).manifest for name in ("nudity", "van-gogh")),
    ],
    ids=lambda one: one.name,
)
def test_an_honest_manifest_is_within_them(asked: Manifest) -> None:
    allowed = [one for one in beyond_limits(asked) if "every other sentence" not in one]
    assert allowed == []
    assert (beyond_limits(asked) == ()) == (asked.concept.target != "The Who")  # a name of stop words needs --force


def test_pull_refuses_it_until_it_is_forced(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    adapter = pico_eraser(pico_pipeline().unet)
    gate = adapter.manifest.gate.model_copy(update={"strength": -1.0})
    hostile = type(adapter)(adapter.manifest.model_copy(update={"gate": gate}), adapter.increments)
    registry = Registry(tmp_path / "registry")
    with LoopbackHub() as hub:
        hub.adopt(monkeypatch, tmp_path)
        monkeypatch.chdir(tmp_path)
        hostile.save(tmp_path / WEIGHTS_NAME, tmp_path / MANIFEST_NAME)
        files = {name: (tmp_path / name).read_bytes() for name in (WEIGHTS_NAME, MANIFEST_NAME)}
        hub.publish("someone/odd", files, commit="d" * 40)
        for attempt in (
            lambda: hub_pull.pull("someone/odd", registry=registry),
            lambda: spm_hub.pull("someone/odd", registry=registry.root),
        ):
            with pytest.raises(HubError, match="it adds what it claims to erase") as refused:
                attempt()
            assert "spmhub pull someone/odd --force" in str(refused.value.mend)
        assert registry.find("snoopy") is None
        assert hub_pull.pull("someone/odd", registry=registry, replace=True).state == "new"
        assert next(iter(hub_pull.restore(registry)), None) is None
