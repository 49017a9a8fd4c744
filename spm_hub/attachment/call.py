"""What a picture is asked for: its prompts, learnt from what is encoded and from what the denoiser is given."""

import inspect
import re
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from spm_hub.attachment.text_encoding import PLACES, tokens_of
from spm_hub.errors import UsageError
from spm_hub.attachment.gate import Prompts

Scalar = str | int | float
Settings = tuple[tuple[str, Scalar | tuple[Scalar, ...]], ...]
"""Arguments that change what the text encoder gives: clip_skip, lora_scale, max_sequence_length and the like.

FLUX.2 takes the layers that it reads the text from, Sana the sentences of an instruction before it: tuples here.
"""

_OTHER_PROMPT = re.compile(r"prompt_\d")

_NOT_SETTINGS = {"self", "prompt", "guidance", "device"}


class CannotEncodeError(UsageError):
    """The pipeline lacks a text encoder, or a tokenizer, that it needs to encode a text."""


@dataclass(eq=False)
class Call:
    """What is known of one call of a pipeline: nothing until it has encoded its prompts.

    images: pictures for each prompt.  guided: whether unconditional rows precede the prompts' own.
    negatives: what was encoded beside the prompts: states that some pipelines (FLUX, Qwen-Image) give the denoiser in a
    call of their own.  gammas: by eraser, one for each prompt.
    unconditional: of the denoiser's present batch, for each block of rows whether it is the negative prompts'.
    plain: whether the denoiser is given states as they were encoded, as its first call in this picture tells.
    others: prompts of this picture that are not its present ones.
    """

    prompts: Prompts | None = None
    settings: Settings = ()
    images: int = 1
    guided: bool = False
    negatives: list[Tensor] = field(default_factory=list)
    gammas: dict[str, list[float]] = field(default_factory=dict)
    unconditional: tuple[bool, ...] = ()
    plain: bool | None = None
    others: list[Prompts] = field(default_factory=list)
    _heard: tuple[Any, int | None] = field(default=(None, None), init=False)

    def learn(self, pipe: Any, bound: Mapping[str, Any], result: Any) -> None:
        """Note the prompts from the first `encode_prompt` of this call.

        What is encoded after them is negative prompts; once the denoiser was called, prompts that may replace them.
        """
        states, *beside = result if isinstance(result, tuple | list) and result else [result]
        if not isinstance(states, Tensor) or states.dim() != 3:
            return
        if self.prompts is not None and self.plain is None:
            self.negatives.append(states)
            return
        images = int(bound.get("num_images_per_prompt") or bound.get("num_videos_per_prompt") or 1)
        texts = tokens = None
        if bound.get("prompt") is not None:
            texts = _as_texts(bound["prompt"])
            if len(texts) * images != len(states):
                return
            tokens = tokens_of(pipe, texts)
            for other in (_as_texts(value) for key, value in bound.items() if _OTHER_PROMPT.fullmatch(key) and value):
                # What another encoder is told is as much of the prompt: of FLUX it is what the denoiser attends to.
                each = other * len(texts) if len(other) == 1 else other
                tokens = tuple(map(frozenset.union, tokens, tokens_of(pipe, each)))
                texts = tuple(one if one == two else f"{one}\n{two}" for one, two in zip(texts, each, strict=True))
        prompts = Prompts(texts, tokens, states[::images].detach())
        if self.prompts is not None:
            self.others.append(prompts)
            return
        self.images, self.guided = images, bool(bound.get("do_classifier_free_guidance"))
        self.settings = _settings(bound)
        self.negatives = [one for one in beside if isinstance(one, Tensor) and one.shape[2:] == states.shape[2:]]
        self.prompts = prompts

    @property
    def block(self) -> int:
        """Rows of the denoiser's batch for all prompts once: prompts in order, the pictures of each side by side."""
        return 0 if self.prompts is None else len(self.prompts.states) * self.images

    def hear(self, rows: int | None, states: Any) -> bool:
        """Note what the denoiser is called with; whether that is other prompts than before, now those of this call.

        A callback may replace them in the middle of a picture. The last block of rows tells, being the prompts' own,
        but not where the pipeline makes something else of what it encoded before the denoiser gets it.
        """
        if self.prompts is None or (self._heard[0] is states and self._heard[1] == rows):
            return False
        self._heard = states, rows
        whole = rows is not None and rows % self.block == 0
        given = list(states.split(self.block)) if whole and isinstance(states, Tensor) and len(states) == rows else []
        known = bool(given) and (self._are(self.prompts, given[-1]) or self._negative(given[-1]))
        if self.plain is None:
            self.plain = known
        replaced = bool(given) and self.plain and not known
        if replaced:
            before = self.prompts
            self.prompts = next(
                (other for other in self.others if self._are(other, given[-1])),
                Prompts(None, None, given[-1][:: self.images].detach()),
            )
            self.others = [before, *(other for other in self.others if other is not self.prompts)]
            self.gammas = {}
        if rows == 2 * self.block:
            # Under classifier-free guidance diffusers puts the unconditional rows first.
            self.unconditional = self.guided, False
        else:
            self.unconditional = tuple(map(self._negative, given))
        return replaced

    def _negative(self, rows: Tensor) -> bool:
        """Whether these are the states of the negative prompts, and not those of the prompts beside them.

        States that are neither count as the prompts': an eraser is never silently off.
        """
        assert self.prompts is not None
        at = rows.data_ptr()
        if at in {each.data_ptr() for each in (self.prompts.states, *self.negatives)}:
            # The very tensor, which tells even a negative prompt that is the prompt itself.
            return at != self.prompts.states.data_ptr()
        return any(_equal(rows, each.to(rows)) for each in self.negatives) and not self._are(self.prompts, rows)

    def _are(self, prompts: Prompts, rows: Tensor) -> bool:
        """Whether these are the states of `prompts`."""
        own = prompts.states
        if own.data_ptr() == rows.data_ptr() and (len(own) * self.images, *own.shape[1:]) == rows.shape:
            return True  # the very tensor that was encoded
        return _equal(rows, own.to(rows).repeat_interleave(self.images, dim=0))


def told(base: type[Any], options: Mapping[str, Any]) -> Settings:
    """What a call of this class of pipelines with these options has its text encoder know beside the prompt.

    Raises UsageError for an option that does not reach the encoder.
    """
    encoder = inspect.signature(base.encode_prompt).parameters if hasattr(base, "encode_prompt") else {}
    call = inspect.signature(base.__call__).parameters
    known = [name for name in encoder if name != "self" and _may_be_setting(name)]
    if idle := next((name for name in options if name not in known), None):
        raise UsageError(
            f"{idle}={options[idle]!r} is nothing that {base.__name__} tells its text encoder beside the prompt",
            mend=f"of these options: {', '.join(known) or 'none'}",
        )
    return _settings({name: call[name].default for name in encoder if name in call} | dict(options))


def encode(pipe: Any, base: type[Any], text: str, settings: Settings = ()) -> Tensor:
    """The states of `text` as the class `base` of this pipeline encodes it: (1, tokens, d_text).

    Always one text at a time: what a text encoder gives for a row may depend on the rows beside it in the last bit.
    Raises CannotEncodeError, which only trying can tell: SDXL does without its first encoder, FLUX without none.
    """
    optional = {
        "device": getattr(pipe, "_execution_device", None),
        "num_images_per_prompt": 1,
        "do_classifier_free_guidance": False,
    }
    try:
        parameters = inspect.signature(base.encode_prompt).parameters
        # SD3 wants its other encoders' prompts named; None stands for the same prompt.
        others = {
            name: None for name, one in parameters.items() if _OTHER_PROMPT.fullmatch(name) and one.default is one.empty
        }
        given = {name: value for name, value in {**optional, **dict(settings)}.items() if name in parameters}
        with torch.no_grad():
            result = base.encode_prompt(pipe, prompt=text, **others, **given)
    except (AttributeError, TypeError, ValueError) as error:
        raise CannotEncodeError(
            f"this {base.__name__} cannot encode {text!r}, as it has to for the gates: {str(error).strip()}",
            mend='load it with its text encoders and tokenizers, or attach with gate="always"',
        ) from error
    states = result[0] if isinstance(result, tuple | list) else result
    if not isinstance(states, Tensor):
        raise UsageError(f"{base.__name__}.encode_prompt gave {type(states).__name__}, not text-encoder states")
    return states[:1]


def encoders_stamp(pipe: Any) -> tuple[object, ...]:
    """Another one whenever a text may be encoded otherwise.

    That is: encoders replaced, cast, written to, given LoRAs or further tokens (textual inversion). Moving them changes
    nothing: offloading does that for every picture.
    """
    found: list[object] = []
    for suffix in PLACES:
        tokenizer: Any = getattr(pipe, f"tokenizer{suffix}", None)
        found.append(len(tokenizer) if hasattr(tokenizer, "__len__") else None)
        encoder = getattr(pipe, f"text_encoder{suffix}", None)
        if not isinstance(encoder, nn.Module):
            found.append(encoder)
            continue
        found.append(weakref.ref(encoder))
        parameters = list(encoder.parameters())
        found.append(sum(one._version for one in parameters if not one.is_inference()))
        found.append(frozenset((one.dtype, one.numel()) for one in parameters))
        layers: list[Any] = [module for module in encoder.modules() if "lora_A" in module._modules]
        found += [
            (*layer.active_adapters, *layer.merged_adapters, layer.disable_adapters, *layer.scaling.items())
            for layer in layers
        ]
    return tuple(found)


def _as_texts(prompt: str | Sequence[str]) -> tuple[str, ...]:
    return (prompt,) if isinstance(prompt, str) else tuple(prompt)


def _settings(arguments: Mapping[str, Any]) -> Settings:
    return tuple(
        (name, tuple(value) if isinstance(value, list) else value)
        for name, value in sorted(arguments.items())
        if _is_setting(value) and _may_be_setting(name)
    )


def _may_be_setting(name: str) -> bool:
    return not _NOT_SETTINGS.intersection(name.split("_"))


def _is_setting(value: object) -> bool:
    return isinstance(value, Scalar) or (
        isinstance(value, list | tuple) and all(isinstance(one, Scalar) for one in value)
    )


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other)
