"""The order of the packages, read from the source: imports inside functions and for annotations count too."""

import ast
import graphlib
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "spm_hub"

# A package imports only packages of the lines above its own.
LEVELS = (
    ("errors", "plugins"),
    ("io",),
    ("models",),
    ("adapters",),
    ("attachment", "registry", "training"),
    ("hub",),
    ("evaluation",),
    ("serving",),
    ("page",),
    ("cli",),
)
LEVEL_OF = {package: level for level, packages in enumerate(LEVELS) for package in packages}
# `training` keeps what it made in a registry, and attaches nothing.
SAME_LEVEL = {("training", "registry")}
# The embedded base model is on its own; three packages use it.
SKETCHBOOK_USERS = {"sketchbook", "evaluation", "cli"}
DOOR = "the public door"
# One module for each file format, and one for each group of commands.
LONG_PACKAGES = {"adapters/formats", "cli"}
MOST_MODULES = 13
MOST_ENTRIES = 14


def package_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return DOOR if parts == ("__init__",) else parts[0]


def imported_modules(path: Path) -> list[str]:
    """Absolute names of everything that the file imports: at its top, inside a function, or for annotations."""
    package = ("spm_hub", *path.relative_to(PACKAGE).parent.parts)
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            found += [f"{module}.{alias.name}" for alias in node.names]
    return found


def imported_packages(path: Path) -> set[str]:
    packages = set()
    for name in imported_modules(path):
        root, *rest = name.split(".")
        if root == "spm_hub":
            known = rest and (rest[0] in LEVEL_OF or rest[0] == "sketchbook")
            packages.add(rest[0] if known else DOOR)
    return packages


def module_of(path: Path) -> str:
    parts = ("spm_hub", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def module_imports() -> dict[str, set[str]]:
    """The modules of the package that each of its modules imports."""
    paths = {module_of(path): path for path in PACKAGE.rglob("*.py")}
    found: dict[str, set[str]] = {}
    for module, path in paths.items():
        found[module] = set()
        for name in imported_modules(path):
            # from spm_hub.registry.registry import Registry: the longest part of it that is a module.
            while name and name not in paths:
                name = name.rpartition(".")[0]
            found[module] |= {name} - {module, ""}
    return found


def private_names(path: Path) -> list[str]:
    """Names with a leading underscore that the file imports from another package of spm_hub."""
    here = module_of(path) if path.name == "__init__.py" else module_of(path).rpartition(".")[0]
    taken = []
    for name in imported_modules(path):
        package, _, last = name.rpartition(".")
        private = last.startswith("_") and not last.startswith("__")
        if name.startswith("spm_hub") and private and package.rpartition(".")[0] != here:
            taken.append(name)
    return taken


def is_allowed(importer: str, imported: str) -> bool:
    if importer == imported:
        return True
    if imported == "sketchbook":
        return importer in SKETCHBOOK_USERS
    if importer == "sketchbook":
        return imported == "errors"
    if importer == DOOR:
        return imported != "cli"
    if imported == DOOR:
        return importer == "cli"
    return LEVEL_OF[importer] > LEVEL_OF[imported] or (importer, imported) in SAME_LEVEL


SOURCES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_follow_the_arrows(path: Path) -> None:
    package = package_of(path)
    assert package in LEVEL_OF or package in ("sketchbook", DOOR), f"{package} has no place in the order"
    against = sorted(imported for imported in imported_packages(path) if not is_allowed(package, imported))
    assert not against, f"{package} may not import {', '.join(against)}"
    assert not private_names(path)


def test_no_module_needs_itself() -> None:
    """Not even for an annotation: of two modules that need each other neither can be read alone."""
    graphlib.TopologicalSorter(module_imports()).prepare()


def test_a_cycle_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path / "spm_hub")
    (tmp_path / "spm_hub" / "hub").mkdir(parents=True)
    lower, upper = (tmp_path / "spm_hub" / "hub" / f"{name}.py" for name in ("lower", "upper"))
    upper.write_text("from .lower import kept\n")
    lower.write_text("kept = 1\n")
    assert module_imports() == {"spm_hub.hub.lower": set(), "spm_hub.hub.upper": {"spm_hub.hub.lower"}}
    test_no_module_needs_itself()
    for import_back in (
        "def find():\n    from spm_hub.hub import upper\n",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .upper import Kind\n",
    ):
        lower.write_text(import_back)
        with pytest.raises(graphlib.CycleError):
            test_no_module_needs_itself()


def test_the_check_sees_what_it_should(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    (tmp_path / "hub").mkdir()
    inner = tmp_path / "hub" / "inner.py"
    inner.write_text(
        "import torch\nfrom ..cli import app\nfrom .near import _mine\n"
        "from spm_hub.io.far import _theirs, __version__\n"
        "def f():\n    import spm_hub.attachment.attachment\n    from . import other\n"
        "    from spm_hub import load, gate\n"
    )
    assert imported_packages(inner) == {"cli", "attachment", "hub", "io", DOOR}
    assert private_names(inner) == ["spm_hub.io.far._theirs"]
    assert not is_allowed("hub", "cli")
    assert not is_allowed("adapters", "attachment")
    assert not is_allowed("registry", "training")


def test_no_package_outgrows_a_page() -> None:
    modules = Counter(str(path.parent.relative_to(PACKAGE)) for path in SOURCES if path.name != "__init__.py")
    assert {name: count for name, count in modules.items() if count > MOST_MODULES and name not in LONG_PACKAGES} == {}
    entries = {path.name for path in PACKAGE.iterdir()} - {"__init__.py", "py.typed", "__pycache__"}
    assert len(entries) <= MOST_ENTRIES, sorted(entries)


def test_tests_lie_in_folders_of_the_same_names() -> None:
    packages = {path.parent.relative_to(PACKAGE) for path in SOURCES} | {Path("integrations")}
    tests = Path(__file__).parent
    assert {path.parent.relative_to(tests) for path in tests.rglob("test_*.py")} <= packages


@pytest.mark.parametrize(
    "statement",
    [
        "import spm_hub",
        "import spm_hub.adapters.manifest, spm_hub.errors, spm_hub.io.atomic",
        "import spm_hub.hub.resolve, spm_hub.registry.archive",
        "from spm_hub.registry.registry import registries as r; [e.read_manifest() for f in r() for e in f.entries()]",
        "from spm_hub import Manifest, load, attach, train",
        "from spm_hub import Recipe; import spm_hub.training.recipe.validation",
        "from spm_hub import Recipe; Recipe.plan(target='snoopy'); Recipe.make(target='snoopy', method='uce')",
        "from spm_hub.training.planning import plan; plan(['snoopy', 'mickey'], {'method': 'sepme'})",
        "from spm_hub.training.methods import all_methods; all_methods()",
        "from spm_hub import ClosedForm, Losses, Method, Objective, RecipePart, Run, Task, Trainable",
    ],
)
def test_no_torch_is_imported(statement: str) -> None:
    assert imported_libraries(statement) == "[]"


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ("train --help", 0),
        ("methods", 0),
        ("methods --json", 0),
        ("train snoopy --method esdx", 2),
        ("train snoopy --set stepz=3", 2),
        ("train snoopy --method uce --set steps=3", 2),
    ],
)
def test_a_command_that_only_reads_recipes_imports_no_torch(arguments: str, code: int) -> None:
    statement = f"""
import contextlib, io, spm_hub.cli
sys.argv = ["spmhub", *{arguments.split()!r}]
left = None
with contextlib.redirect_stdout(io.StringIO()):
    try:
        spm_hub.cli.main()
    except SystemExit as error:
        left = error.code
assert (left or 0) == {code}, left"""
    assert imported_libraries(statement) == "[]"


def imported_libraries(statement: str) -> str:
    """The large libraries that a fresh interpreter has imported after the statement."""
    code = (
        f"import sys; {statement}\nprint(sorted({{'torch', 'diffusers', 'transformers', 'peft'}} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
