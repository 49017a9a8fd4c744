"""remove, gc, export, import, verify and sign as commands, and apply and pull under a required signature."""

import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from loopback import LoopbackHub
from pico import pico_eraser, pico_pipeline
from test_registry import named
from test_signing import keys  # noqa: F401 - a fixture
from typer.testing import CliRunner

from spm_hub.adapters.adapter import Adapter
from spm_hub.cli.app import app
from spm_hub.registry import signing
from spm_hub.registry.entry import MANIFEST_NAME, WEIGHTS_NAME
from spm_hub.registry.registry import Registry
from spm_hub.training import Recipe

Spmhub = Callable[..., tuple[int, Any]]


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    """A registry of two erasers, the only one there is."""
    registry = Registry(tmp_path / "registry")
    for seed, name in enumerate(("snoopy", "mickey"), start=1):
        registry.add(named(name, seed=seed))
    monkeypatch.setenv("SPMHUB_REGISTRY", str(registry.root))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    # Set first, so that what a command sets is taken back after the test.
    monkeypatch.setenv(signing.KEY_VARIABLE, "")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return registry


@pytest.fixture
def spmhub(capsys: pytest.CaptureFixture[str]) -> Spmhub:
    """Run a command with --json and return its exit code and result."""

    def call(*arguments: object) -> tuple[int, Any]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            app([*map(str, arguments), "--json"])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        os.environ[signing.KEY_VARIABLE] = ""  # each command has a process of its own
        return int(ended.value.code or 0), json.loads(captured.out)

    return call


def test_remove(spmhub: Spmhub, kept: Registry) -> None:
    code, answer = spmhub("remove", "snoopy", "snopy")
    assert code == 2
    assert "did you mean snoopy" in answer["error"]["message"]
    assert spmhub("remove", "snoopy", "--dry-run")[1][0]["removed"] is False
    assert len(kept.entries()) == 2, "nothing goes while a name is wrong, or dry"
    assert spmhub("remove", "snoopy", "mickey") == (
        0,
        [{"name": name, "registry": str(kept.root), "removed": True} for name in ("snoopy", "mickey")],
    )
    assert kept.entries() == ()


def test_gc(spmhub: Spmhub, kept: Registry) -> None:
    (kept.root / "adapters" / "snoopy.safetensors").unlink()
    orphan = kept.root / "manifests" / "snoopy.json"
    expected = [{"file": str(orphan), "bytes": orphan.stat().st_size}]
    assert spmhub("gc", "--dry-run")[1]["files"] == expected
    assert orphan.exists()
    assert spmhub("gc")[1]["files"] == expected
    assert not orphan.exists()


def test_export_and_import(spmhub: Spmhub, kept: Registry, tmp_path: Path) -> None:
    assert spmhub("export", "snoopy", "mickey", "--to", tmp_path / "a.tar")[0] == 0
    code, answer = spmhub("import", tmp_path / "a.tar", "--registry", tmp_path / "other")
    assert (code, [row["state"] for row in answer]) == (0, ["new", "new"])
    assert spmhub("export", "snoopy", "--to", tmp_path / "a.tar")[0] == 1
    assert spmhub("import", tmp_path / "none.tar")[0] == 2


def test_verify(spmhub: Spmhub, kept: Registry) -> None:
    code, answer = spmhub("verify")
    assert code == 0
    assert [one["name"] for one in answer] == ["mickey", "snoopy"]
    assert {check["subject"]: check["state"] for check in answer[0]["checks"]} == {
        "header": "ok",
        "manifest": "ok",
        "size": "ok",
        "sha256": "ok",
        "contents": "ok",
        "manifest inside the file": "ok",
        "signature": "not checked",
        "recipe": "not checked",
        "audit": "ok",
    }
    file = kept.root / "adapters" / "snoopy.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\1")
    code, answer = spmhub("verify", "snoopy")
    assert code == 1
    states = {check["subject"]: check["state"] for check in answer[0]["checks"]}
    assert (states["header"], states["size"], states["sha256"], states["contents"]) == ("ok", "ok", "failed", "failed")
    assert spmhub("verify", "mickey")[0] == 0
    file.write_bytes(b"")
    code, answer = spmhub("verify", "snoopy")
    assert {check["subject"] for check in answer[0]["checks"] if check["state"] == "ok"} == {"manifest"}
    assert spmhub("verify", "snopy")[0] == 2


def test_a_path_and_a_file_that_came_alone(spmhub: Spmhub, kept: Registry, tmp_path: Path) -> None:
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes((kept.root / "adapters" / "snoopy.safetensors").read_bytes())
    code, answer = spmhub("verify", alone)
    assert code == 0
    states = {check["subject"]: check["state"] for check in answer[0]["checks"]}
    assert states == {
        "header": "ok", "manifest": "not checked", "contents": "ok", "signature": "not checked",
        "recipe": "not checked", "audit": "ok",
    }  # fmt: skip


def test_a_recipe_that_could_not_be_trained_again(spmhub: Spmhub, kept: Registry) -> None:
    eraser = named("cat")
    recipe = Recipe.plan(target="cat").model_dump(mode="json")
    for given, state, said in (
        (recipe, "ok", "spm on cat"),
        ({**recipe, "stepps": 3}, "failed", "recipe key stepps is unknown; did you mean steps"),
    ):
        manifest = eraser.manifest.model_copy(update={"recipe": given, "versions": {"spm-hub": "1"}})
        kept.add(replace(eraser, manifest=manifest), replace=True)
        code, answer = spmhub("verify", "cat")
        assert code == (state == "failed")
        (found,) = [one for one in answer[0]["checks"] if one["subject"] == "recipe"]
        assert found["state"] == state
        assert said in found["detail"]


def test_signed_and_required(spmhub: Spmhub, kept: Registry, keys: tuple[Path, Path]) -> None:  # noqa: F811
    private, public = keys
    code, answer = spmhub("apply", "-a", "snoopy", "-p", "snoopy", "--require-signature", public)
    assert (code, answer["error"]["type"]) == (1, "SignatureError")
    assert spmhub("verify", "snoopy", "--key", public)[0] == 1
    assert spmhub("sign", "snoopy", "--key", private)[0] == 0
    assert spmhub("verify", "snoopy", "--key", public)[0] == 0
    code, answer = spmhub("apply", "-a", "snoopy,mickey", "-p", "snoopy", "--require-signature", public)
    assert "mickey" in answer["error"]["message"]


def test_pull_under_a_required_signature(
    spmhub: Spmhub,
    kept: Registry,
    keys: tuple[Path, Path],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    private, public = keys
    kept.sign("snoopy", private)
    entry = kept.get("snoopy")
    assert entry.manifest_path is not None
    assert entry.signature_path is not None
    files = {
        WEIGHTS_NAME: entry.adapter_path.read_bytes(),
        MANIFEST_NAME: entry.manifest_path.read_bytes(),
        signing.SIGNATURE_NAME: entry.signature_path.read_bytes(),
    }
    with LoopbackHub() as hub:
        hub.adopt(monkeypatch, tmp_path)
        hub.publish("someone/snoopy", files)
        hub.publish("someone/bare", {name: files[name] for name in (WEIGHTS_NAME, MANIFEST_NAME)})
        files[MANIFEST_NAME] = files[MANIFEST_NAME].replace(b'"strength": 1.0', b'"strength": 0.0')
        hub.publish("someone/altered", files)
        there = Registry(tmp_path / "there")
        given = ("--registry", there.root, "--require-signature", public)
        for repo, named_ in (("bare", "is not signed"), ("altered", MANIFEST_NAME)):
            code, answer = spmhub("pull", f"someone/{repo}", *given)
            assert (code, answer["error"]["type"]) == (1, "SignatureError")
            assert named_ in answer["error"]["message"]
            assert there.entries() == ()
        assert spmhub("pull", "someone/snoopy", *given)[0] == 0
        assert spmhub("verify", "snoopy", "--registry", there.root, "--key", public)[0] == 0
        # Under another name the signature would not hold; without one, what the manifest inside says is the same.
        code, answer = spmhub("pull", "someone/snoopy", *given, "--name", "beagle")
        assert (code, "is signed under the name 'snoopy'" in answer["error"]["message"]) == (2, True)
        assert [entry.name for entry in there.entries()] == ["snoopy"]
        assert spmhub("pull", "someone/bare", "--registry", there.root, "--name", "beagle")[0] == 0
        assert spmhub("verify", "beagle", "--registry", there.root)[0] == 0
        # What came without being asked for a signature is refused when one is asked for.
        assert spmhub("pull", "someone/bare", "--registry", there.root, "--force")[0] == 0
        assert spmhub("pull", "someone/bare", *given)[0] == 1


def test_a_registry_that_is_asked_for_is_the_only_one_to_be_listed_and_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, asked = tmp_path / "here", tmp_path / "asked"
    for place, names in ((here, ("snoopy", "mickey")), (asked, ("mickey",))):
        for folder in ("adapters", "manifests"):
            (place / folder).mkdir(parents=True)
        for name in names:
            Registry(place).add(named(name))
    monkeypatch.chdir(here)
    monkeypatch.delenv("SPMHUB_REGISTRY", raising=False)
    done = CliRunner().invoke(app, ["remove", "snoopy", "--registry", str(asked)])
    assert done.exit_code != 0
    assert f"no eraser 'snoopy' in {asked}" in done.stderr
    assert [entry.name for entry in Registry(here).entries()] == ["mickey", "snoopy"]
    listed = CliRunner().invoke(app, ["list", "--registry", str(asked), "--json"])
    assert [(row["name"], row["registry"]) for row in json.loads(listed.stdout)] == [("mickey", str(asked))]
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    assert CliRunner().invoke(app, ["remove", "mickey"]).exit_code != 0, "the working folder was not asked for"
    assert CliRunner().invoke(app, ["remove", "mickey", "--registry", "."]).exit_code == 0
    assert [entry.name for entry in Registry(asked).entries()] == ["mickey"]


def test_a_recipe_of_megabytes_is_not_shown_but_counted(tmp_path: Path) -> None:
    """It took 7 s to show, 21 s and 650 MiB to preview, and 20 MB of text."""
    adapter = pico_eraser(pico_pipeline().unet, "snoopy")
    long = {**adapter.manifest.recipe, "notes": {f"key {index}": "x" for index in range(100_000)}}
    Registry(tmp_path).add(Adapter(adapter.manifest.model_copy(update={"recipe": long}), adapter.increments))
    for given in (["show", "snoopy", "--full"], ["push", "snoopy", "someone/snoopy", "--dry-run", "--no-pictures"]):
        started = time.process_time()
        done = CliRunner().invoke(app, [*given, "--registry", str(tmp_path)])
        assert done.exit_code == 0, done.output
        assert len(done.stdout) < 30_000
        assert " characters" in done.stdout
        assert time.process_time() - started < 5.0
