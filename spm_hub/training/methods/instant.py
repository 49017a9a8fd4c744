"""Instant: an eraser computed from text states alone, in closed form.

No prediction of the denoiser is made. Keys and values of cross-attention are linear in the text states, and so is the
layer through which the text enters SD3 and FLUX. So an increment can be computed that moves a concept's sentences there
to those of its surrogate, and all others as little as possible.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import Field

from spm_hub.errors import RecipeError
from spm_hub.io.progress import phase
from spm_hub.training.loop.closed_form import ClosedForm
from spm_hub.training.methods.method import Method
from spm_hub.training.recipe.schema import NonBlank, RecipePart
from spm_hub.training.recipe.validation import refuse_erased

if TYPE_CHECKING:
    from torch import Tensor, nn

    from spm_hub.adapters.increments import LowRank
    from spm_hub.training.base_model import TeacherModel
    from spm_hub.training.conditioning import Conditioning
    from spm_hub.training.loop.run import Task
    from spm_hub.training.recipe.fields import RecipeFields

_AT_ONCE = 64  # prompts, whose states are in memory together in float64
_SPARE, _MOST_ROUNDS, _CONVERGED = 8, 500, 1e-12  # of the subspace iteration
_ROUGHLY = 1e-6  # in place of the last, to choose between the weights below
_HOLDS = (1.0, 4.0, 16.0, 64.0)
_JUDGING = 8  # modules that stand for all when one of these weights is chosen
_NOTHING = 1e-9  # share of the way
_MOST_DRAWS = 4  # for each sentence wanted, as the same one may be drawn twice


class Options(RecipePart):
    """The settings of the closed form."""

    reach: float = Field(
        default=0.9,
        gt=0,
        description="share of the way to the surrogate's that keys and values of new sentences about the concept go",
    )
    sentences: int = Field(default=64, ge=1, description="about the concept, to compute the increment from")
    held: int = Field(default=200, ge=1, description="sentences about everything else, whose keys and values are kept")
    hold: float | None = Field(
        default=None,
        gt=0,
        description="weight of keeping these, against 1 for the concept's; unless given the one of 1, 4, 16, 64 that "
        "moves new sentences about everything else least",
    )
    keep: tuple[NonBlank, ...] = Field(
        default=(), description="further prompts to keep, as much as all others together"
    )
    ridge: float = Field(
        default=1e-4, gt=0, description="weight of keeping every direction, as a share of the states' mean square"
    )


@dataclass(frozen=True, eq=False)
class Moments:
    """Means over all tokens of n prompts with states t and goals g, each (d_text,), in float64.

    second: of t t^T.  pull: of (g - t) t^T.  gap: of (g - t) (g - t)^T.  All are (d_text, d_text).
    """

    second: Tensor
    pull: Tensor
    gap: Tensor


def nearest(
    weights: Mapping[str, Tensor], pull: Tensor, metric: Tensor, rank: int, converged: float = _CONVERGED
) -> dict[str, LowRank]:
    """Return the increments X of that rank that bring W t nearest to W g, and move other states least.

    weights: path to W (out, d_text).  pull: the mean of (g - t) t^T.  metric: M, positive definite, the weighted sum of
    t t^T over the concept's states and of a a^T over all states to keep.  converged: the relative change of singular
    values in a round after which they count as found.

    Among all matrices W pull M^-1 minimises mean |X t - W (g - t)|^2 + mean |X a|^2, with the weights in M. For any
    other X the sum is greater by |(X - W pull M^-1) M^(1/2)|^2, so that the best one of a rank has the leading singular
    vectors of W pull M^(-1/2) (Eckart and Young 1936). Returns float64.
    """
    import torch

    from spm_hub.adapters.increments import LowRank

    root = torch.linalg.cholesky(metric)
    shared = torch.linalg.solve_triangular(root, pull.T, upper=False).T
    found = {}
    with phase("computing the closed form") as move:
        for done, (path, weight) in enumerate(weights.items(), start=1):
            whole = weight.to(metric) @ shared
            left = _leading(whole, min(rank, *whole.shape), converged)
            right = torch.linalg.solve_triangular(root.T, (left.T @ whole).T, upper=True).T
            found[path] = LowRank(right.contiguous(), left.contiguous())
            move(done, len(weights))
    return found


def _leading(matrix: Tensor, rank: int, converged: float) -> Tensor:
    """Return the leading left singular vectors of `matrix` (m, n) as (m, rank).

    By subspace iteration from a fixed start: for one vector of a wide matrix a whole SVD would take a thousand times
    as long.
    """
    import torch

    few = min(rank + _SPARE, *matrix.shape)
    start = torch.randn((matrix.shape[1], few), dtype=matrix.dtype, generator=torch.Generator().manual_seed(0))
    basis: Tensor = torch.linalg.qr(matrix @ start.to(matrix.device)).Q
    before = torch.zeros(rank, dtype=matrix.dtype, device=matrix.device)
    for _ in range(_MOST_ROUNDS):
        basis = torch.linalg.qr(matrix @ (matrix.T @ basis)).Q
        turned, values, _ = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
        if bool((values[:rank] - before).abs().max() <= converged * values[0]):
            break
        before = values[:rank]
    found: Tensor = basis @ turned[:, :rank]
    return found


def solve(task: Task) -> dict[str, LowRank]:
    """Return the increments on `modules`, float64 on the CPU.

    With `together` each concept's increment also keeps the other concepts' keys and values.
    Raises RecipeError for a quantised weight, and where the text encoder makes the same of concept and surrogate.
    """
    import torch

    from spm_hub.adapters.increments import LowRank
    from spm_hub.models.architectures import weight_of

    recipe, base, chosen = task.recipe, task.base, _options(task.recipe)
    _check_weights(task.modules)
    weights = {path: weight_of(module) for path, module in task.modules.items()}
    with torch.no_grad():
        sentences, unseen = sentences_of(task)
        concept, new = (_moments(base, texts, _goals(task, texts)) for texts in (sentences, unseen))
        kept, judged = _kept(task)
        holds = (chosen.hold,) if chosen.hold is not None else _HOLDS
        some = dict(list(weights.items())[:: max(1, len(weights) // _JUDGING)]) if len(holds) > 1 else weights
        tried, way = {}, _way(some, new)
        for hold in holds:
            metric = concept.second + hold * kept
            metric.diagonal().add_(chosen.ridge * metric.diagonal().mean())
            found = nearest(some, concept.pull, metric, recipe.increment.rank, _ROUGHLY)
            tried[hold] = metric, _moved(found, judged) / max(_gone(found, some, new, way), _NOTHING) ** 2
        metric, _ = tried[min(tried, key=lambda hold: tried[hold][1])]
        found = nearest(weights, concept.pull, metric, recipe.increment.rank)
        gone = _gone(found, weights, new, way if some is weights else _way(weights, new))
        if gone <= _NOTHING:
            raise RecipeError(
                f"the text encoder makes nothing of {recipe.target!r} that tells it from {recipe.surrogate!r}: there "
                "is nothing to erase",
                mend="another name for the concept, or --method spm",
            )
        share = chosen.reach / gone
        return {path: LowRank(one.down, share * one.up).to(device="cpu") for path, one in found.items()}


def _gone(found: Mapping[str, LowRank], weights: Mapping[str, Tensor], new: Moments, way: float) -> float:
    """Return the share of the way to their goals that keys and values of new sentences go.

    way: the whole of it, from `_way`.
    """
    gone = sum(
        float((one.up.T @ weights[path].to(new.pull) @ new.pull @ one.down.T).trace()) for path, one in found.items()
    )
    return gone / way if way > 0 else 0.0


def _way(weights: Mapping[str, Tensor], new: Moments) -> float:
    """Return the mean |W (g - t)|^2 of new sentences, summed over the weights W."""
    wide = (weight.to(new.gap) for weight in weights.values())
    return sum(float(((weight @ new.gap) * weight).sum()) for weight in wide)


def _moved(found: Mapping[str, LowRank], second: Tensor) -> float:
    """Return the mean |X a|^2, summed over the increments X, of states a with this second moment."""
    return sum(float(((one.up.T @ one.up) @ (one.down @ second @ one.down.T)).trace()) for one in found.values())


def _options(recipe: RecipeFields) -> Options:
    chosen = recipe.options
    assert isinstance(chosen, Options), "checked by the recipe"
    return chosen


def sentences_of(task: Task) -> tuple[list[str], list[str]]:
    """Return the sentences about the concept to compute with, its names first, and others to judge by."""
    from spm_hub.training.data.sampling import generator_for

    prompts, count = task.prompts, _options(task.recipe).sentences
    generator = generator_for(task.recipe.seed, 5, 0)
    drawn = (prompts.target(generator) for _ in range(_MOST_DRAWS * count))
    different = list(dict.fromkeys((*prompts.names, *drawn)))[: count + max(1, count // 4)]
    return different[:count], different[count:] or different


def _goals(task: Task, texts: Sequence[str]) -> list[str]:
    """Return for each sentence the prompt whose keys and values it is to get.

    It is the same sentence with the surrogate in the concept's place, or the empty prompt where there is no surrogate.
    """
    surrogate = task.recipe.surrogate
    return [task.prompts.without(text, surrogate) if surrogate else "" for text in texts]


def _moments(base: TeacherModel, texts: Sequence[str], goals: Sequence[str]) -> Moments:
    """Return the moments of sentences whose goals are other prompts, token by token."""
    import torch

    sums: list[Tensor] = []
    tokens = 0
    with phase("encoding sentences about the concept") as move:
        for start in range(0, len(texts), _AT_ONCE):
            part = slice(start, start + _AT_ONCE)
            # Zeros, which SDXL receives for no prompt, would turn a concept into nothing at all.
            given, wanted = (base.encode(list(of[part]), literally=True) for of in (texts, goals))
            keep, ends = _counted(given), _counted(wanted).sum(1) - 1
            # A goal with fewer tokens repeats its last one.
            at = torch.minimum(torch.arange(keep.shape[1], device=ends.device), ends[:, None])
            goal = torch.take_along_dim(_read(base, wanted.states), at[..., None], 1)[keep]
            states = _read(base, given.states)[keep]
            gap, tokens = goal - states, tokens + len(states)
            products = [states.T @ states, gap.T @ states, gap.T @ gap]
            sums = [one + other for one, other in zip(sums, products, strict=True)] if sums else products
            move(min(start + _AT_ONCE, len(texts)), len(texts))
    return Moments(*(one / tokens for one in sums))


def _counted(rows: Conditioning) -> Tensor:
    """Return which tokens attention reads, (prompts, tokens) of booleans."""
    import torch

    if rows.mask is None:
        return torch.ones(rows.states.shape[:2], dtype=torch.bool, device=rows.states.device)
    return rows.mask.bool()


def _kept(task: Task) -> tuple[Tensor, Tensor]:
    """Return the mean of a a^T (d_text, d_text) over the states a to keep, and over new ones.

    Of the sentences about everything else, those near to the concept weigh most, as in latent anchoring.
    """
    from spm_hub.training.data.anchors import anchor_weights

    recipe, base, count = task.recipe, task.base, _options(task.recipe).held
    target = base.encode([recipe.target]).states[0]
    others = everything_else(task)
    weights = []
    with phase("encoding sentences about everything else") as move:
        for start in range(0, len(others), _AT_ONCE):
            texts = others[start : start + _AT_ONCE]
            near = anchor_weights(base.encode(texts, literally=True).states, target, recipe.anchoring.alpha).tolist()
            other = [not task.prompts.mentions_concept(text) for text in texts]
            weights += [one * counts for one, counts in zip(near, other, strict=True)]
            move(start + len(texts), len(others))
    mean = _second(base, others[:count], weights[:count])
    new = _second(base, others[count:], weights[count:]) if any(weights[count:]) else mean
    company = [name for one in recipe.together for name in (one.target, *one.aliases)]
    if named := [*_options(recipe).keep, *company]:
        mean = mean + _second(base, named, [1.0] * len(named))
    return mean, new


def everything_else(task: Task) -> list[str]:
    """Return sentences of every kind, the same for every concept: those to keep, and a quarter more."""
    from spm_hub.training.data.prompts import PromptMaker
    from spm_hub.training.data.sampling import generator_for

    maker = PromptMaker((), task.recipe.kind, task.prompts.words, task.prompts.vocabulary)
    generator, count = generator_for(task.recipe.seed, 6, 0), _options(task.recipe).held
    drawn = ["", *(maker.anchor(generator) for _ in range(_MOST_DRAWS * (count + 1)))]
    return list(dict.fromkeys(drawn))[: count + max(1, count // 4)]


def _second(base: TeacherModel, texts: Sequence[str], weights: Sequence[float]) -> Tensor:
    """Return the weighted mean over the prompts of the mean of a a^T over their tokens a, float64."""
    import torch

    total: Tensor | None = None
    for start in range(0, len(texts), _AT_ONCE):
        rows = base.encode(list(texts[start : start + _AT_ONCE]), literally=True)
        counted = _counted(rows)
        share = torch.tensor(weights[start : start + _AT_ONCE], dtype=torch.float64, device=counted.device)
        each = (counted * (share / counted.sum(1))[:, None])[counted]
        states = _read(base, rows.states)[counted]
        product = states.T @ (states * each[:, None])
        total = product if total is None else total + product
    assert total is not None, "there are prompts to keep"
    return total / sum(weights)


def _read(base: TeacherModel, states: Tensor) -> Tensor:
    """Return the inputs of the changed modules for text states (n, tokens, d): in PixArt projected."""
    for name in ("caption_projection", "caption_norm"):
        layer = getattr(base.denoiser, name, None)
        states = states if layer is None else layer.to(states.dtype)(states)  # it may be in its file's precision
    return states.double()


def _check_weights(modules: Mapping[str, nn.Module]) -> None:
    from spm_hub.models.architectures import weight_of

    if path := next((path for path, module in modules.items() if not weight_of(module).is_floating_point()), None):
        raise RecipeError(f"method 'instant' cannot read {path}: it is quantised", mend="--method esd-x")


def check(recipe: RecipeFields) -> None:
    """Refuse prompts to keep that are to be erased."""
    refuse_erased(recipe, "options.keep", _options(recipe).keep)


def check_model(recipe: RecipeFields, denoiser: nn.Module) -> None:
    """Raise RecipeError for a denoiser without modules that read the text alone."""
    from spm_hub.training.trainable.module_selection import select_modules

    select_modules(denoiser, recipe.increment.modules)


METHOD = Method(
    name="instant",
    title="Instant, SPM's increment in closed form",
    paper="spm-hub; it solves for keys and values what SPM (CVPR 2024, arXiv 2312.16145) trains by predictions",
    summary="Computes a rank 1 increment of what reads the text, from text states alone: an eraser in seconds.",
    cost="Seconds on the sketchbook; no training loop, and no prediction of the denoiser.",
    harm="Without a gate, relatives of the concept change too; `spmhub eval` shows which.",
    preset={"objective": {"name": "instant"}, "increment": {"modules": "text"}},
    trains=ClosedForm(solve),
    predicts=False,
    uses=frozenset({"anchoring.alpha", "increment.rank", "increment.dtype", "protection", "together"}),
    instead={
        "*": "it is a closed form, without a training loop",
        "objective.eta": "options.reach is how far it goes",
        "anchoring": "options.held, options.hold and options.keep say what it keeps",
        "increment": "it gives a low_rank increment of increment.rank on the modules that read the text",
        "increment.modules": "it changes the modules that read the text, 'text', only",
        "closed_form": "its settings are options.reach, sentences, held, hold, keep and ridge",
    },
    options=Options,
    together=lambda recipe: True,
    joins=lambda runs: runs[0],
    check=check,
    check_model=check_model,
)
