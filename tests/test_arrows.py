"""Which room may import which: read from the source, so that an import hidden in a function counts too."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "spm_hub"

# A room imports only rooms further down.
LEVELS = (
    ("errors",),
    ("aliases", "atomic", "environment", "hashing", "network", "plugins", "snapshots", "untrusted", "watching"),
    ("increments", "manifest"),
    ("formats",),
    ("adapter",),
    ("architectures", "naming", "reduction"),
    ("begun", "branching", "concepts"),
    ("gate", "layers", "tuners"),
    ("calls",),
    ("prompting", "single_file"),
    ("options",),
    ("gating",),
    ("attachment", "baking", "conversion", "models"),
    ("hub", "training"),
    ("attacks",),
    ("diagnosis", "evaluation"),
    ("cli", "eval_unlearn"),
)
LEVEL_OF = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
# The embedded base model stands on its own, and is judged and shown by two rooms.
SKETCHBOOK_USERS = {"sketchbook", "evaluation", "cli"}
DOOR = "the public door"


def room_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return DOOR if parts == ("__init__",) else parts[0]


class WithoutTypes(ast.NodeTransformer):
    """Leaves out what is imported for annotations alone, and is never run."""

    def visit_If(self, node: ast.If) -> ast.If | None:
        return None if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING" else node


def imported_modules(path: Path, *, types: bool = True) -> list[str]:
    """Absolute names of everything that the file imports, at its top or inside a function; `types`: for annotations."""
    package = ("spm_hub", *path.relative_to(PACKAGE).parent.parts)
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = []
    for node in ast.walk(tree if types else WithoutTypes().visit(tree)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            found += [f"{module}.{alias.name}" for alias in node.names]
    return found


def imported_rooms(path: Path) -> set[str]:
    rooms = set()
    for name in imported_modules(path):
        root, *rest = name.split(".")
        if root == "spm_hub":
            known = rest and (rest[0] in LEVEL_OF or rest[0] == "sketchbook")
            rooms.add(rest[0] if known else DOOR)
    return rooms


def module_of(path: Path) -> str:
    parts = ("spm_hub", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def running_imports() -> dict[str, set[str]]:
    """Which modules of the package each of them imports when it runs, sooner or later."""
    paths = {module_of(path): path for path in PACKAGE.rglob("*.py")}
    found: dict[str, set[str]] = {}
    for module, path in paths.items():
        found[module] = set()
        for name in imported_modules(path, types=False):
            # from spm_hub.registry.registry import Registry: the longest part of it that is a module.
            while name and name not in paths:
                name = name.rpartition(".")[0]
            found[module] |= {name} - {module, ""}
    return found


def is_allowed(importer: str, imported: str) -> bool:
    if importer == imported:
        return True
    if imported == "sketchbook":
        return importer in SKETCHBOOK_USERS
    if importer == "sketchbook":
        return imported == "errors"
    if importer == DOOR:
        return imported != "cli"
    if importer == "__main__":
        return imported == "cli"
    if imported == DOOR:
        return importer == "cli"
    return LEVEL_OF[importer] > LEVEL_OF[imported]


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_follow_the_arrows(path: Path) -> None:
    room = room_of(path)
    assert room in LEVEL_OF or room in ("sketchbook", "__main__", DOOR), f"{room} has no place among the rooms"
    against = sorted(imported for imported in imported_rooms(path) if not is_allowed(room, imported))
    assert not against, f"{room} may not import {', '.join(against)}"


def test_no_module_needs_itself() -> None:
    """Not even by an import inside a function: of two modules that need each other neither is read alone."""
    graphlib.TopologicalSorter(running_imports()).prepare()


def test_a_module_that_needs_itself_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path / "spm_hub")
    (tmp_path / "spm_hub" / "hub").mkdir(parents=True)
    lower, upper = (tmp_path / "spm_hub" / "hub" / f"{name}.py" for name in ("lower", "upper"))
    upper.write_text("from .lower import kept\n")
    lower.write_text("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .upper import Kind\n")
    assert running_imports() == {"spm_hub.hub.lower": set(), "spm_hub.hub.upper": {"spm_hub.hub.lower"}}
    test_no_module_needs_itself()
    lower.write_text("def find():\n    from spm_hub.hub import upper\n")
    with pytest.raises(graphlib.CycleError):
        test_no_module_needs_itself()


def test_the_check_sees_what_it_should(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    (tmp_path / "hub").mkdir()
    inner = tmp_path / "hub" / "inner.py"
    inner.write_text(
        "import torch\nfrom ..cli import app\ndef f():\n    import spm_hub.attachment.attachment\n    from . import other\n"
        "    from spm_hub import load, gate\n"
    )
    assert imported_rooms(inner) == {"cli", "attachment", "hub", "gate", DOOR}
    assert not is_allowed("hub", "cli")
    assert not is_allowed("gate", "layers")


@pytest.mark.parametrize(
    "statement",
    [
        "import spm_hub",
        "import spm_hub.adapters.manifest, spm_hub.errors, spm_hub.io.atomic",
        "import spm_hub.hub.resolve, spm_hub.registry.archive",
        "from spm_hub.registry.registry import registries; [e.read_manifest() for r in registries() for e in r.entries()]",
        "from spm_hub import Manifest, load, attach, train",
    ],
)
def test_no_torch_is_imported(statement: str) -> None:
    code = (
        f"import sys; {statement}; print(sorted({{'torch', 'diffusers', 'transformers', 'peft'}} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
