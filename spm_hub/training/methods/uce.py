"""UCE: cross-attention edited in closed form, without a training loop.

Gandikota et al., Unified Concept Editing in Diffusion Models, WACV 2024, arXiv 2308.14761.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from spm_hub.errors import RecipeError
from spm_hub.io.progress import phase
from spm_hub.training.data.token_positions import concept_positions, last_position, window
from spm_hub.training.loop.closed_form import ClosedForm
from spm_hub.training.methods.method import Method
from spm_hub.training.recipe.protected_prompts import normalise_prompt
from spm_hub.training.recipe.validation import refuse_erased

if TYPE_CHECKING:
    from torch import Tensor, nn

    from spm_hub.adapters.increments import LowRank
    from spm_hub.training.base_model import TeacherModel
    from spm_hub.training.data.prompts import PromptMaker
    from spm_hub.training.loop.run import Task
    from spm_hub.training.recipe.fields import RecipeFields


def edit(
    weights: Mapping[str, Tensor], edited: Tensor, goals: Tensor, kept: Tensor, ridge: float, rank: int | None = None
) -> dict[str, LowRank]:
    """Return float64 increments that map keys and values of `edited` to those of `goals`, all at once.

    weights: path to (out, d_text).  edited c_e, goals c_g (n, d_text), kept c_p (m, d_text): text states.
    ridge: lambda.  rank: of the increments; by default n, or d_text if that is less.

    W' = (lambda W + sum_e W c_g c_e^T + sum_p W c_p c_p^T) (lambda I + sum_e c_e c_e^T + sum_p c_p c_p^T)^-1.
    As W = W M M^-1, with M the inverted matrix, W' - W = [W (c_g - c_e)] [c_e^T M^-1]: a product of rank n, exactly;
    and a sum over concepts, so that each one's own terms, with the other concepts among the kept states, are an eraser
    of its own. If n exceeds the rank asked for, W' - W = W K is cut to W U U^T K, U the first left singular vectors of
    K M^(1/2): no other product of that rank is nearer to K on the states that M is made of.
    """
    import torch

    from spm_hub.adapters.increments import LowRank

    c, moves, p = edited.double(), (goals - edited).double(), kept.double()
    m = ridge * torch.eye(c.shape[1], dtype=c.dtype, device=c.device) + c.T @ c + p.T @ p
    right = torch.linalg.solve(m, c.T).T.contiguous()  # M is symmetric
    left = moves.T
    if len(c) > (most := min(c.shape[1], rank or c.shape[1])):
        whole = left @ right
        left = torch.linalg.svd(whole @ torch.linalg.cholesky(m)).U[:, :most]
        right = left.T @ whole
    return {path: LowRank(right, weight.double() @ left) for path, weight in weights.items()}


def solve(task: Task) -> dict[str, LowRank]:
    """UCE's increments on `modules`, float64: target and aliases, all at once, become the surrogate.

    With `closed_form.attributes` they stay themselves and are moved towards those instead (the paper's debiasing).
    With `together` they are the target's share of the joint solution, whose sum over all its concepts is that solution.
    Raises RecipeError where the modules do not read the text encoder's own states, or a weight is quantised.
    """
    import torch

    from spm_hub.models.architectures import weight_of
    from spm_hub.training.protection import modules_not_reading_text

    recipe, base, modules = task.recipe, task.base, task.modules
    with torch.no_grad():
        # Both sides of the equation have products of two states: a root of the weight in each is the weight of a term.
        weight = recipe.closed_form.erase_scale**0.5
        edited, goals = (weight * one for one in _edits(recipe, base, (recipe.target, *recipe.aliases), recipe.kind))
        kept = torch.cat([edited[:0], *_all_kept(recipe, base)])
        if path := next((path for path, module in modules.items() if not weight_of(module).is_floating_point()), None):
            raise RecipeError(f"method 'uce' cannot edit {path}: it is quantised", mend="--method esd-x")
        if others := modules_not_reading_text(base, modules, recipe.target):
            raise not_editable(others, len(modules))
        weights = {path: weight_of(module) for path, module in modules.items()}
        found = edit(weights, edited, goals, kept, recipe.closed_form.ridge, recipe.closed_form.rank)
        return {path: increment.to(device="cpu") for path, increment in found.items()}


def _all_kept(recipe: RecipeFields, base: TeacherModel) -> list[Tensor]:
    """Return the states to keep, each (n, d_text), times the root of their weight.

    They are those of the concepts of `together`, of `closed_form.preserve`, and of sentences about everything else.
    """
    from spm_hub.training.data.sampling import generator_for

    chosen = recipe.closed_form
    edited, preserved = chosen.erase_scale**0.5, chosen.preserve_scale**0.5
    kept = [edited * _edits(recipe, base, (one.target, *one.aliases), one.kind)[0] for one in recipe.together]
    if chosen.preserve:
        kept.append(preserved * _kept_states(recipe, base, chosen.preserve))
    if chosen.held:
        company = (name for one in recipe.together for name in (one.target, *one.aliases))
        maker = _maker(base, (recipe.target, *recipe.aliases, *company), recipe.kind)
        generator = generator_for(recipe.seed, 6, 0)
        kept.append(
            preserved * _kept_states(recipe, base, ["", *(maker.anchor(generator) for _ in range(chosen.held))])
        )
    return kept


def _edits(recipe: RecipeFields, base: TeacherModel, names: Sequence[str], kind: str) -> tuple[Tensor, Tensor]:
    """Return the states to edit, and their goals.

    They are those of each name alone, and in the same sentences as every other name.
    """
    import torch

    from spm_hub.training.data.sampling import generator_for

    pairs = []
    with phase(f"encoding sentences about {names[0]}") as move:
        for name in names:
            maker, generator = _maker(base, (name,), kind), generator_for(recipe.seed, 5, 0)
            for text in (name, *(maker.target(generator) for _ in range(recipe.closed_form.sentences))):
                pairs.append(_pair(recipe, base, name, text, maker))
                move(len(pairs), len(names) * (1 + recipe.closed_form.sentences))
    return torch.cat([old for old, _ in pairs]), torch.cat([new for _, new in pairs])


def _pair(recipe: RecipeFields, base: TeacherModel, name: str, text: str, maker: PromptMaker) -> tuple[Tensor, Tensor]:
    """Return the states of `text` at its concept's last token, or from there to the end, and their goals.

    The goals are the same states of the sentence with the surrogate; with attributes c_i of weights w_i they are
    c_e + sum_i w_i c_i, so that keys and values become W c_e + sum_i w_i W c_i. The states of a sentence with another
    name begin at that name or, if it has none, at the token before the gap.
    """
    attributes = recipe.closed_form.attributes
    others = [one.prompt for one in attributes] or [recipe.surrogate]
    texts = [maker.without(text, other) for other in others]
    tokenizer = base.pipe.tokenizer
    old, *rows = base.encode([text, *texts], literally=True).states
    first = (concept_positions(tokenizer, text, [name])[-1:] or (last_position(tokenizer, text),))[0]
    starts = [_start(tokenizer, text, without, other) for without, other in zip(texts, others, strict=True)]
    count = 1 if recipe.closed_form.tokens == "last" else len(old) - max(first, *starts)
    edited = old[first : first + count]
    found = [row[start : start + count] for row, start in zip(rows, starts, strict=True)]
    if not attributes:
        return edited, found[0]
    return edited, edited + sum(one.weight * states for one, states in zip(attributes, found, strict=True))


def _start(tokenizer: Any, text: str, without: str, other: str) -> int:
    """Return the position of the last token of `other`, which has the concept's place, in `without`."""
    same = [one == another for one, another in zip(window(tokenizer, text), window(tokenizer, without), strict=False)]
    gap = same.index(False) if False in same else len(same)
    return (concept_positions(tokenizer, without, [other])[-1:] or (max(0, gap - 1),))[0]


def _kept_states(recipe: RecipeFields, base: TeacherModel, prompts: Sequence[str]) -> Tensor:
    """Return the states (n, d_text) to keep of prompts: their last tokens', or all if all are edited."""
    import torch

    # Zeros, which SDXL receives for no prompt, would turn a concept into nothing at all, and keep nothing.
    states = base.encode(prompts, literally=True).states
    if recipe.closed_form.tokens == "onwards":
        return states.flatten(0, 1)
    return torch.stack(
        [row[last_position(base.pipe.tokenizer, text)] for row, text in zip(states, prompts, strict=True)]
    )


def _maker(base: TeacherModel, names: tuple[str, ...], kind: str) -> PromptMaker:
    from spm_hub.training.data.prompts import PromptMaker, Words, vocabulary_words

    return PromptMaker(names, kind, Words.load(), vocabulary_words(base.pipe.tokenizer))


def not_editable(paths: Sequence[str], whole: int) -> RecipeError:
    """For these of `whole` modules, which do not read the text states alone."""
    return RecipeError(
        f"method 'uce' edits what modules make of the text encoder's states: {paths[0]} ({len(paths)} of {whole} "
        "modules) reads something else",
        mend="--method esd-x, or a model with cross-attention (SD 1, SD 2, SDXL)",
    )


def check(recipe: RecipeFields) -> None:
    """Refuse preserved prompts that are to be erased, and attributes that cannot balance anything."""
    refuse_erased(recipe, "closed_form.preserve", recipe.closed_form.preserve or ())
    prompts = [one.prompt for one in recipe.closed_form.attributes]
    if not prompts:
        return
    refuse_erased(recipe, "closed_form.attributes", prompts)
    given = [normalise_prompt(prompt) for prompt in prompts]
    if twice := next((prompt for prompt in given if given.count(prompt) > 1), None):
        raise ValueError(f"closed_form.attributes names {twice!r} twice")
    if recipe.surrogate:
        raise ValueError(
            f"closed_form.attributes keep {recipe.target!r} and move it, surrogate {recipe.surrogate!r} would replace "
            "it: give one of them"
        )
    if recipe.kind == "style":
        raise ValueError("closed_form.attributes move what a sentence shows, and kind 'style' is how: leave kind out")
    if not any(one.weight for one in recipe.closed_form.attributes):
        raise ValueError(
            "closed_form.attributes: all weights are 0, nothing would change; spmhub train --balance finds them"
        )


def check_model(recipe: RecipeFields, denoiser: nn.Module) -> None:
    """Raise RecipeError for a denoiser whose chosen modules read more than the text encoder's states."""
    from spm_hub.training.protection import modules_reading_more
    from spm_hub.training.trainable.module_selection import select_modules

    modules = select_modules(denoiser, recipe.increment.modules)
    if joint := modules_reading_more(denoiser, modules):
        raise not_editable(joint, len(modules))


METHOD = Method(
    name="uce",
    title="UCE, Unified Concept Editing",
    paper="Gandikota et al., WACV 2024, arXiv 2308.14761",
    summary="Edits keys and values of cross-attention in closed form: the fastest, on SD 1, SD 2 and SDXL.",
    cost="About a second on the sketchbook; no training loop.",
    harm="Fully on, related concepts change; a character stayed in 1 of 8 pictures, and attacks brought it back.",
    preset={
        "objective": {"name": "uce"},
        "increment": {"modules": "esd-x-strict"},
        # Each direction beyond the first few costs others more than it erases: a rank of 32 ruined the second base of
        # the benchmarks. A greater weight of the concept's states erases what few directions leave of it.
        "closed_form": {
            "tokens": "onwards",
            "sentences": 40,
            "held": 200,
            "preserve": None,
            "rank": 4,
            "erase_scale": 3.0,
        },
        "templates": False,
    },
    trains=ClosedForm(solve),
    uses=frozenset({"closed_form", "increment.dtype", "protection", "together"}),
    instead={
        "*": "it is a closed form, without a training loop",
        "objective.eta": "it is a closed form; closed_form.ridge is the weight of keeping everything else",
        "objective.paired": "it always edits the concept's states into those of the same sentence with the surrogate",
        "increment": "it gives an exact low_rank increment of closed_form.rank on keys and values of cross-attention",
        "increment.modules": "it edits keys and values of cross-attention, 'esd-x-strict', only",
    },
    together=lambda recipe: True,
    joins=lambda runs: runs[0],
    check=check,
    check_model=check_model,
)
