"""How a pipeline reads a text: its text-encoder states, its token sets, and what changes either."""

import inspect
import re
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from spm_hub.attachment.concept_index import WAY
from spm_hub.errors import UsageError

PLACES = ("", "_2", "_3", "_4")
"""What follows the names of a pipeline's text encoders and of their tokenizers."""


def tokens_of(pipe: Any, texts: Sequence[str]) -> tuple[frozenset[int], ...]:
    """T(.) of each text, as this pipeline would cut it, the tokens of textual inversions included.

    Of every tokenizer whose encoder is there, each in its own window: what FLUX's CLIP reads no more, its T5 does.
    """
    convert = getattr(pipe, "maybe_convert_prompt", None)
    found = [frozenset[int]() for _ in texts]
    for place, suffix in enumerate(PLACES):
        tokenizer = getattr(pipe, f"tokenizer{suffix}", None)
        # FLUX.2 has a processor of pictures and texts in its place, which holds the tokenizer.
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        if tokenizer is None or getattr(pipe, f"text_encoder{suffix}", tokenizer) is None:
            continue
        if place and type(tokenizer).__name__ == "ByT5Tokenizer":
            continue  # HunyuanImage's second one cuts into bytes, which any longer text shares with any name.
        given = texts if convert is None else convert(list(texts), tokenizer)
        found = list(map(frozenset.union, found, token_sets(tokenizer, given, place)))
    return tuple(found)


Scalar = str | int | float


Settings = tuple[tuple[str, Scalar | tuple[Scalar, ...]], ...]
"""Arguments that change what the text encoder gives: clip_skip, lora_scale, max_sequence_length and the like.

FLUX.2 takes the layers that it reads the text from, Sana the sentences of an instruction before it: tuples here.
"""


_OTHER_PROMPT = re.compile(r"prompt_\d")


_NOT_SETTINGS = {"self", "prompt", "guidance", "device"}


class CannotEncodeError(UsageError):
    """The pipeline lacks a text encoder, or a tokenizer, that it needs to encode a text."""


def encoder_settings(base: type[Any], options: Mapping[str, Any]) -> Settings:
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


def token_sets(tokenizer: Any, texts: Sequence[str], place: int = 0) -> tuple[frozenset[int], ...]:
    """T(.) of each text: the ids that the text encoder is given, without special ones and bare spaces.

    CLIP's tokenizer knows neither capitals nor a word's place. To one that does, "snoopy", "a snoopy" and "Snoopy" may
    share nothing, whatever the pipeline itself makes of capitals: there T(.) also has the ids of the text in small
    letters after a space, as of another way (`WAY`) to cut it. place: of the tokenizer among those of its pipeline.
    """
    special = set(tokenizer.all_special_ids)

    def ids(texts: Sequence[str]) -> list[frozenset[int]]:
        return [frozenset(row) - special for row in tokenizer(list(texts), truncation=True).input_ids]

    one, other = ids(["A b", " a b"])
    ways = [ids(texts)] if one == other else [ids(texts), ids([f" {text.lower()}" for text in texts])]
    # SentencePiece may cut a space off the word after it, and every text has that.
    blank = {token for sets in ways for token in set[int]().union(*sets) if not tokenizer.decode([token]).strip()}
    return tuple(
        frozenset(token + (2 * place + way) * WAY for way, tokens in enumerate(each) for token in tokens - blank)
        for each in zip(*ways, strict=True)
    )
