"""A vision-language model as a judge: yes or no to the question whether a picture shows the subject."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image

from spm_hub.errors import ModelError, UsageError
from spm_hub.evaluation.metrics.hub_models import model_folder
from spm_hub.evaluation.metrics.metric import Judge, NamedMetric, Verdict
from spm_hub.evaluation.metrics.placement import placed

QUESTION = "Does this picture show {}? Answer with yes or no."

ANSWERS = {True: ("yes", "Yes", " yes", " Yes"), False: ("no", "No", " no", " No")}
"""Texts whose first tokens count as each answer."""


def _make(argument: str) -> Judge:
    if not argument:
        raise UsageError("vlm needs a model", mend="vlm:OWNER/NAME@COMMIT")
    folder, about = model_folder(argument, "vlm")

    def verdicts(pictures: Sequence[Image], subjects: Sequence[str]) -> list[Verdict]:
        # One picture at a time: rows of a batch are padded, which changes answers in the last bits.
        return [asked(folder, picture, subject) for picture, subject in zip(pictures, subjects, strict=True)]

    about = {**about, "question": QUESTION, "present": "yes is likelier than no as the first token"}
    return Judge(f"vlm:{about['model']}", verdicts, about)


VLM = NamedMetric("vlm", "vlm:MODEL", "a vision-language model's yes or no to the subject's name", _make)


@torch.no_grad()
def asked(folder: Path, picture: Image, subject: str) -> Verdict:
    """Return whether a model answers yes, and the share of yes in the probability of both answers."""
    model, processor, tokens = _model(folder)
    message = {
        "role": "user",
        "content": [{"type": "image"}, {"type": "text", "text": QUESTION.format(subject)}],
    }
    text = processor.apply_chat_template([message], add_generation_prompt=True)
    given = processor(images=picture.convert("RGB"), text=text, return_tensors="pt").to(model.device)
    shares = model(**given).logits[0, -1].float().cpu().softmax(-1)
    yes, no = (float(shares[tokens[answer]].sum()) for answer in (True, False))
    if not yes + no > 0:
        raise ModelError("the model gives neither yes nor no any probability", mend="another model: vlm:OWNER/NAME")
    return Verdict(yes > no, round(yes / (yes + no), 6))


@cache
def _model(folder: Path) -> tuple[Any, Any, dict[bool, list[int]]]:
    """Return the model, its processor, and the first tokens of each answer. Raises ModelError."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = placed(AutoModelForImageTextToText.from_pretrained(folder))
    processor = AutoProcessor.from_pretrained(folder)
    encode = processor.tokenizer.encode
    tokens = {
        answer: sorted({encode(text, add_special_tokens=False)[0] for text in texts})
        for answer, texts in ANSWERS.items()
    }
    if set(tokens[True]) & set(tokens[False]):
        raise ModelError("the model's tokenizer begins yes and no with the same token", mend="another model")
    return model, processor, tokens
