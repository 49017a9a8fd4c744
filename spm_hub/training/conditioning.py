"""The denoiser's conditioning, as rows of a batch, and the arguments of its calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spm_hub.errors import ModelError


@dataclass(frozen=True, eq=False)
class Conditioning:
    """The rows of a denoiser's inputs other than latents and time.

    They are indexed, cut and joined like one tensor of rows.
    states: (n, tokens, d_text), the text encoder's, e(c) of anchors and gates.  pooled: (n, d_pooled), if the family
    has it.  mask: (n, tokens), 0 at padding, None if every token counts.  others: further rows by the name of the
    denoiser's argument: SDXL's time ids (n, 6), FLUX's guidance (n,).
    """

    states: Tensor
    pooled: Tensor | None = None
    mask: Tensor | None = None
    others: Mapping[str, Tensor] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def shape(self) -> torch.Size:
        """That of `states`."""
        return self.states.shape

    def __len__(self) -> int:
        return len(self.states)

    def __getitem__(self, rows: Any) -> Conditioning:
        return self.map(lambda part: part[rows])

    def __iter__(self) -> Iterator[Conditioning]:
        return (self[row] for row in range(len(self)))

    def map(self, change: Callable[[Tensor], Tensor]) -> Conditioning:
        """The same change to the leading dimensions of every part."""
        return Conditioning(
            change(self.states),
            None if self.pooled is None else change(self.pooled),
            None if self.mask is None else change(self.mask),
            {name: change(part) for name, part in self.others.items()},
        )

    def expand(self, rows: int) -> Conditioning:
        """One row, `rows` times, without a copy."""
        return self.map(lambda part: part.expand(rows, *part.shape))

    def under(self, guidance: Tensor) -> Conditioning:
        """Return these rows under `guidance` if the model has a guidance input, else self.

        guidance: as many leading dimensions as the rows. It is raised to 1: such a model was never trained below.
        """
        if GUIDANCE not in self.others:
            return self
        embedding = guidance.to(self.others[GUIDANCE]).clamp_min(1.0)
        return replace(self, others={**self.others, GUIDANCE: embedding.expand_as(self.others[GUIDANCE])})

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """All rows, one part after the other; where the numbers of tokens differ, padded and masked."""
        tokens = max(part.states.shape[1] for part in parts)
        if any(part.states.shape[1] != tokens or part.mask is not None for part in parts):
            parts = [part._padded(tokens) for part in parts]
        first = parts[0]

        def joined(of: Callable[[Conditioning], Tensor | None]) -> Tensor:
            return torch.cat([tensor for part in parts if (tensor := of(part)) is not None])

        return Conditioning(
            joined(lambda part: part.states),
            None if first.pooled is None else joined(lambda part: part.pooled),
            None if first.mask is None else joined(lambda part: part.mask),
            {name: joined(lambda part, name=name: part.others[name]) for name in first.others},  # type: ignore[misc]
        )

    def _padded(self, tokens: int) -> Conditioning:
        missing = tokens - self.states.shape[1]
        mask = torch.ones(self.states.shape[:2], device=self.states.device) if self.mask is None else self.mask
        return replace(self, states=F.pad(self.states, (0, 0, 0, missing)), mask=F.pad(mask, (0, missing)))


GUIDANCE = "guidance"
"""The argument by which a guidance-distilled denoiser (FLUX.1 dev) receives its guidance."""


@dataclass(frozen=True, eq=False)
class DenoiserCall:
    """The arguments of a pipeline's calls of its denoiser, learnt from calls for one prompt and for two.

    Arguments with as many rows as prompts are rows; the rest (image positions, switches) is the same for all.
    latents: the name of the noisy latents' argument.  fixed: the other arguments, by dotted path into dictionaries.
    listed: entries of `fixed` that are lists with one item for each row.  timestep_scale: the denoiser receives
    t / timestep_scale for the scheduler's time t.
    """

    latents: str
    mask: str | None
    pooled: str | None
    fixed: Mapping[str, Any]
    rowwise: tuple[str, ...]
    listed: tuple[str, ...]
    timestep_scale: float

    @classmethod
    def learnt(cls, one: Mapping[str, Any], two: Mapping[str, Any], time: float) -> DenoiserCall:
        """Learn from the arguments for one prompt and for two; `time`: their timestep in the scheduler.

        Raises ModelError for a denoiser whose arguments say nothing of text states or of the time.
        """
        latents = next(iter(one))
        first, second = _leaves(one), _leaves(two)
        received = _number(first.get(TIME))
        if not isinstance(first.get(STATES), Tensor) or first[STATES].dim() != 3 or not received or not time:
            raise ModelError(
                f"training does not know this denoiser: it is called with {', '.join(first)} and needs text "
                f"states as {STATES} and a time other than 0 as {TIME}",
                mend="spmhub models",
            )
        rowwise = tuple(
            name
            for name, value in first.items()
            if isinstance(value, Tensor) and value.dim() and len(value) == 1 and len(second[name]) == 2
            if name not in (latents, TIME)
        )
        listed = tuple(
            name
            for name, value in first.items()
            if isinstance(value, list) and len(value) == 1 and len(second[name]) == 2
        )
        return cls(
            latents,
            next((name for name in MASKS if name in first), None),
            next((name for name in POOLED if name in first), None),
            {name: value for name, value in first.items() if name not in (latents, TIME, *rowwise)},
            rowwise,
            listed,
            time / received,
        )

    def conditioning(self, arguments: Mapping[str, Any]) -> Conditioning:
        """The rows in the arguments of a call."""
        leaves = _leaves(arguments)
        mask = leaves[self.mask] if self.mask is not None else None
        return Conditioning(
            leaves[STATES],
            leaves[self.pooled] if self.pooled in self.rowwise else None,
            mask if isinstance(mask, Tensor) else None,
            {name: leaves[name] for name in self.rowwise if name not in (STATES, self.mask, self.pooled)},
        )

    def arguments(self, latents: Tensor, times: Tensor, conditioning: Conditioning) -> dict[str, Any]:
        """Return keyword arguments for the denoiser.

        Raises ModelError for padded states if the denoiser has no mask argument.
        """
        leaves: dict[str, Any] = {
            **self.fixed,
            self.latents: latents,
            STATES: conditioning.states,
            **conditioning.others,
        }
        leaves[TIME] = times if self.timestep_scale == 1 else times / self.timestep_scale
        leaves |= {name: self.fixed[name] * len(latents) for name in self.listed}
        if self.pooled is not None and conditioning.pooled is not None:
            leaves[self.pooled] = conditioning.pooled
        if self.mask is not None:
            leaves[self.mask] = conditioning.mask
        elif conditioning.mask is not None:
            raise ModelError("prompts have text states of different lengths, and this denoiser takes no mask")
        nested: dict[str, Any] = {}
        for path, value in leaves.items():
            *parents, name = path.split(".")
            place = nested
            for parent in parents:
                place = place.setdefault(parent, {})
            if name:
                place[name] = value
        return nested


STATES, TIME = "encoder_hidden_states", "timestep"
MASKS = ("encoder_attention_mask", "encoder_hidden_states_mask")
POOLED = ("pooled_projections", "added_cond_kwargs.text_embeds")


def _leaves(arguments: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Arguments with those in dictionaries under dotted names; an empty dictionary is the name and a dot."""
    found: dict[str, Any] = {}
    for name, value in arguments.items():
        if isinstance(value, dict):
            found |= _leaves(value, f"{prefix}{name}.") or {f"{prefix}{name}.": None}
        else:
            found[prefix + name] = value
    return found


def _number(time: Any) -> float | None:
    return None if time is None else float(time.flatten()[0]) if isinstance(time, Tensor) else float(time)
