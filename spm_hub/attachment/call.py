"""The prompts of one call of a pipeline, recorded from its `encode_prompt` and its denoiser."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor

from spm_hub.attachment.gates.evaluation import GateEvaluation
from spm_hub.attachment.gates.evidence import Evidence
from spm_hub.attachment.gates.gate import Prompts
from spm_hub.attachment.text_encoding import Settings, read_prompts, settings_among


@dataclass(eq=False)
class Call:
    """One call of a pipeline: its prompts, unknown until it has encoded them, and their gammas.

    pipe: the pipeline.  gates: what computes the gammas of its prompts.
    images: pictures for each prompt.  guided: whether unconditional rows precede those of the prompts.
    negatives: states of negative prompts.  gammas: by eraser, one for each prompt.
    unconditional: for each block of rows in the denoiser's batch, whether it belongs to the negative prompts.
    as_encoded: whether the denoiser receives states as `encode_prompt` returned them, which its first call shows.
    replaced: prompts of this picture that are not its present ones.
    watched: whether the denoiser was asked for evidence about the prompts (`watch.prompt_check`).
    evidence: what it showed, by eraser, one for each prompt.  acting: the gammas in effect, `select` applied.
    last_asked: the denoiser's last call with rows of the prompts: how to make it again, their states, and their place.

    A block is the rows of all prompts once (`rows_per_block`). What the denoiser receives under guidance:

    | pipeline                      | calls a step | blocks of a call                             |
    |-------------------------------|--------------|----------------------------------------------|
    | SD 1 and 2, SDXL, SD3         | one          | negative prompts, prompts                    |
    | the same, perturbed attention | one          | negative prompts, prompts, prompts           |
    | FLUX, Qwen-Image              | two          | prompts; negative prompts, in their own call |

    A tensor that `encode_prompt` returned is recognised by its `data_ptr`, a copy by its values.
    """

    pipe: Any
    gates: GateEvaluation
    prompts: Prompts | None = None
    settings: Settings = ()
    images: int = 1
    guided: bool = False
    negatives: list[Tensor] = field(default_factory=list)
    gammas: dict[str, list[float]] = field(default_factory=dict)
    unconditional: tuple[bool, ...] = ()
    as_encoded: bool | None = None
    replaced: list[Prompts] = field(default_factory=list)
    watched: bool = False
    evidence: dict[str, tuple[Evidence, ...]] = field(default_factory=dict)
    acting: dict[str, list[float]] = field(default_factory=dict)
    last_asked: tuple[Any, Tensor, slice] | None = None
    _last_input: tuple[Any, int | None] = field(default=(None, None), init=False)

    def record_encoding(self, arguments: Mapping[str, Any], result: Any) -> None:
        """Record the prompts from the first `encode_prompt` of this call: its arguments and its result.

        What is encoded after that is negative prompts; after the first call of the denoiser it is prompts that may
        replace the present ones.
        """
        states, *others = result if isinstance(result, tuple | list) and result else [result]
        if not isinstance(states, Tensor) or states.dim() != 3:
            return
        if self.prompts is not None and self.as_encoded is None:
            self.negatives.append(states)
            return
        images = int(arguments.get("num_images_per_prompt") or arguments.get("num_videos_per_prompt") or 1)
        prompts = read_prompts(self.pipe, arguments, states[::images].detach())
        if prompts.texts is not None and len(prompts.texts) * images != len(states):
            return
        if self.prompts is not None:
            self.replaced.append(prompts)
            return
        self.images, self.guided = images, bool(arguments.get("do_classifier_free_guidance"))
        self.settings = settings_among(arguments)
        self.negatives = [one for one in others if isinstance(one, Tensor) and one.shape[2:] == states.shape[2:]]
        self.prompts = prompts

    @property
    def rows_per_block(self) -> int:
        """The rows of all prompts once: prompts in order, the pictures of each next to one another."""
        return 0 if self.prompts is None else len(self.prompts.states) * self.images

    def anew(self) -> Self:
        """Return this call as it was before its prompts were known, with the evidence about them."""
        return type(self)(self.pipe, self.gates, watched=True, evidence=self.evidence)

    def record_again(self, rows: int | None, states: Any, again: Any) -> None:
        """Record how to repeat this call of the denoiser for the prompts.

        Calls that have other rows than guidance asks for cannot be repeated in part.
        """
        block = self.rows_per_block
        plain = (rows == block and self.unconditional == (False,)) or self.unconditional == (True, False)
        if block and plain and isinstance(states, Tensor) and len(states) == rows:
            part = slice(rows - block, rows)
            self.last_asked = again, states[part], part

    def record_denoising(self, rows: int | None, states: Any) -> bool:
        """Record the denoiser's inputs. Return whether the prompts were replaced during the call.

        A step callback may replace them. The last block of rows shows it, as it belongs to the prompts, unless the
        pipeline changes the states between `encode_prompt` and the denoiser.
        """
        if self.prompts is None or (self._last_input[0] is states and self._last_input[1] == rows):
            return False
        self._last_input = states, rows
        block = self.rows_per_block
        whole = rows is not None and rows % block == 0
        blocks = list(states.split(block)) if whole and isinstance(states, Tensor) and len(states) == rows else []
        known = bool(blocks) and (self._matches(self.prompts, blocks[-1]) or self._is_negative(blocks[-1]))
        if self.as_encoded is None:
            self.as_encoded = known
        are_others = bool(blocks) and self.as_encoded and not known
        if are_others:
            before = self.prompts
            self.prompts = next(
                (other for other in self.replaced if self._matches(other, blocks[-1])),
                Prompts(None, None, blocks[-1][:: self.images].detach()),
            )
            self.replaced = [before, *(other for other in self.replaced if other is not self.prompts)]
            self.gammas, self.watched, self.evidence = {}, False, {}
        if rows == 2 * block:
            # Under classifier-free guidance diffusers puts the unconditional rows first.
            self.unconditional = self.guided, False
        else:
            self.unconditional = tuple(map(self._is_negative, blocks))
        return are_others

    def _is_negative(self, rows: Tensor) -> bool:
        """Return whether these are states of the negative prompts, and not of the prompts too.

        States that are neither count as the prompts': an eraser is never silently off.
        """
        assert self.prompts is not None
        address = rows.data_ptr()
        if address in {each.data_ptr() for each in (self.prompts.states, *self.negatives)}:
            # The same tensor: this recognises even a negative prompt with the text of the prompt.
            return address != self.prompts.states.data_ptr()
        return any(_equal(rows, each.to(rows)) for each in self.negatives) and not self._matches(self.prompts, rows)

    def _matches(self, prompts: Prompts, rows: Tensor) -> bool:
        """Return whether these rows are the states of `prompts`."""
        own = prompts.states
        if own.data_ptr() == rows.data_ptr() and (len(own) * self.images, *own.shape[1:]) == rows.shape:
            return True  # the same tensor
        return _equal(rows, own.to(rows).repeat_interleave(self.images, dim=0))


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other)
