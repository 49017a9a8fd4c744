"""Draws x_t, and the frozen base's predictions there, from trajectories.

A trajectory of the base under guidance passes through every x_t, and the rows it needs at each step ARE the teacher's
predictions for the concept, the empty prompt and an anchor. Nothing is computed for the targets alone: SPM's own loop
spends about thirty of its fifty denoiser rows per iteration on reaching one x_t.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from spm_hub.io.progress import phase
from spm_hub.training.base_model import TeacherModel
from spm_hub.training.conditioning import GUIDANCE, Conditioning
from spm_hub.training.data.anchors import AnchorSource
from spm_hub.training.data.batch import Batch
from spm_hub.training.data.prompts import PromptMaker
from spm_hub.training.data.sampling import (
    generator_for,
    initial_sigma,
    less_concept,
    neutral_prompts,
    scale_model_input,
    trained_prompt,
)
from spm_hub.training.recipe.fields import RecipeFields
from spm_hub.training.recipe.schema import Anchoring
from spm_hub.training.trainable.trainable import Trainable

_HELD_OUT = 1_000_002
"""The index of a group that no training reaches, under any seed: one below the first of the next seed."""


@dataclass(frozen=True)
class Chunk:
    """A group of trajectories, all steps of all flattened to n rows.

    latents (n, *latent_shape), times (n,), owner (n,): the trajectory; noise (k, *latent_shape) that each began with,
    led (k,): whether by the concept; prompts (n), target_states (n rows), neutral_states (n), empty_states (k);
    anchor_states (n, a); concept, neutral, empty as latents; anchors (n, a, *latent_shape).
    """

    latents: Tensor
    times: Tensor
    owner: Tensor
    noise: Tensor
    led: Tensor
    prompts: tuple[str, ...]
    target_states: Conditioning
    neutral_states: Conditioning
    anchor_states: Conditioning
    empty_states: Conditioning
    concept: Tensor
    neutral: Tensor
    empty: Tensor
    anchors: Tensor

    def __len__(self) -> int:
        return len(self.latents)


@dataclass(frozen=True, eq=False)
class _Lead:
    """The prompts, anchors and guidance that lead a group of k trajectories.

    prompts (k) of the concept; anchor (k rows), of which those at `by_anchor` (k,) lead; guidance (k,) of the
    trajectories, embedding (k,) the one that a guidance-distilled denoiser receives in the losses; fixed: rows asked at
    every step, the empty prompt's and with `erase_from` the target's; apart: whether leading needs rows of its own.
    """

    prompts: tuple[str, ...]
    anchor: Conditioning
    by_anchor: Tensor
    guidance: Tensor
    embedding: Tensor
    fixed: tuple[Conditioning, ...]
    apart: bool


@dataclass(frozen=True, eq=False)
class _Question:
    """The prompts and states of one step of k trajectories.

    rows: all of the states in the order of the denoiser's call.
    """

    prompts: tuple[str, ...]
    target: Conditioning
    neutral: Conditioning
    anchors: tuple[Conditioning, ...]
    rows: Conditioning


@dataclass(frozen=True, eq=False)
class _Visit:
    """One step of k trajectories: x_t and the teacher's predictions there.

    All tensors are (k, *latent_shape), but kept, the predictions of a anchors, (k, a, *latent_shape), and times (k,).
    driver: the prediction that leads on.
    """

    question: _Question
    latents: Tensor
    times: Tensor
    concept: Tensor
    neutral: Tensor
    empty: Tensor
    kept: Tensor
    driver: Tensor


class TrajectorySource:
    """Trajectories of the frozen base.

    The concept leads half of them, an anchor the other half, at various guidance scales, so that x_t covers both the
    base's pictures and those that the erased model will draw instead. If the concept does not lead, it is predicted in
    another sentence at every step, at no cost: in all, a concept is learnt from hundreds of sentences.
    """

    def __init__(
        self,
        base: TeacherModel,
        recipe: RecipeFields,
        maker: PromptMaker,
        anchors: AnchorSource,
        trainable: Trainable | None = None,
    ) -> None:
        """trainable: frozen while trajectories are drawn; None for a bare base."""
        self._base, self._recipe, self._maker, self._anchors, self._trainable = base, recipe, maker, anchors, trainable
        self._kept: dict[int, Chunk] = {}

    @torch.no_grad()
    def _run(self, index: int) -> Chunk:
        """Return the index-th group of trajectories, from noise to pictures."""
        base = self._base
        generator = generator_for(self._recipe.seed, 0, index)
        base.forget()
        lead = self._lead(generator)
        count = len(lead.prompts)
        # Another number of steps each time, so that together the trajectories visit all timesteps.
        most = base.steps(self._recipe.x_t.steps)
        steps = most - int(torch.randint(1 + most // 4, (), generator=generator))
        scheduler = base.scheduler(steps)
        noise = base.noise(count, generator)
        latents = noise * initial_sigma(scheduler)
        visits: list[_Visit] = []
        with phase("drawing trajectories to learn from") as move:
            for time in scheduler.timesteps:
                question = self._ask(lead, generator)
                model_input = scale_model_input(scheduler, latents, time)
                repeated = torch.cat([model_input] * (len(question.rows) // count))
                parts = base.predict(repeated, time.expand(len(repeated)), question.rows).split(count)
                visit = self._visit(lead, question, model_input, time.expand(count), parts)
                visits.append(visit)
                guided = base.guide(visit.empty, visit.driver, lead.guidance)
                latents = scheduler.step(guided, time, latents).prev_sample
                move(len(visits), len(scheduler.timesteps))
        return self._chunk_of(lead, noise, visits)

    def _lead(self, generator: torch.Generator) -> _Lead:
        """Draw the prompts, the anchors and the guidance that lead a group of trajectories."""
        base, recipe, source = self._base, self._recipe, self._recipe.x_t
        anchored, count = recipe.anchoring.weight > 0, source.trajectories
        prompts = tuple(trained_prompt(recipe, self._maker, generator) for _ in range(count))
        # Drawn even without anchoring, so that the noise and the guidance of a seed do not depend on it.
        anchor = self._anchors.draw(count, generator)
        empty = base.encode([""])[0]
        picks = torch.randint(len(source.guidance), (count,), generator=generator)
        guidance = torch.tensor(source.guidance)[picks]
        by_anchor = (torch.arange(count) % 2 == 1) & anchored
        guidance = torch.where(by_anchor, guidance.abs(), guidance).to(base.device)
        # The guidance that the denoiser receives in the losses need not be the one that leads the trajectories.
        embedding = guidance
        if source.guidance_embedding is not None:
            embedding = torch.full_like(guidance, source.guidance_embedding)
        fixed = [empty.expand(count).under(embedding)]
        if recipe.erase_from is not None:
            fixed.append(base.encode([recipe.target])[0].expand(count).under(embedding))
        apart = source.guidance_embedding is not None and GUIDANCE in empty.others
        return _Lead(prompts, anchor.under(embedding), by_anchor, guidance, embedding, tuple(fixed), apart)

    def _ask(self, lead: _Lead, generator: torch.Generator) -> _Question:
        """Return everything that the denoiser is asked at one step of the trajectories."""
        base, recipe, count = self._base, self._recipe, len(lead.prompts)
        # All anchors but the driving one change at every step: thousands of texts are kept, at the cost of few.
        base.forget()
        anchors: list[Conditioning] = []
        if recipe.anchoring.weight > 0:
            others = max(1, recipe.anchoring.offered) - 1
            anchors = [
                lead.anchor,
                *(self._anchors.draw(count, generator).under(lead.embedding) for _ in range(others)),
            ]
        prompts = tuple(
            trained_prompt(recipe, self._maker, generator) if freely else given
            for given, freely in zip(lead.prompts, lead.by_anchor.tolist(), strict=True)
        )
        target = base.encode(prompts).under(lead.embedding)
        neutral = base.encode(neutral_prompts(recipe, self._maker, prompts)).under(lead.embedding)
        leading = [target] if recipe.surrogate == "" else [target, neutral]
        alone: list[Conditioning] = []
        if lead.apart:
            ahead = target if recipe.x_t.driver == "concept" else neutral
            leader = torch.where(lead.by_anchor, torch.arange(count) + count, torch.arange(count)).to(base.device)
            alone = [Conditioning.cat([ahead, lead.anchor])[leader].under(lead.guidance)]
        rows = Conditioning.cat([*leading, *lead.fixed, *alone, *anchors])
        return _Question(prompts, target, neutral, tuple(anchors), rows)

    def _visit(
        self, lead: _Lead, question: _Question, latents: Tensor, times: Tensor, parts: Sequence[Tensor]
    ) -> _Visit:
        """Take apart the predictions of one step, `parts`, as `_ask` put the rows together."""
        recipe, per = self._recipe, len(question.anchors)
        concept, neutral, empty = parts[0], parts[1], parts[1 if recipe.surrogate == "" else 2]
        kept = (
            torch.stack(tuple(parts[-per:]), dim=1) if per else concept.new_empty(len(concept), 0, *concept.shape[1:])
        )
        driver = concept if recipe.x_t.driver == "concept" else neutral
        if lead.apart:
            driver = parts[-per - 1]
        elif per:
            by_anchor = lead.by_anchor.to(concept.device).view(-1, *[1] * (concept.dim() - 1))
            driver = torch.where(by_anchor, kept[:, 0], driver)
        if recipe.erase_from is not None:
            of_target = (1 if recipe.surrogate == "" else 2) + len(lead.fixed) - 1
            neutral = less_concept(concept, parts[of_target], neutral)
        return _Visit(question, latents, times, concept, neutral, empty, kept, driver)

    def _chunk_of(self, lead: _Lead, noise: Tensor, visits: Sequence[_Visit]) -> Chunk:
        """Flatten all steps of all trajectories to rows."""
        count, steps = len(lead.prompts), len(visits)
        device = self._base.device
        questions = [visit.question for visit in visits]
        per = len(questions[0].anchors)
        # Without anchors the target states take their place: no row of them is used, but they have the right shape.
        anchors = [states for each in questions for states in each.anchors] or [each.target for each in questions]
        by_row = Conditioning.cat(anchors).map(
            lambda part: part.unflatten(0, (steps, -1, count)).transpose(1, 2).flatten(0, 1)[:, :per]
        )
        return Chunk(
            latents=torch.cat([visit.latents for visit in visits]),
            times=torch.cat([visit.times for visit in visits]),
            owner=torch.arange(count, device=device).repeat(steps),
            noise=noise,
            led=~lead.by_anchor.to(device) & (lead.guidance > 0) & (self._recipe.x_t.driver == "concept"),
            prompts=tuple(prompt for each in questions for prompt in each.prompts),
            target_states=Conditioning.cat([each.target for each in questions]),
            neutral_states=Conditioning.cat([each.neutral for each in questions]),
            anchor_states=by_row,
            empty_states=lead.fixed[0],
            concept=torch.cat([visit.concept for visit in visits]),
            neutral=torch.cat([visit.neutral for visit in visits]),
            empty=torch.cat([visit.empty for visit in visits]),
            anchors=torch.cat([visit.kept for visit in visits]),
        )

    def chunk(self, index: int) -> Chunk:
        """Return the index-th group; the current and the previous one stay in memory."""
        if index not in self._kept:
            self._kept = {kept: chunk for kept, chunk in self._kept.items() if kept == index - 1}
            with nullcontext() if self._trainable is None else self._trainable.frozen():
                self._kept[index] = self._run(index)
        return self._kept[index]

    def held_out(self, rows: int) -> Batch:
        """Return rows of trajectories that no training step has, drawn by the frozen base."""
        with nullcontext() if self._trainable is None else self._trainable.frozen():
            group = self._run(_HELD_OUT)
        return _assemble([(group, rows)], self._recipe, generator_for(self._recipe.seed, 1, _HELD_OUT))

    def batch(self, step: int) -> Batch:
        """Return the rows of training step `step`.

        They are a function of the recipe and `step` alone, so that a resumed run goes on exactly.
        """
        recipe = self._recipe
        length = -(-recipe.steps // min(recipe.x_t.chunks, recipe.steps))
        index = step // length
        generator = generator_for(recipe.seed, 1, step)
        previous = self.chunk(index - 1) if index > 0 else None
        current = self.chunk(index)
        size = recipe.batch_size
        if previous is None:
            return _assemble([(current, size)], recipe, generator)
        return _assemble([(previous, size // 2), (current, size - size // 2)], recipe, generator)


def _assemble(shares: list[tuple[Chunk, int]], recipe: RecipeFields, generator: torch.Generator) -> Batch:
    targets: list[tuple[Tensor, ...]] = []
    anchors: list[tuple[Tensor, ...]] = []
    prompts: list[str] = []
    target_states: list[Conditioning] = []
    neutral_states: list[Conditioning] = []
    anchor_states: list[Conditioning] = []
    for chunk, size in shares:
        if size == 0:
            continue
        rows = torch.randint(len(chunk), (size,), generator=generator).to(chunk.latents.device)
        owner = chunk.owner[rows]
        targets.append((
            chunk.latents[rows], chunk.times[rows], chunk.noise[owner], chunk.led[owner], chunk.concept[rows],
            chunk.neutral[rows],
        ))  # fmt: skip
        prompts += [chunk.prompts[row] for row in rows.tolist()]
        target_states.append(chunk.target_states[rows])
        neutral_states.append(chunk.neutral_states[rows])
        anchored = recipe.anchoring.weight > 0
        for taken in _taken(recipe.anchoring, size, generator).to(rows.device) if anchored else ():
            anchors.append((chunk.latents[rows], chunk.times[rows], chunk.anchors[rows, taken]))
            anchor_states.append(chunk.anchor_states[rows, taken])
        # The empty prompt is the other half of guidance at every picture, so it is an anchor too.
        some = rows[: max(1, size // 4) if anchored else 0]
        anchors.append((chunk.latents[some], chunk.times[some], chunk.empty[some]))
        anchor_states.append(chunk.empty_states[chunk.owner[some]])
    latents, times, noise, led, concept, neutral = (torch.cat(parts) for parts in zip(*targets, strict=True))
    anchor_latents, anchor_times, kept = (torch.cat(parts) for parts in zip(*anchors, strict=True))
    return Batch(
        latents, times, noise, led, tuple(prompts), Conditioning.cat(target_states), Conditioning.cat(neutral_states),
        concept, neutral,
        anchor_latents, anchor_times, Conditioning.cat(anchor_states), kept,
    )  # fmt: skip


def _taken(anchoring: Anchoring, size: int, generator: torch.Generator) -> Tensor:
    """Return (per_target, size): which of its anchors each row of a batch takes, none of them twice."""
    if anchoring.offered == anchoring.per_target:
        return torch.arange(anchoring.per_target)[:, None].expand(-1, size)
    order = torch.rand((size, anchoring.offered), generator=generator).argsort(dim=1)
    return order[:, : anchoring.per_target].T
