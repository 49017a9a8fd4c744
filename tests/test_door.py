"""The public door: the five lines of Python that everything else is behind."""

import inspect
import pydoc
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from pico import pico_eraser, pico_pipeline
from PIL import Image

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
    assert door.keys() - inner.keys() == {"registry", "erase", "look"}
    assert not inner.keys() - door.keys()
    assert all(one.kind is not one.VAR_KEYWORD for one in (*door.values(), *inner.values()))
    assert {name: one.default for name, one in inner.items()} == {
        name: door[name].default if name != "adapters" else inner[name].default for name in inner
    }
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


def test_apply_returns_pictures_with_and_without_and_writes_them(tmp_path: Path) -> None:
    pipe, snoopy = pico_pipeline(), pico_eraser(pico_pipeline().unet, "snoopy")
    Registry(tmp_path).add(pico_eraser(pipe.unet, "mickey", 2))
    prompts = ["snoopy", "a dog"]
    applied = spm_hub.apply(
        [snoopy, "mickey"], prompts, pipe=pipe, registry=tmp_path, seed=5, number=2, steps=2, out=tmp_path / "drawn"
    )

    def drawn(prompt: str) -> list[bytes]:
        generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
        made = pipe(prompt, num_inference_steps=2, generator=generators, num_images_per_prompt=2).images
        return [picture.tobytes() for picture in made]

    assert [[one.tobytes() for one in each] for each in applied.without] == [drawn(prompt) for prompt in prompts]
    with spm_hub.attach(pipe, [snoopy, "mickey"], registry=tmp_path) as erasers:
        assert [[one.tobytes() for one in each] for each in applied.with_erasers] == list(map(drawn, prompts))
        assert [dict(one) for one in applied.gammas] == [erasers.gates(prompt) for prompt in prompts]
    assert applied.names == ("snoopy", "mickey")
    assert applied.sources["model"] == "StableDiffusionPipeline, the given StableDiffusionPipeline"
    assert applied.sources["mickey"] == str(tmp_path / "adapters" / "mickey.safetensors")
    assert {key: len(paths) for key, paths in applied.files.items()} == {"without": 4, "with": 4, "grid": 1}
    with Image.open(applied.files["grid"][0]) as written:
        assert written.tobytes() == applied.grid.tobytes()
    with Image.open(applied.files["with"][1]) as written:
        assert written.tobytes() == applied.with_erasers[0][1].tobytes()

    alone = spm_hub.apply(snoopy, "snoopy", pipe=pipe, steps=2, seed=5, gate=0.0, compare=False, progress=False)
    assert (alone.without, alone.files) == ((), {})
    assert alone.gammas == ({"snoopy": 0.0},)
    assert alone.with_erasers[0][0].tobytes() == drawn("snoopy")[0]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"prompts": []}, "there is no prompt"),
        ({"prompts": ["snoopy", " "]}, "prompt 2 is empty"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"strength": {"snopy": 1.0}}, "no eraser 'snopy' among these: snoopy"),
        ({"device": "meta"}, "weights have no values"),
        ({"model": "sketchbok"}, "did you mean sketchbook"),
    ],
)
def test_what_apply_refuses_before_a_model_is_loaded(
    options: dict[str, Any], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    snoopy = pico_eraser(pico_pipeline().unet, "snoopy")
    monkeypatch.setattr("spm_hub.models.loading.load_pipeline", None)
    with pytest.raises(UsageError, match=says):
        spm_hub.apply(snoopy, **{"prompts": "snoopy", **options})
    with pytest.raises(UsageError, match="rows is 'neither'"):
        spm_hub.apply(snoopy, "snoopy", pipe=pico_pipeline(), rows="neither")  # type: ignore[arg-type]


def test_the_door_lists_what_it_has_and_documents_every_parameter() -> None:
    assert dir(spm_hub) == sorted(spm_hub.__all__) == sorted(set(spm_hub.__all__))
    for name in spm_hub.__all__:
        thing = getattr(spm_hub, name)
        if not inspect.isfunction(thing):
            continue
        for parameter in inspect.signature(thing).parameters.values():
            assert parameter.annotation is not inspect.Parameter.empty, (name, parameter)
            assert parameter.kind != parameter.VAR_KEYWORD or parameter.name == "recipe", (name, parameter)
            if parameter.name != "pipe":
                assert re.search(rf"\b{parameter.name}\b", thing.__doc__ or ""), (name, parameter)


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
