"""Minimalist erasure: masks and gradients against independent float64, memory counted, masks as weights, resumption."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FluxTransformer2DModel, SD3Transformer2DModel
from diffusers.utils import logging
from pico import pico_pipeline
from pico_families import family_pipeline
from test_families import SD35_MEDIUM, apart, draw
from test_methods import sd14, sdxl
from torch import Tensor, nn

import spm_hub
from spm_hub.adapters.adapter import load_file
from spm_hub.adapters.increments import Mask, spread
from spm_hub.errors import AdapterFileError, ModelError, RecipeError, SpmHubError
from spm_hub.models.architectures import denoiser_of
from spm_hub.training import Recipe, train
from spm_hub.training.base_model import TeacherModel
from spm_hub.training.data.prompts import PromptMaker, Words
from spm_hub.training.loop.backprop_through_sampling import Step, back_propagate, sample_latents
from spm_hub.training.loop.mask_run import MaskRun, final_latent_losses
from spm_hub.training.loop.run import Task
from spm_hub.training.trainable.mask import TrainableMask, expected_on, hard_concrete, neurons

pytestmark = pytest.mark.slow

SMALL: dict[str, Any] = {
    "target": "snoopy", "method": "minimalist", "steps": 6, "batch_size": 2, "x_t": {"steps": 3},
    "masks": {"prompts": 3, "groups": ("ff", "attn")}, "optimiser": {"warmup": 1},
}  # fmt: skip


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logging.set_verbosity_error()
    yield
    logging.set_verbosity_warning()


def recipe(**values: Any) -> Recipe:
    merged = {**SMALL, **values}
    for key in ("x_t", "masks", "optimiser"):
        merged[key] = {**SMALL[key], **values.get(key, {})}
    return Recipe.make(**merged)


@contextmanager
def room(plan: Recipe, pipe: DiffusionPipeline) -> Iterator[tuple[MaskRun, TrainableMask, TeacherModel]]:
    base = TeacherModel(pipe, plan.resolution)
    run = MaskRun(Task(plan, base, {}))
    try:
        yield run, run.masks, base
    finally:
        run.masks.remove()


def test_a_sample_of_a_mask_is_the_hard_concrete_distribution_in_float64() -> None:
    random = np.random.default_rng(0)
    logits, u = random.normal(0, 4, 500), random.uniform(size=500)
    for epsilon in (0.0, 0.5):
        noise = np.log(u + epsilon) - np.log(1 - u + epsilon)
        expected = np.clip(1 / (1 + np.exp(-(noise + logits) / 0.83)) * 1.2 - 0.1, 0, 1)
        found = hard_concrete(torch.from_numpy(logits), torch.from_numpy(u), epsilon).numpy()
        np.testing.assert_allclose(found, expected, atol=1e-12)
        assert 0 < (found == 0).mean() < 1
        assert 0 < (found == 1).mean() < 1


def test_the_expected_l0_norm_is_how_often_samples_are_above_zero() -> None:
    generator = torch.Generator().manual_seed(0)
    for logit in (-4.0, -2.0, 0.0, 3.0):
        logits = torch.full((200_000,), logit, dtype=torch.float64)
        u = torch.rand(200_000, generator=generator, dtype=torch.float64)
        share = float((hard_concrete(logits, u) > 0).double().mean())
        assert float(expected_on(logits[:1])) == pytest.approx(share, abs=5e-3)


def test_the_losses_are_the_papers_in_float64() -> None:
    drawn, goals = np.random.default_rng(1).normal(size=(2, 5, 4, 8, 8))
    concept = np.array([True, False, True, False, False])
    erase, keep = final_latent_losses(*(torch.from_numpy(array) for array in (drawn, goals, concept)))
    squares = [float(np.mean((drawn[row] - goals[row]) ** 2)) for row in range(5)]
    assert float(erase) == pytest.approx(squares[0] + squares[2], rel=1e-12)
    assert float(keep) == pytest.approx(squares[1] + squares[3] + squares[4], rel=1e-12)


GROUPS = {"sd1": ("ff", "attn"), "sdxl": ("linear",), "sd3": ("ff", "norm", "attn"), "flux-dev": ("ff", "norm", "attn")}


@pytest.mark.parametrize("family", GROUPS)
def test_the_gradient_is_that_of_back_propagation_through_all_steps(family: str) -> None:
    plan = recipe(masks={"groups": GROUPS[family]}, x_t={"steps": 4, "guidance": [2.0]}, resolution=16)
    with room(plan, family_pipeline(family, dtype=torch.float64)) as (run, injection, base):
        step = run.denoising(["snoopy", "a dog"], masks=17)
        noise = base.noise(2, torch.Generator().manual_seed(3)).double()
        goals = base.noise(2, torch.Generator().manual_seed(4)).double()
        parameters = injection.state()
        for parameter in parameters.values():
            parameter.data.uniform_(-1.0, 1.0, generator=torch.Generator().manual_seed(5))

        latents = noise
        for index in range(4):
            latents = step(index, latents)
        whole = torch.autograd.grad((latents - goals).pow(2).mean(), list(parameters.values()))

        kept = sample_latents(step, noise, 4)
        torch.testing.assert_close(kept[-1], latents.detach(), rtol=1e-9, atol=1e-9)
        back_propagate(step, kept, 2 * (kept[-1] - goals) / goals.numel())
        for (key, parameter), expected in zip(parameters.items(), whole, strict=True):
            assert parameter.grad is not None
            assert float(expected.norm()) > 0, key
            assert float((parameter.grad - expected).norm() / expected.norm()) <= 1e-4, key


def test_the_gradient_is_the_slope_of_the_loss() -> None:
    """Against differences of the loss itself, along a random direction of all logits; no autograd in the reference."""
    with room(recipe(), family_pipeline("sd1", dtype=torch.float64)) as (run, injection, base):
        step = run.denoising(["snoopy", "a dog"], masks=0)
        noise = base.noise(2, torch.Generator().manual_seed(3)).double()
        parameters = list(injection.state().values())
        for parameter in parameters:
            parameter.data = torch.full_like(parameter, 0.3, dtype=torch.float64)

        def loss() -> float:
            return float(sample_latents(step, noise, 3)[-1].pow(2).sum())

        kept = sample_latents(step, noise, 3)
        back_propagate(step, kept, 2 * kept[-1])
        generator = torch.Generator().manual_seed(6)
        directions = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in parameters]
        slope = sum(
            float((p.grad * d).sum()) for p, d in zip(parameters, directions, strict=True) if p.grad is not None
        )
        heights = []
        for sign in (1, -2):
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter.data += sign * 1e-6 * direction
            heights.append(loss())
        assert slope == pytest.approx((heights[0] - heights[1]) / 2e-6, rel=1e-4)


class Counted:
    """Bytes that graphs hold on to, now and at most."""

    def __init__(self) -> None:
        self.now = self.peak = 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        def pack(tensor: Tensor) -> Tensor:
            saved = tensor.detach().clone()  # an object of its own, that goes with the graph
            self.now += saved.nbytes
            self.peak = max(self.peak, self.now)
            weakref.finalize(saved, self._gone, saved.nbytes)
            return saved

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
            yield

    def _gone(self, size: int) -> None:
        self.now -= size


def peak_of(work: Callable[[Step, Tensor, int], None], steps: int) -> int:
    with room(recipe(x_t={"steps": steps}), pico_pipeline()) as (run, _, base):
        step = run.denoising(["snoopy", "a dog"], masks=0)
        counted = Counted()
        with counted.watching():
            work(step, base.noise(2, torch.Generator().manual_seed(0)), steps)
        assert counted.peak > 0
        return counted.peak


def test_memory_does_not_grow_with_the_number_of_steps() -> None:
    def step_wise(step: Step, noise: Tensor, steps: int) -> None:
        latents = sample_latents(step, noise, steps)
        back_propagate(step, latents, latents[-1])

    def at_once(step: Step, noise: Tensor, steps: int) -> None:
        latents = noise
        for index in range(steps):
            latents = step(index, latents)
        latents.pow(2).sum().backward()

    one, many = peak_of(step_wise, 2), peak_of(step_wise, 12)
    assert many <= 1.01 * one
    assert peak_of(at_once, 12) > 5 * one, "the count sees a graph of twelve steps"


def test_a_step_that_is_not_itself_again_is_refused() -> None:
    with room(recipe(), pico_pipeline()) as (run, injection, base):
        step = run.denoising(["snoopy"], masks=0)
        latents = sample_latents(step, base.noise(1, torch.Generator().manual_seed(0)), 3)
        for parameter in injection.state().values():
            parameter.data.zero_()
        with pytest.raises(ModelError, match=r"step \d.*run again"):
            back_propagate(step, latents, latents[-1])


@pytest.mark.parametrize("family", ["sd1", "flux-schnell"])
def test_masks_as_they_begin_are_refused_once_saved(family: str, tmp_path: Path) -> None:
    pipe = family_pipeline(family)
    plan = recipe(steps=1, optimiser={"lr": 1e-6}, masks={"groups": GROUPS.get(family, ("ff", "norm", "attn"))})
    train(plan, pipe=pipe).save(tmp_path / "fresh.safetensors")
    adapter = load_file(tmp_path / "fresh.safetensors")
    with pytest.raises(AdapterFileError, match="changes nothing"):
        spm_hub.attach(pipe, [adapter], gate="always")


def masked_by_activations(
    denoiser: nn.Module, offs: dict[str, Tensor], work: Callable[[], Tensor], heads: int
) -> Tensor:
    """The paper's own reading of a mask: what the neurons give is multiplied, no weight is touched."""
    hooks = []
    for name, off in offs.items():
        module = denoiser.get_submodule(name)
        if hasattr(module, "to_q"):

            def values(_: nn.Module, __: Any, out: Tensor, off: Tensor = off) -> Tensor:
                return (out.unflatten(-1, (heads, -1)) * (~off)[:, None]).flatten(-2)

            # A head whose values are zero gives zero, whatever it attends to.
            projections = [getattr(module, name, None) for name in ("to_v", "add_v_proj")]
            hooks += [layer.register_forward_hook(values) for layer in projections if layer is not None]
        else:
            inner = module.net[0] if hasattr(module, "net") else module.linear
            hooks.append(inner.register_forward_hook(lambda _, __, out, off=off: out * ~off))
    try:
        return work()
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("family", ["sd1", "sd3", "flux-dev"])
def test_what_is_saved_is_what_the_paper_masks(family: str) -> None:
    pipe = family_pipeline(family, dtype=torch.float64)
    denoiser = denoiser_of(pipe)
    groups = ("ff", "attn") if family == "sd1" else ("ff", "norm", "attn")
    with room(recipe(masks={"groups": groups}, resolution=16), pipe) as (_, injection, _base):
        generator = torch.Generator().manual_seed(2)
        offs = {}
        for name, logits in injection.state().items():
            logits.data.uniform_(-1, 2, generator=generator)
            offs[name] = logits.detach() <= 0
        increments = injection.increments()
    # A norm's own bias is masked with its outputs; in the single blocks of FLUX heads and neurons share a layer.
    heads = {"sd1": 2, "sd3": 4, "flux-dev": 2}[family]
    expected = masked_by_activations(denoiser, offs, lambda: draw(pipe, ["snoopy"]), heads)
    bare = draw(pipe, ["snoopy"])
    weights = {key: value.clone() for key, value in denoiser.state_dict().items()}
    with torch.no_grad():
        for path, mask in increments.items():
            module = denoiser.get_submodule(path)
            module.weight.data[~mask.keep if mask.dim == 0 else (slice(None), ~mask.keep)] = 0.0
            if mask.dim == 0 and module.bias is not None:
                module.bias.data[~mask.keep] = 0.0
        found = draw(pipe, ["snoopy"])
        denoiser.load_state_dict(weights)
    assert apart(expected, bare) > 1e-3
    assert apart(found, expected) <= 1e-6


def test_erasers_of_several_concepts_multiply_and_leave_one_by_one() -> None:
    pipe = pico_pipeline(dtype=torch.float64)
    adapters = []
    for seed, target in enumerate(("snoopy", "mickey")):
        trained = train(recipe(target=target, steps=1), pipe=pipe)
        generator = torch.Generator().manual_seed(seed)
        masks = {
            path: Mask(torch.rand(len(mask.keep), generator=generator) > 0.4, mask.dim)
            for path, mask in trained.increments.items()
            if isinstance(mask, Mask)
        }
        adapters.append(spm_hub.Adapter(trained.manifest, masks))
    one, two = (adapter.increments for adapter in adapters)
    modules = {path: pipe.unet.get_submodule(path) for path in one}
    before = {path: module.weight.detach().clone() for path, module in modules.items()}
    strengths = {"snoopy": 1.0, "mickey": 0.25}
    with spm_hub.attach(pipe, adapters, gate="always", strength=strengths, mode="fold") as erasers:
        draw(pipe, ["a dog"])
        folded = draw(pipe, ["a dog"])
        for path, module in modules.items():
            factor = (1 - (~one[path].keep).double()) * (1 - 0.25 * (~two[path].keep).double())
            assert float((~one[path].keep & ~two[path].keep).sum()) > 0
            torch.testing.assert_close(module.weight.data, before[path] * factor, rtol=1e-15, atol=0)
        erasers.recover("snoopy")
        draw(pipe, ["a dog"])
        for path, module in modules.items():
            factor = 1 - 0.25 * (~two[path].keep).double()
            torch.testing.assert_close(module.weight.data, before[path] * factor, rtol=1e-15, atol=0)
    assert all(torch.equal(module.weight, before[path]) for path, module in modules.items())
    with spm_hub.attach(pipe, adapters, gate="always", strength=strengths, mode="branch"):
        assert apart(draw(pipe, ["a dog"]), folded) <= 1e-9


def test_neurons_of_the_real_architectures() -> None:
    with torch.device("meta"):
        models: dict[str, nn.Module] = {
            "sd14": sd14(), "sdxl": sdxl(), "flux": FluxTransformer2DModel(),
            "sd35": SD3Transformer2DModel(**{**SD35_MEDIUM, "num_layers": 4, "dual_attention_layers": (0,)}),
        }  # fmt: skip

    def counted(name: str, group: Any) -> tuple[int, int]:
        rows = neurons(models[name], [group]).values()
        for row in rows:
            for place in row.places:
                assert models[name].get_submodule(place.path).weight.shape[place.dim] == place.total
                assert row.count * place.width <= place.total
        return len(rows), sum(row.count for row in rows)

    assert counted("flux", "ff") == (38, 466_944)
    assert counted("flux", "norm") == (19, 350_208)
    assert counted("flux", "attn") == (57, 1_368)
    assert counted("sd14", "ff") == (16, 4 * (5 * 320 + 5 * 640 + 6 * 1280))
    assert counted("sd14", "attn") == (32, 32 * 8)
    assert counted("sd14", "linear")[0] == 16 * 10
    assert counted("sdxl", "ff")[0] == 70
    assert counted("sdxl", "attn")[0] == 140
    assert counted("sd35", "ff")[0] == 7  # the last block has none of the text's
    assert counted("sd35", "attn")[0] == 5
    first = next(iter(neurons(models["flux"], ["attn"]).values()))
    assert [place.path for place in first.places] == [
        "transformer_blocks.0.attn.to_out.0", "transformer_blocks.0.attn.to_add_out"
    ]  # fmt: skip
    with pytest.raises(RecipeError, match=r"masks.groups.*no neurons of group 'norm'") as caught:
        neurons(models["sd14"], ["norm"])
    assert caught.value.mend == "--set masks.groups=[ff, attn]"


def test_neurons_are_spread_over_their_entries() -> None:
    assert spread(torch.tensor([True, False]), 2, 5).tolist() == [True, True, False, False, True]
    assert spread(torch.tensor([0.5, 0.25]), 1, 2).tolist() == [0.5, 0.25]


@pytest.mark.parametrize("family", ["sdxl", "sd3", "flux-schnell"])
def test_diffusion_and_flows_are_erased_through_their_own_sampling(family: str) -> None:
    pipe = family_pipeline(family)
    before = {key: value.clone() for key, value in denoiser_of(pipe).state_dict().items()}
    errors: list[float] = []
    groups = ("ff", "norm", "attn") if family != "sdxl" else ("ff", "attn")
    plan = recipe(
        steps=14, resolution=16, templates=False, masks={"prompts": 1, "groups": groups, "beta": 0.0, "epsilon": 0.5},
        optimiser={"lr": 1.0},
    )  # fmt: skip
    random_state = torch.get_rng_state()
    adapter = train(plan, pipe=pipe, progress=lambda step, total, info: errors.append(info["erase"]))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert errors[-1] < 0.97 * errors[0]
    assert adapter.manifest.increment.kind == "mask"
    assert any(not bool(mask.keep.all()) for mask in adapter.increments.values())
    bare = draw(pipe, ["snoopy"])
    with spm_hub.attach(pipe, [adapter]):
        assert apart(draw(pipe, ["snoopy"]), bare) > 1e-4
    assert torch.equal(draw(pipe, ["snoopy"]), bare)
    after = denoiser_of(pipe).state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in denoiser_of(pipe).modules())


def test_the_l0_term_switches_off_or_on() -> None:
    shares = {}
    for l0 in (1e4, -1e4):
        shares[l0] = train(recipe(steps=9, masks={"l0": l0, "init": 1.0}), pipe=pico_pipeline()).increments
    assert not any(bool(mask.keep.any()) for mask in shares[1e4].values())
    assert all(bool(mask.keep.all()) for mask in shares[-1e4].values())


def test_batches_accumulate_to_the_same_step_and_both_kinds_alternate() -> None:
    kinds = []
    for values in ({"batch_size": 4}, {"batch_size": 2, "masks": {"accumulate": 2}}):
        with room(
            recipe(masks={"epsilon": 1e9, "init": 1.0, **values.pop("masks", {})}, **values), pico_pipeline()
        ) as (
            run,
            injection,
            _,
        ):
            run.step(0)
            kinds.append({key: logits.grad.clone() for key, logits in injection.state().items()})
            prompts = run.pictures.prompts
            assert all("snoopy" in prompt for prompt in prompts[::2])
            assert not any("snoopy" in prompt for prompt in prompts[1::2])
    # With a noise of nothing the samples are the same; passes of two and two then add up to one of four.
    for key, whole in kinds[0].items():
        assert float((kinds[1][key] - whole).norm() / whole.norm()) < 1e-4, key


def test_goals_are_the_bases_own_pictures_without_the_concept() -> None:
    plan = recipe(surrogate="dog", x_t={"guidance": [2.0]})
    pipe = pico_pipeline()
    with room(plan, pipe) as (run, _, base):
        pictures = run.pictures
        for row in (0, 1):
            wanted = pictures.prompts[row].replace("snoopy", "dog")
            own = pipe.scheduler
            pipe.scheduler = base.scheduler(3)
            options = {"num_inference_steps": 3, "guidance_scale": 2.0, "output_type": "latent"}
            theirs = pipe(wanted, latents=pictures.noise[row][None], **options).images
            pipe.scheduler = own
            assert apart(pictures.goals[row][None], theirs) <= 1e-4


def test_a_concept_is_taken_out_of_a_sentence() -> None:
    maker = PromptMaker(("nudity", "nude", "a nude"), "nsfw", Words.load(), ())
    assert maker.without("a photo of a nude person on the beach", "") == "a photo of person on the beach"
    assert maker.without("Nudity", "a dressed person") == "a dressed person"


def test_ctrl_c_saves_what_there_is_and_leaves_the_pipeline_as_it_was(tmp_path: Path) -> None:
    pipe = pico_pipeline()
    before = {key: value.clone() for key, value in pipe.unet.state_dict().items()}

    def stop(at: int) -> Callable[[int, int, dict[str, float]], None]:
        def progress(step: int, total: int, info: dict[str, float]) -> None:
            if step == at:
                raise KeyboardInterrupt

        return progress

    with pytest.raises(SpmHubError, match=r"step 2 of 6.*saved"):
        train(recipe(), pipe=pipe, progress=stop(2), checkpoint_dir=tmp_path)
    resumed = train(recipe(), pipe=pipe, checkpoint_dir=tmp_path, resume=True)
    whole = train(recipe(), pipe=pipe)
    assert resumed.increments.keys() == whole.increments.keys()
    assert all(torch.equal(mask.keep, resumed.increments[path].keep) for path, mask in whole.increments.items())
    assert all(torch.equal(value, before[key]) for key, value in pipe.unet.state_dict().items())


def test_ctrl_c_before_the_first_step_saves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(self: MaskRun, step: int) -> dict[str, float]:
        raise KeyboardInterrupt

    monkeypatch.setattr(MaskRun, "step", interrupt)
    with pytest.raises(SpmHubError, match="nothing was saved: no step of 6 is on disk"):
        train(recipe(), pipe=pico_pipeline(), checkpoint_dir=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"increment": {"kind": "dense"}}, "switches neurons off.*'mask'.*methods 'spm' and 'esd-x'"),
        ({"increment": {"rank": 4}}, "kind .mask. has no rank .got 4."),
        ({"increment": {"dtype": "float16"}}, "increment.dtype 'float16' would change nothing.*kind 'mask'"),
        (
            {"method": "spm", "increment": {"kind": "mask"}},
            "kind 'mask' cannot be trained by method 'spm': method 'minimalist'",
        ),
        ({"method": "uce", "increment": {"kind": "mask"}}, "'uce' does not read it; it gives an exact low_rank"),
        (
            {"method": "esd-x", "masks": {"beta": 1}},
            "masks.beta 1.0 would change nothing: method 'esd-x'.* at 0.1, .*reads it: 'minimalist'",
        ),
        ({"masks": {"groups": ["linear", "ff"]}}, "mask one layer twice"),
        ({"masks": {"groups": ["fff"]}}, "masks.groups.0: unknown.*did you mean ff"),
        ({"masks": {"groups": []}}, "masks.groups"),
        ({"masks": {"betta": 1}}, "masks.betta is unknown; did you mean beta"),
        (
            {"anchoring": {"weight": 3}},
            "anchoring.weight 3.0 would change nothing.*masks.beta is the weight of keeping everything else",
        ),
        ({"x_t": {"source": "student"}}, "of x_t it reads steps and guidance"),
        ({"x_t": {"guidance": [1.0, 3.0]}}, "under one guidance"),
        ({"x_t": {"guidance": [0.0]}}, "under one guidance of 1 or more"),
        ({"objective": {"eta": 2}}, "eta 2.0 would change nothing: method 'minimalist' does not"),
        ({"optimiser": {"scale_lr": True}}, "scale_lr True would change nothing.*Leave it at False"),
        ({"batch_size": 1}, "has to be even"),
        ({"erase_from": "a dog", "templates": False}, "erase_from 'a dog' would change nothing.*method 'esd-x' has"),
        ({"adversary": {"steps": 3}}, "adversary.steps 3 would change nothing.*method 'race' has"),
    ],
)
def test_impossible_combinations_are_refused_with_the_nearest_valid_choice(values: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        Recipe.make(**{"target": "snoopy", "method": "minimalist", **values})
