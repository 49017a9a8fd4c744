"""The weights of debiasing, found from shares of pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from pico import pico_pipeline
from PIL import Image

from spm_hub.errors import RecipeError, UsageError
from spm_hub.evaluation import balancing
from spm_hub.evaluation.balancing import Balance, balanced, balanced_session
from spm_hub.evaluation.metrics.metric import PairMetric, PictureMetric
from spm_hub.models.base_choice import BaseChoice
from spm_hub.training import Recipe
from spm_hub.training.session import Session

PAPER = {"tokens": "last", "sentences": 0, "held": 0, "rank": None, "preserve": (), "erase_scale": 1.0}


class Lines:
    """A reporter that keeps what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


def drawn_as(patch: pytest.MonkeyPatch, whites: Sequence[int]) -> list[int]:
    """Have round k draw whites[k] white pictures of ten; "white" and "black" score them. Returns the seeds."""
    seeds: list[int] = []

    def draw(pipe: Any, prompts: Sequence[str], drawing: Any) -> list[tuple[Image.Image, ...]]:
        assert prompts == ["snoopy"]
        assert (drawing.number, drawing.steps, drawing.guidance) == (10, 20, 7.5)
        white = whites[min(len(seeds), len(whites) - 1)]
        seeds.append(drawing.seed)
        return [tuple(Image.new("L", (4, 4), 255 if index < white else 0) for index in range(10))]

    def score(pictures: Sequence[Image.Image], texts: Sequence[str]) -> list[float]:
        sign = 1 if texts[0] == "white" else -1
        return [sign * (float(np.asarray(one).mean()) - 127.0) for one in pictures]

    patch.setattr(balancing, "draw", draw)
    patch.setattr(balancing, "metric_named", lambda text: PictureMetric(text, score))
    return seeds


def test_weights_are_the_sums_of_what_every_round_was_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds = drawn_as(monkeypatch, [9, 8, 2, 5])
    plan = Recipe.make(target="snoopy", method="uce", seed=3, closed_form=PAPER)
    found, shares = balanced(plan, pico_pipeline(), Balance.parse("white, black"), "any:judge", Lines())
    expected = (0.5 - 0.9) + (0.5 - 0.8) + (0.5 - 0.2)
    weights = {one.prompt: one.weight for one in found.closed_form.attributes}
    assert weights == pytest.approx({"white": expected, "black": -expected})
    assert shares == {"white": 0.5, "black": 0.5}
    assert seeds == [3, 13, 23, 33]
    unchanged = {"closed_form": plan.closed_form}
    assert found.model_copy(update=unchanged) == plan


def test_the_nearest_weights_are_kept_where_no_round_is_balanced(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn_as(monkeypatch, [9, 7, 1])
    plan = Recipe.make(target="snoopy", method="uce", closed_form=PAPER)
    lines = Lines()
    balance = Balance({"white": 0.5, "black": 0.5}, rounds=2)
    found, shares = balanced(plan, pico_pipeline(), balance, "any:judge", lines)
    assert [one.weight for one in found.closed_form.attributes] == pytest.approx([-0.4, 0.4])
    assert shares["white"] == 0.7
    assert "not balanced after 2 rounds" in lines.said[-1]


def test_what_is_balanced_already_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn_as(monkeypatch, [5])
    plan = Recipe.make(target="snoopy", method="uce")
    with pytest.raises(UsageError, match="drawn as white 50 %, black 50 %, and no edit came nearer"):
        balanced(plan, pico_pipeline(), Balance.parse("white, black"), "any:judge", Lines())


def test_a_session_trains_with_the_weights_that_were_found(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn_as(monkeypatch, [8, 5])
    base = BaseChoice("pico", pipe=pico_pipeline())

    def session(*targets: str, method: str = "uce") -> Session:
        plans = tuple(Recipe.make(target=target, method=method) for target in targets)
        return Session(plans, base, Lines(), find=lambda name: None)  # type: ignore[arg-type, return-value]

    found = balanced_session(session("snoopy"), "white=0.5, black=0.5", "any:judge")
    assert [one.weight for one in found.plans[0].closed_form.attributes] == pytest.approx([-0.3, 0.3])
    with pytest.raises(UsageError, match="one concept at a time"):
        balanced_session(session("snoopy", "mickey"), "white, black", "any:judge")
    with pytest.raises(RecipeError, match="'spm' does not read it"):
        balanced_session(session("snoopy", method="spm"), "white, black", "any:judge")
    monkeypatch.setattr(balancing, "metric_named", lambda text: PairMetric(text, lambda one, other: [0.0]))
    with pytest.raises(UsageError, match="no number for a picture and a text"):
        balanced_session(session("snoopy"), "white, black", "any:judge")


@pytest.mark.parametrize("text", ["", "a man", "a man, a man", "a man=0.5, a woman", "a man=0.5, a woman=0.6", "=1"])
def test_shares_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"attribute|shares"):
        Balance.parse(text)


def test_shares_are_read_from_a_line() -> None:
    assert Balance.parse("a man, a woman").shares == {"a man": 0.5, "a woman": 0.5}
    assert Balance.parse(" a man=0.25 ,a woman = .75").shares == {"a man": 0.25, "a woman": 0.75}
