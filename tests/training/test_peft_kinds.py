"""LoHa, LoKr, VeRA and DoRA: nothing at first, trained by PEFT, saved as increments that do what PEFT's layers do."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from pico import pico_pipeline
from test_quantised import packed

from spm_hub.adapters.adapter import Adapter
from spm_hub.adapters.increments import Dense, LowRank
from spm_hub.attachment.attachment import attach
from spm_hub.errors import ModelError, RecipeError
from spm_hub.models.architectures import targets
from spm_hub.training import Recipe, train
from spm_hub.training.data.sampling import generator_for
from spm_hub.training.recipe.schema import PEFT_KINDS
from spm_hub.training.trainable.low_rank import TrainableLowRank
from spm_hub.training.trainable.module_selection import select_modules
from spm_hub.training.trainable.peft import TrainablePeft

pytestmark = pytest.mark.slow

SMALL = {"target": "snoopy", "steps": 6, "batch_size": 4, "x_t": {"steps": 5, "trajectories": 4, "chunks": 3}}


def recipe(kind: str, **values: Any) -> Recipe:
    modules = "esd-x" if kind == "vera" else "targets"  # PEFT has no VeRA for the 1x1 convolutions of SD1
    return Recipe.make(**{**SMALL, "increment": {"kind": kind, "rank": 2, "modules": modules}, **values})


def modules_for(unet: Any, kind: str) -> Any:
    return select_modules(unet, "esd-x") if kind == "vera" else targets(unet)


def shaken(injection: TrainablePeft) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in injection.state().values():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", PEFT_KINDS)
def test_nothing_changes_at_first_nor_after_removal_and_masters_are_float32(kind: str, dtype: torch.dtype) -> None:
    unet = pico_pipeline(dtype=dtype).unet
    before = {key: value.clone() for key, value in unet.state_dict().items()}
    kinds = {path: type(module) for path, module in unet.named_modules()}
    latents, states = torch.randn(2, 4, 8, 8).to(dtype), torch.randn(2, 12, 16).to(dtype)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with torch.no_grad():
        plain = unet(latents, 500, states).sample
        injection = TrainablePeft(unet, kind, 2, torch.Generator().manual_seed(1), modules_for(unet, kind))
        assert torch.equal(torch.rand(3), expected), "the global random state is left alone"
        assert torch.equal(unet(latents, 500, states).sample, plain)
        assert {parameter.dtype for parameter in injection.state().values()} == {torch.float32}
        shaken(injection)
        changed = unet(latents, 500, states).sample
        assert changed.dtype == dtype
        assert not torch.equal(changed, plain)
        with injection.frozen():
            assert torch.equal(unet(latents, 500, states).sample, plain)
        injection.remove()
        assert torch.equal(unet(latents, 500, states).sample, plain)
    assert before.keys() == unet.state_dict().keys()
    assert all(torch.equal(before[key], value) for key, value in unet.state_dict().items())
    assert kinds == {path: type(module) for path, module in unet.named_modules()}


@pytest.mark.parametrize("selection", ["targets", "esd-u"])
@pytest.mark.parametrize("kind", PEFT_KINDS)
def test_what_is_saved_does_what_peft_does(kind: str, selection: str) -> None:
    """The whole U-Net with PEFT's layers in it, against the bare one with our increments added to its weights."""
    unet = pico_pipeline().unet
    chosen = select_modules(unet, "esd-x" if kind == "vera" else selection)
    latents, states = torch.randn(2, 4, 8, 8), torch.randn(2, 12, 16)
    injection = TrainablePeft(unet, kind, 2, torch.Generator().manual_seed(1), chosen)
    shaken(injection)
    with torch.no_grad():
        trained = unet(latents, 500, states).sample
        increments = injection.increments()
        assert injection.conversion_error(increments)[1] < 1e-4
        wrong = {path: found.to(dtype=torch.bfloat16) for path, found in increments.items()}
        assert 1e-4 < injection.conversion_error(wrong)[1] < 2e-2, "rounding shows"
        injection.remove()
        plain = unet(latents, 500, states).sample
        for path, increment in increments.items():
            weight = unet.get_submodule(path).weight
            weight += increment.delta_for(weight)
        found = unet(latents, 500, states).sample
    assert float((trained - plain).norm()) > 0.01 * float(plain.norm())
    assert float((found - trained).norm()) < 1e-4 * float((trained - plain).norm())
    expected = {"vera": LowRank, "dora": Dense}.get(kind)
    assert expected is None or {type(increment) for increment in increments.values()} == {expected}


def test_thin_kinds_are_thin_where_that_is_less() -> None:
    unet = pico_pipeline(channels=(64, 64), text_width=64).unet
    for kind, rank in (("loha", 4), ("lokr", 2)):
        # LoKr on all, 3x3 convolutions too; the pairs of LoHa are too many for the narrow ones.
        chosen = select_modules(unet, {"loha": "esd-x", "lokr": "esd-all"}[kind])
        injection = TrainablePeft(unet, kind, 2, torch.Generator().manual_seed(1), chosen)
        shaken(injection)
        with torch.no_grad():
            increments = injection.increments()
            for path, increment in increments.items():
                assert isinstance(increment, LowRank)
                delta = unet.get_submodule(path).get_delta_weight("spmhub_training").double().numpy()
                np.testing.assert_allclose(increment.delta_for(torch.from_numpy(delta)).numpy(), delta, atol=1e-5)
                if kind == "loha":
                    assert increment.rank == rank == np.linalg.matrix_rank(delta, tol=1e-5)
        injection.remove()
        thick = TrainablePeft(unet, kind, 16, torch.Generator().manual_seed(1), select_modules(unet, "esd-x"))
        assert {type(increment) for increment in thick.increments().values()} == {Dense}
        thick.remove()


def trained(kind: str, pipe: Any, lr: float) -> tuple[Adapter, list[float]]:
    """An eraser and its losses of 40 steps."""
    losses: list[float] = []
    plan = recipe(kind, steps=40, optimiser={"lr": lr, "warmup": 1}, anchoring={"weight": 0.0, "reach": None})
    adapter = train(plan, pipe=pipe, progress=lambda step, total, info: losses.append(info["erase"]))
    return adapter, losses


@cache
def untrained() -> list[float]:
    """The losses on the same batches without learning; no kind changes anything at first, nor what batches hold."""
    return trained("loha", pico_pipeline(), 1e-12)[1]


@pytest.mark.parametrize("kind", PEFT_KINDS)
def test_they_train_are_attached_and_tell_how_exact_they_are(kind: str) -> None:
    pipe = pico_pipeline()
    adapter, losses = trained(kind, pipe, 1e-2)
    # Against an untrained one on the same batches, as no two batches are equally far from their targets.
    assert sum(losses[-8:]) < 0.97 * sum(untrained()[-8:])
    (measured,) = adapter.manifest.evaluation
    assert (measured.protocol, measured.metric) == ("conversion", f"relative_error_of_{kind}")
    assert 0 <= measured.value < 1e-3
    assert measured.samples == len(adapter.increments)
    assert adapter.manifest.recipe["increment"]["kind"] == kind
    before = {key: value.clone() for key, value in pipe.unet.state_dict().items()}
    with attach(pipe, [adapter], gate="always"):
        pass
    assert all(torch.equal(before[key], value) for key, value in pipe.unet.state_dict().items())


@pytest.mark.parametrize("kind", ["low_rank", *PEFT_KINDS])
def test_a_quantised_base_is_trained_on_and_the_eraser_acts_beside_it(kind: str) -> None:
    pipe = pico_pipeline()
    packed(pipe.unet)
    stored = {key: value.clone() for key, value in pipe.unet.state_dict().items()}
    plan = recipe("vera" if kind == "vera" else kind, steps=4).with_set("increment.modules=esd-x")
    if kind in ("loha", "lokr", "dora"):
        # They need the weight itself, or its shape, which PEFT cannot read out of a packed format.
        with pytest.raises(RecipeError, match="quantised and packed"):
            train(plan, pipe=pipe)
        return
    adapter = train(plan, pipe=pipe)
    assert all(torch.equal(stored[key], value) for key, value in pipe.unet.state_dict().items())
    plain = pipe(
        "snoopy", num_inference_steps=1, generator=torch.Generator().manual_seed(0), output_type="latent"
    ).images
    with attach(pipe, [adapter], gate="always"):
        erased = pipe(
            "snoopy", num_inference_steps=1, generator=torch.Generator().manual_seed(0), output_type="latent"
        ).images  # fmt: skip
    assert not torch.equal(plain, erased)


def test_what_peft_cannot_do_is_refused_with_the_nearest_choice() -> None:
    unet = pico_pipeline().unet
    with pytest.raises(RecipeError, match=r"PEFT has none for .*proj_in, a Conv2d(.|\n)*increment\.modules=esd-x"):
        TrainablePeft(unet, "vera", 2, generator_for(0, 2, 0), targets(unet))
    TrainableLowRank(unet, 1, generator_for(0, 2, 0), select_modules(unet, "esd-x"))
    with pytest.raises(ModelError, match="already has LoRA layers"):
        TrainablePeft(unet, "loha", 2, generator_for(0, 2, 0), select_modules(unet, "esd-x"))
    with pytest.raises(RecipeError, match="start_from goes with"):
        recipe("loha", start_from="snoopy")
