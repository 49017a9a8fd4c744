"""Every block of code and every command line of the README and the docs runs, or is marked as needing something else.

Pictures and trainings are cut short by the options that people have for it: steps of sampling, keys of the recipe.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import inspect
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from documents import PAGES, ROOT, SHORT_RECIPE, Block, Command, blocks, commands, shorten
from typer.testing import CliRunner

import spm_hub
from spm_hub.cli.app import app
from spm_hub.io.environment import KEY_VARIABLE, OWNER_VARIABLE, REGISTRY_VARIABLE
from spm_hub.models import loading
from spm_hub.training.recipe.recipe import Recipe

SHORT = {
    "train": (
        *(f"--set={key}={value}" for key, value in SHORT_RECIPE.items() if not isinstance(value, dict)),
        *(f"--set=x_t.{key}={value}" for key, value in SHORT_RECIPE["x_t"].items()),
        "--no-look",
    ),
    "apply": ("--steps=1",),
    "eval": ("--samples=1", "--steps=1"),
    "attack": ("--prompts=1", "--tries=1", "--iterations=1", "--steps=4"),
}
"""Options that are added to a command: the last one of a name counts."""
RUN_ELSEWHERE = {"demo": "tests/cli/test_picture_commands.py"}
"""Commands that another test runs at length; here their arguments are parsed."""
IN_AN_EMPTY_FOLDER = {"README.md"}
"""Pages whose commands begin with nothing at hand; those of the others are in a copy of the repository's registry."""
SLOW = {"README.md", "docs/training.md", "docs/benchmarks.md", "docs/python-api.md"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the repository's registry, as working folder; nothing outside of it is written or asked."""
    here = tmp_path / "here"
    for name in ("adapters", "manifests"):
        shutil.copytree(ROOT / name, here / name)
    monkeypatch.chdir(here)
    for variable in ("XDG_CACHE_HOME", "XDG_DATA_HOME"):
        monkeypatch.setenv(variable, str(tmp_path / variable))
    # As the clone does, whose registry this is a copy of.
    monkeypatch.setenv(REGISTRY_VARIABLE, str(here))
    monkeypatch.setenv(OWNER_VARIABLE, "")
    monkeypatch.setenv("TERM", "dumb")
    shorten(monkeypatch)
    # The sketchbook is loaded once a page: it takes longer than most of what is done with it.
    monkeypatch.setattr(loading, "load_pipeline", functools.cache(loading.load_pipeline))
    return here


@pytest.mark.parametrize("page", [pytest.param(page, marks=[pytest.mark.slow] * (page in SLOW)) for page in PAGES])
def test_every_block_runs(page: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = tmp_path / "empty"
    elsewhere.mkdir()
    namespace: dict[str, Any] = {"__name__": page}
    for block in blocks(page):
        if block.language == "python":
            run_python(page, block, namespace)
        elif block.language == "sh":
            for command in commands(block):
                with monkeypatch.context() as patch:
                    # A command may set it for the rest of its process.
                    patch.setenv(KEY_VARIABLE, "")
                    if page in IN_AN_EMPTY_FOLDER:
                        patch.chdir(elsewhere)
                        patch.setenv(REGISTRY_VARIABLE, "")
                    run(page, command)
        elif block.language == "yaml":
            keys = set(yaml.safe_load(block.text))
            # tests/evaluation/test_guest_programs.py runs the configuration of eval-unlearn.
            assert keys <= Recipe.model_fields.keys() or "technique" in keys, f"{page}:{block.line}"
        else:
            assert block.language == "text", f"{page}:{block.line}: nobody runs {block.language!r}"
            check_text(page, block)


def run_python(page: str, block: Block, namespace: dict[str, Any]) -> None:
    """Run a block; the literal in a comment behind an expression is its value. A marked block is only compiled."""
    tree = ast.parse(block.text)
    lines = block.text.splitlines()
    for node in tree.body:
        comment = lines[(node.end_lineno or 1) - 1][node.end_col_offset or 0 :].strip().removeprefix("#").strip()
        ast.increment_lineno(node, block.line - 1)
        code = compile(ast.Module([node], []), page, "exec")
        stated = literal(comment)
        if block.mark is not None:
            continue
        if isinstance(node, ast.Expr) and stated is not None:
            found = eval(compile(ast.Expression(node.value), page, "eval"), namespace)
            assert found == stated, f"{page}:{node.lineno}: {ast.unparse(node)} is {found!r}"
        else:
            exec(code, namespace)


def literal(comment: str) -> object:
    """Return the value that a comment states, None where it says something else or leaves a part of it open (...)."""
    if "..." in comment:
        return None
    try:
        return ast.literal_eval(comment)
    except (ValueError, SyntaxError):
        return None


def run(page: str, command: Command) -> None:
    """Run one command line of a page, or where it is marked parse its arguments."""
    where = f"{page}:{command.line}: {' '.join(command.words)}"
    program, *arguments = command.words
    if program == "spmhub":
        if command.mark is not None or arguments[0] in RUN_ELSEWHERE:
            parse(arguments)
            return
        done = CliRunner().invoke(app, [*arguments, *short(arguments)])
        assert done.exit_code == 0, f"{where}\n{done.output}\n{done.exception}"
    elif program == "make":
        done_there = subprocess.run(["make", "--dry-run", *arguments], cwd=ROOT, capture_output=True, text=True)
        assert done_there.returncode == 0, f"{where}\n{done_there.stderr}"
    elif arguments[:3] == ["-m", "pip", "install"]:
        assert command.mark is not None, where
        *options, place = arguments[3:]
        assert set(options) <= {"--no-deps"}, where
        assert (ROOT / place.removeprefix("path/to/spm-hub").strip("/") / "pyproject.toml").is_file(), where
    elif program == "python":
        assert arguments[:2] == ["-m", "pytest"], where
        paths = [word for word in arguments if word.startswith("tests/")]
        assert paths, where
        assert all((ROOT / path).exists() for path in paths), where
    else:
        assert shutil.which(program), where
        if command.mark is not None:
            sources = [word.removeprefix("path/to/spm-hub/") for word in command.words if "path/to/spm-hub/" in word]
            assert all((ROOT / source).exists() for source in sources), where
            return
        subprocess.run(command.words, check=True, capture_output=True)


def short(arguments: list[str]) -> tuple[str, ...]:
    """Return the options that cut a command short; a recipe that a method does not read would be refused."""
    closed_form = not {"instant", "uce"}.isdisjoint(arguments)
    return () if closed_form else SHORT.get(arguments[0], ())


def parse(arguments: list[str]) -> None:
    """Parse the arguments of `spmhub` as it would, and run nothing."""
    group: Any = typer.main.get_command(app)
    context = group.make_context("spmhub", list(arguments))
    name, found, rest = group.resolve_command(context, list(arguments))
    found.make_context(name, rest, parent=context)


def check_text(page: str, block: Block) -> None:
    """Refuse commands in a block that is called text: that is for signatures and the tree of packages."""
    for line in block.text.splitlines():
        assert not re.match(r"(spmhub|make|hf|python) ", line), (
            f"{page}:{block.line}: {line!r} is a command: call it sh"
        )


def test_marked_commands_that_do_not_parse_are_seen() -> None:
    parse(["apply", "-a", "snoopy", "--prompt", "snoopy", "--device", "cuda"])
    for wrong in (["apply", "--adaptors", "snoopy"], ["aply", "-a", "snoopy"], ["bake", "-a", "snoopy"]):
        with pytest.raises(Exception, match=r"(?i)no such|missing"):
            parse(wrong)


def test_demo_is_run_by_its_own_test() -> None:
    for command, path in RUN_ELSEWHERE.items():
        assert f'spmhub("{command}"' in (ROOT / path).read_text()


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(text)):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        found = (ROOT / page).parent / path if path else ROOT / page
        assert found.exists(), f"{page} links to {target}"
        if anchor:
            assert anchor in anchors(found.read_text(encoding="utf-8")), f"{page} links to {target}"


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", without_code(text), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_python_page_names_the_real_parameters() -> None:
    signatures = [block.text for block in blocks("docs/python-api.md") if block.language == "text"]
    stated = dict(re.findall(r"^spm_hub\.(\w+)\((.*)\) -> \w+", "\n".join(signatures), flags=re.MULTILINE))
    functions = {name for name in spm_hub.__all__ if inspect.isfunction(getattr(spm_hub, name))}
    assert set(stated) == functions
    for name, parameters in stated.items():
        function: Callable[..., Any] = getattr(spm_hub, name)
        names = [word.lstrip("*") for word in parameters.split(", ") if word != "*"]
        assert names == list(inspect.signature(function).parameters), name


def test_the_changelog_names_modules_that_there_are() -> None:
    moves = re.findall(
        r"^\| `(spm_hub[\w.]+)` \| `(spm_hub[\w.]+)` \|$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE
    )
    assert moves
    for _, new in moves:
        assert importlib.util.find_spec(new) is not None, new


def test_contributing_is_short_and_its_map_is_the_tree() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    assert len(text.splitlines()) <= 150
    package = ROOT / "spm_hub"
    stated = re.findall(r"^  (\w+)/ ", text, re.MULTILINE)
    assert sorted(stated) == sorted(path.name for path in package.iterdir() if (path / "__init__.py").is_file())
    for name, described in re.findall(r"^  (\w+)/ +(.*)$", text, re.MULTILINE):
        assert all((package / name / inner).is_dir() for inner in re.findall(r"(\w+)/", described)), name
