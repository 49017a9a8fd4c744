"""Make an eraser for the checkpoint at hand: the method `instant` needs its text states, keys and values alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import comfy.lora
import comfy.utils
import torch
from torch import Tensor, nn

import spm_hub
from spm_hub.adapters.adapter import increment_info
from spm_hub.adapters.manifest import Base, Concept, GateDefaults, Manifest, Training
from spm_hub.errors import UsageError
from spm_hub.io.progress import Progress, show_phases
from spm_hub.models.architectures import fingerprint_by_names
from spm_hub.training.conditioning import Conditioning
from spm_hub.training.loop.run import Task
from spm_hub.training.methods.instant import solve
from spm_hub.training.recipe.recipe import Recipe

from .gating import encode, tokenizers_of

Inform = Callable[[int, int, Mapping[str, float]], object]

_READS_TEXT = re.compile(r"(.*attn2\.to_[kv])\.weight")


def make_eraser(
    model: Any, clip: Any, concept: str, *, aliases: Sequence[str] = (), surrogate: str = "", kind: str = "other",
    reach: float = 0.9, base: str = "", inform: Inform,
) -> spm_hub.Adapter:  # fmt: skip
    """Return an eraser of a concept for a MODEL and its CLIP, patches of LoRAs included.

    surrogate: what is drawn in the concept's place.  reach: the share of the way there that new sentences go.  base:
    the name of the checkpoint, for the manifest. Raises UsageError for a model whose text enters by other layers than
    keys and values of cross-attention, and RecipeError for a concept that the text encoder cannot tell from nothing.
    """
    config = model.model.model_config.unet_config
    places = comfy.utils.unet_to_diffusers(config)
    modules = {found[1]: key for name, key in places.items() if (found := _READS_TEXT.fullmatch(name))}
    if not modules:
        raise UsageError(
            f"{type(model.model).__name__} has no keys and values of cross-attention, as SD 1, SD 2 and SDXL have",
            mend="spmhub train CONCEPT --method instant, where spm-hub is installed",
        )
    recipe = Recipe(
        target=concept, aliases=tuple(aliases), surrogate=surrogate, kind=kind, method="instant",
        options={"reach": reach}, model=base.strip() or "a checkpoint in ComfyUI",
    )  # fmt: skip
    weights = {path: _weight(model, f"diffusion_model.{key}") for path, key in modules.items()}
    with show_phases(_Reports(inform)):
        found = solve(Task(recipe, _TextOnly(clip), {path: _linear(one) for path, one in weights.items()}))
    increments = {path: one.to(dtype=torch.float32) for path, one in found.items()}
    state = model.model_state_dict()
    stored = {name: f"diffusion_model.{key}" for name, key in places.items()}
    shapes = {name: tuple(state[key].shape) for name, key in stored.items() if key in state}
    manifest = Manifest(
        name=recipe.slug,
        concept=Concept(target=concept, aliases=recipe.aliases, surrogate=surrogate, kind=recipe.kind),
        increment=increment_info(increments),
        base=Base(family=_family(config), id=recipe.model, fingerprint=fingerprint_by_names(shapes)),
        recipe=recipe.model_dump(mode="json"),
        versions={"torch": torch.__version__},
        gate=GateDefaults(strength=recipe.strength),
        training=Training(steps=0, planned=0, ended="closed form"),
    )
    return spm_hub.Adapter(manifest, increments, "made in ComfyUI")


def _family(config: Mapping[str, Any]) -> str:
    """Return the family of a U-Net in ComfyUI's configuration."""
    if config.get("adm_in_channels"):
        return "sdxl"
    return "sd2" if config.get("use_linear_in_transformer") else "sd1"


def _weight(model: Any, key: str) -> Tensor:
    """Return a weight as the sampler uses it, with the patches of LoRA loaders: float32 on the CPU."""
    (stored, convert), *patches = model.get_key_patches(key)[key]
    weight: Tensor = convert(stored.to(device="cpu", dtype=torch.float32, copy=True))
    return comfy.lora.calculate_weight(patches, weight, key) if patches else weight


def _linear(weight: Tensor) -> nn.Module:
    layer = nn.Linear(1, 1, bias=False, device="meta")
    layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    return layer


class _TextOnly:
    """A base as `instant` uses it: it encodes texts, and its denoiser passes the states on as they are."""

    def __init__(self, clip: Any) -> None:
        self._clip, self.denoiser = clip, nn.Identity()
        self.pipe = SimpleNamespace(tokenizer=next(iter(tokenizers_of(clip)), _NoWords()))
        self._known: dict[str, Tensor] = {}

    def encode(self, prompts: Sequence[str], *, literally: bool = False) -> Conditioning:
        """Return the states of prompts. `literally` changes nothing: ComfyUI has no zeros for the empty prompt."""
        if missing := [text for text in dict.fromkeys(prompts) if text not in self._known]:
            self._known |= dict(zip(missing, encode(self._clip, missing).float().cpu(), strict=True))
        return Conditioning.cat([Conditioning(self._known[text][None]) for text in prompts])


class _NoWords:
    """Stands for a tokenizer whose words cannot be listed."""

    def get_vocab(self) -> dict[str, int]:
        return {}


class _Reports:
    """Shows each phase of the work in ComfyUI's bar."""

    def __init__(self, inform: Inform) -> None:
        self._inform = inform

    def say(self, text: str) -> None:
        """Say nothing: a node has one line of text, which is its result's."""

    @contextmanager
    def progress(self, label: str) -> Iterator[Progress]:
        """Yield the function that moves ComfyUI's bar."""

        def move(step: int, total: int, info: Mapping[str, float] | None = None, text: str = "") -> None:
            self._inform(step, total, info or {})

        yield move
