"""A vision-language model's yes or no, by a tiny model of random weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from spm_hub.errors import UsageError
from spm_hub.evaluation.metrics.metric import Judge
from spm_hub.evaluation.metrics.named import judge_named

WORDS = ["<pad>", "<unk>", "<image>", "yes", "Yes", "no", "No", "Does", "this", "picture", "show", "snoopy", "a", "dog",
         "Answer", "with", "or", "?", "."]  # fmt: skip
CHAT = "{% for m in messages %}{% for part in m.content %}{{ '<image>' if part.type == 'image' else part.text }} "
CHAT += "{% endfor %}{% endfor %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny-vlm"
    raw = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<unk>", pad_token="<pad>", additional_special_tokens=["<image>"]
    )
    vision = CLIPVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
                              image_size=16, patch_size=8)  # fmt: skip
    text = LlamaConfig(vocab_size=len(WORDS), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                       num_attention_heads=2, num_key_value_heads=2)  # fmt: skip
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_id=2))
    with torch.no_grad():  # so that answers depend on the picture
        for weight in model.parameters():
            weight.normal_(std=0.5)
    model.save_pretrained(path)
    processor = LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}), tokenizer,
        patch_size=8, vision_feature_select_strategy="default", chat_template=CHAT, num_additional_image_tokens=1,
    )  # fmt: skip
    processor.save_pretrained(path)
    return path


def pictures(count: int) -> list[Image.Image]:
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 256, (24, 24, 3), dtype=np.uint8)) for _ in range(count)]


def test_an_answer_is_the_likelier_of_yes_and_no_as_the_next_token(folder: Path) -> None:
    judge = judge_named(f"vlm:{folder}")
    assert isinstance(judge, Judge)
    assert judge.key == "vlm:tiny-vlm"
    shown = pictures(6)
    found = judge.measure(shown, ["snoopy"] * 6)
    assert len({one.score for one in found}) == 6, "the pictures decide"
    model = LlavaForConditionalGeneration.from_pretrained(folder)
    processor = LlavaProcessor.from_pretrained(folder)
    text = "<image> Does this picture show snoopy? Answer with yes or no. "
    for picture, one in zip(shown, found, strict=True):
        given = processor(images=picture, text=text, return_tensors="pt")
        made = model.generate(
            **given, max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        shares = made.logits[0][0].double().softmax(-1)
        yes, no = shares[3] + shares[4], shares[5] + shares[6]
        assert one.score == pytest.approx(float(yes / (yes + no)), abs=1e-5)
        assert one.present == bool(yes > no)
    with pytest.raises(UsageError, match="vlm needs a model"):
        judge_named("vlm:")
