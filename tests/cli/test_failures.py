"""Errors that are the fault of the machine and not of the user; and archives of other kinds."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from test_registry import named
from typer.testing import CliRunner

from spm_hub.cli import main
from spm_hub.cli.app import app
from spm_hub.cli.output import Output, exit_on_error
from spm_hub.registry.registry import Registry


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("std::bad_alloc"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nMore about it"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_too_little_memory_is_a_sentence(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended, exit_on_error(Output(json=True)):
        raise error
    assert ended.value.code == 1
    printed = capsys.readouterr()
    assert json.loads(printed.out)["error"]["message"].startswith("there is not enough memory")
    assert "--dtype float16" in printed.err


def test_our_own_mistakes_stay_tracebacks() -> None:
    with pytest.raises(RuntimeError, match="shapes"), exit_on_error(Output()):
        raise RuntimeError("shapes differ")


def test_ctrl_c_is_an_error_for_machines_too(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended, exit_on_error(Output(json=True)):
        raise KeyboardInterrupt
    assert ended.value.code == 130
    assert json.loads(capsys.readouterr().out)["error"]["message"] == "interrupted"


def test_a_full_stdout_is_reported_on_stderr(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Full:
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

        flush = write

    monkeypatch.setattr("sys.stdout", Full())
    with pytest.raises(SystemExit) as ended, exit_on_error(Output(json=True)):
        Output(json=True).data({}, "")
    assert ended.value.code == 1
    assert "No space left on device" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["e.tar.gz", "e.tgz", "e.zip"])
def test_another_kind_of_archive_is_no_folder_of_that_name(name: str, tmp_path: Path) -> None:
    Registry(tmp_path / "registry").add(named("snoopy"))
    given = ["export", "snoopy", "--registry", str(tmp_path / "registry"), "--to", str(tmp_path / name)]
    done = CliRunner().invoke(app, given)
    assert done.exit_code == 2
    assert "--out e.tar" in done.stderr
    assert not (tmp_path / name).exists()


def test_an_eraser_named_twice_is_exported_once(tmp_path: Path) -> None:
    Registry(tmp_path / "registry").add(named("snoopy"))
    given = ["export", "snoopy", "snoopy", "--registry", str(tmp_path / "registry"), "--to", str(tmp_path / "e.tar")]
    done = CliRunner().invoke(app, [*given, "--json"])
    assert done.exit_code == 0, done.output
    assert len(json.loads(done.stdout)) == 1


def test_a_demo_never_replaces_somebodys_own_eraser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def trained(*_: Any, **__: Any) -> None:
        pytest.fail("minutes of training before the refusal")

    monkeypatch.setattr("spm_hub.training.trainer.train", trained)
    Registry(tmp_path).add(named("snoopy"))
    before = (tmp_path / "adapters" / "snoopy.safetensors").read_bytes()
    done = CliRunner().invoke(app, ["demo", "--out", str(tmp_path)])
    assert done.exit_code == 1
    assert "snoopy" in done.stderr
    assert (tmp_path / "adapters" / "snoopy.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        (["show", "--json"], 2, "Missing argument"),
        (["list", "--jsn", "--json"], 2, "No such option: --jsn"),
        (["apply", "--seed", "x", "--json"], 2, "--seed"),
        (["nope", "--json"], 2, "No such command"),
    ],
)
def test_a_command_line_that_cannot_be_read_is_an_error_for_machines_too(
    line: list[str], code: int, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["spmhub", *line])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == code
    printed = capsys.readouterr()
    assert words in json.loads(printed.out)["error"]["message"]
    assert words in printed.err


def test_results_for_machines_come_through_the_same_door(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Registry(tmp_path).add(named("snoopy"))
    for line, code in ((["list"], 0), (["show", "snopy"], 2)):
        monkeypatch.setattr("sys.argv", ["spmhub", *line, "--registry", str(tmp_path), "--json"])
        with pytest.raises(SystemExit) as ended:
            main()
        assert (ended.value.code or 0) == code
        assert json.loads(capsys.readouterr().out)


def test_the_version_is_that_of_the_package() -> None:
    done = CliRunner().invoke(app, ["--version"])
    assert done.exit_code == 0
    assert done.stdout == f"spmhub {version('spm-hub')}\n"
