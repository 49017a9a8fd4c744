"""Encodes texts as a pipeline does: text-encoder states, token sets, and encoder settings."""

import hashlib
import inspect
import re
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from spm_hub.attachment.gates.concept_index import WAY
from spm_hub.attachment.gates.gate import Prompts
from spm_hub.errors import UsageError
from spm_hub.models.text_window import SUFFIXES, WINDOW, cut_text, reads_whole, tokenizers_of, window_of

Scalar = str | int | float

Settings = tuple[tuple[str, Scalar | tuple[Scalar, ...]], ...]
"""Arguments that change the text encoder's output, by name: clip_skip, lora_scale, max_sequence_length and the like.

Some are tuples: the layers that FLUX.2 reads the text from, the sentences that Sana puts before it.
"""

_UNCUT = 10**6
"""A window that no text fills."""

_OTHER_PROMPT = re.compile(r"prompt_\d")

_NOT_SETTINGS = {"self", "prompt", "guidance", "device"}


class CannotEncodeError(UsageError):
    """Raised where the pipeline lacks a text encoder or a tokenizer that it needs to encode a text."""


def tokens_of(
    pipe: Any, texts: Sequence[str], settings: Settings = (), positions: int | None = None
) -> tuple[frozenset[int], ...]:
    """Return T(.) of each text: the tokens of all the pipeline's tokenizers, textual inversions included.

    Each tokenizer cuts the text in its own window: FLUX's T5 reads on where its CLIP stops. A tokenizer counts only
    where its encoder is loaded. settings: of the call. positions: the number of the texts' states, if it is known.
    """
    convert = getattr(pipe, "maybe_convert_prompt", None)
    found = [frozenset[int]() for _ in texts]
    known = dict(settings)
    whole = positions is not None and reads_whole(pipe, known, positions)
    for position, _, tokenizer in tokenizers_of(pipe):
        given = texts if convert is None else convert(list(texts), tokenizer)
        window = None if whole else window_of(tokenizer, known)
        found = list(map(frozenset.union, found, token_sets(tokenizer, given, position, window)))
    return tuple(found)


def read_prompts(pipe: Any, arguments: Mapping[str, Any], states: Tensor) -> Prompts:
    """Return the prompts in the arguments of `encode_prompt`, with the states that it made of them.

    Their texts and tokens are None where the arguments have no prompt. What other encoders are given (prompt_2 of SDXL
    and FLUX) belongs to the prompt: FLUX's denoiser attends to that.
    """
    if arguments.get("prompt") is None:
        return Prompts(None, None, states)
    settings, positions = settings_among(arguments), states.shape[1]
    cut: list[str] = []

    def as_read(texts: Sequence[str]) -> tuple[str, ...]:
        """Return the part of each text that some encoder reads."""
        cuts = [cut_text(pipe, text, dict(settings), positions) for text in texts]
        cut.extend(one.describe("the prompt") for one in cuts if one is not None)
        return tuple(text if one is None else one.read for text, one in zip(texts, cuts, strict=True))

    texts = _as_texts(arguments["prompt"])
    tokens, read = tokens_of(pipe, texts, settings, positions), as_read(texts)
    for other in (_as_texts(value) for key, value in arguments.items() if _OTHER_PROMPT.fullmatch(key) and value):
        each = other * len(texts) if len(other) == 1 else other
        tokens = tuple(map(frozenset.union, tokens, tokens_of(pipe, each, settings, positions)))
        texts, read = _joined(texts, each), _joined(read, as_read(each))
    return Prompts(texts, tokens, states, None if read == texts else read, tuple(dict.fromkeys(cut)))


def _joined(ones: Sequence[str], others: Sequence[str]) -> tuple[str, ...]:
    return tuple(one if one == two else f"{one}\n{two}" for one, two in zip(ones, others, strict=True))


def encoder_settings(base: Any, options: Mapping[str, Any]) -> Settings:
    """Return the settings with which a call with these options encodes its prompts, defaults included.

    base: the class of the pipeline, or its `modular.BlockReader`. Raises UsageError for an option that
    `base.encode_prompt` does not have.
    """
    encoder = inspect.signature(base.encode_prompt).parameters if hasattr(base, "encode_prompt") else {}
    call = inspect.signature(base.__call__).parameters
    known = [name for name in encoder if name != "self" and _may_be_setting(name)]
    if unknown := next((name for name in options if name not in known), None):
        raise UsageError(
            f"{base.__name__}.encode_prompt has no option {unknown!r}, which was given as {options[unknown]!r}",
            mend=f"one of these options: {', '.join(known) or 'none'}",
        )
    return settings_among({name: call[name].default for name in encoder if name in call} | dict(options))


def encode(pipe: Any, base: Any, text: str, settings: Settings = ()) -> Tensor:
    """Return the states of `text` as the pipeline's class or reader encodes it: (1, tokens, d_text).

    One text at a time: the output of a text encoder for a row may depend on the other rows in the last bit. Raises
    CannotEncodeError; only a try shows it, as SDXL encodes without its first encoder and FLUX needs both.
    """
    return encode_together(pipe, base, [text], settings)


def execution_device(pipe: Any) -> Any:
    """Return the device that a pipeline encodes texts on; None where it does not say.

    diffusers looks through all modules to find it, which takes longer than a small text encoder.
    """
    return getattr(pipe, "_execution_device", None)


def encode_together(pipe: Any, base: Any, texts: Sequence[str], settings: Settings = ()) -> Tensor:
    """Return the states of texts encoded as one batch: (texts, tokens, d_text). Raises CannotEncodeError."""
    if not hasattr(base, "encode_prompt"):
        raise CannotEncodeError(
            f"{base.__name__} encodes texts in a way that the gates do not know: it has no encode_prompt, and no block "
            "that makes prompt_embeds of a prompt",
            mend='attach with gate="always"',
        )
    optional = {"num_images_per_prompt": 1, "do_classifier_free_guidance": False, **dict(settings)}
    if "device" not in optional:
        optional["device"] = execution_device(pipe)
    prompt = texts[0] if len(texts) == 1 else list(texts)
    try:
        parameters = inspect.signature(base.encode_prompt).parameters
        # SD3 requires the other encoders' prompts as arguments; None means the same prompt.
        others = {
            name: None for name, one in parameters.items() if _OTHER_PROMPT.fullmatch(name) and one.default is one.empty
        }
        given = {name: value for name, value in optional.items() if name in parameters}
        with torch.no_grad():
            result = base.encode_prompt(pipe, prompt=prompt, **others, **given)
    except (AttributeError, TypeError, ValueError) as error:
        raise CannotEncodeError(
            f"this {base.__name__} cannot encode {prompt!r}, which the gates need: {str(error).strip()}",
            mend='load it with its text encoders and tokenizers, or attach with gate="always"',
        ) from error
    states = result[0] if isinstance(result, tuple | list) else result
    if not isinstance(states, Tensor):
        raise UsageError(f"{base.__name__}.encode_prompt returned {type(states).__name__}, not text-encoder states")
    return states[: len(texts)]


def tokens_by_position(pipe: Any, text: str, length: int, settings: Settings) -> list[str]:
    """Return the text of the token behind each of the `length` states of `text`, in order.

    "(start)", "(end)" and "(padding)" are the tokens around the text. The first tokenizer counts whose window is as
    long as the states: for FLUX that is T5's. Empty where there is none, as for SD3, which joins the states of several
    encoders, and for Qwen-Image, which drops a part of them.
    """
    window = dict(settings).get(WINDOW)
    for suffix in SUFFIXES:
        tokenizer: Any = getattr(pipe, f"tokenizer{suffix}", None)
        if tokenizer is None or not hasattr(tokenizer, "model_max_length"):
            continue
        clip = "CLIP" in type(tokenizer).__name__
        if length != (tokenizer.model_max_length if clip and window is None else None if clip else window):
            continue
        convert = getattr(pipe, "maybe_convert_prompt", None)
        given = text if convert is None else convert(text, tokenizer)
        ids = tokenizer(given, padding="max_length", max_length=length, truncation=True).input_ids
        return _named(tokenizer, ids)
    return []


def _named(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Return the text of each token of one padded text; CLIP may pad with the token that ends a text."""
    found: list[str] = []
    for token in ids:
        if found and found[-1] in ("(end)", "(padding)"):
            found.append("(padding)")
        elif token == tokenizer.eos_token_id:
            found.append("(end)")
        elif token == tokenizer.bos_token_id:
            found.append("(start)")
        else:
            found.append(tokenizer.decode([token]).strip())
    return found


def encoders_digest(pipe: Any) -> str:
    """Return a hash of the text encoders' weights and tokenizers that is the same in every process.

    Of each weight its name, shape and some of its numbers count: hashing all of a large encoder would take seconds.
    """
    digest = hashlib.sha256()
    for suffix in SUFFIXES:
        tokenizer: Any = getattr(pipe, f"tokenizer{suffix}", None)
        digest.update(repr((suffix, type(tokenizer).__name__, _length(tokenizer))).encode())
        encoder = getattr(pipe, f"text_encoder{suffix}", None)
        for name, parameter in encoder.named_parameters() if isinstance(encoder, nn.Module) else ():
            flat = parameter.detach().flatten()
            some = flat[:: max(1, len(flat) // 64)].float().cpu()
            digest.update(repr((name, tuple(parameter.shape), some.tolist())).encode())
        if isinstance(encoder, nn.Module):
            digest.update(repr(_loras_of(encoder)).encode())
    return digest.hexdigest()


def encoders_of(pipe: Any) -> list[object]:
    """Return the text encoders and tokenizers of a pipeline, None for one that is missing."""
    return [getattr(pipe, f"{kind}{suffix}", None) for suffix in SUFFIXES for kind in ("text_encoder", "tokenizer")]


def vocabulary(pipe: Any) -> Mapping[str, int]:
    """Return the ids of the first tokenizer's tokens by their text; empty if it lists none."""
    for suffix in SUFFIXES:
        tokenizer: Any = getattr(pipe, f"tokenizer{suffix}", None)
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        if tokenizer is not None and hasattr(tokenizer, "get_vocab"):
            found: Mapping[str, int] = tokenizer.get_vocab()
            return found
    return {}


def encoders_stamp(pipe: Any) -> tuple[object, ...]:
    """Return a fingerprint that changes when the text encoders or tokenizers change.

    They change when an encoder is replaced, cast, written to or given a LoRA, or a tokenizer gets more tokens (textual
    inversion). Moving an encoder between devices changes nothing: offloading does that for every picture.
    """
    found: list[object] = []
    for suffix in SUFFIXES:
        tokenizer: Any = getattr(pipe, f"tokenizer{suffix}", None)
        found.append(_length(tokenizer))
        encoder = getattr(pipe, f"text_encoder{suffix}", None)
        if not isinstance(encoder, nn.Module):
            found.append(encoder)
            continue
        found.append(weakref.ref(encoder))
        parameters = list(encoder.parameters())
        found.append(sum(one._version for one in parameters if not one.is_inference()))
        found.append(frozenset((one.dtype, one.numel()) for one in parameters))
        found += _loras_of(encoder)
    return tuple(found)


def _loras_of(encoder: nn.Module) -> list[tuple[object, ...]]:
    """Return which LoRAs act on each layer that has some, and how strongly."""
    layers: list[Any] = [module for module in encoder.modules() if "lora_A" in module._modules]
    return [
        (*layer.active_adapters, *layer.merged_adapters, layer.disable_adapters, *layer.scaling.items())
        for layer in layers
    ]


def _length(tokenizer: Any) -> int | None:
    return len(tokenizer) if hasattr(tokenizer, "__len__") else None


def _as_texts(prompt: str | Sequence[str]) -> tuple[str, ...]:
    return (prompt,) if isinstance(prompt, str) else tuple(prompt)


def settings_among(arguments: Mapping[str, Any]) -> Settings:
    """Return those of the arguments of `encode_prompt` that are settings, in the order of their names."""
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


def token_sets(
    tokenizer: Any, texts: Sequence[str], position: int = 0, window: int | None = None
) -> tuple[frozenset[int], ...]:
    """Return T(.) of each text: the ids of its tokens, without special tokens and bare spaces.

    CLIP's tokenizer ignores case and position. To tokenizers that do not (T5, Qwen), "snoopy", "a snoopy" and "Snoopy"
    may share no token: there T(.) also contains the ids of the lower-cased text after a space, offset by `WAY` so that
    the two tokenizations are counted separately. position: of the tokenizer among those of its pipeline.  window: the
    number of tokens that its encoder reads; None for all of them.
    """
    special = set(tokenizer.all_special_ids)

    def ids(texts: Sequence[str]) -> list[frozenset[int]]:
        cut = tokenizer(list(texts), truncation=True, max_length=window or _UNCUT)
        return [frozenset(row) - special for row in cut.input_ids]

    one, other = ids(["A b", " a b"])
    ways = [ids(texts)] if one == other else [ids(texts), ids([f" {text.lower()}" for text in texts])]
    # SentencePiece may make a token of the space before a word, which every text then contains.
    blank = {token for sets in ways for token in set[int]().union(*sets) if not tokenizer.decode([token]).strip()}
    return tuple(
        frozenset(token + (2 * position + way) * WAY for way, tokens in enumerate(each) for token in tokens - blank)
        for each in zip(*ways, strict=True)
    )
