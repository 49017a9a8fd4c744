"""The probe: a small classifier that names the subject and the style of a 64x64 picture.

It is trained on drawings of the world and tested on held-out ones, never on samples of a model: it must not learn to
overlook the mistakes of the models that it judges.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import ResNetConfig, ResNetForImageClassification

from spm_hub.sketchbook.figures import SUBJECTS
from spm_hub.sketchbook.world import STYLE_NAMES, Drawing

SUBJECT_CLASSES: tuple[str, ...] = (*SUBJECTS, "nothing")
STYLE_CLASSES: tuple[str, ...] = (*STYLE_NAMES, "no style")
BATCH_SIZE = 96
"""Number of drawings in a training step."""


@dataclass(frozen=True)
class Reading:
    """The subject and style that the probe names for one picture."""

    subject: str
    style: str


def to_batch(pictures: Sequence[Image.Image]) -> torch.Tensor:
    """Convert pictures of any size to a tensor (n, 3, 64, 64) in [-1, 1]."""
    arrays = [np.asarray(p.convert("RGB").resize((64, 64), Image.Resampling.BOX), dtype=np.float32) for p in pictures]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2) / 127.5 - 1.0


def labels(drawing: Drawing) -> tuple[int, int]:
    """Return the class indices (subject, style) of a drawing."""
    return SUBJECT_CLASSES.index(drawing.subject or "nothing"), STYLE_CLASSES.index(drawing.style or "no style")


class Probe:
    """A classifier of subjects and styles; `features` are its pooled activations, for Fréchet distances."""

    def __init__(self, model: ResNetForImageClassification) -> None:
        self.model = model.eval()

    @classmethod
    def load(cls, folder: Path) -> Probe:
        model = ResNetForImageClassification.from_pretrained(folder, use_safetensors=True)
        return cls(model.float())

    @torch.no_grad()
    def logits(self, pictures: Sequence[Image.Image]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the logits of subjects (n, subjects + 1) and of styles (n, styles + 1)."""
        scores = torch.cat([self.model(to_batch(pictures[i : i + 128])).logits for i in range(0, len(pictures), 128)])
        return scores[:, : len(SUBJECT_CLASSES)], scores[:, len(SUBJECT_CLASSES) :]

    @torch.no_grad()
    def features(self, pictures: Sequence[Image.Image]) -> torch.Tensor:
        """Return pooled features (n, channels)."""
        return torch.cat([
            self.model.resnet(to_batch(pictures[i : i + 128])).pooler_output.flatten(1)
            for i in range(0, len(pictures), 128)
        ])  # fmt: skip

    def read(self, pictures: Sequence[Image.Image]) -> list[Reading]:
        subjects, styles = (logits.argmax(1).tolist() for logits in self.logits(pictures))
        return [
            Reading(SUBJECT_CLASSES[subject], STYLE_CLASSES[style])
            for subject, style in zip(subjects, styles, strict=True)
        ]


def _augment(batch: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Augment a batch (n, 3, 64, 64) with shifts, blur, noise, stronger contrast and colour.

    The probe must not depend on pixel-sharp edges, which no autoencoder reproduces, nor on exact tones, which guidance
    exaggerates.
    """
    shift = torch.randint(-3, 4, (2,), generator=generator)
    batch = torch.roll(batch, (int(shift[0]), int(shift[1])), dims=(2, 3))
    if torch.rand((), generator=generator) < 0.6:
        size = int(torch.randint(18, 56, (), generator=generator))
        batch = F.interpolate(F.interpolate(batch, size=size, mode="area"), size=64, mode="bilinear")
    chances = torch.rand((2, len(batch), 1, 1, 1), generator=generator)
    batch = batch.mean(1, keepdim=True).lerp(batch, 1 + 0.6 * chances[0])
    batch = batch.mean((1, 2, 3), keepdim=True).lerp(batch, 0.9 + 0.7 * chances[1]).clamp(-1, 1)
    noise = torch.randn(batch.shape, generator=generator) * 0.08 * torch.rand((), generator=generator)
    gain = 1 + 0.1 * torch.randn((len(batch), 3, 1, 1), generator=generator)
    return batch * gain + noise


def train_probe(
    pictures: torch.Tensor,
    targets: torch.Tensor,
    *,
    steps: int,
    generator: torch.Generator,
    report: Callable[[int, float], None],
) -> Probe:
    """Train a probe on `pictures` (n, 3, 64, 64) uint8 and `targets` (n, 2) class indices."""
    names = [f"subject:{name}" for name in SUBJECT_CLASSES] + [f"style:{name}" for name in STYLE_CLASSES]
    # transformers initialises weights from the global random state
    torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
    model = ResNetForImageClassification(
        ResNetConfig(
            embedding_size=32, hidden_sizes=[32, 64, 128], depths=[1, 2, 1], layer_type="basic",
            downsample_in_first_stage=False, num_labels=len(names), id2label=dict(enumerate(names)),
            label2id={name: index for index, name in enumerate(names)},
        )
    )  # fmt: skip
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=3e-3, total_steps=steps)
    model.train()
    for step in range(steps):
        rows = torch.randint(len(pictures), (BATCH_SIZE,), generator=generator)
        scores = model(_augment(pictures[rows].float() / 127.5 - 1.0, generator)).logits
        loss = F.cross_entropy(scores[:, : len(SUBJECT_CLASSES)], targets[rows, 0])
        loss = loss + F.cross_entropy(scores[:, len(SUBJECT_CLASSES) :], targets[rows, 1])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        report(step + 1, float(loss.detach()))
    return Probe(model)
