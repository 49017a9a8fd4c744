"""What the nodes compute: gates of prompts as ComfyUI's CLIP reads them, and hooks that change weights by them."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.hooks
import comfy.lora
import torch
from comfy import sd1_clip
from torch import Tensor

import spm_hub
from spm_hub.adapters.formats.spm import to_tensors
from spm_hub.adapters.manifest import factor_of
from spm_hub.errors import UsageError

Progress = Callable[[int, int, Mapping[str, float]], object]

_REMEMBERED = 4
"""How many sets of erasers stay calibrated."""
_CLIP_ALONE = frozenset({"l", "g", "h"})
"""ComfyUI's names of text encoders whose texts all have the same number of tokens."""
_PARTS = (
    ".lora_down.weight", ".lora_up.weight", ".lora_A.weight", ".lora_B.weight", ".alpha", ".diff", ".diff_b",
)  # fmt: skip
"""Endings of the keys that name a part of a module's change."""


@dataclass(frozen=True)
class Chosen:
    """An eraser in a chain of Load Eraser nodes, and the factor of its gamma."""

    adapter: spm_hub.Adapter
    strength: float


@dataclass(frozen=True)
class Settings:
    """How the erasers of a chain are gated. None takes what each eraser's manifest says."""

    gate: str | None = None
    rows: str | None = None
    threshold: float | None = None


@dataclass(frozen=True)
class Answer:
    """The gates of one prompt: gamma by the eraser's name, and a line for each that says why."""

    gammas: Mapping[str, float]
    report: str


def plain_text(prompt: str) -> str:
    """Return a prompt without the weights of its words, by ComfyUI's own rules: (snoopy:1.3) is snoopy."""
    segments = sd1_clip.token_weights(sd1_clip.escape_important(prompt), 1.0)
    return sd1_clip.unescape_important("".join(text for text, _ in segments))


def encode(clip: Any, texts: Sequence[str]) -> Tensor:
    """Return the states that the denoiser receives of texts without weights: (texts, tokens, d_text)."""
    tokens = [clip.tokenize(text.replace("(", "\\(").replace(")", "\\)")) for text in texts]
    lengths = {tuple(len(chunk) for chunk in chunks) for one in tokens for chunks in one.values()}
    if len(texts) > 1 and tokens[0].keys() <= _CLIP_ALONE and len(lengths) == 1 and len(lengths.pop()) == 1:
        # ComfyUI encodes the windows of a long text as one batch: here each is a text.
        states = clip.encode_from_tokens({name: [one[name][0] for one in tokens] for name in tokens[0]})
        return states.reshape(len(texts), -1, states.shape[-1])
    each = [clip.encode_from_tokens(one)[0] for one in tokens]
    return torch.nn.utils.rnn.pad_sequence(each, batch_first=True)


def tokenizers_of(clip: Any) -> list[Any]:
    """Return the tokenizers of transformers behind a CLIP; those of other kinds are left out."""
    found = [getattr(one, "tokenizer", None) for one in vars(clip.tokenizer).values()]
    return [one for one in found if hasattr(one, "get_vocab") and hasattr(one, "all_special_ids")][:4]


class Gates:
    """The gates of chains of erasers under CLIPs; those used last stay calibrated, and keep no CLIP in memory."""

    def __init__(self) -> None:
        self._known: OrderedDict[object, _Calibrated] = OrderedDict()

    def ask(
        self, clip: Any, chain: Sequence[Chosen], prompt: str, settings: Settings, progress: Progress | bool = False
    ) -> Answer:
        """Return the gates of a prompt, its weights of words left out. Raises SpmHubError."""
        calibrated, text = self._calibrated(clip, chain, settings, progress), plain_text(prompt)
        calibrated.encoder.clip = clip
        try:
            states = encode(clip, [text])
            gammas = calibrated.gates.gates(text, states)
            reasons = calibrated.gates.explain(text, states)
        finally:
            calibrated.encoder.clip = None
        lines = []
        for one in chain:
            name, why = one.adapter.name, reasons[one.adapter.name]
            token = f", token {why.token!r}" if why.token else ""
            lines.append(f"{name}: gamma {gammas[name]:.4g} ({why.term}: {why.shown or 'nothing'}{token})")
        return Answer(gammas, "\n".join(lines) or "no erasers")

    def _calibrated(
        self, clip: Any, chain: Sequence[Chosen], settings: Settings, progress: Progress | bool
    ) -> _Calibrated:
        model = clip.cond_stage_model
        key = (
            id(model), clip.layer_idx, repr(clip.tokenizer_options), clip.patcher.patches_uuid,
            settings.gate, settings.threshold, tuple(id(one.adapter) for one in chain),
        )  # fmt: skip
        kept = self._known.get(key)
        if kept is None or kept.model() is not model:
            encoder = _Encoder()
            asked = spm_hub.TextGates(
                [one.adapter for one in chain], encoder, tokenizers_of(clip), gate=settings.gate,
                threshold=settings.threshold or None, progress=progress,
            )  # fmt: skip
            kept = _Calibrated(weakref.ref(model), encoder, asked)
        self._known[key] = kept
        self._known.move_to_end(key)
        while len(self._known) > _REMEMBERED:
            self._known.popitem(last=False)
        return kept


class _Encoder:
    """Encodes texts with the CLIP of the question in progress."""

    clip: Any = None

    def __call__(self, texts: Sequence[str]) -> Tensor:
        return encode(self.clip, texts)


@dataclass(frozen=True)
class _Calibrated:
    """The gates under one CLIP, whose model may go away before."""

    model: weakref.ref[Any]
    encoder: _Encoder
    gates: spm_hub.TextGates


class EraserHook(comfy.hooks.WeightHook):
    """Adds an eraser's change to the denoiser's weights while its conditioning is sampled.

    Unlike ComfyUI's own LoRA hook it refuses a model that lacks a module, instead of leaving that out.
    """

    def __init__(self, strength_model: float = 1.0, strength_clip: float = 0.0) -> None:
        super().__init__(strength_model=strength_model, strength_clip=strength_clip)
        self.eraser = ""

    def clone(self) -> EraserHook:
        """Return the same hook for another group."""
        copy = super().clone()
        copy.eraser = self.eraser
        return copy

    def add_hook_patches(self, model: Any, model_options: Any, target_dict: Any, registered: Any) -> bool:
        """Register the change with a model. Raises UsageError where the model has no such module."""
        if target_dict.get("target") == comfy.hooks.EnumWeightTarget.Clip:
            return False
        check_fit(self.eraser, self.weights, comfy.lora.model_lora_keys_unet(model.model, {}))
        return super().add_hook_patches(model, model_options, target_dict, registered)


def check_fit(name: str, weights: Mapping[str, Tensor], known: Mapping[str, object]) -> None:
    """Raise UsageError unless a model knows all modules of an eraser. known: ComfyUI's names of its modules."""
    modules = {stem(key) for key in weights}
    if lost := sorted(modules - known.keys()):
        raise UsageError(
            f"eraser {name} does not fit this model: {len(lost)} of its {len(modules)} modules are not in it, such as "
            f"{lost[0]}",
            mend="an eraser for the family of this model; Load Eraser says which family an eraser is for",
        )


def stem(key: str) -> str:
    """Return the name of the module in the key of a tensor."""
    return next((key.removesuffix(part) for part in _PARTS if key.endswith(part)), key)


_tensors: weakref.WeakKeyDictionary[spm_hub.Adapter, dict[str, Tensor]] = weakref.WeakKeyDictionary()


def weights_of(adapter: spm_hub.Adapter) -> dict[str, Tensor]:
    """Return an eraser's tensors by the keys that ComfyUI knows; they are read from its file once."""
    if adapter not in _tensors:
        _tensors[adapter] = to_tensors(adapter.increments, adapter.manifest.base.family)
    return _tensors[adapter]


def hooks_of(
    chain: Sequence[Chosen], gammas: Mapping[str, float], rows: str | None
) -> tuple[comfy.hooks.HookGroup | None, comfy.hooks.HookGroup | None]:
    """Return the hooks of a prompt's conditioning and of its negative one; None where no eraser acts.

    The two are the same object where they can be: ComfyUI then samples both in one batch. An eraser with gamma 0 has no
    hook, and the weights stay as they are to the last bit.
    """
    acting: list[tuple[EraserHook, str]] = []
    for one in chain:
        gate = one.adapter.manifest.gate
        factor = factor_of(gate.law, gammas[one.adapter.name], one.strength * gate.strength)
        if factor:
            hook = EraserHook(factor)
            hook.eraser, hook.weights = one.adapter.name, weights_of(one.adapter)
            acting.append((hook, rows or gate.rows))
    everywhere = [hook for hook, where in acting if where == "both"]
    positive = _group([hook for hook, _ in acting])
    return positive, positive if len(everywhere) == len(acting) else _group(everywhere)


def _group(hooks: Sequence[EraserHook]) -> comfy.hooks.HookGroup | None:
    if not hooks:
        return None
    group = comfy.hooks.HookGroup()
    for hook in hooks:
        group.add(hook)
    return group


def with_hooks(conditioning: Any, hooks: comfy.hooks.HookGroup | None) -> Any:
    """Return a conditioning with these hooks besides its own. Raises UsageError for an eraser that it has already."""
    if hooks is None:
        return conditioning
    for _, extra in conditioning:
        present = {getattr(hook, "eraser", "") for hook in getattr(extra.get("hooks"), "hooks", ())}
        if twice := sorted(present & {hook.eraser for hook in hooks.hooks}):
            raise UsageError(
                f"{', '.join(twice)} would act twice on this conditioning, which has been gated already",
                mend="gate each conditioning once: either Text Encode (Erasers) or Gate Conditioning",
            )
    return comfy.hooks.set_hooks_for_conditioning(conditioning, hooks)
