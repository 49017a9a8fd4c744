"""Methods: losses and closed forms against float64 transcriptions, ESD's choices against the official key lists."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from pico import pico_eraser, pico_pipeline
from pico_families import family_pipeline
from safetensors.torch import save_file
from torch import nn

from spm_hub.adapters.increments import Dense, LowRank
from spm_hub.attachment.attachment import attach
from spm_hub.errors import RecipeError, UsageError
from spm_hub.training import Recipe, train
from spm_hub.training.base_model import TeacherModel
from spm_hub.training.data.anchors import AnchorSource
from spm_hub.training.data.prompts import PromptMaker, Words, vocabulary_words
from spm_hub.training.data.sampling import generator_for
from spm_hub.training.data.student import StudentSource
from spm_hub.training.data.token_positions import last_position
from spm_hub.training.data.trajectories import TrajectorySource
from spm_hub.training.loop.checkpoint import Checkpoint
from spm_hub.training.methods import METHODS
from spm_hub.training.methods.esd import ESD
from spm_hub.training.recipe.schema import IncrementRecipe, Masks
from spm_hub.training.trainable.dense import TrainableDense
from spm_hub.training.trainable.low_rank import TrainableLowRank
from spm_hub.training.trainable.mask import TrainableMask
from spm_hub.training.trainable.module_selection import select_modules

KEYS = Path(__file__).resolve().parents[3] / "shared" / "conformance" / "esd_keys"
RECIPES = sorted((Path(__file__).resolve().parents[2] / "manifests" / "recipes").glob("*.yaml"))
SMALL = {"target": "snoopy", "steps": 6, "batch_size": 4, "x_t": {"steps": 5, "trajectories": 4, "chunks": 3}}


# UCE's own choice of states.
PAPER = {"tokens": "last", "sentences": 0, "held": 0, "rank": None, "preserve": (), "erase_scale": 1.0}


def recipe(**values: object) -> Recipe:
    return Recipe.make(**{**SMALL, **values})


def test_esd_is_its_equation_in_float64_in_both_conventions() -> None:
    prediction, concept, empty = np.random.default_rng(0).normal(size=(3, 2, 4, 8, 8))
    given = [torch.from_numpy(array) for array in (prediction, concept, empty)]
    for eta in (0.0, 1.0, 3.0):
        expected = np.mean((prediction - (empty - eta * (concept - empty))) ** 2)
        assert float(ESD(eta).erase(*given)) == pytest.approx(expected, rel=1e-12)
        assert float(ESD(eta + 1, "rewrite").erase(*given)) == pytest.approx(expected, rel=1e-12)
        goal = np.mean((concept - (empty - eta * (concept - empty))) ** 2)
        assert float(ESD(eta).distance(*given[1:])) == pytest.approx(goal, rel=1e-12)
        assert float(ESD(eta + 1, "rewrite").distance(*given[1:])) == pytest.approx(goal, rel=1e-12)


@pytest.mark.parametrize("source", ["trajectory", "student"])
def test_erase_x_from_y_trains_y_towards_y_without_x(source: str) -> None:
    plan = recipe(
        method="esd-x", templates=False, erase_from="a dog", objective={"eta": 2.5},
        x_t={**SMALL["x_t"], "source": source}, anchoring={"weight": 0.0},
    )  # fmt: skip
    base = TeacherModel(pico_pipeline())
    maker = PromptMaker(("snoopy",), plan.kind, Words.load(), vocabulary_words(base.pipe.tokenizer))
    anchors = AnchorSource(base, plan.anchoring, plan.target, maker)
    injection = TrainableDense(select_modules(base.denoiser, "esd-x"))
    made = TrajectorySource(base, plan, maker, anchors)
    batch = (made if source == "trajectory" else StudentSource(base, plan, maker, anchors, injection)).batch(1)
    assert len(batch.anchor_latents) == 0
    x, y, empty = base.encode(["snoopy", "a dog", ""])
    size = len(batch.latents)
    assert torch.equal(batch.states.states, y.expand(size).states)
    with torch.no_grad():
        at_x, at_y, at_empty = (
            base.predict(batch.latents, batch.times, told.expand(size)).double() for told in (x, y, empty)
        )
    expected = at_y - 2.5 * (at_x - at_empty)
    found = ESD(2.5, "rewrite").target(batch.concept.double(), batch.neutral.double())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    injection.remove()


def sd14() -> UNet2DConditionModel:
    return UNet2DConditionModel(cross_attention_dim=768)


def sdxl() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        block_out_channels=(320, 640, 1280), cross_attention_dim=2048, attention_head_dim=[5, 10, 20],
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=[1, 2, 10], use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
    )  # fmt: skip


def flux_dev() -> FluxTransformer2DModel:
    return FluxTransformer2DModel(guidance_embeds=True)


@pytest.mark.skipif(not KEYS.is_dir(), reason="no conformance files beside this checkout")
@pytest.mark.parametrize(
    ("prefix", "make"),
    [("sd14", sd14), ("sdxl", sdxl), ("flux_schnell", FluxTransformer2DModel), ("flux_dev", flux_dev)],
)  # fmt: skip
def test_esd_changes_exactly_what_the_official_files_hold(prefix: str, make: Callable[[], nn.Module]) -> None:
    with torch.device("meta"):
        denoiser = make()
    lists = sorted(KEYS.glob(f"{prefix}_*.txt"))
    assert len(lists) >= 2
    for path in lists:
        expected = dict(line.split("\t") for line in path.read_text().splitlines() if line.strip())
        name = path.stem.removeprefix(f"{prefix}_").replace("selfattn", "esd-selfattn")
        found = {
            f"{module}.{part}": str(tuple(parameter.shape))
            for module, layer in select_modules(denoiser, name).items()
            for part, parameter in layer.named_parameters()
        }
        assert found == expected, path.name
    if prefix.startswith("flux"):
        strict, both = (select_modules(denoiser, name).keys() for name in ("esd-x-strict", "esd-x-strict-text"))
        assert {key.rpartition(".")[2] for key in both - strict} == {"add_k_proj", "add_v_proj"}
        assert strict < both
        with pytest.raises(RecipeError, match="esd-selfattn"):
            select_modules(denoiser, "esd-selfattn")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_increments_begin_at_nothing_freeze_to_the_base_and_go(dtype: torch.dtype) -> None:
    pipe = pico_pipeline(dtype=dtype)
    unet = pipe.unet
    before = {key: value.clone() for key, value in unet.state_dict().items()}
    latents, states = torch.randn(2, 4, 8, 8).to(dtype), torch.randn(2, 12, 16).to(dtype)
    with torch.no_grad():
        plain = unet(latents, 500, states).sample
        injection = TrainableDense(select_modules(unet, "esd-all"))
        assert torch.equal(unet(latents, 500, states).sample, plain)
        for delta in injection.state().values():
            assert delta.dtype == torch.float32
            delta.add_(0.02)
        changed = unet(latents, 500, states).sample
        assert not torch.equal(changed, plain)
        with injection.frozen():
            assert torch.equal(unet(latents, 500, states).sample, plain)
        injection.remove()
        assert torch.equal(unet(latents, 500, states).sample, plain)
        for path, increment in injection.increments().items():
            module = unet.get_submodule(path)
            module.weight.data = (module.weight.float() + increment.delta).to(dtype)
            if increment.delta_bias is not None:
                module.bias.data = (module.bias.float() + increment.delta_bias).to(dtype)
        assert torch.equal(unet(latents, 500, states).sample, changed)
    assert list(before) == list(unet.state_dict())
    assert not any("forward" in module.__dict__ for module in unet.modules())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("increment", "x_t"), [({"kind": "dense"}, "student"), ({"kind": "low_rank", "rank": 2}, "trajectory")]
)
def test_esd_lowers_its_loss_and_a_resumed_run_is_the_same_run(
    tmp_path: Path, increment: dict[str, object], x_t: str
) -> None:
    plan = recipe(method="esd-x", increment=increment, x_t={**SMALL["x_t"], "source": x_t}, steps=20)
    plan = plan.with_set(
        "optimiser.lr=5e-5" if increment["kind"] == "dense" else "optimiser.lr=1e-3",
        "optimiser.warmup=2",
        "optimiser.ema=null",
        "stop.reach=null",
    )
    pipe = pico_pipeline()
    before = {key: value.clone() for key, value in pipe.unet.state_dict().items()}
    whole = train(plan, pipe=pipe)
    base = TeacherModel(pipe)
    noise, told = base.noise(8, generator_for(3, 0, 0)), base.encode(["snoopy", ""])
    times = torch.linspace(50, 950, 8).long()
    with torch.no_grad():
        concept, neutral = (base.predict(noise, times, told[row].expand(8)) for row in (0, 1))
        with attach(pipe, [whole], gate="always"):
            erased = base.predict(noise, times, told[0].expand(8))
    assert float(ESD(1.0).erase(erased, concept, neutral) / ESD(1.0).distance(concept, neutral)) < 0.95

    def interrupt(step: int, total: int, info: dict[str, float]) -> None:
        if step == 8:
            raise RuntimeError("killed: nothing is written now, the last checkpoint is that of step 6")

    with pytest.raises(RuntimeError, match="killed"):
        train(plan, pipe=pipe, progress=interrupt, checkpoint_dir=tmp_path, checkpoint_every=3)
    steps: list[int] = []
    resumed = train(
        plan, pipe=pipe, checkpoint_dir=tmp_path, resume=True, progress=lambda step, total, info: steps.append(step)
    )  # fmt: skip
    assert steps[0] == 7
    whole.save(tmp_path / "whole.safetensors")
    resumed.save(tmp_path / "resumed.safetensors")
    assert (tmp_path / "whole.safetensors").read_bytes() == (tmp_path / "resumed.safetensors").read_bytes()
    assert all(torch.equal(value, before[key]) for key, value in pipe.unet.state_dict().items())
    assert whole.increments.keys() == select_modules(pipe.unet, "esd-x").keys()
    assert {type(found) for found in whole.increments.values()} == {Dense if "rank" not in increment else LowRank}
    assert whole.manifest.recipe["objective"].items() >= {"name": "esd", "eta": 2.0, "convention": "rewrite"}.items()
    with attach(pipe, [resumed], gate="always"):
        pass
    assert all(torch.equal(value, before[key]) for key, value in pipe.unet.state_dict().items())


def test_low_rank_layers_may_be_put_on_any_selection() -> None:
    unet = pico_pipeline().unet
    chosen = select_modules(unet, "esd-u")
    injection = TrainableLowRank(unet, 2, generator_for(0, 2, 0), chosen)
    assert set(injection.paths) == set(chosen)
    assert {path: found.weight_shape for path, found in injection.increments().items()} == {
        path: tuple(module.weight.shape) for path, module in chosen.items()
    }
    injection.remove()


@pytest.mark.parametrize(("erase", "preserve"), [(1.0, 1.0), (3.0, 0.25)])
def test_uce_is_its_closed_form_in_float64(erase: float, preserve: float) -> None:
    names, kept, ridge = ("snoopy", "van gogh"), ("a dog", "mickey mouse"), 0.7
    pipe = pico_pipeline()
    plan = Recipe.make(
        target=names[0], aliases=names[1:], surrogate="cat", method="uce",
        closed_form={**PAPER, "ridge": ridge, "preserve": kept, "erase_scale": erase, "preserve_scale": preserve},
    )  # fmt: skip
    adapter = train(plan, pipe=pipe)
    tokenizer = pipe.tokenizer

    def state(prompt: str) -> np.ndarray:
        window = tokenizer(prompt, padding="max_length", max_length=tokenizer.model_max_length, return_tensors="pt")
        end = int((window.input_ids[0] == tokenizer.eos_token_id).nonzero()[0])
        with torch.no_grad():
            return pipe.text_encoder(window.input_ids)[0][0, end - 1].double().numpy()

    goal = state("cat")
    cross = {path for path, _ in pipe.unet.named_modules() if path.endswith(("attn2.to_k", "attn2.to_v"))}
    assert set(adapter.increments) == cross
    for path, increment in adapter.increments.items():
        w = pipe.unet.get_submodule(path).weight.detach().double().numpy()
        left, m = ridge * w, ridge * np.eye(w.shape[1])
        for c in map(state, names):
            left, m = left + erase * np.outer(w @ goal, c), m + erase * np.outer(c, c)
        for c in map(state, kept):
            left, m = left + preserve * np.outer(w @ c, c), m + preserve * np.outer(c, c)
        expected = left @ np.linalg.inv(m) - w
        assert isinstance(increment, LowRank)
        assert increment.rank == len(names)
        found = increment.delta_for(pipe.unet.get_submodule(path).weight).double().numpy()
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5 * np.abs(expected).max())
        assert np.linalg.matrix_rank(expected, tol=1e-8) == len(names)
    one = train(Recipe.make(target="snoopy", method="uce", closed_form=PAPER), pipe=pipe)
    assert {found.rank for found in one.increments.values() if isinstance(found, LowRank)} == {1}


def test_the_last_subject_token_of_a_text_too_long_is_inside_the_window() -> None:
    tokenizer = pico_pipeline().tokenizer
    found = [last_position(tokenizer, text) for text in ("", "dog", "dog " * 50)]
    assert found == [0, 1, tokenizer.model_max_length - 2]


def test_uce_puts_the_encoded_empty_prompt_in_a_concepts_place_on_sdxl_too() -> None:
    """Guidance tells SDXL zeros in place of no prompt; of zeros, keys and values would be nothing at all."""
    pipe = family_pipeline("sdxl")
    adapter = train(Recipe.make(target="snoopy", method="uce", closed_form=PAPER), pipe=pipe)

    def encoded(prompt: str) -> np.ndarray:
        with torch.no_grad():
            return pipe.encode_prompt(prompt, device="cpu", do_classifier_free_guidance=False)[0][0].double().numpy()

    c, goal = encoded("snoopy")[last_position(pipe.tokenizer, "snoopy")], encoded("")[0]
    for path, increment in adapter.increments.items():
        w = pipe.unet.get_submodule(path).weight.detach().double().numpy()
        left = 0.5 * w + np.outer(w @ goal, c)
        expected = left @ np.linalg.inv(0.5 * np.eye(w.shape[1]) + np.outer(c, c)) - w
        found = increment.delta_for(pipe.unet.get_submodule(path).weight).double().numpy()
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"method": "esdx"}, "unknown method.*did you mean esd-x"),
        ({"method": "ucee"}, "did you mean uce"),
        ({"method": "esd-x", "objective": {"eta": 0}}, "objective.*nothing is erased"),
        (
            {"method": "uce", "increment": {"kind": "dense"}},
            "^recipe: increment.kind 'dense' would change nothing: method 'uce' does not read it; it gives an exact",
        ),
        (
            {"method": "uce", "steps": 5},
            "^recipe: steps 5 would change nothing: method 'uce' does not read it; it is a closed form, without",
        ),
        ({"method": "uce", "objective": {"eta": 3}}, "closed_form.ridge"),
        ({"method": "spm", "closed_form": {"ridge": 1}}, "method 'spm' does not read it(.|\n)*: 'uce'\n"),
        ({"method": "esd-x", "objective": {"name": "spm", "convention": "paper"}}, "has the objective 'esd'"),
        ({"objective": {"convention": "rewrite"}}, "convention 'rewrite' would change nothing(.|\n)*: 'race', 'esd-x'"),
        ({"erase_from": "a dog"}, "templates has to be false"),
        (
            {"method": "sdd", "erase_from": "a dog", "templates": False},
            "erase_from 'a dog' needs the frozen base's prediction",
        ),
        (
            {"method": "fmn", "anchoring": {"weight": 40}, "x_t": {"source": "student"}},
            "anchoring.weight is 40, but anchoring.per_target 0",
        ),
        ({"method": "fmn", "anchoring": {"weight": 40}}, "anchoring.weight is 40, but anchoring.per_target 0"),
        (
            {"method": "fmn", "anchoring": {"source": "given", "prompts": ["a cat"]}},
            "anchoring.prompts is .'a cat',., but anchoring.weight 0: nothing would be kept",
        ),
        ({"method": "fmn", "anchoring": {"alpha": 1}}, "anchoring.alpha is 1.0, but anchoring.weight 0"),
        ({"method": "fmn", "surrogate": "a dog"}, "does not read surrogate 'a dog'"),
        (
            {"method": "fmn", "objective": {"paired": True}, "surrogate": "dog"},
            "paired True would change nothing: method 'fmn' does not read it; it asks for no",
        ),
        (
            {"method": "uce", "objective": {"paired": True}, "surrogate": "dog"},
            "paired True would change nothing: method 'uce' does not read it; it always",
        ),
        ({"name": ""}, "recipe key name: an eraser's name .* or leave it out"),
        ({"name": "My snoopy"}, "for instance my-snoopy"),
        ({"increment": {"beta": 0.1}}, "beta 0.1 belongs to kind 'null_space'"),
        ({"stop": {"after": 3}}, "after 3 say how to stop, and below is null"),
        ({"increment": {"kind": "dense", "rank": 8}}, "kind 'dense' has no rank"),
        ({"method": "esd-x", "increment": {"modules": "esd-y"}}, "increment.modules: unknown.*esd-"),
        ({"method": "uce", "closed_form": {"preserve": ["Snoopy "]}}, "'snoopy' is both to be erased and to be kept"),
        ({"optimiser": {"cycles": 5}}, "optimiser.cycles 5 belongs to schedule 'cosine_restarts'"),
        ({"anchoring": {"source": "gaussian", "alpha": 1.0}}, "anchoring.alpha 1 chooses among sentences"),
        (
            {
                "method": "esd-x",
                "erase_from": "a dog",
                "templates": False,
                "surrogate": "cat",
                "objective": {"paired": True},
            },
            "erase_from 'a dog' compares with the empty prompt",
        ),
        (
            {"method": "race", "increment": {"kind": "loha", "rank": 4}, "start_from": "snoopy"},
            "try --increment lora:4",
        ),
        ({"resolution": 13}, "resolution: Input should be a multiple of 8"),
    ],
)
def test_impossible_combinations_are_refused_with_the_reason(values: dict[str, object], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        Recipe.make(target="snoopy", **values)


def test_beta_and_l1_are_those_of_the_increments_they_are_for() -> None:
    """SepME's small beta, under the rates of other methods, trained and erased nothing."""
    strict = {"kind": "null_space", "modules": "esd-x-strict"}
    assert Recipe.make(target="snoopy", method="sepme").increment.beta == 1e-2
    for method in ("race", "esd-x", "ca", "spm"):
        assert Recipe.make(target="snoopy", method=method, increment=strict).increment.beta == 1.0
        assert Recipe.make(target="snoopy", method=method, increment={**strict, "beta": 0.1}).increment.beta == 0.1
    assert Recipe.make(target="snoopy", method="sepme", increment={"kind": "loha", "rank": 4}).regulariser.l1 == 0
    assert Recipe.make(target="snoopy", method="sepme", increment={"kind": "dense"}).regulariser.l1 == 1e-6


def test_a_recipes_anchoring_may_be_switched_off_by_its_weight_alone() -> None:
    path = next(path for path in RECIPES if path.stem == "spm-sd1")
    assert Recipe.plan(path, sets=("anchoring.weight=0",), target="church").anchoring.per_target == 4


@pytest.mark.parametrize("method", METHODS)
def test_every_method_survives_yaml_with_every_part_changed(method: str, tmp_path: Path) -> None:
    changes = [] if method == "fmn" else ["surrogate=dog"]
    if method == "minimalist":
        changes += ["masks.groups=[linear]", "masks.beta=0.5", "templates=false", "steps=9"]
    elif method not in ("instant", "uce"):
        changes += ["increment.kind=low_rank", "increment.rank=1", "anchoring.weight=40", "anchoring.per_target=1"]
        changes += ["templates=false", "steps=9"]
    plan = Recipe.make(target="snoopy", method=method).with_set(*changes)
    (tmp_path / "recipe.yaml").write_text(plan.to_yaml())
    assert Recipe.plan(tmp_path / "recipe.yaml") == plan


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_recipes_that_come_along_are_valid(path: Path) -> None:
    plan = Recipe.plan(path) if "\ntarget:" in path.read_text() else Recipe.plan(path, target="church")
    assert path.stem.startswith(plan.method)
    assert Recipe.make(**plan.model_dump(mode="json")) == plan


def test_the_old_name_of_guidance_embedding_is_read_wherever_a_recipe_comes_from(tmp_path: Path) -> None:
    new = Recipe.plan(target="snoopy", x_t={"guidance_embedding": 2.0})
    assert new.x_t.guidance_embedding == 2.0
    (tmp_path / "old.yaml").write_text("target: snoopy\nx_t: {told: 3.0}\n")
    manifest = new.model_dump(mode="json")
    manifest["x_t"]["told"] = manifest["x_t"].pop("guidance_embedding")
    assert Recipe.make(**manifest) == new
    assert Recipe.plan(tmp_path / "old.yaml").x_t.guidance_embedding == 3.0
    assert Recipe.plan(tmp_path / "old.yaml", ["x_t.guidance_embedding=2.0"]) == new, "options win over the file"
    assert Recipe.plan(None, ["x_t.told=2.0"], target="snoopy") == new
    assert Recipe.plan(target="snoopy", x_t={"told": 2.0}) == new.with_set("x_t.told=2.0")
    assert "guidance_embedding: 2.0" in new.to_yaml()
    with pytest.raises(RecipeError, match=r"x_t\.told is the old name of x_t\.guidance_embedding: both"):
        Recipe.make(target="snoopy", x_t={"told": 2.0, "guidance_embedding": 3.0})


def test_a_checkpoint_with_the_old_name_still_belongs_to_its_recipe(tmp_path: Path) -> None:
    recipe = Recipe.make(target="snoopy", x_t={"guidance_embedding": 2.0})
    checkpoint = Checkpoint(tmp_path, {"base-dtype": "float32"})
    old = json.loads(recipe.model_dump_json())
    old["x_t"]["told"] = old["x_t"].pop("guidance_embedding")
    del old["options"]
    metadata = {"recipe": json.dumps(old), "step": "3", "base-dtype": "float32"}
    save_file({"a": torch.ones(1)}, checkpoint.path, metadata)
    assert checkpoint.read(recipe)[0] == 3
    with pytest.raises(RecipeError, match="belongs to another recipe"):
        checkpoint.read(recipe.with_set("x_t.guidance_embedding=3.0"))
    save_file({"a": torch.ones(1)}, checkpoint.path, {**metadata, "recipe": "{}"})
    with pytest.raises(RecipeError, match="belongs to another recipe"):
        checkpoint.read(recipe)


def test_a_trainable_refuses_what_its_kind_cannot_do() -> None:
    unet = pico_pipeline().unet
    mask = TrainableMask(unet, Masks(groups=("ff",)))
    eraser = pico_eraser(unet)
    path, increment = next(iter(eraser.increments.items()))
    for act, words in (
        (lambda: mask.project(torch.eye(16)), "TrainableMask cannot leave protected prompts alone(.|\\n)*sepme"),
        (mask.deltas, "regulariser.l1 needs changes of weights, and TrainableMask has none(.|\\n)*lora:4"),
        (lambda: mask.start_values(path, increment, eraser), "TrainableMask cannot begin with snoopy"),
        (mask.install, "TrainableMask cannot be trained together with other concepts"),
    ):
        with pytest.raises(RecipeError, match=words):
            act()
    assert mask.conversion_error({}) is None
    mask.remove()


SETTINGS: dict[str, dict[str, object]] = {
    **{
        f"spm-{base}": {
            "objective.eta": 1, "steps": 3000, "batch_size": 1, "optimiser.lr": 1e-4, "optimiser.warmup": 500,
            "optimiser.cycles": 3, "anchoring.weight": 1000, "anchoring.reach": None, "anchoring.alpha": 1,
            "anchoring.per_target": 4, "surrogate": "", "increment.rank": 1, "strength": 1 + (base == "style-sd1"),
        }
        for base in ("sd1", "sd2", "sdxl", "style-sd1")
    },
    "spm-nudity-sd1": {"objective.eta": 3, "steps": 15000, "anchoring.weight": 100, "strength": 2},
    "esd-u-nudity-sd1": {"objective.eta": 1, "objective.convention": "paper", "steps": 1000, "optimiser.lr": 1e-5},
    "esd-x-strict-sd1": {"objective.eta": 2, "x_t.guidance": (3,), "steps": 200, "optimiser.lr": 5e-5},
    "esd-u-sdxl": {"objective.eta": 1, "x_t.guidance": (2,), "steps": 200, "optimiser.lr": 1e-5},
    "esd-x-sdxl": {"objective.eta": 1, "x_t.guidance": (2,), "steps": 200, "optimiser.lr": 2e-4},
    "esd-x-flux": {
        "objective.eta": 1, "x_t.guidance_embedding": 1, "x_t.guidance": (3.5,), "x_t.steps": 28, "steps": 1400,
        "optimiser.lr": 1e-4, "resolution": 512,
    },
    "race-regularised-sd1": {"adversary.hold": 0.1, "adversary.steps": 10, "adversary.epsilon": 0.1, "steps": 1000},
    "race-sd1": {"adversary.hold": 0, "adversary.steps": 10, "adversary.epsilon": 0.1, "optimiser.lr": 1e-5},
    "sepme-sd1": {"increment.beta": 1e-4, "regulariser.l1": 1e-6, "stop.below": 1e-4, "optimiser.lr": 0.1},
    "sepme-v1-sd1": {"regulariser.l1": 3e-5, "stop.below": 0, "optimiser.lr": 1e-2, "steps": 1000},
    "minimalist-flux": {"optimiser.lr": 0.5, "x_t.steps": 5, "masks.prompts": 40, "masks.beta": 0.1, "masks.init": 3},
    "minimalist-sdxl-turbo": {
        "optimiser.lr": 0.2, "optimiser.warmup": 0, "x_t.steps": 2, "masks.prompts": 20, "masks.beta": 0,
        "steps": 20 * 2 * 8 // 4,
    },
    "minimalist-nudity-flux": {"masks.beta": 1e-3, "masks.accumulate": 4},
    "uce": {"closed_form.ridge": 0.5, "closed_form.tokens": "last"},
    "fmn-sd1": {"steps": 35},
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_the_recipes_that_come_along_have_the_papers_settings(name: str) -> None:
    plan = Recipe.plan(next(path for path in RECIPES if path.stem == name), target="church")
    for key, expected in SETTINGS[name].items():
        found: object = plan
        for part in key.split("."):
            found = getattr(found, part)
        assert found == expected, key
    family = {"sd1": "sd-v1-4", "sd2": "sd-2-1", "sdxl": "sdxl", "flux": "flux"}.get(name.rpartition("-")[2], "")
    assert plan.model.startswith(family)
    assert not plan.templates or plan.method in ("ca", "fmn", "minimalist")


def test_increments_by_name() -> None:
    assert len(RECIPES) >= 7
    assert IncrementRecipe.named("lora:4") == {"kind": "low_rank", "rank": 4}
    assert IncrementRecipe.named("spm") == {"kind": "low_rank", "rank": 1}
    assert Recipe.plan(target="dog", method="esd-u", increment=IncrementRecipe.named("dense")).increment.kind == "dense"
    for wrong in ("lora", "lora:x", "dense:3", "dens"):
        with pytest.raises(UsageError, match="unknown increment"):
            IncrementRecipe.named(wrong)
