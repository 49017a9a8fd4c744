"""Tries: whatever an attack gives in place of a prompt and seed is drawn by the pipeline as it says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from attacked import CASES, untouched
from diffusers import DDIMScheduler
from pico import pico_eraser, pico_pipeline
from pico_families import family_pipeline
from PIL import Image

from spm_hub.errors import ModelError, UsageError
from spm_hub.evaluation import attacks
from spm_hub.evaluation.attacks.samplers import ProbingSampler
from spm_hub.evaluation.attacks.tries import draw
from spm_hub.evaluation.attacks.victim import Victim

DDIM = {"eta": 0.0}
FOUR = attacks.AttackDrawingOptions(steps=4, guidance=3.0)


def values(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture).astype(int)


def by_hand(pipe: Any, prompt: str, seed: int) -> np.ndarray:
    drawn = pipe([prompt], num_inference_steps=4, guidance_scale=3.0, generator=[torch.Generator().manual_seed(seed)])
    return values(drawn.images[0])


@pytest.mark.parametrize("given", [{}, {"text": "a", "states": "b"}, {"text": "a", "start": 2}])
def test_tries_that_say_too_little_or_too_much_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="a try"):
        attacks.Try(**given)


@pytest.mark.parametrize("family", ["sd1", "sdxl", "sd3", "flux-dev"])
def test_states_of_a_prompt_draw_what_the_prompt_draws(family: str) -> None:
    pipe = family_pipeline(family)
    case = attacks.Case("a photo of snoopy", 3)
    with torch.no_grad():
        states = Victim(pipe).encode([case.prompt])
    (text, embedded), _ = draw(pipe, [(case, attacks.Try(case.prompt)), (case, attacks.Try(states=states))], FOUR)
    assert np.abs(values(text) - values(embedded)).max() <= 1
    assert values(text).std() > 0


def test_tries_of_all_kinds_in_one_round_come_back_in_order() -> None:
    pipe = pico_pipeline()
    one, two, three = CASES
    with torch.no_grad():
        states = Victim(pipe).encode(["church"])
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(11))[0]
    asked = [
        (one, attacks.Try("dog")),
        (two, attacks.Try(states=states)),
        (three, attacks.Try("dog", seed=9)),
        (one, attacks.Try("cat", latents=noise)),
        (two, attacks.Try("dog")),
    ]
    pictures, latents = draw(pipe, asked, FOUR)
    assert latents.shape == (5, 4, 8, 8)
    expected = [("dog", 3), ("church", 4), ("dog", 9), ("cat", 11), ("dog", 4)]
    for picture, (prompt, seed) in zip(pictures, expected, strict=True):
        assert np.abs(values(picture) - by_hand(pipe, prompt, seed)).max() <= 1


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_a_picture_that_is_finished_from_the_middle_is_the_picture(family: str) -> None:
    """Without an eraser, x_t after two steps and the other two steps are one picture drawn by DDIM."""
    pipe = family_pipeline(family)
    case, own, config = CASES[0], pipe.scheduler, dict(pipe.config)
    _, x_t = draw(pipe, [(case, attacks.Try(case.prompt, options={"until": 2}))], FOUR)
    asked = [(case, attacks.Try(case.prompt, latents=x_t[0], start=2)), (case, attacks.Try(case.prompt, options=DDIM))]
    (finished, whole), _ = draw(pipe, asked, FOUR)
    assert np.abs(values(finished) - values(whole)).max() <= 1
    if family == "sd1":  # whose own sampler is DDIM
        assert np.abs(values(finished) - by_hand(pipe, case.prompt, case.seed)).max() <= 1
    assert pipe.scheduler is own
    assert dict(pipe.config) == config


def test_the_sampler_adds_the_noise_that_it_says() -> None:
    own = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1,
    )  # fmt: skip
    kept = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    x_t, noise = torch.randn(2, 1, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    for eta, variance in ((0.0, 1.0), (0.7, 1.0), (1.0, 1.04), (1.85, 1.02)):
        made = ProbingSampler.of(own, eta=eta, variance=variance)
        made.set_timesteps(12)
        time = int(made.timesteps[-2])
        found = made.step(noise, made.timesteps[-2], x_t, generator=torch.Generator().manual_seed(5)).prev_sample
        now, then = kept[time], kept[time - 1000 // 12]
        sigma = eta * np.sqrt((1 - then) / (1 - now)) * np.sqrt(1 - now / then)
        clean = (x_t.numpy() - np.sqrt(1 - now) * noise.numpy()) / np.sqrt(now)
        fresh = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(5)).numpy()
        expected = np.sqrt(then) * clean + np.sqrt(abs(1 - then - sigma**2)) * noise.numpy()
        np.testing.assert_allclose(found, expected + variance * sigma * fresh, rtol=1e-4, atol=1e-5)
        assert eta < 1.5 or 1 - then - sigma**2 < 0, "the case for which DDIM's own formula has no number"
        own.set_timesteps(12)
        if eta <= 1 and variance == 1:
            ddim = own.step(noise, time, x_t, eta=eta, generator=torch.Generator().manual_seed(5)).prev_sample
            torch.testing.assert_close(found, ddim, rtol=1e-5, atol=1e-5)


def test_flows_have_no_noise_to_change() -> None:
    pipe = family_pipeline("flux-dev")
    for attack in (attacks.NoiseProbing(), attacks.Completion()):
        with pytest.raises(ModelError, match="no diffusion schedule"):
            attacks.run(pipe, [], CASES, lambda pictures: [], attack, drawing=FOUR)


def test_the_gammas_of_a_winner_are_those_that_it_was_drawn_with() -> None:
    pipe = pico_pipeline()
    same = untouched(pipe)
    seen: list[torch.Tensor] = []

    class Watching:
        def gammas(self, prompts: Any, concepts: Any) -> torch.Tensor:
            found = prompts.states.flatten(1).norm(dim=1, keepdim=True).double() / 10
            seen.append(found[:, 0] + 0 if prompts.texts is None else found[:, 0] + len(prompts.texts[0]))
            return seen[-1][:, None]

    victim = Victim(pipe)
    with torch.no_grad():
        states = victim.encode(["dog"])
    with victim.attach([pico_eraser(pipe.unet)], gate=Watching()):
        for one in (attacks.Try("a photo of dog"), attacks.Try(states=states)):
            seen.clear()
            draw(pipe, [(CASES[0], one)], FOUR)
            assert victim.gammas(one) == {"snoopy": pytest.approx(float(seen[0][0]), rel=1e-6)}
    assert same()
