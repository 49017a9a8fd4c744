"""Calls that other threads are in: seen on their stacks, as a pipeline that nobody holds leaves no other trace of them.

Of a stack only which code runs on it is read, never what that has at hand: reading the locals of a frame that runs in
another thread can crash the interpreter (Python 3.11, with tensors among them). Whose call it is, is therefore not
known, and those of other pipelines are waited for too: each for that one call, and never for a later one.
"""

import inspect
import sys
import threading
from collections.abc import Iterator
from types import CodeType, FrameType
from typing import Any

import torch

from spm_hub.models.architectures import body_of

_DECORATED = torch.no_grad()(lambda: None).__code__
"""Of every function under torch.no_grad, a pipeline's `__call__` among them."""

_OPENING = ("__enter__", "__init__", "__new__", "clone")
"""What such a function calls before the one it is around."""


class Begun:
    """The calls of pipelines, and of one denoiser, that other threads were in when this was made."""

    def __init__(self, pipeline_class: type[Any], denoiser: Any, door: CodeType) -> None:
        """door: of the function in which calls of a pipeline go on that nobody holds."""
        calls = (vars(base)["__call__"] for base in pipeline_class.__mro__ if "__call__" in vars(base))
        forwards = (type(module).forward for module in (denoiser, body_of(denoiser)))
        inner = (inspect.unwrap(function) for function in (*calls, *forwards))
        self._codes = {door, *(code for function in inner if (code := getattr(function, "__code__", None)) is not None)}
        self._running: dict[int, FrameType] = {}
        self._hesitating: dict[int, FrameType] = {}
        self._thread, self._threads = threading.get_ident(), set[int]()
        for thread, frame, within in _frames_of_others():
            if self._counts(frame):
                self._running[id(frame)] = frame
                self._threads.add(thread)
            elif _hesitates(frame, within):
                self._hesitating[id(frame)] = frame

    def crosses(self, other: "Begun") -> bool:
        """Whether each is of a thread that is in a call which the other is about."""
        return self._thread in other._threads and other._thread in self._threads

    def over(self) -> bool:
        """Whether all of them have ended."""
        running: dict[int, FrameType] = {}
        hesitating: dict[int, FrameType] = {}
        for _, frame, within in _frames_of_others():
            if id(frame) in self._running:
                running[id(frame)] = frame
            elif id(frame) in self._hesitating:
                if _hesitates(frame, within):
                    hesitating[id(frame)] = frame
                elif within is not None and self._counts(within):
                    running[id(within)] = within
        self._running, self._hesitating = running, hesitating
        return not running and not hesitating

    def _counts(self, frame: FrameType) -> bool:
        code = frame.f_code
        if code in self._codes:
            return True
        if code.co_name != "__call__":
            return False
        from diffusers import DiffusionPipeline

        owner = frame.f_globals.get(code.co_qualname.partition(".")[0])
        return isinstance(owner, type) and issubclass(owner, DiffusionPipeline)


def _frames_of_others() -> Iterator[tuple[int, FrameType, FrameType | None]]:
    """Every frame on the stacks of other threads, which those are, and the one that it has called."""
    here = threading.get_ident()
    for thread, top in sys._current_frames().items():
        frame, within = (None if thread == here else top), None
        while frame is not None:
            yield thread, frame, within
            frame, within = frame.f_back, frame


def _hesitates(frame: FrameType, within: FrameType | None) -> bool:
    """Whether this is a function under torch.no_grad that has not called the one it is around yet."""
    return frame.f_code is _DECORATED and (within is None or within.f_code.co_name in _OPENING)
