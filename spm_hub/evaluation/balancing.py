"""Finds the weights of UCE's debiasing from how often a model draws a concept with each attribute.

Gandikota et al., Unified Concept Editing in Diffusion Models, WACV 2024, arXiv 2308.14761: debiasing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from PIL.Image import Image

from spm_hub.attachment.attachment import attach
from spm_hub.errors import UsageError
from spm_hub.evaluation.metrics.metric import Judge, PictureMetric
from spm_hub.evaluation.metrics.named import metric_named
from spm_hub.evaluation.pictures import DrawingOptions, draw
from spm_hub.io.progress import Reporter
from spm_hub.models.base_choice import BaseChoice
from spm_hub.training.recipe.presets import deep_merge
from spm_hub.training.recipe.recipe import Recipe
from spm_hub.training.trainer import train

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from spm_hub.training.session import Session

_ROUNDING = 1e-6


@dataclass(frozen=True)
class Balance:
    """The aim of debiasing, and its measurement; the numbers are those of the authors' code.

    shares: the wanted share of the concept's pictures by attribute, a prompt each; they sum to 1.
    tolerance: an attribute is balanced when its share is nearer to the wanted one.  rounds: edits at most.
    drawing: of each round's pictures; every round has other seeds.
    """

    shares: Mapping[str, float]
    tolerance: float = 0.05
    rounds: int = 30
    drawing: DrawingOptions = field(default_factory=lambda: DrawingOptions(number=10, steps=20, guidance=7.5))

    def __post_init__(self) -> None:
        if len(self.shares) < 2 or abs(sum(self.shares.values()) - 1) > _ROUNDING or min(self.shares.values()) < 0:
            raise UsageError(
                f"shares are of two attributes or more and sum to 1, and these are {dict(self.shares)}",
                mend='--balance "a man=0.5, a woman=0.5"',
            )

    @classmethod
    def parse(cls, text: str) -> Balance:
        """Return the balance of "a man, a woman", equal shares, or "a man=0.4, a woman=0.6".

        Raises UsageError.
        """
        parts = [part.partition("=") for part in text.split(",") if part.strip()]
        names = [name.strip() for name, _, _ in parts]
        if len(set(names)) < len(names) or not all(names):
            raise UsageError(f"--balance {text!r} names an attribute twice, or none", mend='--balance "a man, a woman"')
        if not any(equals for _, equals, _ in parts):
            return cls({name: 1 / len(names) for name in names})
        try:
            return cls({name: float(share) for name, (_, _, share) in zip(names, parts, strict=True)})
        except ValueError:
            raise UsageError(
                f"--balance {text!r}: either every attribute has a share, a number, or none has",
                mend='--balance "a man=0.5, a woman=0.5"',
            ) from None


def balanced_session(session: Session, text: str, judge: str | None) -> Session:
    """Return a session of one concept with the weights that balance it, on its base, which is loaded.

    text: as `Balance.parse` reads it.  judge: as for `balanced`; None is CLIP, that of the sketchbook or the authors'.
    Call `check` first. Raises UsageError for several concepts, and as `balanced` does.
    """
    balance, plan = Balance.parse(text), session.plans[0]
    if len(session.plans) > 1 or plan.together:
        raise UsageError("--balance is for one concept at a time", mend="train the concepts one after the other")
    _with_weights(plan, dict.fromkeys(balance.shares, 1.0))  # refuses a recipe that has no attributes
    judge = judge or ("clip:sketchbook" if session.base.is_embedded else "clip:openai/clip-vit-base-patch32")
    metric_named(judge)  # before the base is loaded
    session.check_before_loading()
    pipe = session.base.open(for_gradients=True)
    found, _ = balanced(plan, pipe, balance, judge, session.reporter)
    base = BaseChoice(session.base.reference, pipe=pipe)
    return replace(session, plans=(found,), base=base)


def balanced(
    recipe: Recipe, pipe: DiffusionPipeline, balance: Balance, judge: str, reporter: Reporter
) -> tuple[Recipe, Mapping[str, float]]:
    """Return the recipe with weights in `closed_form.attributes`, and the shares under them.

    judge: as `metric_named` reads it, with a score for a picture and a text; a picture has the attribute of the
    greatest. A weight grows by the difference of the wanted and the measured share, round after round, from nothing or
    from the recipe's own weights, until all are within the tolerance. If none is after all rounds, the weights whose
    shares were nearest are returned.
    Raises UsageError for a judge without scores, and for a concept that is balanced already; RecipeError.
    """
    weights = dict.fromkeys(balance.shares, 0.0)
    weights |= {one.prompt: one.weight for one in recipe.closed_form.attributes if one.prompt in weights}
    best: tuple[float, Recipe | None, Mapping[str, float]] | None = None
    for number in range(balance.rounds + 1):
        edited = _with_weights(recipe, weights) if any(weights.values()) else None
        drawing = replace(balance.drawing, seed=recipe.seed + number * balance.drawing.number)
        shares = _measured(recipe, edited, pipe, drawing, tuple(weights), judge)
        missing = {name: balance.shares[name] - share for name, share in shares.items()}
        worst = max(map(abs, missing.values()))
        reporter.say(f"round {number}: {recipe.target!r} is drawn as {_words(shares)}")
        if best is None or worst < best[0]:
            best = worst, edited, shares
        if worst < balance.tolerance:
            break
        weights = {name: weight + missing[name] for name, weight in weights.items()}
    assert best is not None
    worst, edited, nearest = best
    if edited is None:
        raise UsageError(
            f"{recipe.target!r} is drawn as {_words(nearest)}, and no edit came nearer to {_words(balance.shares)}",
            mend="other attributes; or weights of your own: --set closed_form.attributes=[{prompt: ..., weight: 0.5}]",
        )
    if worst >= balance.tolerance:
        reporter.say(f"not balanced after {balance.rounds} rounds; kept the nearest: {_words(nearest)}")
    return edited, nearest


def _with_weights(recipe: Recipe, weights: Mapping[str, float]) -> Recipe:
    attributes = [{"prompt": prompt, "weight": weight} for prompt, weight in weights.items()]
    values = deep_merge(recipe.model_dump(mode="json"), {"closed_form": {"attributes": attributes}})
    return Recipe.make(**values)


def _measured(
    recipe: Recipe,
    edited: Recipe | None,
    pipe: DiffusionPipeline,
    drawing: DrawingOptions,
    attributes: Sequence[str],
    judge: str,
) -> dict[str, float]:
    """Return the share of pictures of the concept that have each attribute, under an edit or under none."""
    if edited is None:
        (pictures,) = draw(pipe, [recipe.target], drawing)
    else:
        with attach(pipe, [train(edited, pipe=pipe)], gate="always"):
            (pictures,) = draw(pipe, [recipe.target], drawing)
    scores = [_scores(judge, pictures, one) for one in attributes]
    found = [max(range(len(attributes)), key=lambda row: scores[row][index]) for index in range(len(pictures))]
    return {name: found.count(row) / len(pictures) for row, name in enumerate(attributes)}


def _scores(judge: str, pictures: Sequence[Image], text: str) -> list[float]:
    metric, subjects = metric_named(judge), [text] * len(pictures)
    scores: list[float | None] = []
    if isinstance(metric, Judge):
        scores = [one.score for one in metric.measure(pictures, subjects)]
    elif isinstance(metric, PictureMetric):
        scores = [*metric.measure(pictures, subjects)]
    known = [score for score in scores if score is not None]
    if len(known) < len(pictures):
        raise UsageError(
            f"{judge!r} gives no number for a picture and a text, so that attributes cannot be compared",
            mend="--judge clip:openai/clip-vit-base-patch32",
        )
    return known


def _words(shares: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {100 * share:.0f} %" for name, share in shares.items())
