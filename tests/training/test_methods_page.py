"""docs/methods.md and the help of the command are made from the methods."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import test_cli
import yaml

from spm_hub.training import Recipe
from spm_hub.training.methods import METHODS
from spm_hub.training.recipe.fields import RecipeFields

spmhub = test_cli.spmhub
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("methods_page", ROOT / "benchmarks" / "methods_page.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_committed_page_is_that_of_the_methods(generator: ModuleType) -> None:
    assert (ROOT / "docs" / "methods.md").read_text(encoding="utf-8") == generator.page(), (
        "python benchmarks/methods_page.py"
    )


@pytest.mark.parametrize("name", METHODS)
def test_a_preset_on_the_page_is_the_methods_own(name: str) -> None:
    """What a reader copies from the page changes nothing of the method's recipe."""
    section = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8").split(f"\n## {name}\n")[1].split("\n## ")[0]
    preset = yaml.safe_load(section.split("```yaml\n")[1].split("```")[0]) if "```yaml" in section else {}
    surrogate = {"surrogate": "dog"} if name == "ca" else {}
    plain = Recipe.make(target="snoopy", method=name, **surrogate)
    assert Recipe.make(target="snoopy", method=name, **{**preset, **surrogate}) == plain
    bare = RecipeFields(target="snoopy").model_dump(mode="json")
    differing = {key for key, value in plain.model_dump(mode="json").items() if value != bare[key]}
    assert differing - {"method", "surrogate", "options"} <= preset.keys()


def test_every_method_says_what_it_is() -> None:
    for method in METHODS.values():
        for text in (method.title, method.paper):
            assert text
        for sentence in (method.summary, method.cost, method.harm):
            assert sentence.endswith(".")
            assert len(sentence) <= 110, method.name


def test_the_command_names_every_method(spmhub: test_cli.Spmhub) -> None:
    said = "".join(spmhub("train", "--help").out.replace("│", " ").split())
    assert f"Oneof{','.join(METHODS)}." in said
    assert spmhub("methods", "-q").out.split() == list(METHODS)


def test_other_commands_help_imports_no_torch(spmhub: test_cli.Spmhub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)  # an import of it fails now
    for name in [name for name in sys.modules if name.startswith("spm_hub.training")]:
        monkeypatch.delitem(sys.modules, name)
    for command in ("apply", "convert", "methods", "list", "doctor"):
        assert spmhub(command, "--help").code == 0
