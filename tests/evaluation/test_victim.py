"""The attacked pipeline as an attack sees it: states, gammas, predictions, gradients, tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from pico import pico_eraser, pico_pipeline
from pico_families import family_pipeline
from torch import Tensor

from spm_hub.evaluation.attacks.noising import Noising
from spm_hub.evaluation.attacks.victim import Victim


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
    printed = victim.vocabulary.words(victim.vocabulary.searchable(printable=True))
    assert printed == [word for word in words if not any(ord(letter) < 32 or ord(letter) == 127 for letter in word)]
    tokens = ids[torch.tensor([[words.index("dog"), words.index("church")], [words.index("a"), words.index("cat")]])]
    assert victim.vocabulary.write(tokens, ["snoopy", "a photo"]) == ["dog church snoopy", "a cat a photo"]
    for text, row in zip(victim.vocabulary.write(tokens, ["", ""]), tokens.tolist(), strict=True):
        assert victim.vocabulary.tokenizer(text, add_special_tokens=False).input_ids == row
