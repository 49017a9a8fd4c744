"""Erasers, their increments and gates need four libraries; programs such as ComfyUI have them."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import spm_hub
from spm_hub.errors import UsageError

ROOT = Path(__file__).resolve().parents[1]
CORE = tomllib.loads((ROOT / "integrations" / "core" / "pyproject.toml").read_text())
WHOLE = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

SCRIPT = """
import sys
import numpy, pydantic, safetensors.torch, torch

OURS = {"spm_hub", "torch", "torchgen", "safetensors", "numpy", "pydantic", "pydantic_core", "annotated_types",
        "typing_extensions", "typing_inspection"}
for name in list(sys.modules):
    if name.partition(".")[0] in %(others)r:
        del sys.modules[name]  # torch brought it


class Nothing:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top not in OURS | set(sys.stdlib_module_names) and not top.startswith("_sysconfigdata"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=top)


sys.meta_path.insert(0, Nothing())
import spm_hub
from spm_hub.attachment.gates import bank
from spm_hub.errors import NotFoundError

bank._LEAST = bank._MOST = 96


def encode(texts):
    letters = [[[len(text), ord(text[at : at + 1] or " "), at] for at in range(6)] for text in texts]
    return torch.tensor(letters, dtype=torch.float32)


whole = spm_hub.load("adapters/snoopy.safetensors")
lazy = spm_hub.load("van gogh", registry=".", lazy=True)
assert len(whole.increments) == len(lazy.increments) == 84
assert all(torch.isfinite(part).all() for one in lazy.increments.values() for part in one.tensors().values())
for gate in ("calibrated", "always", "evidence"):
    assert spm_hub.gates([whole, lazy], "snoopy", encode=encode, gate=gate)["snoopy"] == 1, gate
assert spm_hub.gates([whole, lazy], "snoopy", encode=encode, gate="transport")["snoopy"] > 0.9
asked = spm_hub.TextGates([whole, lazy], encode)
assert asked.explain("by van gogh")["van-gogh"].term == "words"
whole.save(sys.argv[1])
assert spm_hub.load(sys.argv[1]).content == whole.content
try:
    spm_hub.load("snopy", registry=".")
except NotFoundError as error:
    assert "snoopy" in str(error)
assert not %(others)r & {name.partition(".")[0] for name in sys.modules}
print("done")
"""
OTHERS = {
    "tqdm", "rich", "yaml", "platformdirs", "filelock", "packaging", "httpx2", "huggingface_hub", "diffusers",
    "transformers", "peft", "PIL", "typer", "accelerate",
}  # fmt: skip


def test_erasers_and_gates_without_any_other_library(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT % {"others": OTHERS}, str(tmp_path / "snoopy.safetensors")], cwd=ROOT,
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == "done\n"
    assert list((tmp_path / "spm-hub" / "banks").iterdir()), "the sentences are kept for the next process"


def test_a_library_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    for name in [name for name in sys.modules if name.startswith("spm_hub.hub.")]:
        monkeypatch.delitem(sys.modules, name)
        monkeypatch.delattr(sys.modules["spm_hub.hub"], name.rpartition(".")[2], raising=False)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UsageError, match=r"spm_hub\.load needs huggingface_hub here.*\n.*pip install huggingface_hub"):
        spm_hub.load("someone/eraser")


def test_the_core_distribution_is_a_part_of_the_whole_one() -> None:
    project = CORE["project"]
    assert {Requirement(line).name for line in project["dependencies"]} == {"numpy", "pydantic", "safetensors", "torch"}
    assert (project["version"], project["requires-python"]) == (WHOLE["version"], WHOLE["requires-python"])
    of_whole = {Requirement(line).name: Requirement(line) for line in WHOLE["dependencies"]}
    for line in project["dependencies"]:
        (least,) = Requirement(line).specifier
        assert least.operator == ">="
        (there,) = of_whole[Requirement(line).name].specifier
        assert there.version in Requirement(line).specifier, f"{line}: not newer than {there}"
    assert set(project["optional-dependencies"]["hub"]) <= set(WHOLE["dependencies"])
    included = CORE["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    taken = {Path(place).relative_to("spm_hub").name for place in included.values()}
    here = {path.name for path in (ROOT / "spm_hub").iterdir()} | {"constraints.txt", "LICENSE"}
    assert {"__init__.py", "errors.py", "adapters", "attachment", "evaluation", "hub", "models"} <= taken <= here
