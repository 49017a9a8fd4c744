"""The public door: the five lines of Python that everything else is behind."""

import inspect
import pydoc
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from pico import pico_pipeline

import spm_hub
from spm_hub.adapters.adapter import Adapter, increment_info
from spm_hub.adapters.formats.lazy import StoredIncrements
from spm_hub.adapters.increments import Increment, LowRank
from spm_hub.adapters.manifest import Base, Concept
from spm_hub.attachment import attachment
from spm_hub.cli.app import app
from spm_hub.errors import RecipeError, UsageError
from spm_hub.registry.registry import Registry
from spm_hub.training import preflight
from spm_hub.training.recipe.recipe import Recipe

MODULE = "mid_block.attentions.0.proj_in"


def random_eraser(pipe: StableDiffusionPipeline, name: str, seed: int) -> Adapter:
    weight = pipe.unet.get_submodule(MODULE).weight
    random = torch.Generator().manual_seed(seed)
    down = torch.randn(1, *weight.shape[1:], generator=random)
    increments: dict[str, Increment] = {MODULE: LowRank(down, torch.randn(weight.shape[0], 1, 1, 1, generator=random))}
    manifest = spm_hub.Manifest(
        name=name,
        concept=Concept(target=name.replace("-", " ")),
        increment=increment_info(increments),
        base=Base(family="sd1", id="pico", fingerprint=""),
        recipe={},
    )
    return spm_hub.Adapter(manifest, increments)


def test_names_paths_and_adapters_are_attached_alike(tmp_path: Path) -> None:
    pipe = pico_pipeline()
    weight = pipe.unet.get_submodule(MODULE).weight
    adapters = [random_eraser(pipe, name, seed) for seed, name in enumerate(("snoopy", "mickey", "nudity"))]
    Registry(tmp_path).add(adapters[0])
    adapters[1].save(tmp_path / "alone.safetensors")
    before = weight.clone()
    with spm_hub.attach(
        pipe, ["snoopy", tmp_path / "alone.safetensors", adapters[2]], registry=tmp_path, gate="always", mode="fold"
    ) as erasers:
        assert set(erasers.names) == {"snoopy", "mickey", "nudity"}
        assert set(erasers.gates("a dog").values()) == {1.0}
    assert torch.equal(pipe.unet.get_submodule(MODULE).weight, before)
    with spm_hub.attach(pipe, "snoopy", registry=tmp_path) as erasers:
        assert list(erasers.names) == ["snoopy"]


def test_erasers_are_meant_by_their_concepts_too(tmp_path: Path) -> None:
    pipe = pico_pipeline()
    for seed, name in enumerate(("van-gogh", "mickey")):
        Registry(tmp_path).add(random_eraser(pipe, name, seed))
    folder = str(tmp_path)
    assert spm_hub.load("van gogh", registry=folder).name == "van-gogh"
    with spm_hub.attach(pipe, ["van gogh", "mickey"], registry=folder, strength={"Van Gogh": 0.5}) as erasers:
        assert dict(erasers.strength) == {"van-gogh": 0.5, "mickey": 1.0}
        erasers.strength["van gogh"] = 2.0
        assert erasers.strength["van gogh"] == erasers.strength["van-gogh"] == 2.0
        assert "monet" not in erasers.strength
        assert erasers.strength.get("monet", 7.0) == 7.0
        erasers.recover("van gogh")
        assert erasers.names == ("mickey",)
    with pytest.raises(UsageError, match=r"strength names 'van-gogh' twice: 1\.0 and 2\.0"):
        spm_hub.attach(pipe, "van-gogh", registry=folder, strength={"van gogh": 1.0, "van-gogh": 2.0})


def test_both_doors_of_attach_document_the_same_parameters() -> None:
    """One line each in the docstring, one type and one default: nothing is taken that neither shows."""
    door, inner = (inspect.signature(one).parameters for one in (spm_hub.attach, attachment.attach))
    assert door.keys() - inner.keys() == {"registry"}
    assert not inner.keys() - door.keys()
    assert all(one.kind is not one.VAR_KEYWORD for one in (*door.values(), *inner.values()))
    assert {name: one.default for name, one in inner.items()} == {name: door[name].default for name in inner}
    lines = [
        dict(line.strip().split(": ", 1) for line in (one.__doc__ or "").splitlines() if ": " in line)
        for one in (spm_hub.attach, attachment.attach)
    ]
    for name in list(inner)[2:]:
        assert lines[0][name] == lines[1][name]
        assert door[name].annotation != door[name].empty
    shown = pydoc.plain(pydoc.render_doc(spm_hub.attach))
    for name in door:
        assert f"{name}:" in shown
    assert "Literal['auto', 'fold', 'branch'] = 'auto'" in shown


def test_what_the_door_does_not_take_is_told_what_it_takes(tmp_path: Path) -> None:
    pipe = pico_pipeline()
    Registry(tmp_path).add(random_eraser(pipe, "snoopy", 0))
    with pytest.raises(UsageError, match=r"adapters is a mapping") as caught:
        spm_hub.attach(pipe, {"snoopy": 0.5}, registry=tmp_path)  # type: ignore[arg-type]
    assert "strength={...}" in str(caught.value.mend)
    with spm_hub.attach(pipe, [], registry=tmp_path) as erasers:
        with pytest.raises(UsageError, match="add takes an Adapter, not 'snoopy'"):
            erasers.add("snoopy")  # type: ignore[arg-type]
        assert erasers.names == ()
    for concept in ([], ["snoopy", 3], None):
        with pytest.raises(UsageError, match="train takes a concept, a list of concepts or a Recipe"):
            spm_hub.train(concept)  # type: ignore[arg-type]


def test_under_a_budget_references_are_read_when_a_prompt_needs_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, loaded, load = pico_pipeline(), list[Adapter](), spm_hub.load

    def noting(*given: Any, **options: Any) -> Adapter:
        loaded.append(load(*given, **options))
        return loaded[-1]

    monkeypatch.setattr(spm_hub, "load", noting)
    for seed, name in enumerate(("snoopy", "mickey")):
        Registry(tmp_path).add(random_eraser(pipe, name, seed))
    with spm_hub.attach(pipe, ["snoopy", "mickey"], registry=tmp_path, increment_budget=1, gate="always"):
        stored = [adapter.increments for adapter in loaded]
        pipe("a dog", num_inference_steps=1, output_type="latent")
        assert [one.nbytes for one in stored if isinstance(one, StoredIncrements)] == [0, 0]


def test_both_doors_train_by_the_same_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Recipe] = []

    def stop(recipe: Recipe, folder: object) -> None:
        seen.append(recipe)
        raise UsageError("far enough")

    monkeypatch.setattr(preflight, "check_before_loading", stop)
    Registry(tmp_path)
    with pytest.raises(UsageError, match="far enough"):
        spm_hub.train("nudity", steps=7, optimiser={"lr": 0.5})
    with pytest.raises(SystemExit):
        app(["train", "nudity", "--set=steps=7", "--set=optimiser.lr=0.5", "--registry", str(tmp_path)])
    assert seen[0] == seen[1]
    assert (seen[0].kind, seen[0].aliases) == ("nsfw", ("nude", "naked"))
    whole = seen[0].with_set("optimiser.warmup=3")
    with pytest.raises(UsageError, match="far enough"):
        spm_hub.train(whole, optimiser={"lr": 0.25})
    assert seen[2] == whole.with_set("optimiser.lr=0.25"), "of a part only what was given changes"


@pytest.mark.parametrize("concept", ["", "  "])
def test_an_empty_concept(concept: str) -> None:
    with pytest.raises(UsageError, match="empty"):
        spm_hub.train(concept)


def test_an_unknown_key_or_method() -> None:
    with pytest.raises(RecipeError, match="stepz is unknown; did you mean steps"):
        spm_hub.train("snoopy", stepz=3)
    with pytest.raises(RecipeError, match="unknown method; did you mean spm"):
        spm_hub.train("snoopy", method="spn")


def test_an_unknown_attribute() -> None:
    with pytest.raises(AttributeError, match="nothing"):
        _ = spm_hub.nothing
