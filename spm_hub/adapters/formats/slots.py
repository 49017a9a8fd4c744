"""Slots: the module and the part of its increment that a key of a file names."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Part = Literal[
    "down", "mid", "up", "alpha", "delta", "delta_bias", "keep_out", "keep_in",
    "hada_w1_a", "hada_w1_b", "hada_t1", "hada_w2_a", "hada_w2_b", "hada_t2",
    "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2",
    "dora_scale", "magnitude",
    "up_bias", "bias_indices", "bias_values", "bias_size",
    "oft_blocks", "oft_blocks_0", "oft_blocks_1", "oft_blocks_2", "oft_blocks_3", "oft_diag", "rescale",
    "ia3", "on_input", "ia3_l", "oft_R", "glora_a1", "glora_a2", "glora_b1", "glora_b2",
]  # fmt: skip


@dataclass(frozen=True)
class Slot:
    """The place of a tensor. `module` is the dotted path in the denoiser, or that path with . as _ ."""

    module: str
    part: Part


KeyParser = Callable[[str], Slot | None]
"""Returns the slot of a key, or None for a key of another format."""
