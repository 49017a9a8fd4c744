"""CLIP: the score of a picture and its subject, and the judge of CLIP's error rate."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL.Image import Image, Resampling
from torch import Tensor
from transformers import AutoTokenizer, CLIPModel

from spm_hub.errors import UsageError
from spm_hub.evaluation.metrics.hub_models import folder_hash, model_folder
from spm_hub.evaluation.metrics.metric import About, Judge, NamedMetric, PictureMetric, Verdict
from spm_hub.evaluation.metrics.placement import placed
from spm_hub.sketchbook.vision import FOLDER

WEIGHT = 2.5
"""The factor of the CLIP score (Hessel et al. 2021, arXiv 2104.08718), which SPM's tables have too, times 100."""

_MEAN, _DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class Clip:
    """A CLIP model; pictures and texts become rows of length 1."""

    def __init__(self, folder: Path) -> None:
        self._model: Any = placed(CLIPModel.from_pretrained(folder, dtype=torch.float32))
        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self._side = int(self._model.config.vision_config.image_size)
        settings = folder / "preprocessor_config.json"
        found = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
        self._mean, self._deviation = found.get("image_mean", _MEAN), found.get("image_std", _DEVIATION)

    @torch.no_grad()
    def pictures(self, pictures: Sequence[Image]) -> Tensor:
        """Return (n, d) of pictures of any size."""
        pixels = torch.stack([prepared(one, self._side, self._mean, self._deviation) for one in pictures])
        return _unit(self._model.get_image_features(pixel_values=pixels.to(self._model.device)))

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Return (n, d) of texts, each cut to the model's window."""
        window = self._model.config.text_config.max_position_embeddings
        given = self._tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=window, return_tensors="pt"
        )
        given = given.to(self._model.device)
        return _unit(self._model.get_text_features(input_ids=given.input_ids, attention_mask=given.attention_mask))


def prepared(picture: Image, side: int, mean: Sequence[float], deviation: Sequence[float]) -> Tensor:
    """Return a picture as CLIP's authors prepare it, (3, side, side).

    The shorter side is resized, bicubic by Pillow, and the centre cut out. transformers' own preparation needs
    torchvision, or warns that it has none.
    """
    rgb = picture.convert("RGB")
    factor = side / min(rgb.size)
    size = tuple(max(side, int(length * factor)) for length in rgb.size)
    rgb = rgb.resize((size[0], size[1]), Resampling.BICUBIC)
    left, top = (round((length - side) / 2) for length in rgb.size)
    pixels = np.asarray(rgb.crop((left, top, left + side, top + side)), dtype=np.float32) / 255
    values = (pixels - np.array(mean, dtype=np.float32)) / np.array(deviation, dtype=np.float32)
    return torch.from_numpy(values).permute(2, 0, 1)


def _unit(features: Any) -> Tensor:
    values: Tensor = features if isinstance(features, Tensor) else features.pooler_output
    return F.normalize(values, dim=-1).cpu()


@cache
def _clip(folder: Path) -> Clip:
    return Clip(folder)


def _make_score(argument: str) -> PictureMetric:
    folder, about = _model(argument, "clip-score")

    def measure(pictures: Sequence[Image], subjects: Sequence[str]) -> list[float]:
        clip = _clip(folder)
        cosines = (clip.pictures(pictures) * clip.texts(subjects)).sum(1)
        found: list[float] = (100 * WEIGHT * cosines.clamp(min=0)).tolist()
        return found

    about = {**about, "formula": "100 x 2.5 x max(cosine, 0)", "text": "the subject, or the prompt where there is none"}
    return PictureMetric(f"clip-score:{about['model']}", measure, about, better="higher")


def _make_judge(argument: str) -> Judge:
    folder, about = _model(argument, "clip")

    def verdicts(pictures: Sequence[Image], subjects: Sequence[str]) -> list[Verdict]:
        clip = _clip(folder)
        shown = clip.pictures(pictures)
        cosines, empty = (shown * clip.texts(subjects)).sum(1).tolist(), (shown @ clip.texts([""]).T)[:, 0].tolist()
        return [Verdict(cosine > nothing, round(cosine, 6)) for cosine, nothing in zip(cosines, empty, strict=True)]

    return Judge(
        f"clip:{about['model']}", verdicts, {**about, "present": "nearer to the subject than to the empty text"}
    )


def clip_features(argument: str, metric: str) -> tuple[Callable[[Sequence[Image]], Tensor], About]:
    """Return a CLIP model's features of pictures, rows of length 1, and the facts about it."""
    folder, about = _model(argument, metric)
    return lambda pictures: _clip(folder).pictures(pictures), {"features": f"clip:{about['model']}", **about}


def _model(argument: str, name: str) -> tuple[Path, About]:
    """Return the folder of a CLIP model and the facts about it.

    "sketchbook" is the one that comes with the package.
    """
    if not argument:
        raise UsageError(f"{name} needs a model", mend=f"{name}:openai/clip-vit-base-patch32")
    if argument == "sketchbook":
        return FOLDER, {"model": argument, "weights": folder_hash(FOLDER)}
    return model_folder(argument, name)


CLIP_SCORE = NamedMetric("clip-score", "clip-score:MODEL", "CLIP score of each picture and its subject", _make_score)
CLIP_JUDGE = NamedMetric(
    "clip",
    "clip:MODEL",
    "CLIP, nearer to the subject than to nothing: 1 minus its share is CLIP's error rate",
    _make_judge,
)
