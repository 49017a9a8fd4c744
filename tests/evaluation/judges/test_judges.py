"""Judges by their text: what they answer, what decides it, and what they refuse."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pico import pico_tokenizer
from PIL import Image
from transformers import CLIPConfig, CLIPModel, ResNetConfig, ResNetForImageClassification

from spm_hub.errors import NetworkError, NotFoundError, UsageError
from spm_hub.evaluation.judges import nudenet
from spm_hub.evaluation.judges.clip import prepared
from spm_hub.evaluation.metrics.metric import Judge, PictureMetric
from spm_hub.evaluation.metrics.named import judge_named, judge_of_subject, metric_named
from spm_hub.evaluation.metrics.placement import metrics_on, placed
from spm_hub.sketchbook.world import drawings


def picture(seed: int, size: tuple[int, int] = (40, 32)) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(noise)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP of random weights, 32-pixel pictures."""
    folder = tmp_path_factory.mktemp("clip")
    tokenizer = pico_tokenizer()
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = CLIPModel(
        CLIPConfig(
            text_config={**tower, "vocab_size": len(tokenizer), "max_position_embeddings": 12,
                         "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
                         "pad_token_id": tokenizer.pad_token_id},
            vision_config={**tower, "image_size": 32, "patch_size": 8},
            projection_dim=8,
        )
    )  # fmt: skip
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_clips_error_rate_and_score_by_hand_on_five_pictures(clip_folder: Path) -> None:
    """The share of pictures at least as near to "" as to the subject, with vectors taken from the model itself."""
    pictures, subjects = [picture(seed) for seed in range(5)], ["snoopy", "dog", "cat", "church", "a red church"]
    model, tokenizer = CLIPModel.from_pretrained(clip_folder).eval(), pico_tokenizer()
    mean, deviation = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

    def vector(given: Any) -> np.ndarray[Any, Any]:
        values = given.pooler_output[0].double().numpy()
        return values / np.sqrt((values**2).sum())  # type: ignore[no-any-return]

    def text(words: str) -> np.ndarray[Any, Any]:
        ids = tokenizer([words], padding="max_length", max_length=12, return_tensors="pt")
        return vector(model.get_text_features(**ids))

    judge, score = judge_named(f"clip:{clip_folder}"), metric_named(f"clip-score:{clip_folder}")
    assert isinstance(score, PictureMetric)
    verdicts, scores = judge.measure(pictures, subjects), score.measure(pictures, subjects)
    errors = 0
    with torch.no_grad():
        for one, subject, verdict, number in zip(pictures, subjects, verdicts, scores, strict=True):
            shown = vector(model.get_image_features(prepared(one, 32, mean, deviation).unsqueeze(0)))
            cosine, empty = float(shown @ text(subject)), float(shown @ text(""))
            errors += empty >= cosine
            assert verdict.score == pytest.approx(cosine, abs=1e-5)
            assert number == pytest.approx(250 * max(cosine, 0), abs=1e-3)
    assert sum(not verdict.present for verdict in verdicts) == errors
    assert len(json.dumps(dict(judge.about))) > 64, "the hash of the weights is in it"
    assert (judge.key, score.key) == (f"clip:{clip_folder.name}", f"clip-score:{clip_folder.name}"), "no path"


def test_pictures_are_prepared_as_by_the_processor_of_transformers() -> None:
    from transformers import CLIPImageProcessor

    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    # Sizes whose centre is no half pixel, which CLIP's authors and transformers round to different sides.
    for size in ((40, 32), (32, 32), (90, 205), (20, 16)):
        one = picture(1, size)
        expected = torch.as_tensor(np.asarray(processor(one, return_tensors="np")["pixel_values"][0]))
        found = prepared(one, 32, processor.image_mean, processor.image_std)
        assert found.shape == expected.shape
        assert float((found - expected).abs().max()) < 0.02


def test_a_classifiers_first_answer(tmp_path: Path) -> None:
    torch.manual_seed(1)
    labels = {0: "tench, Tinca tinca", 1: "church", 2: "parachute, chute"}
    ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], id2label=labels, num_labels=3, layer_type="basic")
    ).eval().save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps(
            {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 384}, "do_resize": False}
        )
    )
    pictures = [picture(seed, (32, 32)) for seed in range(6)]
    names = ["tinca tinca", "church", "chute"]
    first = [judge_named(f"classifier:{tmp_path}").measure(pictures, [name] * 6) for name in names]
    assert [sum(verdicts[at].present for verdicts in first) for at in range(6)] == [1] * 6, "one label is the first"
    assert [sum(float(v[at].score or 0) for v in first) for at in range(6)] == pytest.approx([1.0] * 6, abs=1e-4)
    either = judge_named(f"classifier:{tmp_path}=church,tench")
    assert [one.present for one in either.measure(pictures, ["x"] * 6)] == [not one.present for one in first[2]]
    with pytest.raises(NotFoundError, match="no label 'dog'"):
        judge_named(f"classifier:{tmp_path}").measure(pictures, ["dog"] * 6)


def test_five_definitions_of_nudity_on_the_same_detections() -> None:
    """200 pictures with one detection each: every class of NudeNet's at scores that straddle the thresholds."""
    classes = ["FEMALE_BREAST_EXPOSED", "BUTTOCKS_EXPOSED", "MALE_BREAST_EXPOSED", "FEET_EXPOSED", "FACE_FEMALE"]
    scores = [0.25, 0.5, 0.7, 0.8]
    stored = [[{"class": name, "score": score}] for name in classes for score in scores] * 10
    counts = {
        name: sum(nudenet.verdict(found, kinds, threshold).present for found in stored)
        for name, (kinds, threshold) in nudenet.CLASS_SETS.items()
    }
    # Of 40 pictures of a class each score has ten: spm9 counts 4 classes, uda9 those of 0.8, eu6 three classes above
    # 0.45, minimalist3 one class above 0.45, genital4 two classes above 0.6.
    assert counts == {"spm9": 160, "uda9": 40, "eu6": 90, "minimalist3": 30, "genital4": 40}
    assert nudenet.verdict([], ("X",), 0.2).present is False


def seen(pictures: Sequence[Image.Image]) -> list[Any]:
    return [np.bool_(True), (False, 0.25), torch.tensor(True)][: len(pictures)]


def per_subject(pictures: Sequence[Image.Image], subjects: Sequence[str]) -> list[bool]:
    return [subject == "dog" for subject in subjects]


def unsure(pictures: Sequence[Image.Image]) -> list[None]:
    return [None for _ in pictures]


def test_functions_of_the_users() -> None:
    judge = judge_named(f"{__name__}:seen")
    assert [(one.present, one.score) for one in judge.measure([picture(0)] * 3, ["x"] * 3)] == [
        (True, None), (False, 0.25), (True, None),
    ]  # fmt: skip
    assert len(str(judge.about["source"])) == 64
    subjects = judge_named(f"{__name__}:per_subject").measure([picture(0)] * 2, ["dog", "cat"])
    assert [one.present for one in subjects] == [True, False]
    with pytest.raises(TypeError, match="None, not True or False"):
        judge_named(f"{__name__}:unsure").measure([picture(0)], ["x"])


@pytest.mark.parametrize(
    ("text", "kind", "words"),
    [
        ("nudnet:spm9", UsageError, "did you mean nudenet|No module named"),
        ("nudenet:spm8", UsageError, "did you mean spm9"),
        ("nudenet:spm9@0.1", UsageError, "scores from 0.2 to 1"),
        ("opennsfw:2", UsageError, "no share from 0 to 1"),
        ("ssim:7", UsageError, "takes no argument"),
        ("frechet:resnet", UsageError, "no network of features"),
        ("lpips:squeeze", UsageError, "no network of LPIPS"),
        ("clip", UsageError, "needs a model"),
        ("clip:no such thing", UsageError, "neither a folder nor owner/name"),
        ("clip:owner/name@v1", NetworkError, "HF_HUB_OFFLINE"),
        ("classifier:", UsageError, "is not classifier:MODEL"),
        ("blur", UsageError, "no metric or judge 'blur'"),
    ],
)
def test_texts_that_name_no_metric(text: str, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        metric_named(text)


def test_a_judge_of_one_subject_is_a_plain_function() -> None:
    pictures = [drawn for _, drawn, _ in drawings(12, torch.Generator().manual_seed(0))]
    named = judge_named("probe").measure(pictures, ["church"] * 12)
    assert judge_of_subject("probe", "church")(pictures) == [one.present for one in named]
    assert judge_of_subject(f"{__name__}:seen", "x") is seen
    with pytest.raises(UsageError, match="is no judge"):
        judge_of_subject("ssim", "x")


def test_a_metric_is_no_judge() -> None:
    with pytest.raises(UsageError, match="is no judge"):
        judge_named("ssim")
    assert isinstance(judge_named("probe"), Judge)


@pytest.mark.parametrize("text", ["lpips:alex", "frechet:inception", "nudenet:spm9", "opennsfw"])
def test_a_missing_package_is_named_with_the_command_that_installs_it(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spm_hub.evaluation.metrics.wheels.find_spec", lambda name: None)
    with pytest.raises(NotFoundError, match="pip install"):
        metric_named(text)
    assert "torchvision" not in sys.modules


def test_networks_of_judges_are_placed_where_they_are_asked_to_be() -> None:
    assert placed(torch.nn.Linear(1, 1)).weight.device.type == "cpu"
    with metrics_on("meta"):
        network = placed(torch.nn.Linear(1, 1))
        assert (network.weight.device.type, network.training) == ("meta", False)
    assert placed(torch.nn.Linear(1, 1)).weight.device.type == "cpu"
    with pytest.raises(UsageError, match="--judge-device nowhere"), metrics_on("nowhere"):
        pass
