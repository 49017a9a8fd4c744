"""Where calls come by: what a pipeline is asked for, read off its own methods, without changing anybody's code."""

import functools
import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from types import MethodType
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from spm_hub.errors import UsageError
from spm_hub.models.architectures import body_of, changeable

HELD = "_spm_hub_attachment"
"""The key in `__dict__` of a pipeline and of its denoiser under which their attachment is found."""

_GUARDED = "_spm_hub_guarded"
"""The key in a denoiser's `__dict__` of the handles of hooks on its modules."""

_FUSED = "fused query, key and value projections are weights of their own, which no eraser was trained on"


def is_attached(pipe: Any) -> bool:
    """Return whether an attachment, perhaps an empty one, is on this pipeline."""
    return HELD in pipe.__dict__


class Holder(Protocol):
    """What the methods of a held pipeline and a held denoiser report to."""

    def picture(self) -> AbstractContextManager[None]:
        """Around one call of the pipeline."""

    def encoded(self, bound: Mapping[str, Any], result: Any) -> None:
        """After the pipeline has encoded prompts: the arguments by name, defaults included, and the result."""

    def encoding(self) -> AbstractContextManager[None]:
        """Around one call of `encode_prompt`."""

    def denoising(self, rows: int | None, states: Any) -> AbstractContextManager[None]:
        """Around one call of the denoiser with `rows` rows, None where they cannot be told, and these text states."""

    def bare_weights(self, *, moving: bool) -> AbstractContextManager[None]:
        """Around whatever reads, replaces or, `moving`, moves or casts the denoiser's weights."""


def hold(pipe: Any, denoiser: Any, holder: Holder) -> None:
    """Let `holder` know of every call of a pipeline and of its denoiser, whose classes become `Held` ones.

    Raises UsageError where the denoiser has a holder already, or where erasers would have nothing to act on; the
    pipeline is then unchanged. A call that is in progress in another thread is not waited for.
    """
    body = body_of(denoiser)
    if any(map(_is_fused, body.modules())):
        raise UsageError(_FUSED, mend="pipe.unfuse_qkv_projections(), and attach again")
    if body.__dict__.setdefault(HELD, holder) is not holder:
        raise UsageError("another thread has just attached erasers to this denoiser", mend="erasers.add(adapter)")
    # Calls that begin from now on wait at the pipeline's door until its denoiser is held too.
    with holder.bare_weights(moving=False):
        try:
            pipe.__dict__[HELD] = denoiser.__dict__[HELD] = holder
            pipe.__class__ = _held_pipeline(pipe.__class__)
            # Plain assignment would pass through torch.compile's wrapper to the module inside it.
            object.__setattr__(denoiser, "__class__", _held_denoiser(denoiser.__class__))
            if body is not denoiser:
                # Its class stays, as torch.compile goes by that: the graph it has may be used further.
                body.__dict__.update({name: MethodType(guard, body) for name, guard in _guards(type(body)).items()})
            body.__dict__[_GUARDED] = _guarded_modules(body)
        except BaseException:
            release(pipe, denoiser)
            raise


def release(pipe: Any, denoiser: Any) -> None:
    """Undo `hold`: the classes are the originals again, and nothing is left in any `__dict__`."""
    body = body_of(denoiser)
    for held in (pipe, denoiser):
        if type(held).__dict__.get(HELD):
            object.__setattr__(held, "__class__", type(held).__mro__[1])
    for name in _guards(type(body)) if body is not denoiser else ():
        body.__dict__.pop(name, None)
    for handle in body.__dict__.pop(_GUARDED, ()):
        handle.remove()
    for held in (pipe, denoiser, body):
        held.__dict__.pop(HELD, None)


def _is_fused(attention: Any) -> bool:
    """Whether an attention layer computes with fused projections; older ones are not told when that ends."""
    told = hasattr(attention, "unfuse_projections") or "Fused" in type(getattr(attention, "processor", None)).__name__
    return told and getattr(attention, "fused_projections", False)


def _under(held: Any, enter: Callable[[Holder], AbstractContextManager[None]], run: Callable[[], Any]) -> Any:
    """Call `run` inside the context that `enter` makes of the present holder; without a holder, call it alone.

    A thread that waited for the holder's lock may find the holder gone, or replaced: it then starts over.
    """
    while (holder := held.__dict__.get(HELD)) is not None:
        with enter(holder):
            if held.__dict__.get(HELD) is holder:
                return run()
    return run()


class _StandIn(type):
    """The type of classes that stand for their base: `type(x) == Base` and `type(x) in (Base, ...)` hold of them too.

    Diffusers' `from_pipe` asks that of a denoiser before it shares it.
    """

    def __eq__(cls, other: object) -> bool:
        return cls is other or cls.__mro__[1] is other

    def __hash__(cls) -> int:
        return hash(cls.__mro__[1])


@functools.cache
def _held_pipeline(base: Any) -> Any:
    """A subclass of `base` to the world its equal, whose calls and prompts the attachment in `__dict__` gets to know.

    One class for each base, so that nothing that looks at types (torch.compile does) sees a new one at every attach.
    """

    class Held(base, metaclass=_StandIn):  # type: ignore[misc]
        @functools.wraps(base.__call__)
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return _under(self, lambda holder: holder.picture(), lambda: base.__call__(self, *args, **kwargs))

    if hasattr(base, "encode_prompt"):
        signature = inspect.signature(base.encode_prompt)

        @functools.wraps(base.encode_prompt)
        def encode_prompt(self: Any, *args: Any, **kwargs: Any) -> Any:
            def run() -> Any:
                result = base.encode_prompt(self, *args, **kwargs)
                if (holder := self.__dict__.get(HELD)) is not None:
                    bound = signature.bind(self, *args, **kwargs)
                    bound.apply_defaults()
                    holder.encoded(bound.arguments, result)
                return result

            return _under(self, lambda holder: holder.encoding(), run)

        Held.encode_prompt = encode_prompt
    for name in ("fuse_lora", "unfuse_lora"):
        if hasattr(base, name):
            setattr(Held, name, _bare_first(base, name))
    return _disguised(Held, base)


@functools.cache
def _held_denoiser(base: Any) -> Any:
    """A subclass of `base` to the world its equal, whose calls and weights the attachment in `__dict__` looks after."""

    class Held(base, metaclass=_StandIn):  # type: ignore[misc]
        # What is compiled after attaching is compiled without this, which then still runs before it.
        @torch.compiler.disable(recursive=False)  # type: ignore[untyped-decorator]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            while (holder := self.__dict__.get(HELD)) is not None:
                denoising = _entered(holder, args, kwargs)
                try:
                    if self.__dict__.get(HELD) is holder:
                        return base.__call__(self, *args, **kwargs)
                finally:
                    _left(denoising)
            return base.__call__(self, *args, **kwargs)

    for name, guard in _guards(base).items():
        setattr(Held, name, guard)
    return _disguised(Held, base)


# Not a `with` around the call: under fullgraph=True torch.compile would trace what opens and closes it, and cannot.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _entered(holder: Holder, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ExitStack:
    stack = ExitStack()
    stack.enter_context(holder.denoising(_batch_rows(args, kwargs), kwargs.get("encoder_hidden_states")))
    return stack


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _left(denoising: ExitStack) -> None:
    denoising.close()


def _guards(base: Any) -> dict[str, Any]:
    """By name, the methods of a denoiser's class that read, move or change weights, in a form that is safe while held.

    Fusing a LoRA or taking it out again, and what copies weights to where it will read them from, need the
    checkpoint's own as much as saving does.
    """
    reading = ("state_dict", "_load_from_state_dict", "fuse_lora", "unfuse_lora")
    copying = ("enable_group_offload", "enable_layerwise_casting", "dequantize")
    guards = {name: _bare_first(base, name) for name in (*reading, *copying) if hasattr(base, name)}
    guards["_apply"] = _bare_first(base, "_apply", moving=True)
    guards["__reduce_ex__"] = _not_copied
    if hasattr(base, "fuse_qkv_projections"):
        guards["fuse_qkv_projections"] = _not_fused
    return guards


def _guarded_modules(body: Any) -> list[RemovableHandle]:
    """Hooks for who reads or loads the weights of a part of the denoiser only, as a ControlNet made from it does."""

    def bare_first(*_: Any) -> None:
        _under(body, lambda holder: holder.bare_weights(moving=False), lambda: None)

    modules: list[Any] = list(changeable(body).values())
    reading = [module.register_state_dict_pre_hook(bare_first) for module in modules]
    return reading + [module.register_load_state_dict_pre_hook(bare_first) for module in modules]


def _bare_first(base: Any, name: str, *, moving: bool = False) -> Any:
    method = getattr(base, name)

    @functools.wraps(method)
    def bare_first(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _under(self, lambda holder: holder.bare_weights(moving=moving), lambda: method(self, *args, **kwargs))

    return bare_first


def _batch_rows(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | None:
    noisy = args[0] if args else kwargs.get("sample", kwargs.get("hidden_states"))
    return len(noisy) if isinstance(noisy, Tensor) and noisy.dim() > 0 else None


def _not_copied(held: Any, protocol: object) -> NoReturn:
    """In place of `__reduce_ex__`: a copy would hold folded weights, and nobody who knows the originals."""
    raise UsageError(
        f"a {type(held).__name__} that holds erasers cannot be copied or pickled", mend="erasers.detach() first"
    )


def _not_fused(held: Any) -> NoReturn:
    raise UsageError(_FUSED, mend="erasers.detach() first")


def _disguised(held: Any, base: Any) -> Any:
    """`held` under the names of `base`: configurations, error messages and look-ups by class name stay as they are."""
    setattr(held, HELD, True)
    held.__reduce_ex__ = _not_copied
    for attribute in ("__module__", "__name__", "__qualname__", "__doc__"):
        setattr(held, attribute, getattr(base, attribute))
    return held
