"""A required signature binds: the name that was asked for, the newest date that is held, and every command."""

from __future__ import annotations

import json
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import torch
from loopback import LoopbackHub
from pico import pico_eraser, pico_pipeline
from test_signing import keys  # noqa: F401 - a fixture
from typer.testing import CliRunner

import spm_hub
from spm_hub.adapters.adapter import Adapter
from spm_hub.adapters.baking import read_provenance
from spm_hub.adapters.manifest import GateDefaults
from spm_hub.cli.app import app
from spm_hub.errors import SignatureError
from spm_hub.hub import bake as baking
from spm_hub.hub import pull as hub_pull
from spm_hub.hub.convert import convert
from spm_hub.hub.push import prepare
from spm_hub.hub.resolve import resolve
from spm_hub.io.hashing import sha256_of
from spm_hub.registry import lockfile, signing
from spm_hub.registry.archive import export, import_
from spm_hub.registry.registry import Registry

pytest.importorskip("model_signing.signing", reason="the extra sign is not installed")


@pytest.fixture
def hub(empty_hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> LoopbackHub:
    monkeypatch.setenv(signing.KEY_VARIABLE, "")
    return empty_hub


@pytest.fixture
def author(tmp_path: Path, keys: tuple[Path, Path]) -> Registry:  # noqa: F811
    """The registry of who signs: snoopy and mickey, both signed."""
    kept = Registry(tmp_path / "author")
    for seed, name in enumerate(("snoopy", "mickey")):
        kept.add(pico_eraser(pico_pipeline().unet, name, seed))
        kept.sign(name, keys[0])
    return kept


@pytest.fixture
def mine(empty_registry: Registry) -> Registry:
    return empty_registry


@pytest.fixture
def required(hub: LoopbackHub, keys: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> Path:  # noqa: F811
    monkeypatch.setenv(signing.KEY_VARIABLE, str(keys[1]))
    return keys[1]


def publish(hub: LoopbackHub, repo: str, kept: Registry, name: str, folder: Path) -> str:
    """Publish an eraser of a registry as its author would, but under any repository's name."""
    folder.mkdir(exist_ok=True)
    files = prepare(kept.get(name), repo, (), folder).files
    return hub.publish(repo, {path: one.read_bytes() if isinstance(one, Path) else one for path, one in files.items()})


def weaker(adapter: Adapter) -> Adapter:
    gate = GateDefaults(strength=0.01)
    return Adapter(adapter.manifest.model_copy(update={"gate": gate}), adapter.increments)


def test_a_signed_snoopy_that_is_served_as_violence_is_refused_and_both_are_named(
    hub: LoopbackHub, author: Registry, mine: Registry, required: Path, tmp_path: Path
) -> None:
    publish(hub, "spm-hub/violence", author, "snoopy", tmp_path / "made")
    place = ["--registry", str(mine.root)]
    for arguments in (
        ["apply", "-a", "violence", "--prompt", "violence", "--pull", *place],
        ["apply", "-a", "spm-hub/violence", "--prompt", "violence", *place],
        ["gates", "a dog", "-a", "spm-hub/violence", *place],
        ["bake", "-a", "spm-hub/violence", "--out", str(tmp_path / "baked"), *place],
        ["convert", "spm-hub/violence", "--to", "diffusers", "--out", str(tmp_path / "out.safetensors")],
        ["export", "spm-hub/violence", "--to", str(tmp_path / "out.tar")],
        ["verify", "spm-hub/violence"],
        ["pull", "spm-hub/violence", *place],
        ["pull", "spm-hub/violence", "--force", *place],
    ):
        done = CliRunner().invoke(app, arguments)
        said = done.stderr + done.stdout
        assert done.exit_code == 1, (arguments, said)
        assert "snoopy" in said, (arguments, said)
        assert "violence" in said, (arguments, said)
    for lazy in (False, True):
        with pytest.raises(
            SignatureError, match=r"'spm-hub/violence' was asked for, but the signed eraser there is 'snoopy'"
        ):
            spm_hub.load("spm-hub/violence", lazy=lazy)
    assert mine.entries() == ()
    assert not any((tmp_path / name).exists() for name in ("baked", "out.safetensors", "out.tar"))
    # Whoever says which eraser he expects gets that one.
    assert hub_pull.pull("spm-hub/violence", registry=mine, name="snoopy").entry.load().name == "snoopy"
    assert resolve("snoopy", mine.root).load().name == "snoopy"
    with pytest.raises(SignatureError, match="snoopy"):
        resolve("spm-hub/violence", mine.root).load()


@pytest.mark.parametrize("repo", ["someone/snoopy", "someone/spm-snoopy", "someone/Snoopy"])
def test_a_repository_of_the_erasers_name_is_accepted(
    repo: str, hub: LoopbackHub, author: Registry, mine: Registry, required: Path, tmp_path: Path
) -> None:
    publish(hub, repo, author, "snoopy", tmp_path / "made")
    assert spm_hub.load(repo).name == "snoopy"
    assert hub_pull.pull(repo, registry=mine).state == "new"
    assert hub_pull.pull(repo, registry=mine).state == "unchanged"


def test_the_lock_file_brings_back_no_other_eraser(
    hub: LoopbackHub, author: Registry, mine: Registry, required: Path, tmp_path: Path
) -> None:
    publish(hub, "someone/snoopy", author, "snoopy", tmp_path / "made")
    entry = hub_pull.pull("someone/snoopy", registry=mine).entry
    pin = lockfile.pin_of(entry.read_manifest())
    mine.remove("snoopy")
    lockfile.record(mine.root, "violence", pin)
    with pytest.raises(SignatureError, match="'violence' was asked for"):
        list(hub_pull.restore(mine))
    assert mine.entries() == ()


def test_an_older_signed_version_is_refused(
    hub: LoopbackHub,
    author: Registry,
    mine: Registry,
    required: Path,
    keys: tuple[Path, Path],  # noqa: F811
    tmp_path: Path,
) -> None:
    good = author.get("snoopy").load()
    author.add(weaker(good), replace=True)
    author.sign("snoopy", keys[0])
    old = publish(hub, "someone/snoopy", author, "snoopy", tmp_path / "old")
    assert hub_pull.pull("someone/snoopy", registry=mine).entry.load().manifest.gate.strength == 0.01
    author.add(good, replace=True)
    author.sign("snoopy", keys[0])
    export(author.entries(), tmp_path / "new.tar")
    publish(hub, "someone/snoopy", author, "snoopy", tmp_path / "new")
    assert hub_pull.pull("someone/snoopy", registry=mine).state == "updated"
    # The repository puts the old version back. Its signature is as valid as ever.
    hub.publish("someone/snoopy", hub.content("someone/snoopy", old))
    for force in ([], ["--force"]):
        done = CliRunner().invoke(app, ["pull", "someone/snoopy", "--registry", str(mine.root), *force])
        assert done.exit_code == 1
        assert "an older one does not replace it" in done.stderr
    assert mine.get("snoopy").load().manifest.gate.strength == 1.0
    # Nor is it used from the Hub's cache, by who never pulled either of them into a registry.
    empty = Registry(tmp_path / "empty")
    (empty.root / "adapters").mkdir(parents=True)
    with pytest.raises(SignatureError, match="older"):
        resolve("someone/snoopy", empty.root)
    # Who names its commit means it.
    assert resolve(f"someone/snoopy@{old}", empty.root).load().manifest.gate.strength == 0.01


def test_an_archive_brings_back_no_older_one(
    hub: LoopbackHub,
    author: Registry,
    required: Path,
    keys: tuple[Path, Path],  # noqa: F811
    tmp_path: Path,
) -> None:
    export([author.get("snoopy")], tmp_path / "old.tar")
    place = Registry(tmp_path / "place")
    import_(tmp_path / "old.tar", place)
    author.sign("snoopy", keys[0])
    export([author.get("snoopy")], tmp_path / "new.tar")
    import_(tmp_path / "new.tar", place, replace=True)
    newest = place.get("snoopy").read_manifest().signed
    with pytest.raises(SignatureError, match="older"):
        import_(tmp_path / "old.tar", place, replace=True)
    assert place.get("snoopy").read_manifest().signed == newest


def test_the_date_is_signed_and_never_goes_back(
    hub: LoopbackHub,
    author: Registry,
    required: Path,
    keys: tuple[Path, Path],  # noqa: F811
) -> None:
    entry = author.get("snoopy")
    signed = entry.read_manifest()
    assert signed.signed is not None
    assert abs(datetime.now(UTC) - signed.signed) < timedelta(minutes=10)
    future = signed.signed + timedelta(days=3650)
    assert signing.next_date(future) > future
    assert entry.manifest_path is not None
    entry.manifest_path.write_text(signed.model_copy(update={"signed": future}).to_json())
    with pytest.raises(SignatureError, match="was altered after it was signed"):
        author.get("snoopy").load()


def test_convert_refuses_unsigned_files_by_their_path(
    hub: LoopbackHub, author: Registry, required: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone, lora = tmp_path / "alone.safetensors", tmp_path / "lora.safetensors"
    shutil.copyfile(author.get("snoopy").adapter_path, alone)
    with monkeypatch.context() as patch:
        patch.setenv(signing.KEY_VARIABLE, "")
        convert(alone, to="kohya", out=lora)
    for path in (alone, lora):
        with pytest.raises(SignatureError, match="not signed"):
            convert(path, to="diffusers", out=tmp_path / "out.safetensors")
        done = CliRunner().invoke(
            app, ["convert", str(path), "--to", "diffusers", "--require-signature", str(required)]
        )
        assert done.exit_code == 1
    convert(author.get("snoopy").adapter_path, to="diffusers", out=tmp_path / "out.safetensors")
    assert (tmp_path / "out.safetensors").is_file()


def test_recover_refuses_a_checkpoint_with_another_eraser_than_the_signed_one(
    hub: LoopbackHub, author: Registry, required: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = pico_pipeline()
    for name in ("honest", "tampered", "unknown"):
        baking.bake(["snoopy", "mickey"], tmp_path / name, pipe=pipe, registry=author.root)
    assert [one.name for one in baking.recover(tmp_path / "honest", "snoopy", author.root).erasers] == ["mickey"]

    checkpoint = tmp_path / "tampered"
    file = checkpoint / "spmhub" / "erasers" / "mickey.safetensors"
    with monkeypatch.context() as patch:
        patch.setenv(signing.KEY_VARIABLE, "")
        pico_eraser(pipe.unet, "mickey", 7).save(file)
    record = json.loads((checkpoint / "spmhub.json").read_text())
    for one in record["erasers"]:
        one["sha256"] = sha256_of(file) if one["name"] == "mickey" else one["sha256"]
    (checkpoint / "spmhub.json").write_text(json.dumps(record))
    before = {path: path.read_bytes() for path in checkpoint.rglob("*") if path.is_file()}
    with pytest.raises(SignatureError, match=r"holds another eraser under the name mickey"):
        baking.recover(checkpoint, "snoopy", author.root)
    assert {path: path.read_bytes() for path in checkpoint.rglob("*") if path.is_file()} == before

    with pytest.raises(SignatureError, match="whose signature cannot be checked"):
        baking.recover(tmp_path / "unknown", "snoopy")
    done = CliRunner().invoke(app, ["recover", "snoopy", "--checkpoint", str(tmp_path / "unknown")])
    assert done.exit_code == 1
    assert len(read_provenance(tmp_path / "unknown").erasers) == 2
    monkeypatch.setenv(signing.KEY_VARIABLE, "")
    assert [one.name for one in baking.recover(tmp_path / "unknown", "snoopy").erasers] == ["mickey"]


def test_an_origin_that_only_the_manifest_claims_is_not_believed(
    hub: LoopbackHub, author: Registry, mine: Registry, required: Path, tmp_path: Path
) -> None:
    publish(hub, "someone/snoopy", author, "snoopy", tmp_path / "made")
    entry = hub_pull.pull("someone/snoopy", registry=mine).entry
    assert "someone/snoopy@" in entry.describe_source()
    assert "claims" not in entry.describe_source()
    path, manifest = entry.manifest_path, entry.read_manifest()
    assert path is not None
    assert manifest.origin is not None
    origin = manifest.origin.model_copy(update={"repo": "official/snoopy"})
    path.write_text(manifest.model_copy(update={"origin": origin}).to_json())
    assert mine.get("snoopy").load().name == "snoopy", "the origin is not part of what is signed"
    assert mine.get("snoopy").pin is None
    assert "official/snoopy" in mine.get("snoopy").describe_source()
    assert "as its manifest claims" in mine.get("snoopy").describe_source()
    assert torch.equal(
        *(next(iter(each.load().increments.values())).tensors()["up"] for each in (entry, author.get("snoopy")))
    )
