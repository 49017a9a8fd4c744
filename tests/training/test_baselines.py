"""Concept Ablation, SDD, Forget-Me-Not and the joint closed form, against float64 transcriptions of their equations."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from pico import pico_pipeline
from pico_families import family_pipeline

from spm_hub.adapters.increments import LowRank
from spm_hub.errors import RecipeError
from spm_hub.training import Recipe, train
from spm_hub.training.base_model import TeacherModel
from spm_hub.training.data.anchors import AnchorSource
from spm_hub.training.data.batch import Batch
from spm_hub.training.data.prompts import PromptMaker, Words, vocabulary_words
from spm_hub.training.data.student import StudentSource
from spm_hub.training.data.token_positions import concept_positions, window
from spm_hub.training.data.trajectories import TrajectorySource
from spm_hub.training.loop.moving_average import EMA
from spm_hub.training.methods import METHODS
from spm_hub.training.methods.fmn import attention_norm, record_attention
from spm_hub.training.methods.uce import edit
from spm_hub.training.trainable.dense import TrainableDense
from spm_hub.training.trainable.module_selection import select_modules
from spm_hub.training.trainer import train_together

SMALL = {"target": "snoopy", "steps": 6, "batch_size": 4, "x_t": {"steps": 5, "trajectories": 4, "chunks": 3}}


def recipe(**values: Any) -> Recipe:
    return Recipe.make(**{**SMALL, **values})


def room(plan: Recipe, strength: float = 0.03) -> tuple[TeacherModel, Batch]:
    """A model that is being erased already, and one batch for it."""
    base = TeacherModel(pico_pipeline())
    words = vocabulary_words(base.pipe.tokenizer)
    maker = PromptMaker((plan.target, *plan.aliases), plan.kind, Words.load(), words)
    anchors = AnchorSource(base, plan.anchoring, plan.target, maker, plan.surrogate)
    injection = TrainableDense(select_modules(base.denoiser, plan.increment.modules))
    batch = TrajectorySource(base, plan, maker, anchors).batch(1)
    generator = torch.Generator().manual_seed(4)
    for delta in injection.state().values():
        delta.data += strength * torch.randn(delta.shape, generator=generator)
    return base, batch


def predicted(base: TeacherModel, latents: Any, times: Any, states: Any) -> np.ndarray:
    with torch.no_grad():
        return base.predict(latents, times, states).double().numpy()


@pytest.mark.parametrize("teacher", ["student", "base"])
@pytest.mark.parametrize("method", ["ca", "sdd"])
def test_self_distillation_is_its_equation_and_sends_no_gradient_through_the_teacher(method: str, teacher: str) -> None:
    plan = recipe(method=method, templates=False).with_set(f"objective.teacher={teacher}")
    base, batch = room(plan)
    concept = predicted(base, batch.latents, batch.times, base.encode(["snoopy"] * 4))
    surrogate = {"ca": "dog", "sdd": ""}[method]
    goal = predicted(base, batch.latents, batch.times, base.encode([surrogate] * 4))
    if teacher == "base":
        goal = batch.neutral.double().numpy()
    losses = METHODS[plan.method].objective(plan).losses(base, batch)
    assert float(losses.erase.detach()) == pytest.approx(np.mean((concept - goal) ** 2), rel=1e-4)
    if method == "ca":
        kept = predicted(base, batch.anchor_latents, batch.anchor_times, batch.anchor_states)
        prior = np.mean((kept - batch.anchor_predictions.double().numpy()) ** 2)
        assert float(losses.anchor.detach()) == pytest.approx(prior, rel=1e-4)
    # Without gradients through the teacher, those of the loss are those against a constant.
    parameters = [p for p in base.denoiser.parameters() if p.requires_grad] or None
    assert parameters is None
    latents = batch.latents.clone().requires_grad_(True)
    moved = Batch(**{**vars(batch), "latents": latents, "neutral": torch.from_numpy(goal).float()})
    found = torch.autograd.grad(METHODS[plan.method].objective(plan).losses(base, moved).erase, latents)[0]
    prediction = base.predict(latents, batch.times, base.encode(["snoopy"] * 4))
    expected = torch.autograd.grad((prediction - torch.from_numpy(goal).float()).pow(2).mean(), latents)[0]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)


def test_paired_surrogates_stand_in_the_concepts_sentences() -> None:
    words = Words.load()
    subject = PromptMaker(("snoopy", "snoopy dog"), "character", words, ())
    assert subject.without("a photo of snoopy in the rain", "cat") == "a photo of cat in the rain"
    assert subject.without("two snoopy dog by picasso", "cat") == "two cat by picasso"
    sign = PromptMaker(("yahoo!", "c++"), "other", words, ())
    assert sign.without("a poster of Yahoo! in town", "a site") == "a poster of a site in town"
    assert sign.without("a book on c++", "java") == "a book on java"
    assert sign.without("yahoo!s", "a site") == "yahoo!s"
    style = PromptMaker(("van gogh",), "style", words, ())
    for text, bare in (("van gogh", "painting"), ("by van gogh", "painting"), ("a dog by van gogh", "a dog")):
        assert style.without(text, "painting") == bare
    assert style.without("a dog, van gogh style", "painting") == "a dog"
    assert style.without("a van gogh painting of a dog", "painting") == "a painting of a dog"
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        assert "gogh" not in style.without(style.target(generator), "painting")


def test_a_name_without_letters_is_told_in_a_sentence() -> None:
    maker = PromptMaker(("☭",), "other", Words.load(), ())
    assert maker.mentions_concept("a flag with ☭ on it")
    assert not maker.mentions_concept("a flag with + on it")


def test_trajectories_may_be_driven_by_the_surrogate_whose_sentences_anchor() -> None:
    plan = recipe(method="ca", x_t={**SMALL["x_t"], "driver": "surrogate", "guidance": [3.0]}, batch_size=2)
    base = TeacherModel(pico_pipeline())
    maker = PromptMaker(("snoopy",), plan.kind, Words.load(), vocabulary_words(base.pipe.tokenizer))
    source = TrajectorySource(base, plan, maker, AnchorSource(base, plan.anchoring, plan.target, maker, plan.surrogate))
    chunk = source.chunk(0)
    first, second = chunk.latents[0], chunk.latents[4]  # the first trajectory's first two steps
    scheduler = base.scheduler(len(chunk) // 4)
    guided = chunk.empty[0] + 3.0 * (chunk.neutral[0] - chunk.empty[0])
    torch.testing.assert_close(scheduler.step(guided, chunk.times[0], first).prev_sample, second, rtol=1e-4, atol=1e-4)
    assert all("snoopy" in prompt for prompt in chunk.prompts)
    told = base.encode([prompt.replace("snoopy", "dog") for prompt in chunk.prompts]).states
    assert torch.equal(chunk.neutral_states.states, told)


def test_watched_probabilities_are_the_attentions_own() -> None:
    pipe = pico_pipeline()
    own: list[torch.Tensor] = []

    class Recording(AttnProcessor):
        def __call__(self, attn: Any, hidden_states: Any, encoder_hidden_states: Any = None, **kwargs: Any) -> Any:
            told = hidden_states if encoder_hidden_states is None else encoder_hidden_states
            query, key = (attn.head_to_batch_dim(part) for part in (attn.to_q(hidden_states), attn.to_k(told)))
            if encoder_hidden_states is not None:
                own.append(attn.get_attention_scores(query, key))
            return super().__call__(attn, hidden_states, encoder_hidden_states, **kwargs)

    pipe.unet.set_attn_processor(Recording())
    with torch.no_grad(), record_attention(pipe.unet) as seen:
        pipe.unet(torch.randn(2, 4, 8, 8), 500, torch.randn(2, 12, 16))
    assert len(seen) == len(own) > 1
    for ours, theirs in zip(seen, own, strict=True):
        torch.testing.assert_close(ours.flatten(0, 1), theirs, rtol=1e-4, atol=1e-6)
    assert not any(module._forward_pre_hooks for module in pipe.unet.modules())


@pytest.mark.parametrize("tokens", ["concept", "onwards"])
def test_forget_me_not_is_the_norm_of_what_is_looked_at_in_float64(tokens: str) -> None:
    plan = recipe(method="fmn", objective={"tokens": tokens})
    base, batch = room(plan)
    tokenizer = base.pipe.tokenizer
    (snoopy,) = window(tokenizer, "snoopy")[1:-1]
    with torch.no_grad(), record_attention(base.denoiser) as seen:
        base.predict(batch.latents, batch.times, batch.states)
    total = 0.0
    for layer in seen:
        for row, prompt in enumerate(batch.prompts):
            ids = window(tokenizer, prompt)
            places = [place for place, token in enumerate(ids) if token == snoopy]
            if tokens == "onwards" and places:
                places = list(range(places[0], layer.shape[-1]))
            total += float((layer[row].double().numpy()[..., places] ** 2).sum())
    losses = METHODS[plan.method].objective(plan).losses(base, batch)
    assert total > 0
    assert float(losses.erase.detach()) == pytest.approx(np.sqrt(total), rel=1e-5)


def test_attended_in_float64() -> None:
    layers = np.random.default_rng(0).random(size=(2, 3, 2, 5, 7))
    chosen = np.random.default_rng(1).random(size=(3, 7)) < 0.4
    expected = np.sqrt(sum((layer.transpose(0, 3, 1, 2)[chosen] ** 2).sum() for layer in layers))
    found = attention_norm([torch.from_numpy(layer) for layer in layers], torch.from_numpy(chosen))
    assert float(found) == pytest.approx(expected, rel=1e-12)


def test_a_concepts_tokens_are_found_wherever_they_stand() -> None:
    tokenizer = pico_pipeline().tokenizer
    assert concept_positions(tokenizer, "van gogh painting a dog by van gogh", ["van gogh"]) == (1, 2, 7, 8)
    assert concept_positions(tokenizer, "a dog", ["cat", "dog"]) == (2,)
    assert concept_positions(tokenizer, "a dog", ["cat"]) == ()


def test_forget_me_not_needs_cross_attention() -> None:
    with pytest.raises(RecipeError, match="needs cross-attention"):
        train(recipe(method="fmn", increment={"modules": "esd-x"}), pipe=family_pipeline("flux-dev"))


def test_a_moving_average_is_one() -> None:
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    average = EMA({"w": weight}, 0.9)
    expected = np.array([1.0, 2.0])
    for step in range(5):
        weight.data = torch.tensor([step * 1.0, -step * 2.0])
        average.update()
        expected = 0.9 * expected + 0.1 * np.array([step * 1.0, -step * 2.0])
    with average.applied():
        np.testing.assert_allclose(weight.detach().numpy(), expected, rtol=1e-6)
    assert weight.tolist() == [4.0, -8.0]


def test_the_average_is_what_is_saved_and_what_draws() -> None:
    plan = recipe(method="sdd", x_t={**SMALL["x_t"], "source": "student"})
    now = train(plan.with_set("optimiser.ema=0"), pipe=pico_pipeline())  # decay 0: the last step itself
    averaged = train(plan.with_set("optimiser.ema=0.99"), pipe=pico_pipeline())
    sizes = [sum(float(found.delta.abs().sum()) for found in made.increments.values()) for made in (now, averaged)]
    assert 0 < sizes[1] < 0.2 * sizes[0]
    drawn: list[float] = []
    sample = StudentSource.batch

    def watch(source: StudentSource, step: int) -> Batch:
        drawn.append(sum(float(delta.detach().abs().sum()) for delta in source._trainable.state().values()))
        return sample(source, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StudentSource, "batch", watch)
        train(plan.with_set("optimiser.ema=0.99"), pipe=pico_pipeline())
    assert drawn[-1] < 0.2 * sizes[0], "x_t is drawn by the average, not by the last step"


@pytest.mark.parametrize("rank", [1, 5, None])
def test_a_closed_form_of_many_states_has_the_rank_asked_for_and_is_the_nearest(rank: int | None) -> None:
    generator = np.random.default_rng(0)
    edited, goals, kept = (torch.from_numpy(generator.normal(size=(rows, 12))) for rows in (30, 30, 40))
    weight = torch.from_numpy(generator.normal(size=(9, 12)))
    c, g, p = (part.numpy() for part in (edited, goals, kept))
    m = 0.5 * np.eye(12) + c.T @ c + p.T @ p
    whole = (0.5 * np.eye(12) + g.T @ c + p.T @ p) @ np.linalg.inv(m) - np.eye(12)
    found = edit({"k": weight}, edited, goals, kept, 0.5, rank)["k"]
    assert found.rank == (rank or 12)
    assert np.linalg.matrix_rank((found.up @ found.down).numpy()) == min(rank or 12, 9)
    root = np.linalg.cholesky(m)
    if rank is None:
        np.testing.assert_allclose((found.up @ found.down).numpy(), weight.numpy() @ whole, atol=1e-10)
        return
    alone = edit({"k": torch.eye(12, dtype=torch.float64)}, edited, goals, kept, 0.5, rank)["k"]
    left = np.linalg.norm((whole - (alone.up @ alone.down).numpy()) @ root)
    assert left == pytest.approx(np.sqrt((np.linalg.svd(whole @ root)[1][rank:] ** 2).sum()), rel=1e-8)


@pytest.mark.parametrize(
    "closed_form",
    [{"tokens": "last", "sentences": 0, "held": 0, "rank": None}, {"sentences": 3, "held": 5, "rank": None}],
)
def test_per_concept_erasers_that_name_each_other_are_the_joint_solution(closed_form: dict[str, Any]) -> None:
    pipe = pico_pipeline()
    names = ("snoopy", "mickey", "van gogh")
    joint = train(Recipe.make(target=names[0], aliases=names[1:], method="uce", closed_form=closed_form), pipe=pipe)
    others = [{"target": name} for name in names[1:]]
    plan = Recipe.make(target=names[0], together=others, method="uce", closed_form=closed_form)
    shares = train_together(plan, pipe=pipe)
    assert [share.manifest.concept.target for share in shares] == list(names)
    for path, whole in joint.increments.items():
        weight = pipe.unet.get_submodule(path).weight
        expected = whole.delta_for(weight)
        found = sum(share.increments[path].delta_for(weight) for share in shares)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))
        single = shares[0].increments[path]
        assert isinstance(single, LowRank)
        if closed_form["sentences"] == 0:
            assert single.rank == 1


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"method": "ca", "target": "gadget"}, "anchor concept(.|\n)*--set surrogate=dog"),
        (
            {"method": "sdd", "objective": {"eta": 2}},
            "objective.eta 2.0 would change nothing: method 'sdd' does not read it; the unconditional prediction",
        ),
        (
            {"method": "fmn", "erase_from": "a dog", "templates": False},
            "erase_from 'a dog' would change nothing: method 'fmn' does not read it(.|\n)*'esd-x'",
        ),
        ({"method": "fmn", "anchoring": {"weight": 1, "reach": 0.9}}, "reach has to be null"),
        (
            {"objective": {"teacher": "student"}},
            "teacher 'student' would change nothing: method 'spm' does not read it(.|\n)*: 'ca', 'sdd'\n",
        ),
        (
            {"objective": {"tokens": "onwards"}},
            "tokens 'onwards' would change nothing: method 'spm' does not read it(.|\n)*: 'fmn'\n",
        ),
        ({"objective": {"paired": True}}, "need a surrogate"),
        ({"method": "uce", "closed_form": {"preserve": ["snoopy"]}}, "'snoopy' is both"),
        ({"method": "uce", "closed_form": {"preserve": ["dog"]}, "together": [{"target": "dog"}]}, "'dog' is both"),
        ({"method": "esd-x", "together": [{"target": "dog"}]}, "try --method sepme or uce"),
        ({"increment": {"kind": "dora", "modules": "esd-x"}, "regulariser": {"l1": 1}}, "regulariser.l1 goes with"),
        (
            {"method": "sdd", "closed_form": {"ridge": 1}},
            "closed_form.ridge 1.0 would change nothing: method 'sdd' does not read it(.|\n)*: 'uce'\n",
        ),
        ({"optimiser": {"ema": 1.0}}, "optimiser.ema"),
    ],
)
def test_impossible_combinations_are_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        Recipe.make(**{"target": "snoopy", **values})


def test_concept_ablation_knows_anchor_concepts() -> None:
    assert Recipe.make(target="snoopy", method="ca").surrogate == "dog"
    assert Recipe.plan(target="hokusai", method="ca").surrogate == "painting"
    assert Recipe.plan(target="Ada Lovelace", method="ca", kind="person").surrogate == "person"
    with pytest.raises(RecipeError) as refused:
        Recipe.plan(target="gadget", method="ca")
    assert refused.value.mend is not None
    option = refused.value.mend.split(",")[0].removeprefix("--set ")
    assert Recipe.plan(target="gadget", method="ca", sets=[option]).surrogate == "dog"
    assert Recipe.plan(target="gadget", method="ca", sets=["surrogate=a box"]).surrogate == "a box"
