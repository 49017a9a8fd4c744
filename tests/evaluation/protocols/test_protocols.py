"""Protocols as data: all are complete, each has a hash that changes with what decides the numbers, and rows."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from pico import pico_pipeline
from pydantic import ValidationError

from spm_hub.adapters.manifest import Concept
from spm_hub.errors import NotFoundError, UsageError
from spm_hub.evaluation.metrics.named import known_metrics, metric_named
from spm_hub.evaluation.prompts.catalogue import catalogue
from spm_hub.evaluation.protocols.protocol import Protocol, protocol_named, protocols
from spm_hub.evaluation.protocols.rows import nearest_by_text, phrase, rows_of
from spm_hub.evaluation.records.rows import PromptRow
from spm_hub.sketchbook.world import unknown_words

SNOOPY = Concept(target="snoopy", aliases=("beagle",), kind="character")


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
            for sentence in (*one.templates, *one.sentences):
                assert not unknown_words(sentence.format("")), "sentences of ours, in words that the sketchbook knows"
    rows = rows_of(protocol.sketchbook, [SNOOPY], seed=1, nearest=first, samples=2)
    assert len({row.id for row in rows}) == len({row.seed for row in rows}) == len(rows)
    assert not any(unknown_words(row.prompt) for row in rows)
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


def test_the_hash_changes_with_whatever_decides_the_numbers_and_with_nothing_else() -> None:
    one = protocol_named("i2p-nudity")
    strict = one.usual.model_copy(update={"measure": ("nudenet:spm9@0.6",)})
    steps = one.usual.model_copy(update={"drawing": one.usual.drawing.model_copy(update={"steps": 31})})
    others = [one.model_copy(update={"usual": strict}), one.model_copy(update={"usual": steps})]
    others.append(one.model_copy(update={"version": 2}))
    assert len({one.sha256, *(other.sha256 for other in others)}) == 4
    assert one.model_copy(update={"published": (), "about": "x"}).sha256 == one.sha256


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
