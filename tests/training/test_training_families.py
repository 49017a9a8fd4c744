"""Training on every family: how a denoiser is called is learnt right, the loss falls, and what is trained attaches."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline
from diffusers.utils import logging
from pico_families import FAMILY_PIPELINES, family_pipeline, pico_t5
from test_families import apart, draw

import spm_hub
from spm_hub.errors import ModelError, RecipeError
from spm_hub.models.architectures import denoiser_of, family_of, targets
from spm_hub.training import Recipe, train
from spm_hub.training.base_model import TeacherModel
from spm_hub.training.conditioning import Conditioning
from spm_hub.training.data.anchors import AnchorSource
from spm_hub.training.data.prompts import PromptMaker, Words, vocabulary_words
from spm_hub.training.data.trajectories import Chunk, TrajectorySource

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logging.set_verbosity_error()
    yield
    logging.set_verbosity_warning()


@pytest.fixture(scope="module", params=list(FAMILY_PIPELINES))
def pipe(request: pytest.FixtureRequest) -> DiffusionPipeline:
    return family_pipeline(request.param)


def recipe(**values: Any) -> Recipe:
    small = {
        "target": "snoopy", "steps": 12, "batch_size": 3, "templates": False, "optimiser": {"warmup": 1},
        "anchoring": {"weight": 1, "per_target": 1}, "x_t": {"steps": 3, "trajectories": 2, "chunks": 1},
    }  # fmt: skip
    return Recipe.make(**{**small, **values})


def test_the_loss_falls_and_the_eraser_attaches_and_is_taken_away(pipe: DiffusionPipeline) -> None:
    losses: list[float] = []
    before = {key: value.clone() for key, value in denoiser_of(pipe).state_dict().items()}
    adapter = train(recipe(), pipe=pipe, progress=lambda step, total, info: losses.append(info["erase"]))
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    assert adapter.manifest.base.family == family_of(pipe).name
    assert adapter.increments.keys() == targets(denoiser_of(pipe)).keys()
    bare = draw(pipe, ["snoopy"])
    erasers = spm_hub.attach(pipe, [adapter])
    changed = draw(pipe, ["snoopy"])
    erasers.recover("snoopy")
    recovered = draw(pipe, ["snoopy"])
    erasers.detach()
    assert apart(changed, bare) > 1e-3
    assert torch.equal(recovered, bare)
    after = denoiser_of(pipe).state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_trajectory_is_the_pipelines_own(pipe: Any) -> None:
    """Ours, from the first noise to the last step, against the pipeline's with the same noise and memoryless steps."""
    base = TeacherModel(pipe, resolution=16)
    steps = base.steps(3)
    scheduler = base.scheduler(steps)
    (told,) = base.encode(["snoopy"])[None]
    generator = torch.Generator().manual_seed(7)
    start = base.noise(1, generator)
    latents = start
    for time in scheduler.timesteps:
        with torch.no_grad():
            prediction = base.predict(latents, time.expand(1), told)
        latents = scheduler.step(prediction, time, latents).prev_sample
    own, known = pipe.scheduler, inspect.signature(type(pipe).__call__).parameters
    options = {name: known[name].default for name in ("max_sequence_length",) if name in known}
    pipe.scheduler = DDIMScheduler.from_config(own.config, clip_sample=False) if "beta_schedule" in own.config else own
    try:
        theirs = draw(pipe, ["snoopy"], num_inference_steps=steps, guidance_scale=1.0, latents=start, **options)
    finally:
        pipe.scheduler = own
    assert apart(latents, theirs) <= 1e-5


def test_distilled_guidance_is_told_and_never_pushed_further() -> None:
    base = TeacherModel(family_pipeline("flux-dev"), resolution=16)
    assert base.steps(16) == 16
    empty, given = torch.zeros(4, 5, 3), torch.ones(4, 5, 3)
    scales = torch.tensor([0.0, 0.5, 3.5, 7.5])
    assert base.guide(empty, given, scales)[:, 0, 0].tolist() == [0.0, 0.5, 1.0, 1.0]
    told = base.encode(["a dog"] * 4).under(scales)
    assert told.others["guidance"].tolist() == [1.0, 1.0, 3.5, 7.5]
    latents, times = base.noise(1, torch.Generator().manual_seed(0)).expand(4, -1, -1), torch.full((4,), 500.0)
    with torch.no_grad():
        low, same, high, highest = base.predict(latents, times, told)
    assert apart(same, low) <= 1e-5
    assert apart(high, low) > 1e-3
    assert apart(highest, high) > 1e-3


def test_the_losses_may_hear_another_guidance_than_leads_the_trajectories() -> None:
    def run(**x_t: Any) -> tuple[TeacherModel, Chunk]:
        given = {"steps": 4, "trajectories": 2, "chunks": 1, "guidance": [3.5], **x_t}
        plan = recipe(x_t=given, anchoring={"per_target": 2}, erase_from="a dog")
        base = TeacherModel(family_pipeline("flux-dev"), resolution=16)
        maker = PromptMaker(("snoopy",), "other", Words.load(), vocabulary_words(base.pipe.tokenizer))
        return base, TrajectorySource(base, plan, maker, AnchorSource(base, plan.anchoring, "snoopy", maker)).chunk(0)

    _, plain = run()
    base, told = run(told=1.0)
    torch.testing.assert_close(told.latents, plain.latents, rtol=0, atol=1e-5)
    for chunk, heard in ((plain, 3.5), (told, 1.0)):
        assert chunk.target_states.others["guidance"].unique().tolist() == [heard]
        assert chunk.anchor_states.others["guidance"].unique().tolist() == [heard]
        with torch.no_grad():
            expected = base.predict(chunk.latents, chunk.times, chunk.target_states)
            held = base.predict(chunk.latents, chunk.times, chunk.anchor_states[:, 1])
        torch.testing.assert_close(chunk.concept, expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(chunk.anchors[:, 1], held, rtol=0, atol=1e-5)
    assert apart(told.concept, plain.concept) > 1e-3


def test_a_guidance_that_nothing_would_hear_is_refused() -> None:
    with pytest.raises(
        RecipeError,
        match=r"x_t.guidance_embedding: 1 is for models with a guidance input(.|\n)*UNet2DConditionModel has",
    ):
        train(recipe(steps=1, x_t={"steps": 2, "told": 1.0}), pipe=family_pipeline("sd1"))
    with pytest.raises(RecipeError, match="draws whole pictures"):
        Recipe.make(target="snoopy", method="minimalist", x_t={"told": 1.0})


def test_a_step_distilled_model_is_trained_where_it_draws() -> None:
    base = TeacherModel(family_pipeline("flux-schnell"), resolution=16)
    assert [base.steps(wanted) for wanted in (1, 4, 16)] == [1, 4, 4]
    assert base.scheduler(4).timesteps.tolist() == [1000.0, 750.0, 500.0, 250.0]
    assert "guidance" not in base.encode(["a dog"]).others


def test_no_prompt_is_zeros_where_the_pipeline_guides_with_zeros() -> None:
    base = TeacherModel(family_pipeline("sdxl"))
    empty, dog = base.encode(["", "dog"])
    assert not empty.states.any()
    assert not empty.pooled.any()
    assert dog.states.any()
    assert empty.others["added_cond_kwargs.time_ids"].tolist() == [16.0, 16.0, 0.0, 0.0, 16.0, 16.0]


@pytest.mark.parametrize("source", ["student", "gaussian"])
@pytest.mark.parametrize("name", ["sdxl", "sd3"])
def test_the_papers_own_sources_work_with_pooled_embeddings(name: str, source: str) -> None:
    values = {"x_t": {"source": source, "steps": 2}} if source == "student" else {"anchoring": {"source": source}}
    adapter = train(recipe(steps=2, **values), pipe=family_pipeline(name))
    assert any(bool(increment.up.any()) for increment in adapter.increments.values())


def test_a_half_precision_base_has_increments_in_full_precision() -> None:
    plan = recipe(steps=5, optimiser={"lr": 1e-3, "warmup": 1})
    exact = train(plan, pipe=family_pipeline("sd2"))
    for dtype in (torch.bfloat16, torch.float16):
        adapter = train(plan, pipe=family_pipeline("sd2", dtype=dtype))
        assert {increment.dtype for increment in adapter.increments.values()} == {torch.float32}
        # The same run but for the base's rounding: the increments point the same way.
        for path, increment in adapter.increments.items():
            mine, theirs = increment.up.flatten(), exact.increments[path].up.flatten()
            assert float(torch.cosine_similarity(mine, theirs, dim=0)) > 0.5, path


def test_words_are_found_in_every_kind_of_vocabulary() -> None:
    class Tokens:
        def get_vocab(self) -> dict[str, int]:
            return {"Ġsun": 4, "▁dog": 2, "cat</w>": 1, "beach": 0, "▁": 3, "ĠSun": 5, "to</w>": 6}

    assert vocabulary_words(Tokens()) == ("cat", "dog", "sun")
    assert {"snoopy", "church", "dog"} <= set(vocabulary_words(pico_t5()[1]))


def test_a_pipeline_whose_predictions_are_changed_on_the_way_is_refused() -> None:
    class Brightened(StableDiffusionPipeline):
        @functools.wraps(StableDiffusionPipeline.__call__)
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            step = self.scheduler.step
            self.scheduler.step = lambda output, *rest, **options: step(output * 1.1, *rest, **options)
            return super().__call__(*args, **kwargs)

    pipe = family_pipeline("sd1")
    pipe.__class__ = Brightened
    with pytest.raises(ModelError, match="what Brightened makes of its denoiser's predictions"):
        TeacherModel(pipe)


def test_a_resolution_that_the_pipeline_refuses_is_a_plain_error() -> None:
    with pytest.raises(ModelError, match="divisible by 8"):
        TeacherModel(family_pipeline("sdxl"), resolution=20)


def test_rows_of_different_lengths_are_padded_and_masked() -> None:
    short, long = Conditioning(torch.ones(1, 2, 3)), Conditioning(torch.ones(2, 4, 3), mask=torch.ones(2, 4))
    joined = Conditioning.cat([short, long])
    assert joined.shape == (3, 4, 3)
    assert joined.mask is not None
    assert joined.mask.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]
    assert joined.states[0].sum() == 6
    with pytest.raises(ModelError, match="different lengths"):
        TeacherModel(family_pipeline("flux-dev"), resolution=16).predict(torch.zeros(3, 16, 16), torch.ones(3), joined)
