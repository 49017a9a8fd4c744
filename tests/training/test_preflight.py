"""What is refused before any weights are read, and trainings that would end in nothing, or in no numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pico import pico_pipeline
from pico_families import family_pipeline

import spm_hub
from spm_hub.errors import RecipeError
from spm_hub.evaluation.attacks.noising import Noising
from spm_hub.training import Recipe, train
from spm_hub.training.base_model import TeacherModel
from spm_hub.training.preflight import check_before_loading
from spm_hub.training.trainer import TrainingDivergedError

SMALL = {"target": "snoopy", "steps": 3, "batch_size": 2, "x_t": {"steps": 3, "trajectories": 2, "chunks": 1}}


@pytest.fixture(scope="module")
def outlines(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folders of pipelines whose weights are gone: whatever is found out there, is found out without them."""

    def outline(family: str) -> Path:
        folder = tmp_path_factory.getbasetemp() / f"outline-{family}"
        if not folder.is_dir():
            family_pipeline(family).save_pretrained(folder)
            for weights in folder.rglob("*.safetensors"):
                weights.unlink()
        return folder

    return outline


@pytest.mark.parametrize(
    ("family", "values", "words"),
    [
        (
            "sd1",
            {"increment": {"kind": "vera", "rank": 4}},
            r"PEFT has none for .*proj_in, a Conv2d(.|\n)*modules=esd-x",
        ),
        ("sd1", {"method": "minimalist", "masks": {"groups": ["norm"]}}, r"'norm'(.|\n)*groups=\[ff, attn\]"),
        ("sd2", {"method": "race"}, r"this one predicts v_prediction(.|\n)*goal=concept"),
        ("flux-schnell", {"method": "race"}, "this one predicts a flow"),
        ("flux-schnell", {"method": "esd-selfattn"}, "no modules of 'esd-selfattn'"),
        ("flux-schnell", {"method": "fmn"}, "needs cross-attention, which FluxTransformer2DModel"),
        ("sd3", {"method": "fmn"}, "needs cross-attention, which SD3Transformer2DModel"),
        ("sd3", {"method": "sepme"}, "cannot be made separable"),
        ("pixart", {"method": "fmn"}, "knows no denoiser whose prompts are masked"),
        ("pixart", {"method": "sepme"}, "cannot be made separable"),
        (
            "sd1",
            {"x_t": {**SMALL["x_t"], "told": 2.0}},
            "x_t.guidance_embedding: 2 is for models with a guidance input",
        ),
        ("flux-schnell", {"x_t": {**SMALL["x_t"], "guidance_embedding": 2.0}}, "FluxTransformer2DModel has none"),
    ],
)
def test_what_a_models_outline_rules_out_is_refused_without_its_weights_and_with_them(
    outlines: Callable[[str], Path], family: str, values: dict[str, Any], words: str
) -> None:
    drawn = {} if values.get("method") == "minimalist" else SMALL["x_t"]
    plan = Recipe.make(**{**SMALL, "x_t": drawn, **values})
    with pytest.raises(RecipeError, match=words):
        check_before_loading(plan, outlines(family))
    with pytest.raises(RecipeError, match=words):
        train(plan, pipe=family_pipeline(family))


@pytest.mark.parametrize("family", ["sd1", "sdxl", "flux-schnell", "pixart"])
def test_what_can_be_trained_passes(outlines: Callable[[str], Path], family: str) -> None:
    for method in ("spm", "esd-x", "minimalist", "sdd", *(("uce",) if family in ("sd1", "sdxl") else ())):
        check_before_loading(Recipe.make(target="snoopy", method=method), outlines(family))
    check_before_loading(Recipe.make(target="snoopy"), None)


@pytest.mark.parametrize("family", ["flux-schnell", "sd3", "pixart"])
def test_uce_is_refused_where_keys_and_values_do_not_read_the_text_encoders_own_states(
    outlines: Callable[[str], Path], family: str
) -> None:
    """At pico size the widths are equal, so that only looking at what the modules are given can tell."""
    plan = Recipe.make(target="snoopy", method="uce")
    with pytest.raises(RecipeError, match="method 'uce' edits what modules make of the text"):
        check_before_loading(plan, outlines(family))
    with pytest.raises(RecipeError, match="method 'uce' edits what modules make of the text"):
        train(plan, pipe=family_pipeline(family))


def test_a_damaged_configuration_is_left_to_whoever_loads_the_model(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    for text in (
        "",
        "[]",
        '{"_class_name": "UNet2DConditionModel", "down_block_types": 3}',
        '{"_class_name": "utils"}',
    ):
        (tmp_path / "unet" / "config.json").write_text(text)
        check_before_loading(Recipe.make(target="snoopy"), tmp_path)


def test_the_door_refuses_before_it_loads(outlines: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spm_hub.models.loading.load_pipeline", lambda *args, **given: pytest.fail("loaded"))
    with pytest.raises(RecipeError, match="PEFT has none"):
        spm_hub.train("snoopy", model=str(outlines("sd1")), increment={"kind": "vera", "rank": 4})


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"surrogate": "Snoopy "}, "surrogate 'snoopy' is itself to be erased"),
        ({"surrogate": "beagle", "aliases": ["beagle"]}, "surrogate 'beagle' is itself"),
        ({"method": "uce", "surrogate": "dog", "together": [{"target": "dog"}]}, "surrogate 'dog' is itself"),
        ({"method": "ca", "target": "painting", "kind": "style"}, "surrogate 'painting' is itself"),
        ({"anchoring": {"source": "given", "prompts": ["a cat", "SNOOPY"]}}, "'snoopy' is both to be erased and"),
        ({"anchoring": {"alpha": -400}}, "alpha -400 is beyond"),
        ({"x_t": {"steps": 1000}}, "x_t.steps.*less than or equal to 999"),
        (
            {"method": "sepme", "together": [{"target": "dog"}], "protection": {"prompts": ["dog"]}},
            "'dog' cannot be erased and protected at once",
        ),
        (
            {"method": "sepme", "aliases": ["beagle"], "protection": {"prompts": ["a cat", "Beagle"]}},
            "'beagle' cannot be erased and protected at once",
        ),
        ({"method": "sepme", "together": [{"target": "snoopy"}]}, "together names 'snoopy' twice"),
    ],
)
def test_recipes_that_contradict_themselves_are_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        Recipe.make(**{"target": "snoopy", **values})


def test_the_finest_schedules_stay_inside_the_models_own() -> None:
    """SD1's schedule begins at 1: the last of a thousand steps would be the thousandth of times 0 to 999."""
    pipe = pico_pipeline()
    plan = Recipe.make(**{**SMALL, "steps": 1, "x_t": {"source": "student", "steps": 999}})
    base = TeacherModel(pipe)
    assert int(base.scheduler(plan.x_t.steps).timesteps.max()) <= 999
    noising = Noising(base)
    latents = torch.randn(1, *base.latent_shape, generator=torch.Generator().manual_seed(0))
    assert [int(time) for time in noising.times(50)] == list(range(10, 1000, 20)), "UnlearnDiffAtk's fifty times"
    for count in (600, 2000):
        times = noising.times(count)
        assert len(times) == count
        noising.add_noise(latents, latents, times[-1][None])


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"optimiser": {"lr": 1e30}}, r"diverged: step [23] of 3 has a loss(.|\n)*optimiser.lr=1e\+29"),
        ({"steps": 1, "optimiser": {"lr": 1e36, "scale_lr": True, "warmup": 0}}, "the increment at .* is not finite"),
        ({"objective": {"eta": 1e30}}, "step 1 of 3"),
    ],
)
def test_a_training_that_leaves_the_numbers_ends_without_an_eraser(
    tmp_path: Path, values: dict[str, Any], words: str
) -> None:
    values = {"increment": {"dtype": "float16"}, **values} if "steps" in values else values
    pipe = pico_pipeline()
    before = {key: value.clone() for key, value in pipe.unet.state_dict().items()}
    with pytest.raises(TrainingDivergedError, match=words):
        train(Recipe.make(**{**SMALL, **values}), pipe=pipe, checkpoint_dir=tmp_path, checkpoint_every=1)
    after = pipe.unet.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("method", ["spm", "minimalist"])
def test_a_concept_that_the_base_draws_as_its_surrogate_is_no_division_by_zero(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = {"steps": 2} if method == "minimalist" else SMALL["x_t"]
    plan = Recipe.make(**{**SMALL, "method": method, "x_t": drawn, "surrogate": "dog", "templates": False})
    pipe = pico_pipeline()
    # A text encoder to which all is one.
    encode = type(pipe).encode_prompt
    monkeypatch.setattr(
        type(pipe),
        "encode_prompt",
        lambda pipe, prompt, *args, **given: encode(pipe, ["dog"] * len(prompt), *args, **given),
    )
    with pytest.raises(RecipeError, match=r"predicts the same for 'snoopy' as for its surrogate 'dog'"):
        train(plan, pipe=pipe)
