"""Where calls come by: what a pipeline is asked for, read off its own methods, without changing anybody's code."""

import functools
import inspect
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor

from spm_hub.architectures import body_of
from spm_hub.errors import UsageError
from spm_hub.gate import Prompts, token_sets

HELD = "_spm_hub_attachment"
"""The key in `__dict__` of a pipeline and of its denoiser under which their attachment is found."""

Settings = tuple[tuple[str, str | int | float], ...]
"""Arguments that change what the text encoder gives: clip_skip, lora_scale, max_sequence_length and the like."""

_OTHER_PROMPT = re.compile(r"prompt_\d")
_NOT_SETTINGS = {"self", "prompt", "guidance", "device"}


class Holder(Protocol):
    """What the methods of a held pipeline and a held denoiser report to."""

    def picture(self) -> AbstractContextManager[None]:
        """Around one call of the pipeline."""

    def encoded(self, bound: Mapping[str, Any], result: Any) -> None:
        """After the pipeline has encoded prompts: the arguments by name, defaults included, and the result."""

    def encoding(self) -> AbstractContextManager[None]:
        """Around one call of `encode_prompt`."""

    def denoising(self, rows: int | None) -> AbstractContextManager[None]:
        """Around one call of the denoiser with `rows` rows, None where they cannot be told."""

    def bare_weights(self, *, moving: bool) -> AbstractContextManager[None]:
        """Around whatever reads, replaces or, `moving`, moves or casts the denoiser's weights."""


def hold(pipe: Any, denoiser: Any, holder: Holder) -> None:
    """Let `holder` know of every call of a pipeline and of its denoiser, whose classes become `Held` ones."""
    for held in (pipe, denoiser, body_of(denoiser)):
        held.__dict__[HELD] = holder
    # Plain assignment would pass through torch.compile's wrapper to the module inside it.
    object.__setattr__(denoiser, "__class__", _held_denoiser(denoiser.__class__))
    object.__setattr__(pipe, "__class__", _held_pipeline(pipe.__class__))


def release(pipe: Any, denoiser: Any) -> None:
    """Undo `hold`: the classes are the originals again, and nothing is left in any `__dict__`."""
    for held in (pipe, denoiser):
        object.__setattr__(held, "__class__", type(held).__mro__[1])
    for held in (pipe, denoiser, body_of(denoiser)):
        held.__dict__.pop(HELD, None)


@functools.cache
def _held_pipeline(base: Any) -> Any:
    """A subclass of `base` to the world its equal, whose calls and prompts the attachment in `__dict__` gets to know.

    One class for each base, so that nothing that looks at types (torch.compile does) sees a new one at every attach.
    """

    class Held(base):  # type: ignore[misc]
        @functools.wraps(base.__call__)
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            if (holder := _holder(self)) is None:
                return super().__call__(*args, **kwargs)
            with holder.picture():
                return super().__call__(*args, **kwargs)

    if hasattr(base, "encode_prompt"):
        signature = inspect.signature(base.encode_prompt)

        @functools.wraps(base.encode_prompt)
        def encode_prompt(self: Any, *args: Any, **kwargs: Any) -> Any:
            if (holder := _holder(self)) is None:
                return base.encode_prompt(self, *args, **kwargs)
            with holder.encoding():
                result = base.encode_prompt(self, *args, **kwargs)
                bound = signature.bind(self, *args, **kwargs)
                bound.apply_defaults()
                holder.encoded(bound.arguments, result)
                return result

        Held.encode_prompt = encode_prompt
    return _disguised(Held, base)


@functools.cache
def _held_denoiser(base: Any) -> Any:
    """A subclass of `base` to the world its equal, whose calls and weights the attachment in `__dict__` looks after."""

    class Held(base):  # type: ignore[misc]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            if (holder := _holder(self)) is None:
                return super().__call__(*args, **kwargs)
            with holder.denoising(_batch_rows(args, kwargs)):
                return super().__call__(*args, **kwargs)

        def state_dict(self, *args: Any, **kwargs: Any) -> Any:
            if (holder := _holder(self)) is None:
                return super().state_dict(*args, **kwargs)
            with holder.bare_weights(moving=False):
                return super().state_dict(*args, **kwargs)

        def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> Any:
            if (holder := _holder(self)) is None:
                return super()._load_from_state_dict(*args, **kwargs)
            with holder.bare_weights(moving=False):
                return super()._load_from_state_dict(*args, **kwargs)

        def _apply(self, *args: Any, **kwargs: Any) -> Any:
            if (holder := _holder(self)) is None:
                return super()._apply(*args, **kwargs)
            with holder.bare_weights(moving=True):
                return super()._apply(*args, **kwargs)

    return _disguised(Held, base)


@dataclass(eq=False)
class Call:
    """What is known of one call of a pipeline: nothing until it has encoded its prompts.

    images: pictures for each prompt.  guided: whether unconditional rows precede the prompts' own.
    gammas: by eraser, one for each prompt.
    """

    prompts: Prompts | None = None
    settings: Settings = ()
    images: int = 1
    guided: bool = False
    gammas: dict[str, list[float]] = field(default_factory=dict)

    def learn(self, pipe: Any, bound: Mapping[str, Any], result: Any) -> None:
        """Note the prompts from the first `encode_prompt` of this call; later ones encode negative prompts."""
        states = result[0] if isinstance(result, tuple | list) and result else result
        if self.prompts is not None or not isinstance(states, Tensor) or states.dim() != 3:
            return
        images = int(bound.get("num_images_per_prompt") or bound.get("num_videos_per_prompt") or 1)
        texts, prompt = None, bound.get("prompt")
        if prompt is not None:
            texts = (prompt,) if isinstance(prompt, str) else tuple(prompt)
            if len(texts) * images != len(states):
                return
        self.images, self.guided = images, bool(bound.get("do_classifier_free_guidance"))
        self.settings = tuple(
            (key, value)
            for key, value in sorted(bound.items())
            if isinstance(value, str | int | float) and not _NOT_SETTINGS.intersection(key.split("_"))
        )
        tokens = None if texts is None else tokens_of(pipe, texts)
        self.prompts = Prompts(texts, tokens, states[::images].detach())

    @property
    def block(self) -> int:
        """Rows of the denoiser's batch for all prompts once: prompts in order, the pictures of each side by side."""
        return 0 if self.prompts is None else len(self.prompts.states) * self.images


def encode(pipe: Any, base: type[Any], text: str, settings: Settings = ()) -> Tensor:
    """The states of `text` as the class `base` of this pipeline encodes it: (1, tokens, d_text).

    Always one text at a time: what a text encoder gives for a row may depend on the rows beside it in the last bit.
    """
    parameters = inspect.signature(base.encode_prompt).parameters
    optional = {
        "device": getattr(pipe, "_execution_device", None),
        "num_images_per_prompt": 1,
        "do_classifier_free_guidance": False,
    }
    # SD3 wants its other encoders' prompts named; None stands for the same prompt.
    others = {
        name: None for name, one in parameters.items() if _OTHER_PROMPT.fullmatch(name) and one.default is one.empty
    }
    given = {name: value for name, value in {**optional, **dict(settings)}.items() if name in parameters}
    with torch.no_grad():
        result = base.encode_prompt(pipe, prompt=text, **others, **given)
    states = result[0] if isinstance(result, tuple | list) else result
    if not isinstance(states, Tensor):
        raise UsageError(f"{base.__name__}.encode_prompt gave {type(states).__name__}, not text-encoder states")
    return states[:1]


def can_encode(pipe: Any) -> bool:
    """Whether the pipeline holds a text encoder and its tokenizer."""
    return _tokenizer(pipe) is not None and getattr(pipe, "text_encoder", None) is not None


def tokens_of(pipe: Any, texts: Sequence[str]) -> tuple[frozenset[int], ...]:
    """T(.) of each text, as this pipeline would cut it, the tokens of textual inversions included."""
    tokenizer = _tokenizer(pipe)
    if tokenizer is None:
        return tuple(frozenset() for _ in texts)
    convert = getattr(pipe, "maybe_convert_prompt", None)
    return token_sets(tokenizer, texts if convert is None else convert(list(texts), tokenizer))


def _tokenizer(pipe: Any) -> Any:
    tokenizers = (getattr(pipe, name, None) for name in ("tokenizer", "tokenizer_2", "tokenizer_3"))
    return next((tokenizer for tokenizer in tokenizers if tokenizer is not None), None)


def _batch_rows(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | None:
    noisy = args[0] if args else kwargs.get("sample", kwargs.get("hidden_states"))
    return len(noisy) if isinstance(noisy, Tensor) and noisy.dim() > 0 else None


def _holder(held: Any) -> Holder | None:
    holder: Holder | None = held.__dict__.get(HELD)
    return holder


def _not_copied(held: Any, protocol: object) -> NoReturn:
    """In place of `__reduce_ex__`: a copy would hold folded weights, and nobody who knows the originals."""
    raise UsageError(
        f"a {type(held).__name__} that holds erasers cannot be copied or pickled", mend="erasers.detach() first"
    )


def _disguised(held: Any, base: Any) -> Any:
    """`held` under the names of `base`: configurations, error messages and look-ups by class name stay as they are."""
    held.__reduce_ex__ = _not_copied
    for attribute in ("__module__", "__name__", "__qualname__", "__doc__"):
        setattr(held, attribute, getattr(base, attribute))
    return held
