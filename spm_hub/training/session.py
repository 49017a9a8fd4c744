"""Train erasers by recipes: load the base, save and resume each run, keep the results in a registry."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from spm_hub.errors import RegistryError, SpmHubError, UsageError
from spm_hub.io.environment import user_folder
from spm_hub.io.progress import Reporter, phase, show_phases
from spm_hub.models.base_choice import BaseChoice
from spm_hub.training.recipe.comparison import is_made_by
from spm_hub.training.recipe.protected_prompts import members

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from spm_hub.adapters.adapter import Adapter
    from spm_hub.adapters.increments import Increment
    from spm_hub.adapters.manifest import Manifest
    from spm_hub.registry.entry import EraserEntry
    from spm_hub.registry.registry import Registry
    from spm_hub.training.loop.checkpoint import Checkpoint
    from spm_hub.training.loop.run import Snapshot
    from spm_hub.training.recipe.recipe import Recipe

_KNOWN_AFTER_LOADING = ("model", "start_from", "start_sha256")
"""Recipe keys whose final values, those in the manifest, come from the base and from the eraser that training starts
from."""


@dataclass(frozen=True)
class TrainingStep:
    """One finished step of a training, for callbacks: `step` of `total`.

    losses: by name ("erase", "anchor"), relative to the distance at the start.
    reached, goal: the share of the way from the concept to its surrogate that is gone, averaged over the last steps,
    and the one that the training aims at; None where the method does not measure them.
    snapshot: returns the increments; of a joint run, those of the first concept.
    """

    step: int
    total: int
    losses: Mapping[str, float]
    snapshot: Snapshot
    reached: float | None = None
    goal: float | None = None

    def increments(self) -> Mapping[str, Increment]:
        """Return a copy of the increments that would be saved now, by module path.

        Call it inside the callback: the training goes on afterwards.
        """
        return self.snapshot()


Callback = Callable[[TrainingStep], object]
"""Called after every step; a true return value ends the training there."""


@dataclass(frozen=True)
class _Opened:
    """The base of a session: its pipeline, and its name, revision and weights' stamp for manifests."""

    pipe: DiffusionPipeline
    name: str
    revision: str | None
    stamp: Mapping[str, str]


@dataclass(frozen=True)
class Session:
    """Runs that train one eraser each, or several jointly, all on one base.

    find: returns the entry of an eraser that a recipe starts from; it may be on the Hub, which `training` does not
    know. registry: where finished erasers are kept; None keeps none. replace: whether they may replace others there.
    resume: go on from the state of an earlier run of the same recipe on the same base, if there is one.
    checkpoint_dir: the folder for the state of the run, in a folder for each if there are several; unless given, a
    folder in the user's cache that belongs to this recipe on this base. The state is saved every 50 steps and at
    Ctrl-C, and deleted when the results are kept or returned.
    look: draws what a new eraser does, and returns it with that in its manifest, and in words; None draws nothing.
    memory: GiB that the training may use, weights included; None for what is free.
    """

    plans: tuple[Recipe, ...]
    base: BaseChoice
    reporter: Reporter
    find: Callable[[str], EraserEntry]
    registry: Registry | None = None
    replace: bool = False
    resume: bool = False
    checkpoint_dir: Path | None = None
    callbacks: tuple[Callback, ...] = ()
    look: Callable[[DiffusionPipeline, Adapter], tuple[Adapter, str]] | None = None
    memory: float | None = None

    def check(self) -> None:
        """Refuse, without loading anything, a base that is none and names that the registry has no room for.

        Raises UsageError, NotFoundError, RegistryError, ModelError.
        """
        if self.replace and self.registry is None:
            raise UsageError("replace is for a registry, and none is given", mend="registry=True for your own")
        for plan in self.plans:
            for member in members(plan):
                known = self.resume and self._made_by(member, apart_from=_KNOWN_AFTER_LOADING)
                self._check_room(member.slug, replace=known)
        if self.base.pipe is not None:
            _check_given(self.base.pipe)
        if remark := self.base.check():
            self.reporter.say(remark)
        _ = self._starts

    def train(self) -> tuple[EraserEntry | Adapter, ...]:
        """Train all erasers; return their entries in the order of the concepts.

        Without a registry they are adapters instead. The base is left as it was. Call `check` first.
        Raises TrainingInterruptedError at Ctrl-C, TrainingDivergedError, RecipeError, ModelError, RegistryError.
        """
        from spm_hub.training.trainer import TrainingInterruptedError

        made: list[EraserEntry | Adapter] = []
        self.check_before_loading()
        with self.opened() as train:
            for plan in self.plans:
                try:
                    made += train(plan)
                except (KeyboardInterrupt, TrainingInterruptedError) as stop:
                    raise self._stopped(stop, plan, made) from None
        return tuple(made)

    def check_before_loading(self) -> None:
        """Refuse plans that this base cannot have, by what its folder says. Raises RecipeError, ModelError."""
        from spm_hub.training.preflight import check_before_loading

        folder = self.base.folder()
        for plan in self.plans:
            check_before_loading(plan, folder)

    @contextmanager
    def opened(self) -> Iterator[Callable[[Recipe], list[EraserEntry | Adapter]]]:
        """Load the base; yield the function that trains a plan, and returns its erasers as `train` does."""
        opened = self._opened()
        finished: list[Checkpoint] = []
        with _evaluating(opened.pipe), show_phases(self.reporter):
            yield lambda plan: self._run(plan, opened, finished)
        # Without a registry a later run could be interrupted; until then these states are all that is kept.
        for checkpoint in finished:
            self._forget(checkpoint)

    def _opened(self) -> _Opened:
        """Load the base and identify it. Raises TrainingInterruptedError at Ctrl-C."""
        from spm_hub.training.loop.checkpoint import base_stamp
        from spm_hub.training.trainer import TrainingInterruptedError

        if self.base.pipe is None:
            self.reporter.say(f"loading {self.plans[0].model} ...")
        try:
            pipe = self.base.open(for_gradients=True, mapped=not any(map(_predicts, self.plans)))
            return _Opened(pipe, *self.base.identity(pipe), base_stamp(pipe))
        except KeyboardInterrupt:
            raise TrainingInterruptedError(
                "stopped while loading the base; no training had begun", mend="the same command again"
            ) from None

    @cached_property
    def _starts(self) -> Mapping[str, EraserEntry]:
        return {plan.start_from: self.find(plan.start_from) for plan in self.plans if plan.start_from is not None}

    def _run(self, plan: Recipe, base: _Opened, finished: list[Checkpoint]) -> list[EraserEntry | Adapter]:
        """Train the eraser of `plan`, or all of a joint run, unless the registry has them already.

        If there is no registry, the checkpoint is added to `finished`.
        """
        from spm_hub.training.loop.checkpoint import Checkpoint
        from spm_hub.training.neighbours import held_names, with_neighbours_recorded
        from spm_hub.training.trainable.warm_start import with_start_recorded
        from spm_hub.training.verdict import verdict

        start = None if plan.start_from is None else self._starts[plan.start_from].load()
        recipe = with_start_recorded(plan.model_copy(update={"model": base.name}), start)
        recipe = with_neighbours_recorded(recipe, base.pipe)
        concepts = [plan.target, *(other.target for other in plan.together)]
        by_concept = {member.target: member for member in members(recipe)}
        kept = {
            member.slug
            for member in by_concept.values()
            if self.resume and not self.replace and self._made_by(member, base=base.stamp)
        }
        names = [by_concept[concept].slug for concept in concepts]
        for name in names:
            self._check_room(name, replace=name in kept)
        what = ", ".join(map(repr, concepts))
        if self.registry is not None and len(kept) == len(names):
            self.reporter.say(f"{what}: erased by this very recipe already, and kept in {self.registry.root}")
            entries = [self.registry.get(name) for name in names]
            for manifest in (entry.read_manifest() for entry in entries):
                if manifest.training is not None and manifest.training.ended == "callback":
                    self.reporter.say(f"{verdict(manifest)}; --force, in Python replace=True, trains it again")
            return [*entries]
        shown = base.name if self.base.pipe is not None else plan.model
        self.reporter.say(f"erasing {what} from {shown} with {plan.method} ...")
        if held := held_names(plan, recipe):
            self.reporter.say(held)
        for remark in _cut_texts(recipe, base.pipe):
            warnings.warn(f"spm_hub: {remark}", UserWarning, stacklevel=2)
        checkpoint = Checkpoint(self._run_folder(recipe, base.stamp), base.stamp)
        if self.resume and not checkpoint.path.exists():
            self.reporter.say(
                f"nothing to resume: {checkpoint.folder} has no run of this recipe on this base; starting from step 1"
            )
        adapters = self._trained(recipe, base, checkpoint, start)
        if self.look is not None:
            try:
                adapters = tuple(self._looked(base.pipe, adapter) for adapter in adapters)
            except KeyboardInterrupt as interrupt:
                raise self._interrupted(interrupt, recipe, checkpoint) from None
        if self.registry is None:
            finished.append(checkpoint)
            return [*adapters]
        try:
            with phase("keeping the eraser"):
                entries = [self._kept(each, self.registry, checkpoint, replace=each.name in kept) for each in adapters]
                self._forget(checkpoint)
        except KeyboardInterrupt as interrupt:
            raise self._interrupted(interrupt, recipe, checkpoint) from None
        return [*entries]

    def _stopped(
        self, stop: KeyboardInterrupt | SpmHubError, plan: Recipe, made: Sequence[EraserEntry | Adapter]
    ) -> SpmHubError:
        """Return the error for Ctrl-C in the run of `plan`, with the erasers that were made before it."""
        from spm_hub.training.trainer import TrainingInterruptedError

        if not isinstance(stop, SpmHubError):
            before = f"stopped before the training on {plan.target!r} began"
            stop = TrainingInterruptedError(before, mend="the same command again")
        if not made:
            return stop
        kept = "as the states of their runs" if self.registry is None else f"in {self.registry.root}"
        return TrainingInterruptedError(
            f"{stop.message}; the erasers of earlier trainings are kept {kept}: {', '.join(one.name for one in made)}",
            mend="the same command with --resume, in Python resume=True: it goes on from there",
        )

    def _looked(self, pipe: DiffusionPipeline, adapter: Adapter) -> Adapter:
        assert self.look is not None
        with phase("a quick look"):
            seen, words = self.look(pipe, adapter)
        self.reporter.say(words)
        return seen

    def _interrupted(self, interrupt: KeyboardInterrupt, recipe: Recipe, checkpoint: Checkpoint) -> SpmHubError:
        """Return the error for Ctrl-C after the training: its eraser is in the registry, or its state on disk."""
        from spm_hub.training.trainer import TrainingInterruptedError, interrupted

        if self.registry is None or not all(self._made_by(each, base=checkpoint.base) for each in members(recipe)):
            return interrupted(interrupt, recipe, checkpoint)
        return TrainingInterruptedError(
            f"stopped after the training; the eraser is kept in {self.registry.root}", mend=f"spmhub show {recipe.slug}"
        )

    def _trained(
        self, recipe: Recipe, base: _Opened, checkpoint: Checkpoint, start: Adapter | None
    ) -> tuple[Adapter, ...]:
        from spm_hub.training.trainer import train_together
        from spm_hub.training.verdict import way

        seen: dict[str, float] = {}

        def note(step: int, total: int, figures: dict[str, float]) -> None:
            seen.update(figures)
            move(step, total, figures, way(figures))

        def call(step: int, snapshot: Snapshot) -> bool:
            losses = {key: value for key, value in seen.items() if key not in ("reached", "goal")}
            done = TrainingStep(step, recipe.steps, losses, snapshot, seen.get("reached"), seen.get("goal"))
            stops = [callback(done) for callback in self.callbacks]
            return any(stops)

        with self.reporter.progress("training") as move:
            return train_together(
                recipe,
                pipe=base.pipe,
                revision=base.revision,
                progress=note,
                checkpoint_dir=checkpoint.folder,
                resume=self.resume,
                start=start,
                on_step=call if self.callbacks else None,
                memory=self.memory,
            )

    def _kept(self, adapter: Adapter, registry: Registry, checkpoint: Checkpoint, *, replace: bool) -> EraserEntry:
        """Keep an eraser in the registry; if that fails, name the checkpoint in which it survives."""
        try:
            entry = registry.add(adapter, replace=self.replace or replace)
        except RegistryError as error:
            if not checkpoint.path.exists():
                lost = "; the training is lost, as there was no room for the state of the run either"
                raise RegistryError(error.message + lost, mend=error.mend) from error
            raise RegistryError(
                f"{error.message}; the training is not lost, its result is in {checkpoint.folder}",
                mend="the same command with --resume, in Python resume=True, with room or in another registry",
            ) from error
        for remark in _remarks(adapter.manifest):
            self.reporter.say(remark)
        return entry

    def _check_room(self, name: str, *, replace: bool) -> None:
        if self.registry is not None:
            self.registry.check_room_for(name, replace=self.replace or replace)

    def _made_by(
        self, recipe: Recipe, *, apart_from: Collection[str] = (), base: Mapping[str, str] | None = None
    ) -> bool:
        """Return whether the registry's eraser of that name was trained by exactly this recipe.

        apart_from: keys to leave out of the comparison. base: the stamp of the weights it has to be trained on, None
        while they are not loaded.
        """
        entry = None if self.registry is None else self.registry.find(recipe.slug)
        try:
            manifest = None if entry is None else entry.read_manifest()
        except SpmHubError:
            return False  # a broken entry is in the way like any other
        if manifest is None or not manifest.recipe or not (base or {}).items() <= manifest.versions.items():
            return False
        wanted = recipe.model_dump(mode="json")
        try:
            # An older manifest may spell a key otherwise, or lack one that had only one value then.
            made = type(recipe).make(**manifest.recipe).model_dump(mode="json")
        except SpmHubError:
            return False
        return is_made_by(made, wanted, apart_from)

    def _run_folder(self, recipe: Recipe, stamp: Mapping[str, str]) -> Path:
        """Return the folder for the state of a run: each recipe on each base has its own."""
        if self.checkpoint_dir is not None:
            return self.checkpoint_dir / recipe.slug if len(self.plans) > 1 else self.checkpoint_dir
        digest = hashlib.sha256(repr((recipe.model_dump_json(), *stamp.values())).encode()).hexdigest()
        return user_folder("cache") / "runs" / f"{recipe.slug}-{digest[:8]}"

    def _forget(self, checkpoint: Checkpoint) -> None:
        """Delete the state of a run, and its folder if it is one of ours."""
        checkpoint.remove()
        if self.checkpoint_dir is None:
            with suppress(OSError):
                checkpoint.folder.rmdir()


def _cut_texts(recipe: Recipe, pipe: DiffusionPipeline) -> Iterator[str]:
    """Yield which texts of a recipe are longer than what the pipeline's text encoders read of them."""
    from spm_hub.models.text_window import cut_text

    texts = {
        text: what
        for member in members(recipe)
        for what, several in (
            ("the anchor", member.anchoring.prompts), ("the protected prompt", member.protection.prompts or ()),
            ("the attribute", [one.prompt for one in member.closed_form.attributes]),
            ("the surrogate", (member.surrogate,)), ("the alias", member.aliases), ("the concept", (member.target,)),
        )
        for text in several
    }  # fmt: skip
    for text, what in texts.items():
        if (cut := cut_text(pipe, text, {})) is not None:
            yield f"{cut.describe(what)}. Nothing is learnt of that part; train an eraser of each of its concepts"


def _predicts(plan: Recipe) -> bool:
    """Return whether the denoiser has to predict; protecting prompts tries it out."""
    from spm_hub.training.methods import find_method
    from spm_hub.training.recipe.protected_prompts import protects

    method = find_method(plan.method)
    return method is None or method.predicts or protects(plan)


def _check_given(pipe: DiffusionPipeline) -> None:
    """Refuse a modular pipeline, and one whose denoiser is on the meta device."""
    from spm_hub.models.architectures import denoiser_of, is_modular

    if is_modular(type(pipe)):
        raise UsageError(
            f"{type(pipe).__name__} is a modular pipeline: erasers attach to it, but training calls an ordinary one",
            mend="give an ordinary pipeline of the same parts, or model=, and attach the eraser to the modular one",
        )
    denoiser = denoiser_of(pipe)
    if any(parameter.is_meta for parameter in denoiser.parameters()):
        raise UsageError(
            f"the denoiser ({type(denoiser).__name__}) of the given pipeline is on the device 'meta', where weights "
            "have no values: nothing can be trained on it",
            mend="give a pipeline with weights on a device, for instance spm_hub.load_pipeline(NAME)",
        )


@contextmanager
def _evaluating(pipe: DiffusionPipeline) -> Iterator[None]:
    """Put all modules of a pipeline into evaluation mode; restore the mode of each at the end."""
    from torch import nn

    parts = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    training = [module for part in parts for module in part.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _remarks(manifest: Manifest) -> Iterator[str]:
    """Yield how well prompts are protected, and how exact a conversion of the increments was."""
    if found := [one for one in manifest.evaluation if one.protocol == "protected-prompts"]:
        worst, target = found
        yield (
            f"{manifest.name}: keys and values move by at most {worst.value:.1e} of their size for {worst.samples} "
            f"protected prompts ({worst.subject}), by {target.value:.2g} for {target.subject}"
        )
    for one in manifest.evaluation:
        if one.protocol == "conversion":
            yield f"{manifest.name}: {one.metric.replace('_', ' ')} in its conversion: {one.value:.1e}"
