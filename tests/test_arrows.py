"""Which room may import which: read from the source, so that an import hidden in a function counts too."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "spm_hub"

# A room imports only rooms further down.
LEVELS = (
    ("errors",),
    ("aliases", "atomic", "network", "plugins", "snapshots", "untrusted"),
    ("increments", "manifest"),
    ("formats",),
    ("adapter",),
    ("architectures", "naming", "reduction"),
    ("branching", "concepts"),
    ("gate", "layers"),
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


def imported_modules(path: Path) -> list[str]:
    """Absolute names of everything that the file imports, at its top or inside a function."""
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


def imported_rooms(path: Path) -> set[str]:
    rooms = set()
    for name in imported_modules(path):
        root, *rest = name.split(".")
        if root == "spm_hub":
            known = rest and (rest[0] in LEVEL_OF or rest[0] == "sketchbook")
            rooms.add(rest[0] if known else DOOR)
    return rooms


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


def test_the_check_sees_what_it_should(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    (tmp_path / "hub").mkdir()
    inner = tmp_path / "hub" / "inner.py"
    inner.write_text(
        "import torch\nfrom ..cli import app\ndef f():\n    import spm_hub.attachment\n    from . import other\n"
        "    from spm_hub import load, gate\n"
    )
    assert imported_rooms(inner) == {"cli", "attachment", "hub", "gate", DOOR}
    assert not is_allowed("hub", "cli")
    assert not is_allowed("gate", "layers")


@pytest.mark.parametrize(
    "statement",
    [
        "import spm_hub",
        "import spm_hub.manifest, spm_hub.errors, spm_hub.atomic",
        "from spm_hub.hub.registry import registries; [e.read_manifest() for r in registries() for e in r.entries()]",
        "from spm_hub import Manifest, load, attach, train",
    ],
)
def test_no_torch_is_imported(statement: str) -> None:
    code = (
        f"import sys; {statement}; print(sorted({{'torch', 'diffusers', 'transformers', 'peft'}} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
