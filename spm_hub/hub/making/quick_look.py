"""A quick look at a new eraser: whether its concept is still drawn, and what else changes.

No judge of pictures is needed, so that it works on any model. A picture of the concept, and one of each name that the
text encoder puts nearest to it, are drawn from the same noise without the eraser and with it. The base itself says in
how many pictures, drawn with the eraser fully on, it recognises the concept, and how many other names.
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
from spm_hub.training.verdict import OTHERS_RECOGNISED, QUICK_LOOK, RECOGNISED

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import Tensor, nn

    from spm_hub.adapters.adapter import Adapter
    from spm_hub.hub.making.recognition import OthersRecognised, Recognition

METRIC = "change_over_the_concepts"
NEIGHBOURS, STEPS, SEED = 4, 10, 2024
_ASKED, _ASKED_OF_LARGE = (20, 8, 12), (8, 4, 4)
"""Pictures that a small base or a large one is asked about.

They are of the concept with the eraser, of the concept without it, and of names that are not near.
"""
_AT_ONCE, _AT_ONCE_OF_LARGE = 20, 5
"""Pictures drawn at once."""
LOST = 0.5
"""A picture that changes by this share of the concept's own change counts as lost."""
_BARELY = 0.1
"""A concept's picture that changes less than this, over the picture's own spread, hardly changes."""
_SMALL = 100 * 2**20
"""Bytes of a small denoiser's weights: a CPU draws these pictures in seconds."""


@dataclass(frozen=True)
class Look:
    """The change of each picture from the same noise, and whether the concept is still there.

    own: of the concept's picture at gamma 1, over that picture's own spread.  gated: of each neighbour's under the
    eraser's own gate, over the change of the concept's picture at gamma 1.
    seen, others: what the base recognises at gamma 1.
    """

    concept: str
    own: float
    gated: dict[str, float]
    seen: Recognition
    others: OthersRecognised

    @property
    def lost(self) -> list[str]:
        """The neighbours whose pictures are lost under the eraser's own gate."""
        return [name for name, change in self.gated.items() if change >= LOST]

    def describe(self) -> str:
        """Return in a sentence whether the concept is left, and the losses."""
        left = self.seen.describe(self.concept)
        if not self.gated:
            return f"a quick look: {left}; no name is near {self.concept}"
        barely = f"{self.concept}'s own picture hardly changes; " if self.own < _BARELY else ""
        kept = (
            f"of the {len(self.gated)} nearest names ({', '.join(self.gated)}) "
            + (f"the pictures of {' and '.join(self.lost)} are lost" if self.lost else "no picture is lost")
            + f": {_percent(max(self.gated.values()))} of {self.concept}'s change at most"
        )
        return f"a quick look: {left}; {barely}{kept}; {self.others.describe()}"

    def evaluation(self, base: str) -> tuple[Evaluation, ...]:
        """Return the numbers for a manifest, those of the concept first."""

        def one(
            subject: str, metric: str, value: float, gate: str | None, samples: int = 1, reference: float | None = None
        ) -> Evaluation:
            return Evaluation(
                protocol=QUICK_LOOK, base=base, subject=subject, metric=metric, value=round(value, 4), samples=samples,
                reference=reference, seed=SEED, steps=STEPS, gate=gate, version=version("spm-hub"),
            )  # fmt: skip

        seen, others = self.seen, self.others
        neighbours = [one(name, METRIC, value, None) for name, value in self.gated.items()]
        if others.known:
            neighbours.append(one("others", OTHERS_RECOGNISED, others.kept / others.known, "always", others.known))
        left = one(
            self.concept, RECOGNISED, seen.erased / seen.of_erased, "always", seen.of_erased, seen.own / seen.of_own
        )
        return (one(self.concept, "change_over_spread", self.own, "always"), left, *neighbours)


def why_not(pipe: DiffusionPipeline) -> str | None:
    """Return why no pictures are drawn with this pipeline, or None if they are."""
    from spm_hub.models.architectures import denoiser_of
    from spm_hub.models.mapped import is_mapped

    denoiser = denoiser_of(pipe)
    if is_mapped(denoiser):
        return "the denoiser stayed in its file"
    on_cpu = next(denoiser.parameters()).device.type == "cpu"
    return "a CPU would take minutes for its pictures" if on_cpu and not _is_small(denoiser) else None


def _is_small(denoiser: nn.Module) -> bool:
    return sum(one.nbytes for one in denoiser.parameters()) <= _SMALL


def look(pipe: DiffusionPipeline, adapter: Adapter) -> Look:
    """Draw with the eraser and without it, and compare. The pipeline is left as it was.

    Raises UsageError, ModelError and others as drawing and attaching do.
    """
    import torch

    from spm_hub.attachment.attachment import attach
    from spm_hub.hub.making.names import nearest, others
    from spm_hub.hub.making.recognition import OthersRecognised, Recognition, named, recognised
    from spm_hub.training.base_model import TeacherModel

    concept = adapter.manifest.concept
    name = concept.require_target(adapter.name)
    names = (name, *concept.aliases)
    near = nearest(pipe, names, concept.kind, NEIGHBOURS)
    prompts = [f"a painting by {one}" if concept.kind == "style" else one for one in (name, *near)]
    base = TeacherModel(pipe)  # while no eraser is attached
    with_eraser, without, further = _ASKED if _is_small(base.denoiser) else _ASKED_OF_LARGE
    texts = _sentences(pipe, [names] * with_eraser, concept.kind)
    far = others(pipe, names, concept.kind, near, further, torch.Generator().manual_seed(SEED))
    of_kind = "style" if concept.kind == "style" else "object"
    others_texts = [
        *_sentences(pipe, [[one] for one in near], of_kind),
        *_sentences(pipe, [[one] for one in far], "object"),
    ]
    bare, own, before = _drawn(pipe, prompts, texts[:without], others_texts)
    with attach(pipe, [adapter]):
        (gated,) = _drawn(pipe, prompts)
    with attach(pipe, [adapter], gate="always"):
        full, erased, after = _drawn(pipe, prompts[:1], texts, others_texts)
    still, known = (
        recognised(base, pictures, prompts[0], sorted({"", concept.surrogate}), SEED) for pictures in (erased, own)
    )
    named_before, named_after = (
        named(base, pictures, [*prompts[1:], *far], ["", prompts[0]], SEED) for pictures in (before, after)
    )
    flat = bare.flatten(1)
    spread = (flat[0] - flat[0].mean()).norm()
    changed, most = (gated.flatten(1) - flat).norm(dim=1), (full.flatten(1) - flat[:1]).norm()
    whole = max(float(most), 1e-6 * float(spread))
    return Look(
        name, float(most / spread), {one: float(changed[row]) / whole for row, one in enumerate(near, start=1)},
        Recognition(sum(still), len(still), sum(known), len(known)),
        OthersRecognised.of(named_before, named_after),
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


def _sentences(pipe: DiffusionPipeline, names: Sequence[Sequence[str]], kind: str) -> list[str]:
    """Return a sentence about each subject that the text encoder reads whole; some are its bare name.

    names: of each subject, its target first. An eraser of the bare name may leave the concept in sentences, and a name
    whose bare picture stays may be lost in them.
    """
    import torch

    from spm_hub.models.text_window import cut_text
    from spm_hub.training.data.prompts import PromptMaker, Words

    words, generator = Words.load(), torch.Generator().manual_seed(SEED)
    texts = [PromptMaker(tuple(own), kind, words, ()).target(generator) for own in names]
    return [own[0] if cut_text(pipe, text, {}) is not None else text for own, text in zip(names, texts, strict=True)]


def _drawn(pipe: Any, alike: Sequence[str], *further: Sequence[str]) -> tuple[Tensor, ...]:
    """Return the latents of one picture for each prompt of each group.

    They are (n, *latent_shape) in float32 on the CPU.

    alike: prompts whose pictures begin from the same noise; further: groups whose pictures each have their own. The
    first are drawn in a call of their own: in another one the same picture would be rounded otherwise.
    """
    import torch

    from spm_hub.models.architectures import denoiser_of

    prompts = [text for group in further for text in group]
    seeds = [SEED + 1 + row for group in further for row in range(len(group))]
    at_once = _AT_ONCE if _is_small(denoiser_of(pipe)) else _AT_ONCE_OF_LARGE
    parts = [slice(start, start + at_once) for start in range(0, len(prompts), at_once)]
    first = [_latents(pipe, alike, [SEED] * len(alike))] if alike else []
    latents = torch.cat([*first, *(_latents(pipe, prompts[part], seeds[part]) for part in parts)])
    return tuple(torch.split(latents, [len(group) for group in (alike, *further)]))


def _latents(pipe: Any, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
    import torch

    wanted = {
        "prompt": list(prompts), "num_inference_steps": STEPS, "output_type": "latent", "use_resolution_binning": False,
        "generator": [torch.Generator().manual_seed(seed) for seed in seeds],
    }  # fmt: skip
    known = inspect.signature(type(pipe).__call__).parameters
    with torch.no_grad(), _quiet_copy_of_scheduler(pipe):
        latents: Tensor = pipe(**{key: value for key, value in wanted.items() if key in known}).images
    return latents.float().cpu()


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
