"""Reads weights and states of texts from a base on this machine, for audits."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spm_hub.adapters.checkpoint_folder import FolderWeights
from spm_hub.adapters.formats.module_names import dotted
from spm_hub.adapters.increments import Increment
from spm_hub.errors import SpmHubError
from spm_hub.io.small_files import read_small
from spm_hub.models.architectures import fingerprint_by_names
from spm_hub.models.references import local_folder, parse_reference
from spm_hub.models.snapshots import LARGEST_INDEX


def local_base(model: str) -> LocalBase | None:
    """Return the files of a model on this machine; None where it has no denoiser."""
    try:
        folder = local_folder(parse_reference(model)) if model else None
    except SpmHubError:
        return None
    parts = () if folder is None else (folder / "unet", folder / "transformer")
    return next((LocalBase(part) for part in parts if part.is_dir()), None)


class LocalBase:
    """A base on this machine: its denoiser's shapes, norms and fingerprint, and its text encoder's states."""

    def __init__(self, denoiser: Path) -> None:
        self._folder = denoiser.parent
        self._weights = FolderWeights(denoiser)
        self.shapes = self._weights.shapes()
        self._norms: dict[str, float] = {}

    @cached_property
    def fingerprint(self) -> str:
        """The fingerprint of the denoiser, by its files."""
        return fingerprint_by_names(self.shapes)

    def fits(self, path: str, increment: Increment) -> bool:
        """Return whether there is a weight of this path, with as many elements as the increment's."""
        there, shape = self.shapes.get(f"{dotted(path)}.weight"), increment.weight_shape
        return there is not None and (shape is None or math.prod(shape) == math.prod(there))

    def weight(self, path: str) -> Tensor:
        """Read the weight of a module, as float32."""
        (weight,) = self._weights.read([f"{dotted(path)}.weight"]).values()
        return weight.float()

    def norm(self, path: str) -> float:
        """Return the norm of a module's weight, never 0."""
        if path not in self._norms:
            self._norms[path] = max(float(self.weight(path).norm()), 1e-30)
        return self._norms[path]

    def states(self, texts: Sequence[str]) -> Tensor | None:
        """Return the text encoder's states of some texts: (texts, tokens, d_text), float32.

        None unless the base has a single CLIP text encoder, as Stable Diffusion 1 and 2 have.
        """
        if self._clip is None:
            return None
        encoder, tokenizer = self._clip
        longest = encoder.config.max_position_embeddings
        tokens = tokenizer(
            list(texts), padding="max_length", max_length=longest, truncation=True, return_tensors="pt"
        ).input_ids
        with torch.inference_mode():
            states: Tensor = encoder(tokens).last_hidden_state
        return states

    @cached_property
    def _clip(self) -> tuple[Any, Any] | None:
        """The text encoder and its tokenizer."""
        folder, several = self._folder / "text_encoder", (self._folder / "text_encoder_2").exists()
        try:
            config = json.loads(read_small(folder / "config.json", LARGEST_INDEX, follow=True))
        except (OSError, ValueError):
            return None
        if several or not isinstance(config, dict) or config.get("architectures") != ["CLIPTextModel"]:
            return None
        from transformers import CLIPTextModel, CLIPTokenizer

        with suppress(OSError, ValueError, TypeError, KeyError, RuntimeError):  # a damaged base shows when it is loaded
            encoder = CLIPTextModel.from_pretrained(
                folder, dtype=torch.float32, local_files_only=True, use_safetensors=True
            ).eval()
            tokenizer = CLIPTokenizer.from_pretrained(self._folder / "tokenizer", local_files_only=True)
            return encoder, tokenizer
        return None
