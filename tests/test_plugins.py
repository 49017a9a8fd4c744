"""Plug-ins of other distributions: found by entry point, imported when needed, and never in anybody's way."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
import test_cli
import torch
from pico import pico_pipeline, target_modules
from safetensors.torch import save_file
from test_cli import Spmhub
from torch import nn

from spm_hub import plugins, training
from spm_hub.adapters import conversion
from spm_hub.adapters.adapter import load_file
from spm_hub.adapters.conversion import Description
from spm_hub.errors import AdapterFileError, RecipeError
from spm_hub.models.architectures import family_of, targets
from spm_hub.training.recipe.recipe import Recipe

spmhub = test_cli.spmhub
GOOD = '''
import torch
from spm_hub.models.architectures import Family
from spm_hub.io.safetensors_file import encode
from spm_hub.adapters.formats.format import WHOLE, Format, Writer
from spm_hub.adapters.formats.slots import Slot
from spm_hub.training.methods import Method
from spm_hub.training.methods.spm import SPM


class Halfway(SPM):
    """To the middle between the concept and the surrogate."""

    def target(self, concept, neutral):
        return (concept + neutral) / 2


def parse(key):
    module, _, part = key.removeprefix("tagged|").partition("|")
    return Slot(module, part) if key.startswith("tagged|") else None


def write(manifest, increments, base):
    tensors = {f"tagged|{path}|{part}": one for path, i in increments.items() for part, one in i.tensors().items()}
    return {WHOLE: encode(tensors, {})}


quiet = {"weight": 0.0, "reach": None, "per_target": 0}
halfway = Method(lambda recipe: Halfway(recipe.eta), {"steps": 7, "anchoring": quiet})
tiny = Family("tiny", "brain", ("TinyDenoiser",), ("TinyBlock",))
tagged = Format.by_keys("tagged", "a format of somebody's own", parse, Writer(("low_rank",), write))
'''
POINTS = """[spm_hub.objectives]
halfway = somebody_elses:halfway
spm = somebody_elses:halfway
[spm_hub.families]
tiny = somebody_elses:tiny
big = somebody_elses:tiny
[spm_hub.formats]
tagged = somebody_elses:tagged
"""
BROKEN = """[spm_hub.objectives]
absent = nowhere_to_be_found:method
[spm_hub.families]
leaves = leaves_at_import:family
[spm_hub.formats]
wrong = somebody_elses:halfway
missing = somebody_elses:no_such_name
"""


def install(site: Path, name: str, points: str, **modules: str) -> None:
    """What pip leaves of a distribution: its modules, and the folder that names its entry points."""
    info = site / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(points)
    for module, text in modules.items():
        (site / f"{module}.py").write_text(text)


@pytest.fixture
def site(tmp_path: Path) -> Path:
    place = tmp_path / "site"
    install(place, "somebody-elses", POINTS, somebody_elses=GOOD)
    install(place, "broken-ones", BROKEN, leaves_at_import="import sys\nsys.exit(3)\n")
    return place


@pytest.fixture
def installed(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(site)
    monkeypatch.setattr(plugins, "_EXAMINED", {})
    importlib.invalidate_caches()
    monkeypatch.delitem(sys.modules, "somebody_elses", raising=False)


@pytest.mark.usefixtures("installed")
def test_the_doctor_names_what_is_broken_and_nothing_else_minds(site: Path, spmhub: Spmhub) -> None:
    done = spmhub("doctor", "--json")
    found = {
        one["subject"].removeprefix("plug-in "): one for one in json.loads(done.out) if "plug-in" in one["subject"]
    }
    assert found["halfway"]["status"] == found["tiny"]["status"] == found["tagged"]["status"] == "ok"
    for name, why in {
        "absent": "nowhere_to_be_found",
        "leaves": "SystemExit: 3",
        "wrong": "of type Method, not Format",
        "missing": "no_such_name",
        "big": "calls itself 'tiny'",
        "spm": "spm-hub itself uses its name",
    }.items():
        assert found[name]["status"] == "warn"
        assert why in found[name]["detail"]
    assert "broken-ones" in found["leaves"]["detail"]
    assert found["leaves"]["mend"].endswith("uninstall broken-ones")
    listed = spmhub("list", "--json", "--registry", str(site))
    assert (listed.code, json.loads(listed.out)) == (0, [])
    (site / "x.safetensors").write_bytes(b"nonsense")
    refused = spmhub("convert", str(site / "x.safetensors"), "--to", "no-such")
    assert refused.code == 2
    assert "tagged" in refused.err, "the working one is offered beside the broken ones"


@pytest.mark.usefixtures("installed")
def test_nothing_is_imported_before_it_is_needed(tmp_path: Path) -> None:
    assert Recipe.make(target="snoopy", method="esd-x").method == "esd-x"
    pipe = pico_pipeline()
    assert family_of(pipe).name == "sd1"
    assert "somebody_elses" not in sys.modules
    with pytest.raises(RecipeError, match="did you mean halfway"):
        Recipe.make(target="snoopy", method="halfwy")
    assert "somebody_elses" in sys.modules


@pytest.mark.usefixtures("installed")
def test_an_objective_trains_with_what_it_presets() -> None:
    with pytest.raises(RecipeError, match="not 'spm'"):
        Recipe.make(target="snoopy", method="halfway", objective={"name": "spm"})
    assert Recipe.make(target="snoopy", method="halfway").steps == 7
    recipe = Recipe.make(
        target="snoopy", method="halfway", steps=3, batch_size=2,
        x_t={"trajectories": 2, "steps": 2, "chunks": 1, "guidance": (1.0,)}, optimiser={"lr": 1e-2},
    )  # fmt: skip
    halfway = training.train(recipe, pipe=pico_pipeline())
    assert halfway.manifest.recipe["method"] == "halfway"
    spm = training.train(
        Recipe.make(**{**recipe.model_dump(mode="json"), "method": "spm", "objective": {"name": "spm"}}),
        pipe=pico_pipeline(),
    )
    changed = [
        not torch.equal(one.up, spm.increments[path].up)  # type: ignore[union-attr]
        for path, one in halfway.increments.items()
    ]
    assert any(changed), "its own target, not SPM's"


class TinyBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.think = nn.Linear(4, 4)


class TinyDenoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([TinyBlock(), TinyBlock()])
        self.outside = nn.Linear(4, 4)


class TinyPipeline:
    def __init__(self) -> None:
        self.brain = TinyDenoiser()


@pytest.mark.usefixtures("installed")
def test_a_family_is_recognised() -> None:
    pipe = TinyPipeline()
    assert family_of(pipe).name == "tiny"
    assert set(targets(pipe.brain)) == {"blocks.0.think", "blocks.1.think"}


@pytest.mark.usefixtures("installed")
def test_a_format_is_read_and_written(tmp_path: Path) -> None:
    path = next(path for path in target_modules(pico_pipeline().unet) if path.endswith("attn1.to_q"))
    pair = {"down": torch.randn(2, 16), "up": torch.randn(16, 2)}
    save_file({f"tagged|{path}|{part}": tensor for part, tensor in pair.items()}, tmp_path / "x.safetensors")
    assert torch.equal(load_file(tmp_path / "x.safetensors").increments[path].tensors()["up"], pair["up"])
    adapter, read_as = conversion.read(tmp_path / "x.safetensors", Description(family="sd1"))
    assert read_as == "tagged"
    conversion.write(adapter, conversion.writer_named("tagged"), tmp_path / "y.safetensors")
    again, _ = conversion.read(tmp_path / "y.safetensors", Description(family="sd1"))
    assert torch.equal(again.increments[path].tensors()["down"], pair["down"])
    save_file({"tugged|x": torch.ones(2)}, tmp_path / "z.safetensors")
    with pytest.raises(AdapterFileError, match="tagged"):
        load_file(tmp_path / "z.safetensors")
