"""The sketchbook: its world, its probe on unseen drawings, its checkpoints, and the erasers shipped for it."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from pico import pico_pipeline

from spm_hub import attach
from spm_hub.evaluation.sketchbook import DetectionRow, cases, count, detection_table, evaluations, paint, probe
from spm_hub.models.aliases import ALIASES
from spm_hub.models.loading import load_pipeline
from spm_hub.registry.registry import Registry
from spm_hub.sketchbook.figures import SUBJECTS
from spm_hub.sketchbook.looks import BACKGROUNDS, Dice
from spm_hub.sketchbook.probe import STYLE_CLASSES, SUBJECT_CLASSES, labels
from spm_hub.sketchbook.train import LossPrinter, train_unet
from spm_hub.sketchbook.world import STYLE_NAMES, Drawing, draw, drawings
from spm_hub.training.base_model import TeacherModel
from spm_hub.training.conditioning import Conditioning
from spm_hub.training.data.anchors import AnchorSource
from spm_hub.training.data.prompts import STYLE_FRAMES, SUBJECT_FRAMES, PromptMaker, Words, vocabulary_words
from spm_hub.training.data.trajectories import TrajectorySource
from spm_hub.training.recipe.recipe import Recipe

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SHIPPED = ("mickey", "nudity", "snoopy", "spongebob", "van-gogh")


def test_the_same_generator_draws_the_same_world() -> None:
    one, two = (drawings(20, torch.Generator().manual_seed(4)) for _ in range(2))
    assert [(d, c) for d, _, c in one] == [(d, c) for d, _, c in two]
    assert all(np.array_equal(np.asarray(a), np.asarray(b)) for (_, a, _), (_, b, _) in zip(one, two, strict=True))


def test_every_subject_leaves_its_mark_on_every_background() -> None:
    """A figure must differ from the empty scene by more than a tenth of the picture, white figures in snow included."""
    for background in BACKGROUNDS:
        for subject in SUBJECTS:
            scene, figure = (
                np.asarray(draw(Drawing(name, None, background), Dice(torch.Generator().manual_seed(1))), dtype=float)
                for name in (None, subject)
            )
            changed = (np.abs(scene - figure).max(axis=2) > 30).mean()
            assert changed > 0.05, (subject, background, changed)


def test_captions_are_true() -> None:
    for drawing, _, text in drawings(300, torch.Generator().manual_seed(8)):
        for style in STYLE_NAMES:
            assert (style in text) <= (style == drawing.style), (drawing, text)
        plain = re.sub("|".join(STYLE_NAMES), "", text)
        named = {subject for subject in SUBJECTS if re.search(rf"\b{subject}\b", plain)}
        allowed = {"nudity", "person"} if drawing.subject == "nudity" else {drawing.subject}
        assert named <= allowed, (drawing, text)


@pytest.mark.parametrize("look", ["ink", "chalk"])
def test_probe_names_held_out_drawings(look: str) -> None:
    rows = drawings(500, torch.Generator().manual_seed(31_337), look)
    readings = probe().read([picture for _, picture, _ in rows])
    for which, classes in ((0, SUBJECT_CLASSES), (1, STYLE_CLASSES)):
        seen = [reading.subject if which == 0 else reading.style for reading in readings]
        right = [classes.index(name) == labels(d)[which] for name, (d, _, _) in zip(seen, rows, strict=True)]
        assert np.mean(right) >= 0.985


@pytest.mark.parametrize("model", ["sketchbook", "sketchbook-chalk"])
def test_checkpoints_are_small_and_draw_their_prompts(model: str) -> None:
    folder = ALIASES[model].embedded
    assert folder is not None
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) <= 25_000_000
    rows = detection_table(load_pipeline(model), styles=(), samples=2, steps=15, seed=5)
    assert np.mean([row.detected for row in rows]) >= 0.9


def test_evaluation_sentences_are_in_no_training_frame() -> None:
    words = Words.load()
    parts = {
        "scene": "|".join(map(re.escape, words.scenes)),
        "artist": "|".join(map(re.escape, words.artists)),
        "thing": "|".join(map(re.escape, words.things + words.people)),
        "word": "[a-z]+",  # any word that a base may know
        "where": "[a-z]+",
    }
    frames = [
        re.compile(frame.format("X", **{part: f"({options})" for part, options in parts.items()}))
        for frame in (*SUBJECT_FRAMES, *STYLE_FRAMES)
        if frame != "{}"
    ]
    for case in cases(samples=50, seed=0):
        skeleton = case.prompt.replace("a nude person", "X").replace(case.name, "X")
        assert not any(frame.fullmatch(skeleton) for frame in frames), case


@pytest.mark.parametrize("name", SHIPPED)
def test_no_evaluation_sentence_was_drawn_in_the_training_of_a_shipped_eraser(name: str) -> None:
    """A sentence frame with a word of the base could make one; the recipe's seed alone decides which are drawn."""
    recipe = Recipe.make(**Registry(ROOT).get(name).load().manifest.recipe)
    pipe = load_pipeline("sketchbook")
    base = TeacherModel(pipe, recipe.resolution)
    maker = PromptMaker((recipe.target, *recipe.aliases), recipe.kind, Words.load(), vocabulary_words(pipe.tokenizer))
    # Neither what is encoded nor what is predicted decides which sentences are drawn.
    base.encode = lambda prompts: Conditioning(torch.ones(len(prompts), 2, 3))
    base.predict = lambda latents, times, states: torch.zeros_like(latents)
    source = TrajectorySource(base, recipe, maker, AnchorSource(base, recipe.anchoring, recipe.target, maker))
    said = {prompt for index in range(recipe.x_t.chunks) for prompt in source.chunk(index).prompts}
    assert len(said) > 100
    assert said.isdisjoint(case.prompt for case in cases(samples=50, seed=2024))


def test_shipped_erasers_are_whole_and_measured() -> None:
    registry = Registry(ROOT)
    assert tuple(entry.name for entry in registry.entries()) == SHIPPED
    for entry in registry.entries():
        adapter = entry.load()
        manifest = adapter.manifest
        assert manifest.increment.rank == 1
        assert manifest.recipe["model"] == "sketchbook"
        measured = {(one.metric, one.subject): one for one in manifest.evaluation if one.base == "sketchbook"}
        assert len(measured) == len(SUBJECTS) + len(STYLE_NAMES)
        assert all(one.samples >= 50 and one.reference is not None for one in measured.values())


@pytest.mark.parametrize(("name", "kind"), [("snoopy", "subject"), ("nudity", "subject"), ("van-gogh", "style")])
def test_a_shipped_eraser_erases_its_concept_and_no_neighbour(name: str, kind: str) -> None:
    target = name.replace("-", " ")
    subjects = (target, "mickey", "person") if kind == "subject" else ("dog",)
    styles = (target, "picasso") if kind == "style" else ()
    pipe = load_pipeline("sketchbook")
    wanted = cases(subjects, styles, samples=10, seed=99)
    without = {row.name: row.detected for row in count(wanted, paint(pipe, wanted, steps=12))}
    with attach(pipe, [Registry(ROOT).get(name).load()]):
        given = {row.name: row.detected for row in count(wanted, paint(pipe, wanted, steps=12))}
    assert without[target] >= 0.9
    assert given[target] <= 0.1
    for other in given.keys() - {target}:
        assert given[other] >= without[other] - 0.1


def test_a_shipped_eraser_is_an_ordinary_lora_file() -> None:
    """Plain diffusers, without us, draws what our attachment draws at gamma 1."""

    def picture(pipe: StableDiffusionPipeline) -> np.ndarray:
        drawn = pipe("snoopy on the beach", num_inference_steps=12, generator=torch.Generator().manual_seed(3))
        return np.asarray(drawn.images[0], dtype=int)

    pipe = load_pipeline("sketchbook")
    bare = picture(pipe)
    with attach(pipe, [Registry(ROOT).get("snoopy").load()], gate="always"):
        ours = picture(pipe)
    pipe.load_lora_weights(ROOT / "adapters", weight_name="snoopy.safetensors")
    plain = picture(pipe)
    assert np.abs(bare - ours).max() > 50
    assert np.abs(plain - ours).max() <= 1


def test_recovering_one_of_three_is_never_having_attached_it() -> None:
    pipe = load_pipeline("sketchbook")
    before = {key: value.clone() for key, value in pipe.unet.state_dict().items()}
    snoopy, mickey, spongebob = (Registry(ROOT).get(name).load() for name in ("snoopy", "mickey", "spongebob"))
    wanted = cases(("mickey", "snoopy"), (), samples=2, seed=1)
    with attach(pipe, [snoopy, mickey, spongebob]) as erasers:
        paint(pipe, wanted, steps=4)
        erasers.recover("mickey")
        recovered = paint(pipe, wanted, steps=4)
    with attach(pipe, [snoopy, spongebob]):
        never = paint(pipe, wanted, steps=4)
    assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(recovered, never, strict=True))
    assert all(torch.equal(before[key], value) for key, value in pipe.unet.state_dict().items())


def test_an_interrupted_denoiser_training_goes_on_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = pico_pipeline()
    latents = torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    ids = torch.randint(0, 50, (8, 12), generator=torch.Generator().manual_seed(1))

    def run(where: Path) -> dict[str, torch.Tensor]:
        unet = pico_pipeline(3).unet.requires_grad_(True)
        train_unet(
            unet, pipe.text_encoder, ids, ids[0], latents, stage="test", steps=6, lr=1e-3, checkpoint=where, seed=0,
            batch_size=2, save_every=3,
        )  # fmt: skip
        return {key: value.clone() for key, value in unet.state_dict().items()}

    def interrupt(self: LossPrinter, step: int, loss: float) -> None:
        if step == 5:
            raise KeyboardInterrupt

    whole = run(tmp_path / "whole.pt")
    with monkeypatch.context() as patched:
        patched.setattr(LossPrinter, "__call__", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "half.pt")
    resumed = run(tmp_path / "half.pt")
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_evaluation_entries_pair_with_and_without() -> None:
    without = [DetectionRow("subject", "dog", 1.0, 4), DetectionRow("style", "picasso", 0.75, 4)]
    given = [DetectionRow("subject", "dog", 0.5, 4), DetectionRow("style", "picasso", 0.75, 4)]
    entries = evaluations(without, given, base="sketchbook", seed=3)
    assert [(one.subject, one.value, one.reference) for one in entries] == [("dog", 0.5, 1.0), ("picasso", 0.75, 0.75)]
