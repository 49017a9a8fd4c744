"""Erasing without a training loop: text states in, the solved increment out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from spm_hub.adapters.increments import LowRank
from spm_hub.errors import RecipeError
from spm_hub.models.architectures import weight_of
from spm_hub.training.base_model import BaseModel
from spm_hub.training.data.prompts import PromptMaker, Words, vocabulary_words
from spm_hub.training.data.token_positions import concept_positions, last_position, window
from spm_hub.training.data.trajectories import generator_for
from spm_hub.training.methods.uce import edit
from spm_hub.training.protection import strangers
from spm_hub.training.recipe.recipe import Recipe


@torch.no_grad()
def solved(recipe: Recipe, base: BaseModel, modules: Mapping[str, nn.Module]) -> dict[str, LowRank]:
    """UCE's increments on `modules`, float64: target and aliases, all at once, become the surrogate.

    With `together` they are the target's share of the joint solution, whose sum over all its concepts is that solution.
    Raises RecipeError where the modules do not read the text encoder's own states, or a weight is quantised.
    """
    chosen = recipe.closed_form
    names = (recipe.target, *recipe.aliases)
    edited, goals = _edits(recipe, base, names, recipe.kind)
    kept = [_edits(recipe, base, (one.target, *one.aliases), one.kind)[0] for one in recipe.together]
    if chosen.preserve:
        kept.append(_held(recipe, base, chosen.preserve))
    if chosen.held:
        company = (name for one in recipe.together for name in (one.target, *one.aliases))
        maker = _maker(base, (*names, *company), recipe.kind)
        generator = generator_for(recipe.seed, 6, 0)
        kept.append(_held(recipe, base, ["", *(maker.anchor(generator) for _ in range(chosen.held))]))
    if path := next((path for path, module in modules.items() if not weight_of(module).is_floating_point()), None):
        raise RecipeError(f"method 'uce' cannot edit {path}: it is quantised", mend="--method esd-x")
    if others := strangers(base, modules, recipe.target):
        raise not_editable(others, len(modules))
    weights = {path: weight_of(module) for path, module in modules.items()}
    found = edit(weights, edited, goals, torch.cat([edited[:0], *kept]), chosen.ridge, chosen.rank)
    return {path: increment.to(device="cpu") for path, increment in found.items()}


def _edits(recipe: Recipe, base: BaseModel, names: Sequence[str], kind: str) -> tuple[Tensor, Tensor]:
    """The states to be edited, of each name alone and in the same sentences as every other's, and what they become."""
    pairs = []
    for name in names:
        maker, generator = _maker(base, (name,), kind), generator_for(recipe.seed, 5, 0)
        for text in (name, *(maker.target(generator) for _ in range(recipe.closed_form.sentences))):
            pairs.append(_pair(recipe, base, name, text, maker.without(text, recipe.surrogate)))
    return torch.cat([old for old, _ in pairs]), torch.cat([new for _, new in pairs])


def _pair(recipe: Recipe, base: BaseModel, name: str, text: str, without: str) -> tuple[Tensor, Tensor]:
    """States of `text` at its concept's last token, or from there to the window's end, and what they become.

    That is the same of `without`, from its surrogate on, or where it has none, from the token before the gap.
    """
    tokenizer = base.pipe.tokenizer
    old, new = base.encode([text, without], literally=True).states
    same = [one == other for one, other in zip(window(tokenizer, text), window(tokenizer, without), strict=False)]
    gap = same.index(False) if False in same else len(same)
    first = concept_positions(tokenizer, text, [name])[-1:] or (last_position(tokenizer, text),)
    other = concept_positions(tokenizer, without, [recipe.surrogate])[-1:] or (max(0, gap - 1),)
    count = 1 if recipe.closed_form.tokens == "last" else len(old) - max(*first, *other)
    return old[first[0] : first[0] + count], new[other[0] : other[0] + count]


def _held(recipe: Recipe, base: BaseModel, prompts: Sequence[str]) -> Tensor:
    """The states (n, d_text) by which prompts are held: their last tokens', or where all are edited, all."""
    # Zeros, which SDXL is told in place of no prompt, would make of a concept nothing at all, and hold nothing.
    states = base.encode(prompts, literally=True).states
    if recipe.closed_form.tokens == "onwards":
        return states.flatten(0, 1)
    return torch.stack(
        [row[last_position(base.pipe.tokenizer, text)] for row, text in zip(states, prompts, strict=True)]
    )


def _maker(base: BaseModel, names: tuple[str, ...], kind: str) -> PromptMaker:
    return PromptMaker(names, kind, Words.load(), vocabulary_words(base.pipe.tokenizer))


def not_editable(paths: Sequence[str], whole: int) -> RecipeError:
    """For these of `whole` modules, which do not read the text states alone."""
    return RecipeError(
        f"method 'uce' edits what modules make of the text encoder's states: {paths[0]} ({len(paths)} of {whole} "
        "modules) reads something else",
        mend="--method esd-x, or a model with cross-attention (SD 1, SD 2, SDXL)",
    )
