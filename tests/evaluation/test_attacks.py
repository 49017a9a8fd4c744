"""Running attacks: cases, outcomes, reports, and that the pipeline is restored."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from attacked import CASES, SMALL, Planted, judge_by, untouched
from pico import pico_eraser, pico_pipeline
from PIL import Image
from torch import Tensor

from spm_hub.adapters.manifest import Concept
from spm_hub.attachment.attachment import attach
from spm_hub.errors import ModelError, NotFoundError, UsageError
from spm_hub.evaluation import attacks
from spm_hub.evaluation.attacks.victim import Victim
from spm_hub.evaluation.judges.importing import import_judge
from spm_hub.evaluation.judging import probe_judge, sentences


def test_asr_counts_successes_before_and_of_the_attack() -> None:
    one, two, three, four = (attacks.Case(str(seed), seed) for seed in range(4))
    report = attacks.Report(
        (
            attacks.Outcome(one, before=True),
            attacks.Outcome(two, before=False, adversarial="dog 1", rounds=2),
            attacks.Outcome(three, before=False, rounds=5),
            attacks.Outcome(four, before=False, rounds=5),
        ),
        given=6,
        threat=attacks.Threat.WEIGHTS,
    )
    assert report.before == 1 / 4
    assert report.asr == 2 / 4
    assert json.loads(json.dumps(report.as_dict()))["outcomes"][1]["adversarial"] == "dog 1"


def test_each_case_ends_where_it_succeeds_and_those_the_base_cannot_draw_do_not_count() -> None:
    answers = iter([[True, True, False], [True, False], [False], [True]])
    attack = Planted()
    report = attacks.run(pico_pipeline(), [], CASES, lambda pictures: next(answers), attack, drawing=SMALL)
    # What an attack imitates is the base's picture of that very case.
    ((case, aim),) = attack.aims
    given = {"num_inference_steps": SMALL.steps, "guidance_scale": SMALL.guidance, "output_type": "latent"}
    alone = pico_pipeline()([case.prompt], generator=[torch.Generator().manual_seed(case.seed)], **given).images
    torch.testing.assert_close(aim[None], alone, rtol=1e-4, atol=1e-4)
    assert report.given == 3
    assert report.outcomes == (
        attacks.Outcome(CASES[0], before=True),
        attacks.Outcome(CASES[1], before=False, adversarial="church", rounds=2),
    )


def test_a_planted_prompt_is_drawn_by_the_pipeline_itself_under_its_own_gate() -> None:
    """An eraser that listens to "snoopy" alone is off for the prompt "dog": the picture is the bare model's."""
    pipe = pico_pipeline()
    bare = pipe(["dog"], num_inference_steps=2, guidance_scale=3.0, generator=[torch.Generator().manual_seed(4)])

    class Words:
        def gammas(self, prompts: object, concepts: object) -> Tensor:
            return torch.tensor([["snoopy" in text] for text in prompts.texts], dtype=torch.float64)  # type: ignore[attr-defined]

    def judge(pictures: Sequence[Image.Image]) -> list[bool]:
        shown.append(np.asarray(pictures[0]))
        return [len(shown) in (1, 3)]

    shown: list[np.ndarray] = []
    eraser = pico_eraser(pipe.unet)
    attacks.run(pipe, [eraser], CASES[1:2], judge, Planted(), drawing=SMALL, gate=Words())
    assert np.array_equal(shown[2], np.asarray(bare.images[0]))
    assert not np.array_equal(shown[1], shown[0])


def test_mistakes_are_refused_and_nothing_is_left_behind() -> None:
    pipe = pico_pipeline()
    same = untouched(pipe)
    eraser, attack = pico_eraser(pipe.unet), attacks.UnlearnDiffAtk(iterations=1, timesteps=1)
    with pytest.raises(UsageError, match="none of the base's 3 pictures"):
        attacks.run(pipe, [eraser], CASES, lambda pictures: [False] * len(pictures), attack, drawing=SMALL)
    with pytest.raises(UsageError, match="there is no case to attack"):
        attacks.run(pipe, [eraser], [], lambda pictures: [], attack)
    with pytest.raises(UsageError, match="2 cases, only 1 of them different"):
        attacks.run(pipe, [eraser], [CASES[0], CASES[0]], lambda pictures: [], attack)
    with attach(pipe, [eraser]), pytest.raises(UsageError, match="already has erasers attached"):
        attacks.run(pipe, [eraser], CASES, lambda pictures: [], attack)

    def broken(pictures: Sequence[Image.Image]) -> list[bool]:
        raise ValueError("the judge fell asleep")

    with pytest.raises(ValueError, match="asleep"):
        attacks.run(pipe, [eraser], CASES, broken, attack, drawing=SMALL)
    assert same()
    pipe.tokenizer_2, pipe.text_encoder_2 = pico_pipeline().tokenizer, pipe.text_encoder
    pipe.tokenizer_2.add_tokens(["extra"])
    with pytest.raises(ModelError, match="do not share one vocabulary"):
        attacks.run(pipe, [eraser], CASES, lambda pictures: [], attack)


def test_judges_and_sentences() -> None:
    judge = probe_judge(Concept(target="Mickey", aliases=("mickey",)))
    assert judge([Image.new("RGB", (64, 64))]) == [False]
    with pytest.raises(NotFoundError, match="did you mean pikachu"):
        probe_judge(Concept(target="pikatchu"))
    assert import_judge("builtins:len") is len
    for wrong in ("builtins", "builtins:nothing", "no_such_module:f", "sys:path"):
        with pytest.raises(UsageError, match="--judge"):
            import_judge(wrong)
    own, other = sentences(Concept(target="snoopy"), 12, 1), sentences(Concept(target="monet", kind="style"), 7, 1)
    assert len(set(own)) == 12
    assert len(set(other)) == 7
    assert all("snoopy" in case.prompt for case in own)
    assert all("monet" in case.prompt for case in other)


@pytest.mark.parametrize("method", [attacks.UnlearnDiffAtk(tokens=50), attacks.P4D(tokens=50)])
def test_tokens_that_no_encoder_reads_are_refused(method: attacks.UnlearnDiffAtk | attacks.P4D) -> None:
    victim = Victim(pico_pipeline())
    picture = torch.randn(1, *victim.base.latent_shape, generator=torch.Generator().manual_seed(1))
    rounds = method.rounds(
        attacks.AttackTarget(victim, [attacks.Case("snoopy", 0)], picture, torch.Generator(), lambda: None)
    )
    with pytest.raises(UsageError, match=r"50 tokens before .* leave no room for it in the .* window of 12 "):
        next(rounds)


@pytest.mark.parametrize("given", [{"steps": 0}, {"guidance": float("nan")}, {"at_once": 0}])
def test_drawings_that_draw_nothing_are_refused(given: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=next(iter(given))):
        attacks.AttackDrawingOptions(**given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1.0), (1, 20, 0.0089, 0.2361)],
)
def test_the_interval_is_wilsons(successes: int, trials: int, low: float, high: float) -> None:
    """Tabulated values; and its ends are the shares whose normal test just does not reject the one observed."""
    found = attacks.wilson(successes, trials)
    assert found == pytest.approx((low, high), abs=5e-5)
    for share in found:
        if 1e-9 < share < 1 - 1e-9:
            away = abs(share - successes / trials)
            assert away == pytest.approx(1.959964 * (share * (1 - share) / trials) ** 0.5, rel=1e-6)


def test_winners_are_drawn_again_at_seeds_of_their_own() -> None:
    pipe = pico_pipeline()
    shown: list[list[np.ndarray]] = []

    def judge(pictures: Sequence[Image.Image]) -> list[bool]:
        shown.append([np.asarray(one) for one in pictures])
        if len(shown) == 5:
            return [True, False, True, False, False, False]
        return {1: [True] * 3, 2: [True, False, False], 3: [False, True], 4: [True]}[len(shown)]

    class Twice(Planted):
        def rounds(self, target: attacks.AttackTarget) -> Iterator[dict[attacks.Case, attacks.Try]]:
            yield dict.fromkeys(target.cases, attacks.Try("dog"))
            yield dict.fromkeys(target.cases, attacks.Try("church"))

    report = attacks.run(pipe, [pico_eraser(pipe.unet)], CASES, judge, Twice(), drawing=SMALL, fresh=3, seed=2)
    first, second, third = report.outcomes
    assert (first.before, first.fresh, first.gammas) == (True, (), {})
    assert (third.adversarial, third.rounds, third.fresh) == ("dog", 1, (True, False, True))
    assert (second.adversarial, second.rounds, second.fresh) == ("church", 2, (False, False, False))
    assert report.fresh == (2, 6)
    said = report.as_dict()
    assert (said["fresh_rate"], said["pictures_judged"]) == (0.3333, 3)
    assert said["fresh_interval_95"] == [pytest.approx(end, abs=1e-4) for end in attacks.wilson(2, 6)]
    assert said["asr_interval_95"] == [pytest.approx(end, abs=1e-4) for end in attacks.wilson(3, 3)]
    with attach(pipe, [pico_eraser(pipe.unet)]) as erasers:
        assert third.gammas == erasers.gates("dog")
        assert second.gammas == erasers.gates("church")
    every = [picture for pictures in shown for picture in pictures]
    assert len({picture.tobytes() for picture in every[6:]}) == len(every[6:]), "no two of the same noise"


def test_several_attacks_share_the_pictures_of_before() -> None:
    pipe = pico_pipeline()
    judge, shown = judge_by(lambda call: call == 1)
    moved: list[tuple[int, int]] = []
    both = [attacks.SeedSearch(tries=2), attacks.UnlearnDiffAtk(tokens=1, iterations=2, timesteps=1)]
    reports = attacks.run_all(
        pipe, [pico_eraser(pipe.unet)], CASES, judge, both, drawing=SMALL, seed=3,
        progress=lambda done, total: moved.append((done, total)),
    )  # fmt: skip
    assert shown == [3, 3, 3, 3, 3]
    assert moved == [(1, 4), (2, 4), (3, 4), (4, 4), (4, 4)]
    for attack, report in zip(both, reports, strict=True):
        alone = attacks.run(pipe, [pico_eraser(pipe.unet)], CASES, judge_by(lambda call: call == 1)[0], attack,
                            drawing=SMALL, seed=3)  # fmt: skip
        assert alone == report
