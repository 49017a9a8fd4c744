"""A stranger's eraser may truthfully be large: its size is asked about before its bytes are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from loopback import LoopbackHub
from typer.testing import CliRunner

import spm_hub
from spm_hub.adapters.adapter import Adapter, increment_info
from spm_hub.adapters.increments import Dense
from spm_hub.adapters.manifest import Base, Concept, Manifest
from spm_hub.cli import app
from spm_hub.errors import TooLargeError, UsageError
from spm_hub.hub.pull import restore
from spm_hub.registry.entry import MANIFEST_NAME, WEIGHTS_NAME
from spm_hub.registry.registry import Registry

REPO = "someone/large"


@pytest.fixture(params=["with a manifest", "without one"])
def hub(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LoopbackHub]:
    """A Hub with an eraser of 1.2 MB, where one megabyte is the limit."""
    increments = {"mid_block.attentions.0.proj_in": Dense(torch.arange(300_000.0).reshape(600, 500).sin())}
    about = Manifest(
        name="large", concept=Concept(target="large"), increment=increment_info(increments),
        base=Base(family="sd1", id="", fingerprint=""), recipe={},
    )  # fmt: skip
    Adapter(about, increments).save(tmp_path / WEIGHTS_NAME, tmp_path / MANIFEST_NAME)
    names = (WEIGHTS_NAME, MANIFEST_NAME) if request.param == "with a manifest" else (WEIGHTS_NAME,)
    monkeypatch.setenv("SPMHUB_LARGEST_DOWNLOAD", "1")
    with LoopbackHub() as served:
        served.adopt(monkeypatch, tmp_path)
        served.publish(REPO, {name: (tmp_path / name).read_bytes() for name in names}, commit="a" * 40)
        yield served


def asked_for_bytes(hub: LoopbackHub) -> list[str]:
    return [one for one in hub.requests if one.startswith("GET") and one.endswith(WEIGHTS_NAME)]


def test_above_the_limit_nothing_is_downloaded_until_somebody_agrees(hub: LoopbackHub, tmp_path: Path) -> None:
    kept = Registry(tmp_path / "kept")
    kept.root.mkdir()
    with pytest.raises(TooLargeError, match=r"has 1\.1 MB, more than the 1\.0 MB") as refused:
        spm_hub.pull(REPO, registry=kept.root)
    assert f"spmhub pull {REPO} --yes" in str(refused.value.mend)
    with pytest.raises(TooLargeError):
        spm_hub.load(REPO, registry=kept.root)
    with pytest.raises(TooLargeError):
        spm_hub.pull(REPO, registry=kept.root, replace=True)  # that is another consent
    assert asked_for_bytes(hub) == []
    assert kept.entries() == ()
    assert spm_hub.pull(REPO, registry=kept.root, largest=2_000_000).name == "large"
    assert len(asked_for_bytes(hub)) == 1
    assert spm_hub.load(REPO, registry=kept.root).name == "large", "what is here needs no consent"


def test_the_command_refuses_without_a_terminal_and_takes_yes(hub: LoopbackHub, tmp_path: Path) -> None:
    place = ("--registry", str(tmp_path / "kept"))
    refused = CliRunner().invoke(app, ["pull", REPO, *place], input="y\n")
    assert refused.exit_code == 1
    assert "more than the 1.0 MB that are downloaded without a question" in refused.stderr
    assert asked_for_bytes(hub) == []
    assert CliRunner().invoke(app, ["pull", REPO, *place, "--yes"]).exit_code == 0
    (tmp_path / "kept" / "adapters" / "large.safetensors").unlink()
    assert [one.entry.name for one in restore(Registry(tmp_path / "kept"))] == ["large"], "it is in the Hub's cache"


def test_the_limit_is_settable_and_has_to_be_a_number(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPMHUB_LARGEST_DOWNLOAD", "much")
    with pytest.raises(UsageError, match="SPMHUB_LARGEST_DOWNLOAD is 'much'"):
        spm_hub.pull(REPO, registry=tmp_path / "kept")
    monkeypatch.setenv("SPMHUB_LARGEST_DOWNLOAD", "2")
    assert spm_hub.pull(REPO, registry=tmp_path / "kept").name == "large"


@pytest.mark.parametrize(("answer", "code"), [("n", 1), ("y", 0)])
def test_in_a_terminal_the_user_is_asked(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str, code: int
) -> None:
    monkeypatch.setattr("typer.testing._NamedTextIOWrapper.isatty", lambda _: True, raising=False)
    ran = CliRunner().invoke(app, ["pull", REPO, "--registry", str(tmp_path / "kept"), "-q"], input=f"{answer}\n")
    assert "Download it? [y/N]" in ran.stderr
    assert ran.exit_code == code
    assert len(asked_for_bytes(hub)) == 1 - code
