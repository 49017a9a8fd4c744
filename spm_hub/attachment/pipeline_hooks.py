"""Intercepts calls of a pipeline, its `encode_prompt` and its denoiser by swapping their classes.

Both objects get a generated subclass of their class. Python looks `__call__` up on the type, so an attribute of the
object would not do. torch.nn.utils.parametrize swaps the class of a module for a generated subclass in the same way,
and swaps it back.
"""

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack
from types import MethodType
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from spm_hub.attachment.modular import call_observed
from spm_hub.errors import UsageError
from spm_hub.models.architectures import body_of, changeable, is_modular

ATTACHMENT = "_spm_hub_attachment"
"""The key of the attachment in the `__dict__` of a pipeline and of its denoiser."""

_HANDLES = "_spm_hub_handles"
"""The key of the handles of hooks on a denoiser's modules in the denoiser's `__dict__`."""

_SEED = 0
"""Of the noise that stands for a picture's latents where the denoiser is asked about a prompt."""

_FUSED = "fused query, key and value projections are weights of their own, which no eraser was trained on"


def is_attached(pipe: Any) -> bool:
    """Return whether an attachment, perhaps an empty one, is on this pipeline."""
    return ATTACHMENT in pipe.__dict__


class Callbacks(Protocol):
    """The methods that the hooks of a pipeline and of its denoiser call."""

    def picture(self, pipe: Any) -> AbstractContextManager[None]:
        """Surround one call of the pipeline `pipe`."""

    def encoded(self, pipe: Any, arguments: Mapping[str, Any], result: Any) -> None:
        """Take the arguments of `encode_prompt` by name, defaults included, and its result."""

    def encoding(self) -> AbstractContextManager[None]:
        """Surround one call of `encode_prompt`."""

    def drawn(self, pipe: Any, draw: Callable[[], Any], given: Iterable[Any]) -> Any:
        """Return the result of `draw`, a call of the pipeline, perhaps after several.

        given: the values of that call's arguments.
        """

    def denoising(self, rows: int | None, states: Any, again: Callable[..., Tensor]) -> AbstractContextManager[None]:
        """Surround one call of the denoiser.

        rows: of its batch, None where the input does not show them.  states: the text-encoder states that it is given.
        again: calls the denoiser with some rows of the same inputs, with other states unless those are None, and with
        other latents, by default noise of a fixed seed, at another timestep, by default the one in the middle.
        """

    def bare_weights(self, *, moving: bool) -> AbstractContextManager[None]:
        """Surround code that reads or replaces the denoiser's weights or, if `moving`, moves or casts them."""


def install_hooks(pipe: Any, denoiser: Any, callbacks: Callbacks) -> None:
    """Call `callbacks` around every call of a pipeline and of its denoiser, until `remove_hooks`.

    Raises UsageError where the denoiser has callbacks already, or where its projections are fused; the pipeline is then
    unchanged. A call that is in progress in another thread is not waited for.
    """
    body = body_of(denoiser)
    if any(map(_is_fused, body.modules())):
        raise UsageError(_FUSED, mend="pipe.unfuse_qkv_projections(), and attach again")
    if body.__dict__.setdefault(ATTACHMENT, callbacks) is not callbacks:
        raise UsageError("another thread has just attached erasers to this denoiser", mend="erasers.add(adapter)")
    # Calls that begin now wait for this lock, and so until the denoiser has its hooks too.
    with callbacks.bare_weights(moving=False):
        try:
            hook_pipeline(pipe, callbacks)
            denoiser.__dict__[ATTACHMENT] = callbacks
            # Plain assignment would pass through torch.compile's wrapper to the module inside it.
            object.__setattr__(denoiser, "__class__", _hooked_denoiser(denoiser.__class__))
            if body is not denoiser:
                # The class of a compiled module stays: torch.compile guards on it, and its graph remains valid.
                methods = {name: MethodType(method, body) for name, method in _hooked_methods(type(body)).items()}
                body.__dict__.update(methods)
            body.__dict__[_HANDLES] = _hook_modules(body)
        except BaseException:
            remove_hooks(pipe, denoiser)
            raise


def hook_pipeline(pipe: Any, callbacks: Callbacks) -> None:
    """Call `callbacks` around every call of a pipeline, until `unhook`."""
    pipe.__dict__[ATTACHMENT] = callbacks
    pipe.__class__ = _hooked_pipeline(pipe.__class__)


def unhook(part: Any) -> None:
    """Restore the class of a pipeline or a denoiser, and leave nothing in its `__dict__`.

    A pipeline may have a class with hooks and no attachment: `type(pipe)(**parts)` of an attached one makes it.
    """
    if type(part).__dict__.get(ATTACHMENT):
        object.__setattr__(part, "__class__", type(part).__mro__[1])
    part.__dict__.pop(ATTACHMENT, None)


def remove_hooks(pipe: Any, denoiser: Any) -> None:
    """Undo `install_hooks`: restore the classes, and leave nothing in any `__dict__`."""
    body = body_of(denoiser)
    for name in _hooked_methods(type(body)) if body is not denoiser else ():
        body.__dict__.pop(name, None)
    for handle in body.__dict__.pop(_HANDLES, ()):
        handle.remove()
    for part in (pipe, denoiser, body):
        unhook(part)


def _is_fused(attention: Any) -> bool:
    """Return whether an attention layer computes with fused projections.

    Older layers keep `fused_projections` set after unfusing; their processor shows the truth.
    """
    current = (
        hasattr(attention, "unfuse_projections") or "Fused" in type(getattr(attention, "processor", None)).__name__
    )
    return current and getattr(attention, "fused_projections", False)


def _run_within(part: Any, enter: Callable[[Callbacks], AbstractContextManager[None]], run: Callable[[], Any]) -> Any:
    """Call `run` inside the context that `enter` makes of the part's callbacks, if it has any.

    A thread that waited in `enter` may find the callbacks removed, or replaced: it then starts over.
    """
    while (callbacks := part.__dict__.get(ATTACHMENT)) is not None:
        with enter(callbacks):
            if part.__dict__.get(ATTACHMENT) is callbacks:
                return run()
    return run()


def _report(pipe: Any, arguments: Mapping[str, Any], result: Any) -> None:
    """Pass an encoding on to the callbacks of a pipeline, if it still has any."""
    if (callbacks := pipe.__dict__.get(ATTACHMENT)) is not None:
        callbacks.encoded(pipe, arguments, result)


class _EqualToBase(type):
    """The metaclass of classes that compare equal to their base.

    `type(x) == Base` and `type(x) in (Base, ...)` are true for them. Diffusers' `from_pipe` compares the type of a
    denoiser in this way before it shares it.
    """

    def __eq__(cls, other: object) -> bool:
        return cls is other or cls.__mro__[1] is other

    def __hash__(cls) -> int:
        return hash(cls.__mro__[1])


@functools.cache
def _hooked_pipeline(base: Any) -> Any:
    """Return the subclass of a pipeline's class that reports calls and prompts to its callbacks.

    One class for each base: torch.compile guards on types, and would recompile for a new one at every attach.
    """

    class Hooked(base, metaclass=_EqualToBase):  # type: ignore[misc]
        @functools.wraps(base.__call__)
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            def run() -> Any:
                if (callbacks := self.__dict__.get(ATTACHMENT)) is None:
                    return draw()
                return callbacks.drawn(self, draw, (*args, *kwargs.values()))

            def draw() -> Any:
                if not is_modular(base):
                    return base.__call__(self, *args, **kwargs)
                return call_observed(self, base.__call__, functools.partial(_report, self), args, kwargs)

            return _run_within(self, lambda callbacks: callbacks.picture(self), run)

    if hasattr(base, "encode_prompt"):
        signature = inspect.signature(base.encode_prompt)

        @functools.wraps(base.encode_prompt)
        def encode_prompt(self: Any, *args: Any, **kwargs: Any) -> Any:
            def run() -> Any:
                result = base.encode_prompt(self, *args, **kwargs)
                bound = signature.bind(self, *args, **kwargs)
                bound.apply_defaults()
                _report(self, bound.arguments, result)
                return result

            return _run_within(self, lambda callbacks: callbacks.encoding(), run)

        Hooked.encode_prompt = encode_prompt
    for name in ("fuse_lora", "unfuse_lora"):
        if hasattr(base, name):
            setattr(Hooked, name, _with_bare_weights(base, name))
    return _named_as(base, Hooked)


@functools.cache
def _hooked_denoiser(base: Any) -> Any:
    """Return the subclass of a denoiser's class that reports calls and uses of weights to its callbacks."""

    class Hooked(base, metaclass=_EqualToBase):  # type: ignore[misc]
        # torch.compile leaves this method out of a graph that it compiles after attaching; it runs before the graph.
        @torch.compiler.disable(recursive=False)  # type: ignore[untyped-decorator]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            while (callbacks := self.__dict__.get(ATTACHMENT)) is not None:
                denoising = _enter_denoising(callbacks, functools.partial(base.__call__, self), args, kwargs)
                try:
                    if self.__dict__.get(ATTACHMENT) is callbacks:
                        return base.__call__(self, *args, **kwargs)
                finally:
                    _leave_denoising(denoising)
            return base.__call__(self, *args, **kwargs)

    for name, method in _hooked_methods(base).items():
        setattr(Hooked, name, method)
    return _named_as(base, Hooked)


# Not a `with` around the call: under fullgraph=True torch.compile would trace its `__enter__` and `__exit__`, and fail.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _enter_denoising(
    callbacks: Callbacks, denoise: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> ExitStack:
    rows, states = _batch_rows(args, kwargs), kwargs.get("encoder_hidden_states")

    @torch.no_grad()
    def again(part: slice, others: Tensor | None, noisy: Tensor | None = None, moment: float = 0.5) -> Tensor:
        inputs, named = _rows_of((args, kwargs), rows, part)
        inputs, named = _with_latents(inputs, named, noisy, moment)
        output = denoise(*inputs, **(named if others is None else {**named, "encoder_hidden_states": others}))
        found = output[0] if isinstance(output, tuple) else output.sample
        assert isinstance(found, Tensor)
        return found

    stack = ExitStack()
    stack.enter_context(callbacks.denoising(rows, states, again))
    return stack


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _leave_denoising(denoising: ExitStack) -> None:
    denoising.close()


def _hooked_methods(base: Any) -> dict[str, Any]:
    """Return replacements for a denoiser's methods that read, move or change weights, by name.

    They see the checkpoint's own weights, as saving must. Fusing and unfusing a LoRA change these weights; group
    offloading, casting and dequantising copy them.
    """
    reading = ("state_dict", "_load_from_state_dict", "fuse_lora", "unfuse_lora")
    copying = ("enable_group_offload", "enable_layerwise_casting", "dequantize")
    methods = {name: _with_bare_weights(base, name) for name in (*reading, *copying) if hasattr(base, name)}
    methods["_apply"] = _with_bare_weights(base, "_apply", moving=True)
    methods["__reduce_ex__"] = _refuse_copy
    if hasattr(base, "fuse_qkv_projections"):
        methods["fuse_qkv_projections"] = _refuse_fusing
    return methods


def _hook_modules(body: Any) -> list[RemovableHandle]:
    """Restore the denoiser's weights whenever those of a part of it are read or loaded.

    ControlNetModel.from_unet, for one, reads the parts one by one.
    """

    def restore_first(*_: Any) -> None:
        _run_within(body, lambda callbacks: callbacks.bare_weights(moving=False), lambda: None)

    modules: list[Any] = list(changeable(body).values())
    reading = [module.register_state_dict_pre_hook(restore_first) for module in modules]
    return reading + [module.register_load_state_dict_pre_hook(restore_first) for module in modules]


def _with_bare_weights(base: Any, name: str, *, moving: bool = False) -> Any:
    method = getattr(base, name)

    @functools.wraps(method)
    def with_bare_weights(self: Any, *args: Any, **kwargs: Any) -> Any:
        bare = functools.partial(method, self, *args, **kwargs)
        return _run_within(self, lambda callbacks: callbacks.bare_weights(moving=moving), bare)

    return with_bare_weights


def _with_latents(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], noisy: Tensor | None, moment: float
) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """Replace the latents and the timestep of a denoiser's arguments.

    noisy: None for noise that is the same in every row.  moment: the timestep, as a share of the schedule.
    Channels beyond the latents' own, as of an inpainting model, stay.
    """
    given = _latents(args, kwargs)
    if noisy is None:
        noise = torch.randn(given.shape[1:], generator=torch.Generator().manual_seed(_SEED))
        noisy = noise.to(given).expand_as(given)
    elif given.dim() == noisy.dim() and given.shape[1] > noisy.shape[1]:
        noisy = torch.cat([noisy.to(given), given[:, noisy.shape[1] :]], dim=1)
    if "timestep" in kwargs:
        kwargs = {**kwargs, "timestep": _timestep_at(moment, kwargs["timestep"])}
    elif len(args) > 1:
        args = (args[0], _timestep_at(moment, args[1]), *args[2:])
    if args:
        return (noisy.to(given), *args[1:]), kwargs
    return args, {**kwargs, "sample" if "sample" in kwargs else "hidden_states": noisy.to(given)}


def _timestep_at(moment: float, like: Any) -> Any:
    """Return the timestep at a share of the schedule: of 1,000, or of 1 for denoisers that count to 1."""
    if isinstance(like, Tensor):
        to_one = like.is_floating_point() and bool(like.max() <= 1)
        return torch.full_like(like, moment if to_one else round(1000 * moment))
    return moment if isinstance(like, float) and like <= 1 else round(1000 * moment)


def _latents(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    return args[0] if args else kwargs.get("sample", kwargs.get("hidden_states"))


def _batch_rows(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | None:
    noisy = _latents(args, kwargs)
    return len(noisy) if isinstance(noisy, Tensor) and noisy.dim() > 0 else None


def _rows_of(value: Any, rows: int | None, part: slice) -> Any:
    """Return a value with some rows of its tensors.

    Those with one row for each of the batch are cut, in tuples, lists and mappings too.
    """
    if isinstance(value, Tensor):
        return value[part] if value.dim() and len(value) == rows else value
    if isinstance(value, Mapping):
        return {key: _rows_of(each, rows, part) for key, each in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_rows_of(each, rows, part) for each in value)
    return value


def _refuse_copy(part: Any, protocol: object) -> NoReturn:
    """Refuse `__reduce_ex__`: a copy would have folded weights without their originals."""
    raise UsageError(
        f"a {type(part).__name__} with erasers attached cannot be copied or pickled", mend="erasers.detach() first"
    )


def _refuse_fusing(part: Any) -> NoReturn:
    raise UsageError(_FUSED, mend="erasers.detach() first")


def _named_as(base: Any, hooked: Any) -> Any:
    """Give `hooked` the names of `base`, which configurations, error messages and look-ups by name use."""
    setattr(hooked, ATTACHMENT, True)
    hooked.__reduce_ex__ = _refuse_copy
    for attribute in ("__module__", "__name__", "__qualname__", "__doc__"):
        setattr(hooked, attribute, getattr(base, attribute))
    return hooked
