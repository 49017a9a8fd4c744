"""Protocols as data: all are complete, each has a hash that changes with what decides the numbers, and rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from diffusers import DiffusionPipeline
from pico import pico_eraser, pico_pipeline
from PIL import Image
from pydantic import ValidationError
from recorded import QUIET, contents

from spm_hub.adapters.adapter import Adapter
from spm_hub.adapters.increments import LowRank
from spm_hub.adapters.manifest import Concept
from spm_hub.errors import NotFoundError, UsageError
from spm_hub.evaluation.metrics.named import known_metrics, metric_named
from spm_hub.evaluation.prompts.catalogue import catalogue
from spm_hub.evaluation.protocols.protocol import Protocol, protocol_named, protocols
from spm_hub.evaluation.protocols.rows import nearest_by_text, phrase, rows_of
from spm_hub.evaluation.protocols.running import Asked, evaluate
from spm_hub.evaluation.records import drawing
from spm_hub.evaluation.records.drawing import RowDefaults, draw_batch
from spm_hub.evaluation.records.folder import RunFolder
from spm_hub.evaluation.records.rows import Batch, PromptRow
from spm_hub.models.base_choice import BaseChoice
from spm_hub.sketchbook.world import unknown_words

SNOOPY = Concept(target="snoopy", aliases=("beagle",), kind="character")


LANGUAGES = ("Spanish", "French", "German", "Italian", "Portuguese")


def first(name: str, among: Sequence[str], count: int) -> tuple[str, ...]:
    return tuple(among[:count])


@pytest.mark.parametrize("protocol", protocols().values(), ids=lambda one: one.name)
def test_every_protocol_runs_on_the_sketchbook_and_names_what_exists(protocol: Protocol) -> None:
    for text in protocol.sketchbook.measure:
        metric_named(text)
    for variant in (protocol.usual, protocol.sketchbook):
        assert {text.partition(":")[0] for text in variant.measure} <= known_metrics().keys()
        for one in variant.sets:
            assert one.file is None or one.file in {known.name for known in catalogue()}
            english = one.group in (None, "English") or protocol.name != "multilingual"
            for sentence in (*one.templates, *one.sentences):
                words = unknown_words(sentence.format(""))
                assert bool(words) != english, "sentences of ours, in words that the sketchbook knows"
    rows = rows_of(protocol.sketchbook, [SNOOPY], seed=1, nearest=first, samples=2)
    assert len({row.id for row in rows}) == len({row.seed for row in rows}) == len(rows)
    assert not any(unknown_words(row.prompt) for row in rows if row.group not in LANGUAGES)
    assert protocol.published == () or protocol.paper is not None


def test_numbers_of_the_papers() -> None:
    def value(name: str, **wanted: object) -> float:
        (one,) = (one for one in protocol_named(name).published if all(getattr(one, k) == v for k, v in wanted.items()))
        return one.value

    spm = {"method": "SPM", "erased": "snoopy"}
    assert value("spm-objects", **spm, subject="snoopy", quantity="CS") == 55.48
    assert value("spm-objects", **spm, subject="mickey", quantity="FID") == 28.39
    assert value("spm-styles", method="ESD", erased="rembrandt", subject="picasso", quantity="CS") == 66.14
    assert value("unlearndiffatk", method="ESD", erased="nudity", quantity="ASR") == 76.05
    assert value("i2p-nudity", method="SPM") == 85.3
    assert value("sepme-restore", erased="cezanne", quantity="ACC", condition="restored") == 98.0
    assert value("minimalist-ip", method="FlowEdit") == 78


def test_the_hash_changes_with_whatever_decides_the_numbers_and_with_nothing_else() -> None:
    one = protocol_named("i2p-nudity")
    strict = one.usual.model_copy(update={"measure": ("nudenet:spm9@0.6",)})
    steps = one.usual.model_copy(update={"drawing": one.usual.drawing.model_copy(update={"steps": 31})})
    others = [one.model_copy(update={"usual": strict}), one.model_copy(update={"usual": steps})]
    others.append(one.model_copy(update={"version": 2}))
    assert len({one.sha256, *(other.sha256 for other in others)}) == 4
    assert one.model_copy(update={"published": (), "about": "x"}).sha256 == one.sha256


def test_rows_of_a_language_have_its_words_and_the_english_subject() -> None:
    variant = protocol_named("multilingual").usual
    dog = rows_of(variant, [Concept(target="dog", kind="object")], seed=7, nearest=first, samples=1)
    prompts = {row.group: (row.prompt, row.subject) for row in dog if row.role == "target"}
    assert prompts["Spanish"] == ("una foto de un perro", "dog")
    assert prompts["German"] == ("ein Foto von einem Hund", "dog")
    assert prompts["English"] == ("a photo of a dog", "dog")
    assert set(prompts) == {"English", *LANGUAGES}


def test_what_stands_beside_a_concept_is_looked_for_unless_it_is_erased_itself() -> None:
    variant = protocol_named("dual-version").sketchbook
    concepts = [SNOOPY, Concept(target="picasso", kind="style")]
    rows = rows_of(variant, concepts, seed=7, nearest=first, samples=5)
    beside = [row for row in rows if row.role == "neighbour"]
    assert ("snoopy in the style of warhol", "warhol") in {(row.prompt, row.subject) for row in beside}
    assert ("a painting of a dog by picasso", "dog") in {(row.prompt, row.subject) for row in beside}
    assert "picasso" not in {row.subject for row in beside}, "it is erased"
    assert all(row.subject in row.prompt for row in beside)


@pytest.mark.filterwarnings("ignore:spm_hub. the prompt")
def test_pictures_of_the_base_serve_every_eraser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pico_pipeline().save_pretrained(tmp_path / "base")
    drawn: list[int] = []

    def draw(pipe: DiffusionPipeline, batch: Batch, defaults: RowDefaults) -> list[Image.Image]:
        drawn.append(batch.number)
        return draw_batch(pipe, batch, defaults)

    monkeypatch.setattr(drawing, "draw_batch", draw)
    asked = Asked(steps=1, limit=8, measure=("ssim",), at_once=4, size=(32, 32))

    def run(name: str, eraser: Adapter, cache: str) -> tuple[dict[str, str], int]:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / cache))
        drawn.clear()
        base = BaseChoice(str(tmp_path / "base"))
        evaluate(protocol_named("neighbours"), [eraser], base, tmp_path / name, asked, QUIET)
        return contents(tmp_path / name), len(drawn)

    one = pico_eraser(pico_pipeline().unet)
    stronger = Adapter(one.manifest, {key: LowRank(each.down, 2 * each.up) for key, each in one.increments.items()})
    assert run("one", one, "shared")[1] == 4
    second, batches = run("second", stronger, "shared")
    assert batches == 2
    assert run("by-itself", stronger, "empty") == (second, 4)


@pytest.mark.filterwarnings("ignore:spm_hub. the prompt")
@pytest.mark.parametrize("name", protocols())
def test_a_first_look_by_every_protocol_on_a_checkpoint_of_the_users(name: str, tmp_path: Path) -> None:
    pipe = pico_pipeline()
    base = BaseChoice(None, pipe=pipe)
    judge = "judged:odd" if name == "race-robustness" else "judged:bright"
    asked = Asked(quick=True, steps=1, limit=4, measure=("ssim", judge), at_once=4, size=(32, 32))
    report = evaluate(protocol_named(name), [pico_eraser(pipe.unet)], base, tmp_path / "run", asked, QUIET)
    samples = RunFolder.open(tmp_path / "run").samples()
    conditions = report["run"]["conditions"]
    assert len(samples) == 4 * len(conditions)
    assert {table["metric"] for table in report["tables"]} == {"ssim", judge}
    assert report["run"]["protocol"]["sha256"] == protocol_named(name).sha256
    attacks = {one["name"]: one["asr"]["value"] for judged in report["attacks"] for one in judged["attacks"]}
    assert (set(attacks) >= {"unlearndiff", "p4d-n"}) == (name == "race-robustness")
    if "restored" in conditions:
        hashes = {one: [sample.sha256 for sample in samples if sample.condition == one] for one in conditions}
        assert hashes["restored"] == hashes["without"] != hashes["with"]
        says = {one["says"] for one in report["findings"] if one["condition"] == "restored"}
        assert says <= {"restored", "not drawn"}


def test_rows_of_erasers_leave_their_names_out_of_the_neighbours() -> None:
    variant = protocol_named("spm-objects").sketchbook
    rows = rows_of(variant, [SNOOPY, Concept(target="Mickey")], seed=7, nearest=first, samples=3)
    assert [row.subject for row in rows if row.role == "target"] == ["snoopy"] * 3 + ["Mickey"] * 3
    neighbours = {row.subject for row in rows if row.role == "neighbour"}
    assert neighbours == {"spongebob", "pikachu", "dog", "cat"}
    given = [PromptRow("a", "my own", 3, "snoopy")]
    own = rows_of(variant, [SNOOPY], seed=7, nearest=first, samples=3, given=given)
    assert [(row.prompt, row.seed) for row in own if row.role == "target"] == [("my own", 3)]
    given.append(PromptRow("b", "a church", 4, "church"))
    both = rows_of(variant, [SNOOPY], seed=7, nearest=first, samples=3, given=given)
    assert [(row.subject, row.role) for row in both[:2]] == [("snoopy", "target"), ("church", "neighbour")]
    with pytest.raises(UsageError, match="names no concept"):
        rows_of(variant, [Concept(target=None)], seed=1, nearest=first)


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("dog", "", "a dog"), ("umbrella", "object", "an umbrella"), ("snoopy", "object", "snoopy"),
        ("Van Gogh", "", "Van Gogh"), ("van gogh", "", "van gogh"), ("nudity", "nsfw", "a nude person"),
        ("the moon", "", "the moon"), ("hulk", "character", "hulk"),
    ],
)  # fmt: skip
def test_names_in_sentences(name: str, kind: str, words: str) -> None:
    assert phrase(name, kind) == words


def test_the_nearest_name_is_the_name_itself() -> None:
    names = ["church", "dog", "snoopy", "cat", "beach"]
    nearest = nearest_by_text(pico_pipeline())
    assert nearest("snoopy", names, 1) == ("snoopy",)
    assert sorted(nearest("dog", names, 5)) == sorted(names)


def test_a_protocol_that_is_wrong_is_refused() -> None:
    good = protocol_named("coco-preservation").model_dump()
    for change in ({"colour": 1}, {"version": 0}, {"name": "No Spaces"}):
        with pytest.raises(ValidationError):
            Protocol.model_validate({**good, **change})
    with pytest.raises(NotFoundError, match="did you mean spm-objects"):
        protocol_named("spm-object")
