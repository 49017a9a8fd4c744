"""A quick look at a new eraser: how far it changes pictures of the names nearest to its concept.

No judge of pictures is needed, so that it works on any model. A picture of the concept, and one of each name that the
text encoder puts nearest to it, are drawn from the same noise without the eraser, with it, and with it fully on.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from spm_hub.adapters.manifest import Evaluation
from spm_hub.errors import SpmHubError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import Tensor

    from spm_hub.adapters.adapter import Adapter

PROTOCOL = "quick-look"
METRIC = "change_over_the_concepts"
NEIGHBOURS, STEPS, SEED = 4, 10, 2024
LOST = 0.5
"""A picture that changes by this share of the concept's own change counts as lost."""
_BARELY = 0.1
"""A concept's picture that changes less than this, over the picture's own spread, hardly changes."""
_SMALL = 100 * 2**20
"""Bytes of a denoiser's weights up to which a CPU draws these pictures in seconds."""


@dataclass(frozen=True)
class Look:
    """The change of each picture from the same noise.

    own: of the concept's picture, over that picture's own spread.  gated, full: of each neighbour's under the eraser's
    own gate, and at gamma 1, over the change of the concept's picture at gamma 1.
    """

    concept: str
    own: float
    gated: dict[str, float]
    full: dict[str, float]

    @property
    def lost(self) -> list[str]:
        """The neighbours whose pictures are lost under the eraser's own gate."""
        return [name for name, change in self.gated.items() if change >= LOST]

    def describe(self) -> str:
        """Return the losses in a sentence."""
        most = max(self.full, key=lambda name: self.full[name], default=None)
        if most is None:
            return f"a quick look: no name is near {self.concept}"
        barely = f"{self.concept}'s own picture hardly changes; " if self.own < _BARELY else ""
        kept = (
            f"of the {len(self.gated)} nearest names ({', '.join(self.gated)}) "
            + (f"the pictures of {' and '.join(self.lost)} are lost" if self.lost else "no picture is lost")
            + f": {_percent(max(self.gated.values()))} of {self.concept}'s change at most"
        )
        return f"a quick look: {barely}{kept}, {_percent(self.full[most])} if it acted fully on every prompt ({most})"

    def evaluation(self, base: str) -> tuple[Evaluation, ...]:
        """Return the numbers for a manifest, those of the concept first."""

        def one(subject: str, metric: str, value: float, gate: str | None) -> Evaluation:
            return Evaluation(
                protocol=PROTOCOL, base=base, subject=subject, metric=metric, value=round(value, 4), samples=1,
                seed=SEED, steps=STEPS, gate=gate, version=version("spm-hub"),
            )  # fmt: skip

        neighbours = [
            one(name, METRIC, value, gate)
            for gate, changes in ((None, self.gated), ("always", self.full))
            for name, value in changes.items()
        ]
        return (one(self.concept, "change_over_spread", self.own, "always"), *neighbours)


def why_not(pipe: DiffusionPipeline) -> str | None:
    """Return why no pictures are drawn with this pipeline, or None if they are."""
    from spm_hub.models.architectures import denoiser_of
    from spm_hub.models.mapped import is_mapped

    denoiser = denoiser_of(pipe)
    if is_mapped(denoiser):
        return "the denoiser stayed in its file"
    small = sum(one.nbytes for one in denoiser.parameters()) <= _SMALL
    on_cpu = next(denoiser.parameters()).device.type == "cpu"
    return "a CPU would take minutes for its pictures" if on_cpu and not small else None


def look(pipe: DiffusionPipeline, adapter: Adapter) -> Look:
    """Draw with the eraser and without it, and compare. The pipeline is left as it was.

    Raises UsageError, ModelError and others as drawing and attaching do.
    """
    from spm_hub.attachment.attachment import attach

    concept = adapter.manifest.concept
    name = concept.require_target(adapter.name)
    near = neighbours(pipe, (name, *concept.aliases), concept.kind)
    prompts = [f"a painting by {one}" if concept.kind == "style" else one for one in (name, *near)]
    bare = _drawn(pipe, prompts)
    with attach(pipe, [adapter]):
        gated = _drawn(pipe, prompts)
    with attach(pipe, [adapter], gate="always"):
        full = _drawn(pipe, prompts)
    spread = (bare - bare.mean(1, keepdim=True)).norm(dim=1)
    changed, always = (gated - bare).norm(dim=1), (full - bare).norm(dim=1)
    whole = max(float(always[0]), 1e-6 * float(spread[0]))
    return Look(
        name, float(always[0] / spread[0]),
        {one: float(changed[row]) / whole for row, one in enumerate(near, start=1)},
        {one: float(always[row]) / whole for row, one in enumerate(near, start=1)},
    )  # fmt: skip


def looked(pipe: DiffusionPipeline, adapter: Adapter) -> tuple[Adapter, str]:
    """Return the eraser with the look in its manifest, and the look in words.

    A look that fails takes nothing from the eraser: the words say why.
    """
    from spm_hub.adapters.adapter import Adapter

    reason = why_not(pipe)
    if reason is None:
        try:
            seen = look(pipe, adapter)
        except (SpmHubError, RuntimeError, ValueError, TypeError) as error:  # out of memory, an unusual pipeline
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        else:
            rows = (*adapter.manifest.evaluation, *seen.evaluation(adapter.manifest.base.id))
            manifest = adapter.manifest.model_copy(update={"evaluation": rows})
            return Adapter(manifest, adapter.increments, adapter.source), f"{adapter.name}: {seen.describe()}"
    return adapter, f"{adapter.name}: no quick look, as {reason}; see spmhub apply --compare"


def neighbours(pipe: DiffusionPipeline, names: Sequence[str], kind: str) -> list[str]:
    """Return the names of a concept's kind that the text encoder puts nearest to it."""
    from spm_hub.training.base_model import TeacherModel
    from spm_hub.training.data.nearest import nearest_names
    from spm_hub.training.data.prompts import PromptMaker, Words

    words = Words.load()
    maker = PromptMaker(tuple(names), kind, words, ())
    known = {
        "style": words.artists, "person": (*words.people, *words.characters),
        "character": (*words.characters, *words.things), "nsfw": words.people,
    }.get(kind, (*words.things, *words.characters))  # fmt: skip
    others = [one for one in dict.fromkeys(known) if not maker.mentions_concept(one)]
    return nearest_names(TeacherModel(pipe), names[:1], others, NEIGHBOURS)


def _drawn(pipe: Any, prompts: Sequence[str]) -> Tensor:
    """Return the latents of one picture for each prompt, (n, numbers) in float32 on the CPU."""
    import torch

    wanted = {
        "prompt": list(prompts), "num_inference_steps": STEPS, "output_type": "latent", "use_resolution_binning": False,
        "generator": [torch.Generator().manual_seed(SEED) for _ in prompts],
    }  # fmt: skip
    known = inspect.signature(type(pipe).__call__).parameters
    with torch.no_grad(), _quiet_copy_of_scheduler(pipe):
        latents: Tensor = pipe(**{key: value for key, value in wanted.items() if key in known}).images
    return latents.float().cpu().flatten(1)


@contextmanager
def _quiet_copy_of_scheduler(pipe: Any) -> Iterator[None]:
    """Give the pipeline a scheduler of its own for a while, and no bar."""
    scheduler, bar = pipe.scheduler, dict(getattr(pipe, "_progress_bar_config", {}))
    pipe.scheduler = copy.deepcopy(scheduler)
    pipe.set_progress_bar_config(disable=True)
    try:
        yield
    finally:
        pipe.scheduler = scheduler
        pipe.set_progress_bar_config(**bar)


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
