"""The sketchbook's CLIP: it names what unseen drawings show, and its text half is the base's own."""

import pytest
import torch
from transformers import CLIPModel, CLIPTextModel

from spm_hub.errors import UsageError
from spm_hub.evaluation.metrics.named import judge_named, metric_named
from spm_hub.models.loading import load_pipeline
from spm_hub.sketchbook.vision import FOLDER
from spm_hub.sketchbook.world import drawings

pytestmark = pytest.mark.slow
NAMES = ("a dog", "a cat", "a church", "a car", "a tree", "snoopy", "mickey", "an apple", "a parachute", "a golf ball")


@pytest.fixture(scope="module")
def shown():
    """Unseen drawings of these subjects, with the place of each one's name."""
    plain = [name.removeprefix("an ").removeprefix("a ") for name in NAMES]
    rows = drawings(400, torch.Generator().manual_seed(991), "ink")
    return [(plain.index(drawing.subject), picture) for drawing, picture, _ in rows if drawing.subject in plain]


def test_it_names_what_unseen_drawings_show(shown):
    score = metric_named("clip-score:sketchbook")
    pictures = [picture for _, picture in shown]
    scores = torch.tensor([score.measure(pictures, [name] * len(pictures)) for name in NAMES])
    right = (scores.argmax(0) == torch.tensor([index for index, _ in shown])).float().mean()
    assert len(pictures) >= 60
    assert float(right) >= 0.9


def test_the_judge_tells_a_subject_from_another(shown):
    judge = judge_named("clip:sketchbook")
    pictures = [picture for _, picture in shown]
    own = [verdict.present for verdict in judge.measure(pictures, [NAMES[index] for index, _ in shown])]
    wrong = [verdict.present for verdict in judge.measure(pictures, [NAMES[index - 1] for index, _ in shown])]
    assert sum(own) / len(own) >= 0.9
    assert sum(own) > 2 * sum(wrong)


def test_the_distance_of_features_tells_other_pictures_from_more_of_the_same(shown):
    frechet = metric_named("frechet:clip:sketchbook")
    pictures = [picture for _, picture in shown]
    one, same = (frechet.features(pictures[start::2]) for start in (0, 1))
    negatives = frechet.features([picture.point(lambda value: 255 - value) for picture in pictures[1::2]])
    assert one.shape == (len(pictures[::2]), 128)
    assert frechet.distance(one, negatives) > 2 * frechet.distance(one, same)


def test_its_text_half_is_the_bases_own():
    clip = CLIPModel.from_pretrained(FOLDER)
    base: CLIPTextModel = load_pipeline("sketchbook", device="cpu").text_encoder
    own = {name: value.float() for name, value in base.state_dict().items()}
    assert all(torch.equal(value.float(), own[name]) for name, value in clip.text_model.state_dict().items())


def test_a_score_without_a_model_is_refused_in_words():
    with pytest.raises(UsageError, match="clip-score needs a model"):
        metric_named("clip-score:")
    with pytest.raises(UsageError, match="frechet needs a model"):
        metric_named("frechet:clip")
