"""Reads the prompts of diffusers' modular pipelines, which encode texts in one of their blocks."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

from spm_hub.models.architectures import is_modular

_STATES, _NEGATIVE_STATES, _IMAGES = "prompt_embeds", "negative_prompt_embeds", "num_images_per_prompt"

Report = Callable[[Mapping[str, Any], Any], object]
"""Called with the arguments of an encoding by name, and with its result, as `encode_prompt` would return it."""


def reader_of(pipe: Any) -> Any:
    """Return the pipeline's class, or for a modular pipeline a `BlockReader`: it encodes texts.

    pipe: without hooks. A modular pipeline without a block that encodes prompts has its class, without `encode_prompt`.
    """
    block = text_block(pipe.blocks) if is_modular(type(pipe)) else None
    return type(pipe) if block is None else BlockReader(type(pipe).__name__, block)


def text_block(blocks: Any) -> Any | None:
    """Return the innermost block that makes text-encoder states of a prompt; None if there is none.

    One that needs nothing but the prompt is preferred, to one that needs a picture too.
    """
    found = list(_text_blocks(blocks))
    alone = [block for block in found if not _required(block) - {"prompt"}]
    return next(iter(alone or found), None)


class BlockReader:
    """Encodes texts with a block of a modular pipeline.

    It has the attributes that `text_encoding` reads of a pipeline's class.
    """

    def __init__(self, name: str, block: Any) -> None:
        """name: of the pipeline's class, for messages."""
        self.__name__ = name
        self._block = block
        inputs = {one.name: one.default for one in block.inputs if one.name}
        signature = inspect.Signature([
            inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=default) for key, default in inputs.items()
        ])  # fmt: skip

        def encode_prompt(pipe: Any, **given: Any) -> Any:
            from diffusers.modular_pipelines import PipelineState

            state = PipelineState()
            for one in block.inputs:
                if one.name:
                    state.set(one.name, given.get(one.name, one.default), one.kwargs_type)
            block(pipe, state)
            return state.get(_STATES)

        encode_prompt.__signature__ = signature  # type: ignore[attr-defined]
        # A modular pipeline is called with the inputs of its blocks.
        self.encode_prompt = self.__call__ = encode_prompt


def call_observed(pipe: Any, call: Callable[..., Any], report: Report, args: tuple[Any, ...], given: Any) -> Any:
    """Call a modular pipeline, and report the prompts and the negative prompts that its blocks encode.

    call: the `__call__` of the pipeline's class.  args, given: its arguments.
    """
    from diffusers.modular_pipelines import PipelineState

    block = text_block(pipe.blocks)
    names = {_IMAGES} if block is None else {_IMAGES, *(one.name for one in block.inputs if one.name)}
    reported = False

    def on_set(state: PipelineState, key: str, value: Any) -> None:
        nonlocal reported
        if not isinstance(value, Tensor) or key not in (_STATES, _NEGATIVE_STATES):
            return
        if key == _NEGATIVE_STATES:
            if reported:
                report({}, value)
        elif not reported:  # a later block repeats the states for every picture
            reported = True
            arguments = {name: state.values.get(name) for name in names}
            prompt, images = arguments.get("prompt"), arguments[_IMAGES] or 1
            count = 1 if isinstance(prompt, str) else len(prompt or value)
            report(arguments, value.repeat_interleave(images, dim=0) if len(value) == count else value)

    class ObservedState(PipelineState):  # type: ignore[misc]
        def set(self, key: str, value: Any, kwargs_type: str | None = None) -> None:
            super().set(key, value, kwargs_type)
            on_set(self, key, value)

    own, *others = args or (None,)
    before = given.pop("state", own)
    state = ObservedState() if before is None else ObservedState(before.values, before.kwargs_mapping)
    result = call(pipe, state, *others, **given)
    if isinstance(result, ObservedState):
        result.__class__ = PipelineState  # an ordinary one for the caller
    return result


def _text_blocks(block: Any) -> Iterator[Any]:
    """Yield the blocks that encode prompts, the innermost of each branch, in their order."""
    inner = [found for one in getattr(block, "sub_blocks", {}).values() for found in _text_blocks(one)]
    if inner:
        yield from inner
    elif "prompt" in block.input_names and _STATES in block.intermediate_output_names:
        yield block


def _required(block: Any) -> set[str]:
    return {one.name for one in block.inputs if one.required}
