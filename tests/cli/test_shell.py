"""The shell's side: completion, commands to start with, and suggested commands that can be typed as they are."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest
from pico import pico_eraser, pico_pipeline
from typer.testing import CliRunner

from spm_hub.adapters.manifest import slug
from spm_hub.cli.app import app
from spm_hub.registry import registry as registries
from spm_hub.registry.registry import Registry

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "spm_hub"
COMMANDS = re.compile(r"spmhub [a-z]|chmod |mkdir |\brm |gunzip |sed -i|hf download|--[a-z-]+ $")
PLACES = re.compile(r"\b(path|file|folder|root|place|source|checkpoint|registry|existing|signature|to|out|key)\b")


def completed(line: str) -> list[str]:
    words = line.split(" ")
    environment = {"_SPMHUB_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
    done = CliRunner().invoke(app, [], env=environment, prog_name="spmhub")
    return done.stdout.split()


def test_commands_options_and_erasers_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Registry(tmp_path / "kept")
    for name in ("snoopy", "snow", "mickey"):
        kept.add(pico_eraser(pico_pipeline().unet, name))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SPMHUB_REGISTRY", str(kept.root))
    monkeypatch.setattr(registries, "user_registry", lambda: Registry(tmp_path / "user"))
    assert completed("spmhub tr") == ["train"]
    assert "--compare" in completed("spmhub apply --co")
    assert completed("spmhub show sno") == ["snoopy", "snow"]
    assert completed("spmhub apply -a mickey,snoo") == ["mickey,snoopy"]
    assert completed("spmhub remove m") == ["mickey"]
    monkeypatch.setenv("SPMHUB_REGISTRY", str(tmp_path / "nowhere"))
    assert completed("spmhub show sno") == []


def test_start_here_does_not_fail_in_this_repository() -> None:
    lines = [line.strip() for line in str(app.info.epilog).splitlines()[1:]]
    assert len(lines) >= 2
    made = set[str]()
    for line in lines:
        program, command, *arguments = shlex.split(line)
        assert (program, CliRunner().invoke(app, [command, "--help"]).exit_code) == ("spmhub", 0)
        if command == "train":
            assert Registry(ROOT).find(slug(arguments[0])) is None, "the name is taken there"
            made.add(arguments[0])
        if command == "apply":
            assert arguments[arguments.index("-a") + 1] in made


def test_square_brackets_of_help_texts_are_shown() -> None:
    help_text = CliRunner().invoke(app, ["sign", "--help"]).stdout
    assert 'pip install "spm-hub[sign]"' in " ".join(help_text.split())
    assert "USER/REPO[@REVISION]" in CliRunner().invoke(app, ["pull", "--help"]).stdout


def unquoted(source: str) -> list[str]:
    """Paths that an f-string of a source puts into a suggested command without quoting them for the shell."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.keyword) or node.arg != "mend":
            continue
        for text in (one for one in ast.walk(node.value) if isinstance(one, ast.JoinedStr)):
            before = ""
            for part in text.values:
                if isinstance(part, ast.Constant):
                    before += str(part.value)
                elif isinstance(part, ast.FormattedValue):
                    name = ast.unparse(part.value)
                    if COMMANDS.search(before) and PLACES.search(name) and "quote" not in name and ".name" not in name:
                        found.append(f"{before}{{{name}}}")
                    before += "X"
    return found


def test_paths_in_suggested_commands_are_quoted() -> None:
    assert unquoted('f(mend=f"spmhub convert {path}")') == ["spmhub convert {path}"]
    assert unquoted('f(mend=f"chmod u+w {quoted(path)}")') == []
    assert {str(path): found for path in PACKAGE.rglob("*.py") if (found := unquoted(path.read_text("utf-8")))} == {}


@pytest.mark.parametrize("place", ["my erasers", "Jürgens Bücher", "it's $HOME", "a;b&c"])
def test_a_suggested_command_names_the_whole_path(place: str, tmp_path: Path) -> None:
    missing = tmp_path / place
    done = CliRunner().invoke(app, ["list", "--registry", str(missing)])
    command = done.stderr.rpartition("try: ")[2]
    assert shlex.split(command) == ["mkdir", "-p", str(missing / "adapters")]
