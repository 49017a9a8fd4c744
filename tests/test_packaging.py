"""What is declared is what is used: dependencies, pins, licence, targets of make, the script of CI."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from spm_hub.cli import diagnosis

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
REQUIREMENTS = [Requirement(line) for line in PROJECT["dependencies"]]
# The making of a tokenizer for transformers: of whatever version that brings.
BROUGHT = {"tokenizers": "transformers"}
NAMES = {"PIL": "pillow", "yaml": "pyyaml"}
# As the metadata of gradio 6.31.0 and ray 2.60.0 has it: the tests' environment has neither.
BOUNDS_OF_OTHERS = {
    "ui": [
        "huggingface-hub<3.0,>=1.16.0", "numpy<3.0,>=1.0", "pillow<13.0,>=8.0", "pydantic<=3.0,>=2.0",
        "starlette<2.0,>=1.0.1", "typer<1.0,>=0.12",
    ],
    "ray": ["click>=7.0", "packaging>=24.2", "protobuf>=3.20.3"],
}  # fmt: skip


def imported() -> set[str]:
    """The top-level names of every third-party module that the package imports, anywhere."""
    found = set()
    for file in (ROOT / "spm_hub").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add(str(node.module).partition(".")[0])
    return found - set(sys.stdlib_module_names) - {"spm_hub", "__future__"}


def test_every_import_is_declared_and_every_declaration_imported() -> None:
    optional = [line for extra, lines in EXTRAS.items() if extra != "dev" for line in lines]
    extras = {canonicalize_name(Requirement(line).name) for line in optional}
    used = {canonicalize_name(BROUGHT.get(name, NAMES.get(name, name))) for name in imported()}
    declared = {canonicalize_name(requirement.name) for requirement in REQUIREMENTS}
    assert used - extras <= declared
    assert declared <= used


@pytest.mark.parametrize("line", [*PROJECT["dependencies"], *EXTRAS["dev"]])
def test_pins_lie_within_the_declared_bounds(line: str) -> None:
    requirement = Requirement(line)
    pin = diagnosis.tested_versions()[canonicalize_name(requirement.name)]
    assert requirement.specifier.contains(pin)
    assert any(one.operator == ">=" for one in requirement.specifier), "a lower bound is stated"


@pytest.mark.parametrize("extra", sorted(EXTRAS))
def test_every_extra_can_be_installed_with_the_pins(extra: str) -> None:
    pins = diagnosis.tested_versions()
    direct = [Requirement(line) for line in EXTRAS[extra]]
    brought = [Requirement(line) for one in direct for line in _requires(one.name)]
    brought += [Requirement(line) for line in BOUNDS_OF_OTHERS.get(extra, ())]
    for needed in (*direct, *brought):
        pin = pins.get(canonicalize_name(needed.name))
        if pin is not None and (needed.marker is None or needed.marker.evaluate({"extra": ""})):
            assert needed.specifier.contains(pin), f"{extra} needs {needed}, and {pin} is pinned"


def _requires(name: str) -> list[str]:
    """What an installed distribution requires; nothing of one that is not installed."""
    try:
        return metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        return []


def test_constraints_are_exact_and_complete() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", line) for line in lines)
    pins = diagnosis.tested_versions()
    pending = {canonicalize_name(Requirement(line).name) for line in (*PROJECT["dependencies"], *EXTRAS["dev"])}
    seen: set[str] = set()
    while pending:
        name = pending.pop()
        seen.add(name)
        if name == "torch":
            continue  # it pins what it needs of CUDA itself, and differs by platform
        assert name in pins, f"{name} is not pinned"
        for line in metadata.requires(name) or ():
            needed = Requirement(line)
            if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                pending |= {canonicalize_name(needed.name)} - seen


def test_metadata() -> None:
    assert PROJECT["license"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text().splitlines()[1]
    assert PROJECT["scripts"] == dict.fromkeys(("spmhub", "hf-spm"), "spm_hub.cli:main")
    assert Version(PROJECT["version"])
    assert {"eval", "ray", "serve", "sign", "ui", "dev"} == set(EXTRAS)
    assert (ROOT / "spm_hub" / "py.typed").is_file()


def test_make_and_ci() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", str(script)], check=True)
    text = script.read_text()
    assert "set -euo pipefail" in text
    assert text.rstrip().endswith("make test"), "its exit code is that of the tests"
    makefile = (ROOT / "Makefile").read_text()
    for needed in ("ruff check", "ruff format --check", "mypy --strict spm_hub", "pytest", "-c constraints.txt"):
        assert needed in makefile


def test_no_path_of_a_developers_machine_is_committed() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    foreign = re.compile(rb"/(?:home|Users|root|work)/\w+/")
    for name in listed.stdout.splitlines():
        file = ROOT / name
        if file.suffix in {".py", ".toml", ".txt", ".md", ".json", ".yaml", ""} and file.is_file():
            assert not foreign.search(file.read_bytes()), f"{name} names {foreign.search(file.read_bytes())}"


def test_the_action_runs_what_it_says(tmp_path: Path) -> None:
    """Its shell lines are run as they stand, with programs that note how they were called."""
    steps = yaml.safe_load((ROOT / "integrations" / "action" / "action.yml").read_text())["runs"]["steps"]
    lines = {step["name"]: step["run"] for step in steps if "run" in step}
    for name in ("python", "spmhub"):
        (tmp_path / name).write_text('#!/bin/sh\nprintf "%s\\n" "${0##*/}" "$@"\n')
        (tmp_path / name).chmod(0o755)

    def called(step: str, **values: str) -> list[str]:
        done = subprocess.run(
            ["bash", "-e", "-o", "pipefail", "-c", lines[step]], capture_output=True, text=True, check=True,
            env={"PATH": f"{tmp_path}:{os.environ['PATH']}", **values},
        )  # fmt: skip
        return done.stdout.splitlines()

    check = ["spmhub", "check", "--strict", "--registry", "our erasers"]
    assert called("Check the registry", REGISTRY="our erasers", KEY="") == check
    assert called("Check the registry", REGISTRY="our erasers", KEY="team.pub") == [*check, "--key", "team.pub"]
    install = called("Install spm-hub", SOURCE="a b", WITH_KEY="")
    assert install[:6] == ["python", "-m", "pip", "install", "-c", "a b/constraints.txt"]
    assert install[-1] == "a b"
    assert called("Install spm-hub", SOURCE="a b", WITH_KEY="team.pub")[-1] == "a b[sign]"
