"""Attacks: their arithmetic in float64, their calls of the pipeline, and that they restore it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from pico import pico_eraser, pico_pipeline
from pico_families import family_pipeline
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

from spm_hub.adapters.manifest import Concept
from spm_hub.attachment.attachment import attach
from spm_hub.cli import app
from spm_hub.errors import ModelError, NotFoundError, UsageError
from spm_hub.evaluation import attacks
from spm_hub.evaluation.attacks.noising import Noising
from spm_hub.evaluation.attacks.searches.p4d import Frame
from spm_hub.evaluation.attacks.searches.unlearndiff import onto_simplex
from spm_hub.evaluation.attacks.victim import Victim
from spm_hub.evaluation.judging import import_judge, probe_judge, sentences

CASES = [attacks.Case("a photo of snoopy", 3), attacks.Case("snoopy", 4), attacks.Case("snoopy by van gogh", 5)]
SMALL = attacks.AttackDrawingOptions(steps=2, guidance=3.0)


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


def test_projection_is_the_nearest_point_of_the_simplex() -> None:
    random = np.random.default_rng(0)
    points = random.normal(size=(6, 9)) * np.array([[0.01], [0.1], [1], [3], [10], [0]])
    found = onto_simplex(torch.from_numpy(points)).numpy()
    for given, projected in zip(points, found, strict=True):
        low, high = given.min() - 1, given.max()
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (middle, high) if np.clip(given - middle, 0, None).sum() > 1 else (low, middle)
        np.testing.assert_allclose(projected, np.clip(given - low, 0, None), atol=1e-9)
        assert projected.sum() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction", "flow"])
def test_noising_is_forward_diffusion_and_the_target_what_a_model_learnt(predicts: str) -> None:
    class Base:
        device = torch.device("cpu")

        def steps(self, wanted: int) -> int:
            return wanted

        def scheduler(self, steps: int) -> object:
            if predicts == "flow":
                made = FlowMatchEulerDiscreteScheduler()
            else:
                made = DDIMScheduler(
                    beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=predicts
                )
            made.set_timesteps(steps)
            return made

    noising = Noising(Base())  # type: ignore[arg-type]
    times = torch.stack(noising.times(4))
    assert torch.all(times.diff() > 0)
    np.testing.assert_allclose(times, [125, 375, 625, 875], atol=1.5)
    x_0, noise = torch.randn(2, 4, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    x_t, goal = noising.add_noise(x_0, noise, times)
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    for row, time in enumerate(times.tolist()):
        if predicts == "flow":
            signal, amount = 1 - time / 1000, time / 1000
            wanted = noise[row] - x_0[row]
        else:
            kept = np.cumprod(1 - betas)[int(time)]
            signal, amount = kept**0.5, (1 - kept) ** 0.5
            wanted = noise[row] if predicts == "epsilon" else signal * noise[row] - amount * x_0[row]
        torch.testing.assert_close(x_t[row], signal * x_0[row] + amount * noise[row], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(goal[row], wanted, rtol=1e-4, atol=1e-4)


def test_what_the_attacker_sees_is_what_the_pipeline_draws_with() -> None:
    """Text states, gammas and prediction for an adversarial prompt: those of the pipeline's own call, to the bit."""
    pipe = pico_pipeline()
    erasers = [pico_eraser(pipe.unet), pico_eraser(pipe.unet, "dog", seed=2)]
    prompts = ["church dog a photo of cat", "dog mickey snoopy"]
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    class StoppedError(Exception):
        pass

    def stop(module: object, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: tuple[Tensor]) -> None:
        seen.append((args[0], kwargs["encoder_hidden_states"], output[0]))
        raise StoppedError

    victim = Victim(pipe)
    with victim.attach(erasers, mode="branch"):
        hook = pipe.unet.register_forward_hook(stop, with_kwargs=True)
        with pytest.raises(StoppedError), torch.no_grad():
            pipe(prompts, num_inference_steps=2, guidance_scale=1.0, generator=torch.Generator().manual_seed(0))
        hook.remove()
        (latents, states, predicted), = seen  # fmt: skip
        first = pipe.scheduler.timesteps[0].expand(2)
        with torch.no_grad():
            conditioning = victim.encode(prompts, torch.zeros(2, 2, victim.vocabulary.table.shape[1]))
            assert torch.equal(conditioning.states, states)
            assert torch.equal(victim.predict(latents, first, prompts, conditioning), predicted)
            fully_on = victim.base.predict(latents, first, conditioning)
        assert not torch.equal(fully_on, predicted), "the gates of these prompts are not 1"


def test_a_prompt_is_seen_with_its_own_mask() -> None:
    """PixArt's denoiser reads a mask of the text states that count; those of the empty prompt are fewer."""
    pipe = family_pipeline("pixart")
    prompts, seen = ["church dog a photo of cat", "dog"], []

    def keep(module: object, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: tuple[Tensor]) -> None:
        seen.append((args[0], kwargs["encoder_attention_mask"], output[0]))

    with torch.no_grad(), pipe.transformer.register_forward_hook(keep, with_kwargs=True):
        pipe(prompts, num_inference_steps=2, guidance_scale=1.0, use_resolution_binning=False, output_type="latent")
    latents, mask, predicted = seen[0]
    victim = Victim(pipe)
    conditioning = victim.encode(prompts)
    assert torch.equal(conditioning.mask, mask)
    assert mask[0].sum() > mask[1].sum()
    with torch.no_grad():
        raw = victim.predict(latents, pipe.scheduler.timesteps[0].expand(2), prompts, conditioning)
    torch.testing.assert_close(raw, predicted.chunk(2, dim=1)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["sd1", "sdxl", "pixart"])
def test_a_token_moved_onto_another_is_the_other(family: str) -> None:
    """T5 reads its table of tokens through another module than the one it names."""
    victim = Victim(family_pipeline(family))
    one, other = (victim.vocabulary.tokenizer(word, add_special_tokens=False).input_ids for word in ("dog", "cat"))
    move = (victim.vocabulary.table[other] - victim.vocabulary.table[one])[None]
    with torch.no_grad():
        moved, meant = victim.encode(["dog"], move), victim.encode(["cat"])
    assert not torch.equal(victim.encode(["dog"]).states, meant.states)
    torch.testing.assert_close(moved.states, meant.states, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["fold", "branch"])
def test_gradients_reach_the_tokens_through_attached_erasers(mode: str) -> None:
    pipe = pico_pipeline(dtype=torch.float32)
    victim = Victim(pipe)
    latents, times = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([500])
    direction = torch.randn(1, 2, victim.vocabulary.table.shape[1], generator=torch.Generator().manual_seed(2))

    def loss(shift: Tensor) -> Tensor:
        conditioning = victim.encode(["dog cat snoopy"], shift)
        return victim.predict(latents, times, ["dog cat snoopy"], conditioning).pow(2).sum()

    with victim.attach([pico_eraser(pipe.unet)], gate="always", mode=mode):
        shift = torch.zeros_like(direction, requires_grad=True)
        (gradient,) = torch.autograd.grad(loss(shift), shift)
        step = 2e-3
        with torch.no_grad():
            slope = float(loss(step * direction) - loss(-step * direction)) / (2 * step)
    assert float((gradient * direction).sum()) == pytest.approx(slope, rel=0.03)
    assert slope != 0


def test_only_tokens_that_can_be_typed_are_tried() -> None:
    victim = Victim(pico_pipeline())
    ids = victim.vocabulary.searchable()
    words = [victim.vocabulary.tokenizer.decode([token]).strip() for token in ids.tolist()]
    assert {"snoopy", "dog", "church", "a"} <= set(words)
    assert "chur" not in words
    tokens = ids[torch.tensor([[words.index("dog"), words.index("church")], [words.index("a"), words.index("cat")]])]
    assert victim.vocabulary.write(tokens, ["snoopy", "a photo"]) == ["dog church snoopy", "a cat a photo"]
    for text, row in zip(victim.vocabulary.write(tokens, ["", ""]), tokens.tolist(), strict=True):
        assert victim.vocabulary.tokenizer(text, add_special_tokens=False).input_ids == row


def judge_by(shows: Callable[[int], bool]) -> tuple[attacks.Judge, list[int]]:
    """A judge that goes by the number of the call, and the numbers of pictures it was shown."""
    calls: list[int] = []

    def judge(pictures: Sequence[Image.Image]) -> list[bool]:
        calls.append(len(pictures))
        return [shows(len(calls))] * len(pictures)

    return judge, calls


def untouched(pipe: object) -> Callable[[], bool]:
    parts = [pipe.unet, pipe.text_encoder, pipe.vae]  # type: ignore[attr-defined]
    before = [{key: value.clone() for key, value in part.state_dict().items()} for part in parts]
    kinds = [type(module) for part in parts for module in part.modules()] + [type(pipe)]

    def same() -> bool:
        hooks = [module._forward_hooks or module._forward_pre_hooks for part in parts for module in part.modules()]
        return (
            all(
                torch.equal(value, was[key])
                for part, was in zip(parts, before, strict=True)
                for key, value in part.state_dict().items()
            )
            and [type(module) for part in parts for module in part.modules()] + [type(pipe)] == kinds
            and not any(hooks)
        )

    return same


def test_unlearndiff_finds_what_lowers_its_loss_and_leaves_the_pipeline_as_it_was() -> None:
    pipe = pico_pipeline()
    same = untouched(pipe)
    judge, shown = judge_by(lambda call: call in (1, 4))  # the base draws it, the eraser holds twice, then it is back
    moved: list[int] = []
    report = attacks.run(
        pipe, [pico_eraser(pipe.unet)], CASES, judge, attacks.UnlearnDiffAtk(tokens=2, iterations=2, timesteps=3),
        drawing=SMALL, progress=lambda done, total: moved.append(done), gate="transport",
    )  # fmt: skip
    assert report.before == 0.0
    assert report.asr == 1.0
    assert shown == [3, 3, 3, 3]
    assert [one.rounds for one in report.outcomes] == [2, 2, 2]
    for one in report.outcomes:
        assert one.adversarial is not None
        assert one.adversarial.endswith(one.case.prompt)
        assert len(one.adversarial.removesuffix(one.case.prompt).split()) == 2
    assert moved == [1, 2, 3, 4, 6]
    assert same()
    again = attacks.run(
        pipe, [pico_eraser(pipe.unet)], CASES, judge_by(lambda call: call in (1, 4))[0],
        attacks.UnlearnDiffAtk(tokens=2, iterations=2, timesteps=3), drawing=SMALL, gate="transport",
    )  # fmt: skip
    assert again == report
    with attach(pipe, [pico_eraser(pipe.unet)]):
        pass
    assert same()


def test_unlearndiff_walks_down_its_loss() -> None:
    """On a model that cares for the prompt alone, the token found is among the best that a search over all finds."""
    pipe = pico_pipeline()
    victim = Victim(pipe)
    wanted = "church"
    goal = victim.encode([f"{wanted} snoopy"]).states.detach()

    def predict(latents: Tensor, times: Tensor, prompts: Sequence[str], conditioning: object) -> Tensor:
        away = (conditioning.states - goal).pow(2).mean(dim=(1, 2))  # type: ignore[attr-defined]
        return (100 * away).view(-1, 1, 1, 1).expand(len(latents), *victim.base.latent_shape)

    victim.predict = predict  # type: ignore[method-assign, assignment]
    victim.noising.add_noise = lambda x_0, noise, times: (x_0, torch.zeros_like(x_0))  # type: ignore[method-assign]
    attack = attacks.UnlearnDiffAtk(tokens=1, iterations=150, timesteps=1)
    cases = [attacks.Case("snoopy", 0)]
    latents = torch.zeros(1, *victim.base.latent_shape)
    (found,) = attack.rounds(
        attacks.AttackTarget(victim, cases, latents, torch.Generator().manual_seed(0), lambda: None)
    )
    ids = victim.vocabulary.searchable()
    every = victim.vocabulary.write(ids[:, None], ["snoopy"] * len(ids))
    away = (victim.encode(every).states.detach() - goal).pow(2).mean(dim=(1, 2))
    assert int((away < away[every.index(str(found[cases[0]].text))]).sum()) < len(ids) / 20


@pytest.mark.slow
def test_p4d_imitates_the_base_by_a_prompt_of_its_own() -> None:
    pipe = pico_pipeline()
    same = untouched(pipe)
    victim = Victim(pipe)
    attack = attacks.P4D(tokens=4, iterations=4, tries=20)
    picture = torch.randn(1, *victim.base.latent_shape, generator=torch.Generator().manual_seed(1))
    case = attacks.Case("a photo of snoopy", 0)
    random = torch.Generator().manual_seed(0)
    rounds = attack._teacher_batches(victim, [case], picture, [0], torch.Generator().manual_seed(5))
    x_t, times, goal = (torch.cat(parts) for parts in zip(*rounds, strict=True))
    assert len(set(times.tolist())) == 4, "a new time at every step"
    with victim.attach([pico_eraser(pipe.unet)], gate="always", strength=0.5):
        again = attack._teacher_batches(victim, [case], picture, [0], torch.Generator().manual_seed(5))
        for found, bare in zip(again, rounds, strict=True):
            assert all(map(torch.equal, found, bare)), "what it imitates is the base, eraser or not"

        def away(prompt: str) -> float:
            with torch.no_grad():
                conditioning = victim.encode([prompt] * 4)
                return float((victim.predict(x_t, times, [prompt] * 4, conditioning) - goal).pow(2).mean())

        tried = [
            str(tries[case].text)
            for tries in attack.rounds(attacks.AttackTarget(victim, [case], picture, random, lambda: None))
        ]
        assert all(len(prompt.split()) == 4 for prompt in tried)
        first, best = away(tried[0]), min(away(prompt) for prompt in tried)
        assert best < first
        assert victim._erasers is not None
        assert dict(victim._erasers.strength) == {"snoopy": 0.5}
    assert same()


def test_p4d_k_leaves_the_sentence_and_moves_the_tokens_in_between() -> None:
    victim = Victim(pico_pipeline())
    cases = [attacks.Case("a photo of snoopy dog", 0), attacks.Case("snoopy", 1)]
    pictures = torch.randn(2, *victim.base.latent_shape, generator=torch.Generator().manual_seed(1))
    attack = attacks.P4D(every=2, iterations=1, tries=3)
    random = torch.Generator().manual_seed(0)
    own = {victim.vocabulary.words(token[None])[0] for token in victim.vocabulary.searchable()}
    for tried in attack.rounds(attacks.AttackTarget(victim, list(cases), pictures, random, lambda: None)):
        words = str(tried[cases[0]].text).split()
        assert [word for place, word in enumerate(words) if place not in (0, 3, 6)] == cases[0].prompt.split()
        assert {words[0], words[3], words[6]} <= own
        assert str(tried[cases[1]].text).split()[1] == "snoopy"
        assert len(str(tried[cases[1]].text).split()) == 2
    # Where the frame says that a token stands, it stands for the text encoder, and beyond its window nothing does.
    frame = Frame.of(victim.vocabulary, cases[0].prompt, 2)
    text = frame.fill(["church", "cat", "dog"])
    ids = victim.vocabulary.tokenizer(text, add_special_tokens=False).input_ids
    assert [victim.vocabulary.tokenizer.decode([ids[place]]).strip() for place in frame.places] == [
        "church",
        "cat",
        "dog",
    ]
    # As in the paper's code: one more place than whole groups, the last one behind them where nothing is left over.
    assert Frame.of(victim.vocabulary, "a photo of snoopy", 2).fill(["1", "2", "3"]) == "1 a photo 2 of snoopy 3"
    shift = torch.zeros(1, 2, victim.vocabulary.table.shape[1])
    shift[0, 0] = (
        victim.vocabulary.table[victim.vocabulary.tokenizer("dog", add_special_tokens=False).input_ids[0]]
        - victim.vocabulary.table[ids[0]]
    )
    moved = victim.encode([text], shift, torch.tensor([[frame.places[0], 2**31]])).states
    torch.testing.assert_close(moved, victim.encode([frame.fill(["dog", "cat", "dog"])]).states, rtol=1e-5, atol=1e-5)


class Planted:
    """An attack that tries one prompt, and is found out where a case that has succeeded is attacked again."""

    steps = tries = 2
    threat = attacks.Threat.TEXT
    aims: list[tuple[attacks.Case, Tensor]]

    def check(self, victim: Victim) -> None:
        pass

    def rounds(self, target: attacks.AttackTarget) -> Iterator[dict[attacks.Case, attacks.Try]]:
        cases, pictures = target.cases, target.pictures
        assert len(pictures) == len(cases)
        self.aims = list(zip(cases, pictures.clone(), strict=True))
        yield dict.fromkeys(cases, attacks.Try("dog"))
        assert all(case == CASES[1] for case in cases)
        if cases:
            yield dict.fromkeys(cases, attacks.Try("church"))


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


def test_the_command_attacks_a_registered_eraser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = pico_pipeline()
    pico_eraser(pipe.unet).save(tmp_path / "snoopy.safetensors")
    monkeypatch.setattr("spm_hub.models.loading.load_pipeline", lambda model, **given: pipe)
    monkeypatch.setattr("spm_hub.evaluation.judging.probe_judge", lambda concept: judge_by(lambda call: call == 1)[0])
    given = ["attack", str(tmp_path / "snoopy.safetensors"), "--prompts", "2", "--iterations", "1", "--tries", "1"]
    done = CliRunner().invoke(app, [*given, "--steps", "2", "--json"])
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    (found,) = said["attacks"]
    assert (found["cases"], found["asr_before"], found["asr"], found["tokens"]) == (2, 0.0, 0.0, 3)
    other = CliRunner().invoke(app, [*given, "--with", "p4d", "--tokens", "5", "--steps", "2", "--json"])
    assert json.loads(other.stdout)["attacks"][0]["attack"] == "p4d-n"
    for wrong, words in (
        (["--with", "unlearndif"], "unknown attack"),
        (["--model", "sd-v1-4"], "no built-in judge"),
        (["--every", "3"], "no attack of --with unlearndiff has it"),
        (["--every", "3", "--with", "p4d", "--tokens", "4"], "--tokens was given as 4"),
    ):
        refused = CliRunner().invoke(app, [*given, *wrong])
        assert refused.exit_code == 2
        assert words in refused.output


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((), {"tokens": 3, "iterations": 40, "timesteps": 50}),
        (("--with", "p4d"), {"tokens": 16, "iterations": 60, "tries": 50}),
        (("--with", "p4d", "--iterations", "7", "--tokens", "4"), {"tokens": 4, "iterations": 7}),
        (("--with", "p4d", "--every", "3"), {"every": 3, "iterations": 60}),
    ],
)
def test_each_attack_has_its_own_papers_settings(
    given: tuple[str, ...], expected: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = pico_pipeline()
    pico_eraser(pipe.unet).save(tmp_path / "snoopy.safetensors")
    seen: list[object] = []

    def run(
        pipe: object, erasers: object, cases: object, judge: object, methods: list[object], **options: object
    ) -> object:
        seen.extend(methods)
        return (attacks.Report((attacks.Outcome(CASES[0], before=True),), 1, attacks.Threat.WEIGHTS),) * 3

    monkeypatch.setattr("spm_hub.evaluation.attacks.run_all", run, raising=False)
    monkeypatch.setattr("spm_hub.models.loading.load_pipeline", lambda model, **given: pipe)
    done = CliRunner().invoke(app, ["attack", str(tmp_path / "snoopy.safetensors"), *given, "--json"])
    assert done.exit_code == 0, done.output
    assert {key: getattr(seen[0], key) for key in expected} == expected


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
