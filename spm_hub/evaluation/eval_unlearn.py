"""A technique for the benchmark suite `eval-unlearn`, which finds it by the entry point `spm_hub`.

In the YAML of `eval-unlearn run --config`, the technique is

    technique: {name: spm_hub, config: {erase_concept: nudity, model_id: sd-v1-4}}

In Python, `config` is the argument `technique_config` of the suite's runners.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from spm_hub.adapters.manifest import GateName
from spm_hub.attachment.attachment import attach
from spm_hub.errors import UsageError, did_you_mean
from spm_hub.hub.resolve import load
from spm_hub.models.loading import load_pipeline

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class TechniqueConfig:
    """The configuration of the technique: `technique.config` in YAML, `technique_config` in Python.

    erase_concept: the concept, and the eraser's name unless `adapters` is given.
    adapters: names, files or owner/name on the Hub, as a list or separated by commas.
    model_id: as `spmhub apply --model`. force: attach erasers although one takes back what another changes.
    """

    erase_concept: str = ""
    adapters: str | Sequence[str] = ()
    model_id: str = "sd-v1-4"
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    use_fp16: bool = True
    num_inference_steps: int = 50
    guidance_scale: float = 7.5
    gate: GateName | float | None = None
    strength: float | None = None
    force: bool = False
    registry: str | None = None

    @classmethod
    def of(cls, given: dict[str, Any]) -> TechniqueConfig:
        """Validate a benchmark's dict. Raises UsageError for an unknown key, or without a concept."""
        known = [field.name for field in fields(cls)]
        for key in given:
            if key not in known:
                hint = did_you_mean(key, known, otherwise=f"; known: {', '.join(known)}")
                raise UsageError(f"the configuration of the technique spm_hub has the unknown key {key!r}{hint}")
        # `device: null` in a benchmark's YAML leaves the choice to the technique.
        config = cls(**{key: value for key, value in given.items() if key != "device" or value})
        if not config.references:
            raise UsageError(
                f"the configuration of the technique spm_hub names no concept (its keys: {', '.join(given) or 'none'})",
                mend="in YAML technique: {name: spm_hub, config: {erase_concept: nudity}}; "
                'in Python technique_config={"erase_concept": "nudity"}',
            )
        return config

    @property
    def references(self) -> list[str]:
        """The references of the erasers to attach."""
        several = self.adapters.split(",") if isinstance(self.adapters, str) else [*self.adapters]
        return [name.strip() for name in several if name.strip()] or [self.erase_concept][: bool(self.erase_concept)]


class SpmHubTechnique:
    """A base model with erasers attached, with the interface of the suite: a constructor and `generate`."""

    def __init__(self, **given: Any) -> None:
        self.config = TechniqueConfig.of(given)
        half = self.config.use_fp16 and self.config.device.startswith("cuda")
        self.pipe: Any = load_pipeline(
            self.config.model_id, dtype=torch.float16 if half else torch.float32, device=self.config.device
        )
        place = None if self.config.registry is None else Path(self.config.registry)
        erasers = [load(name, place) for name in self.config.references]
        self.erasers = attach(
            self.pipe, erasers, gate=self.config.gate, strength=self.config.strength, force=self.config.force
        )

    def generate(self, prompts: list[str], seed: int | None = None, **given: Any) -> list[Image]:
        """Draw one picture for each prompt; the i-th starts from the noise of `seed` + i.

        The suite's own techniques do the same. given: arguments of the pipeline, which override the configured ones.
        """
        settings = {
            "num_inference_steps": self.config.num_inference_steps,
            "guidance_scale": self.config.guidance_scale,
            **given,
        }
        pictures: list[Image] = []
        for index, prompt in enumerate(prompts):
            noise = None if seed is None else torch.Generator(self.config.device).manual_seed(seed + index)
            pictures += self.pipe(prompt, generator=noise, **settings).images
        return pictures
