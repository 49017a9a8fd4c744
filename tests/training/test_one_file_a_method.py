"""A method is one object in one file: nothing else of the package decides by its name."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from pico import pico_pipeline

import spm_hub
from spm_hub.adapters.adapter import Adapter
from spm_hub.training import Recipe, train
from spm_hub.training.methods import METHODS, Method

PACKAGE = Path(spm_hub.__file__).parent
FOLDER = PACKAGE / "training" / "methods"
FILES = sorted(path for path in FOLDER.glob("*.py") if path.stem not in ("__init__", "method"))
MODULE_CHOICES = {"esd-x", "esd-x-strict", "esd-x-strict-text", "esd-u", "esd-all", "esd-selfattn"}
# Where a word that names a method too means something else.
OTHER_MEANINGS = {
    "adapters/formats/kohya.py": {"spm"},  # the file format
    "training/recipe/schema.py": {"spm"} | MODULE_CHOICES,  # the increment of rank 1; the value of increment.modules
    "training/trainable/module_selection.py": MODULE_CHOICES,
}
_LOOKUPS = ("get", "setdefault", "startswith", "endswith", "find_method")


def methods_of(path: Path) -> tuple[Method, ...]:
    module = import_module(f"spm_hub.training.methods.{path.stem}")
    found: tuple[Method, ...] = module.METHODS if hasattr(module, "METHODS") else (module.METHOD,)
    return found


def names_of(methods: tuple[Method, ...]) -> set[str]:
    """All names by which code could tell a method: its own, and its objective's."""
    return {name for one in methods for name in (one.name, one.objective_name)}


def decided_by(source: str) -> Iterator[str]:
    """All strings that code compares, matches or looks up: whatever it could decide by."""
    for node in ast.walk(ast.parse(source)):
        parts: list[ast.expr | None] = []
        match node:
            case ast.Compare(left=left, comparators=others):
                parts = [left, *others]
            case ast.MatchValue(value=value):
                parts = [value]
            case ast.Dict(keys=keys):
                parts = [*keys]
            case ast.Subscript(slice=index):
                parts = [index]
            case ast.Call(func=ast.Attribute(attr=name) | ast.Name(id=name), args=args) if name in _LOOKUPS:
                parts = [*args]
            case ast.Call(func=ast.Name(id="dict"), keywords=keywords):
                yield from (one.arg for one in keywords if one.arg)
        for part in filter(None, parts):
            for one in ast.walk(part):
                if isinstance(one, ast.Constant) and isinstance(one.value, str):
                    yield one.value


def test_every_file_makes_its_own_methods_and_is_listed_once() -> None:
    listed = [one for path in FILES for one in methods_of(path)]
    assert {one.name: one for one in listed} == METHODS
    assert len(listed) == len(METHODS), "no method is in two files"
    makers = {
        path
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Method"
    }
    assert makers == set(FILES)
    tree = ast.parse((FOLDER / "__init__.py").read_text(encoding="utf-8"))
    uses = Counter(node.id for node in ast.walk(tree) if isinstance(node, ast.Name))
    assert {path.stem: uses[path.stem] for path in FILES} == {path.stem: 1 for path in FILES}


def test_no_other_file_decides_by_the_name_of_a_method() -> None:
    own = {path: names_of(methods_of(path)) for path in FILES}
    known = set().union(*own.values())
    found = {
        str(path.relative_to(PACKAGE)): named
        for path in sorted(PACKAGE.rglob("*.py"))
        if (named := (known - own.get(path, set())) & set(decided_by(path.read_text(encoding="utf-8"))))
    }
    assert found == OTHER_MEANINGS


@pytest.mark.parametrize(
    "line",
    [
        'recipe.method == "fmn"',
        'recipe.objective.name in ("uce", "fmn")',
        'x = {"fmn": 1}[recipe.method]',
        'x = dict(fmn=1)',
        'METHODS["fmn"]',
        'find_method("fmn")',
        'recipe.method.startswith("fmn")',
        'match recipe.method:\n    case "uce" | "fmn":\n        pass',
    ],
)  # fmt: skip
def test_a_decision_is_seen(line: str) -> None:
    assert "fmn" in set(decided_by(line))


def test_words_for_people_are_no_decision() -> None:
    assert not set(decided_by('raise ValueError("take method fmn", mend="--method fmn")'))


PREDICTION: dict[str, Any] = {
    "steps": 2,
    "batch_size": 2,
    "x_t": {"trajectories": 2, "steps": 2, "chunks": 1, "guidance": [1.0]},
}
SHORT: dict[str, dict[str, Any]] = {
    "minimalist": {"steps": 2, "batch_size": 2, "x_t": {"steps": 2}, "masks": {"prompts": 2}},
    "sepme": {**PREDICTION, "templates": False, "stop": {"below": None}},
    "uce": {},
    "instant": {"options": {"sentences": 8, "held": 8}},
}


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_under_another_name_a_method_trains_to_the_same_bits(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method = methods_of(path)[0]
    preset = {**method.preset, "objective": {**method.preset.get("objective", {}), "name": "renamed"}}
    monkeypatch.setitem(METHODS, "renamed", replace(method, name="renamed", preset=preset))
    first, second = (trained(name, SHORT.get(method.name, PREDICTION)) for name in (method.name, "renamed"))
    assert second.manifest.recipe["objective"]["name"] == "renamed"
    assert first.increments
    assert list(first.increments) == list(second.increments)
    for key, increment in first.increments.items():
        ours, theirs = increment.tensors(), second.increments[key].tensors()
        assert list(ours) == list(theirs)
        assert all(torch.equal(ours[part], theirs[part]) for part in ours)


def trained(name: str, short: dict[str, Any]) -> Adapter:
    recipe = Recipe.make(target="snoopy", method=name, **short)
    return train(recipe, pipe=pico_pipeline(text_width=64))
