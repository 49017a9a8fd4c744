"""Terminals, pipes and locales that cannot encode everything: no command ends in a traceback."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from pico import pico_eraser, pico_pipeline
from test_cli import PICO_TRAINING

from spm_hub.cli import main
from spm_hub.cli.app import EXAMPLES
from spm_hub.cli.output import Output
from spm_hub.registry import registry as registries
from spm_hub.registry.registry import Registry

CONCEPT = "葛飾北斎 “ß” 🐕"
ENCODINGS = ("cp1252", "ascii", "latin-1", "cp437")


class Stream(io.TextIOWrapper):
    """A strict stream of an old encoding, in a pipe or on a terminal."""

    def __init__(self, encoding: str, *, terminal: bool = False) -> None:
        super().__init__(io.BytesIO(), encoding=encoding, errors="strict", write_through=True)
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal

    def text(self) -> str:
        assert isinstance(self.buffer, io.BytesIO)
        return self.buffer.getvalue().decode(self.encoding)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("Modelle für 葛飾") / "pico"
    pico_pipeline().save_pretrained(path)
    return path


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    """A registry whose eraser and folder have names that old encodings lack; the working folder is empty."""
    kept = Registry(tmp_path / "Radierer – 消しゴム")
    kept.add(pico_eraser(pico_pipeline().unet, CONCEPT, aliases=("Хокусай",)))
    (tmp_path / "Arbeit").mkdir()
    monkeypatch.chdir(tmp_path / "Arbeit")
    monkeypatch.setenv("SPMHUB_REGISTRY", str(kept.root))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(registries, "user_registry", lambda: Registry(tmp_path / "user"))
    return kept


def run(monkeypatch: pytest.MonkeyPatch, encoding: str, *arguments: object, terminal: bool = False) -> tuple[int, str]:
    """The exit code and all that a command prints in an encoding; it raises whatever would be a traceback."""
    out, err = Stream(encoding, terminal=terminal), Stream(encoding, terminal=terminal)
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", out)
        patched.setattr(sys, "stderr", err)
        patched.setattr(sys, "argv", ["spmhub", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
    assert "Traceback" not in err.text()
    if "--json" in arguments:
        assert out.text() == "" or json.loads(out.text()) is not None
    return int(ended.value.code or 0), out.text() + err.text()


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_command_that_only_looks_prints(
    encoding: str, registry: Registry, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (name,) = (entry.name for entry in registry.entries())
    for arguments in (
        ("list",), ("show", name), ("verify",), ("gates", f"{CONCEPT} am Strand", "a dog", "-a", name, "-m", model),
        ("export", name, "--to", "消しゴム.tar"), ("convert", name, "--to", "kohya"), ("methods",), ("models",),
    ):  # fmt: skip
        for flag in ((), ("--json",), ("-q",)):
            if arguments[0] in ("export", "convert"):
                flag = (*flag, "--force")
            code, printed = run(monkeypatch, encoding, *arguments, *flag)
            assert code == 0, printed
    code, printed = run(monkeypatch, encoding, "show", CONCEPT + "x")
    assert (code, "error: no eraser" in printed) == (2, True)
    code, printed = run(monkeypatch, encoding, "show", "--ünknown", "--json")
    assert (code, "UsageError" in printed) == (2, True)


def test_help_prints_in_ascii(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in EXAMPLES:
        assert run(monkeypatch, "ascii", name, "--help")[0] == 0


@pytest.mark.parametrize("terminal", [False, True], ids=["pipe", "terminal"])
def test_drawing_and_training_print_bars_and_tables(
    terminal: bool, registry: Registry, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (name,) = (entry.name for entry in registry.entries())
    options = ("--model", model)
    drawn = run(
        monkeypatch, "cp1252", "apply", "-a", name, "-p", CONCEPT, "--steps", 1, "--compare", *options,
        terminal=terminal,
    )  # fmt: skip
    assert drawn[0] == 0, drawn[1]
    trained = run(monkeypatch, "cp1252", "train", "Käthe Kollwitz 版画", *options, *PICO_TRAINING, terminal=terminal)
    assert trained[0] == 0, trained[1]
    assert registry.get("Käthe Kollwitz 版画").read_manifest().concept.target == "Käthe Kollwitz 版画"


def test_a_table_of_escaped_names_stays_aligned(monkeypatch: pytest.MonkeyPatch) -> None:
    from spm_hub.cli.output import table

    out = Stream("ascii")
    monkeypatch.setattr(sys, "stdout", out)
    Output().data(None, table(["name", "number"], [["葛", 1], ["plain", 22]], title="[sign] ß"))
    lines = [line.rstrip() for line in out.text().splitlines() if line.strip()]
    assert lines[0].strip() == "[sign] \\xdf"
    assert lines[3].split() == ["\\u845b", "1"]
    assert len(lines[3]) == len(lines[4]), "numbers are aligned to the right"


def test_json_in_ascii_is_json_beyond_the_first_plane(monkeypatch: pytest.MonkeyPatch) -> None:
    for encoding in ("ascii", "utf-8"):
        out = Stream(encoding)
        monkeypatch.setattr(sys, "stdout", out)
        value = "🐕 é \u202e \x9b \x7f"
        Output(json=True).data({"name": value}, "")
        assert json.loads(out.text()) == {"name": value}
        assert not set(out.text()) & set("\u202e\x9b\x7f")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="file names are UTF-8 there whatever the locale")
def test_a_plain_ascii_locale_takes_names_of_every_script(registry: Registry, model: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "HOME": str(tmp_path)}
    environment.pop("PYTHONIOENCODING", None)
    arguments = ["train", "Käthe 版画", "--model", str(model), *PICO_TRAINING]
    made = subprocess.run(
        [sys.executable, "-m", "spm_hub.cli", *arguments], env=environment, capture_output=True, check=False
    )
    assert made.returncode == 0, made.stderr
    assert made.stdout.isascii()
    assert made.stderr.isascii()
    assert registry.get("Käthe 版画").read_manifest().base.id == "pico"
