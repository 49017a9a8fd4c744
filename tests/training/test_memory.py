"""Rows in groups and blocks that keep their inputs alone: the gradient of the whole batch, in the memory there is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from pico import pico_pipeline
from pico_families import family_pipeline
from torch import Tensor
from torch.overrides import TorchFunctionMode

from spm_hub.errors import RecipeError
from spm_hub.training import Recipe
from spm_hub.training.base_model import TeacherModel
from spm_hub.training.loop.fitting import rows_with_gradient
from spm_hub.training.loop.prediction_run import PredictionRun
from spm_hub.training.loop.run import Task
from spm_hub.training.memory import Split, fitted, kept_by_one_row
from spm_hub.training.methods import find_method
from spm_hub.training.trainable.low_rank import TrainableLowRank
from spm_hub.training.trainable.module_selection import select_modules

SMALL = {"steps": 2, "batch_size": 3, "x_t": {"steps": 3, "trajectories": 2, "chunks": 1}}


def gradients(pipe: Any, split: Split, values: dict[str, Any]) -> tuple[dict[str, Tensor], int]:
    """The first step's gradients by parameter, and the most rows that the denoiser ever saw with gradients on."""
    plan = Recipe.make(**{"target": "snoopy", **SMALL, **values})
    method = find_method(plan.method)
    assert method is not None
    assert method.objective is not None
    base = TeacherModel(pipe)
    base.denoiser.requires_grad_(False)
    modules = select_modules(base.denoiser, plan.increment.modules)
    run = PredictionRun(Task(plan, base, modules, method.objective(plan)))
    seen: list[int] = []

    def look(module: Any, args: Any, given: Any) -> None:
        if torch.is_grad_enabled():
            seen.append(len(given["encoder_hidden_states"]))

    try:
        for number, parameter in enumerate(run.trainable.state().values()):  # away from 0, where half of them vanish
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
            if base.dtype == torch.float64:
                parameter.data = parameter.data.double()
        run.source.batch(0)  # the trajectories of both are those of one call, and kept
        base.split = split
        hook = base.denoiser.register_forward_pre_hook(look, with_kwargs=True)
        run.differentiate(run.total(0, run.losses(0)))
        hook.remove()
        found = {name: one.grad.clone() for name, one in run.trainable.state().items() if one.grad is not None}
        assert len(found) == len(run.trainable.state())
        return found, max(seen)
    finally:
        run.trainable.remove()


def worst(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """The greatest difference of a tensor's gradients, as a share of the norm of all."""
    whole = torch.stack([one.norm() for one in left.values()]).norm()
    return max(float((one - right[name]).norm() / whole) for name, one in left.items())


def by_other_kernels(pipe: Any, values: dict[str, Any]) -> dict[str, Tensor]:
    """The whole batch's gradients with products that are rounded otherwise: how sure float32 is of them."""
    with torch.backends.mkldnn.flags(enabled=False):
        return gradients(pipe, Split(), values)[0]


@pytest.mark.parametrize(
    ("dtype", "values", "split"),
    [
        (torch.float64, {}, Split(2)),
        (torch.float64, {}, Split(5, checkpointing=True)),
        (torch.float32, {}, Split(2)),
        (torch.float32, {"method": "esd-x"}, Split(2)),
        (torch.float32, {"method": "race", "adversary": {"steps": 2}}, Split(2, checkpointing=True)),
        (torch.float32, {"method": "sdd"}, Split(2)),
    ],
)
def test_groups_of_rows_have_the_gradient_of_the_whole_batch(
    dtype: torch.dtype, values: dict[str, Any], split: Split
) -> None:
    pipe = pico_pipeline(dtype=dtype)
    whole, rows = gradients(pipe, Split(), values)
    found, at_once = gradients(pipe, split, values)
    assert at_once == min(rows, split.rows or rows)
    allowed = 1e-12 if dtype == torch.float64 else max(1e-6, 2 * worst(whole, by_other_kernels(pipe, values)))
    assert worst(whole, found) < allowed
    assert not pipe.unet.is_gradient_checkpointing


@pytest.mark.parametrize("family", ["sdxl", "flux-dev", "pixart"])
def test_every_family_takes_rows_in_groups(family: str) -> None:
    pipe = family_pipeline(family).to(torch.float64)
    values = {"increment": {"modules": "text"}}
    whole, _ = gradients(pipe, Split(), values)
    found, at_once = gradients(pipe, Split(2, checkpointing=True), values)
    assert at_once == 2
    assert worst(whole, found) < 1e-12


CARDS = {  # model: (its latents' side, GiB of the card, GiB of its weights in float16, most GiB to keep)
    "sd1": (64, 8, 2.0, 6),
    "sdxl": (128, 16, 6.5, 12),
}


def exact_unet(model: str) -> UNet2DConditionModel:
    """The denoiser in float16 without values, a rank 1 increment on every target in effect."""
    width = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (320, 640, 1280), "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20), "cross_attention_dim": 2048, "use_linear_projection": True,
        "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    } if model == "sdxl" else {"cross_attention_dim": 768}  # fmt: skip
    with torch.device("meta"):
        unet = UNet2DConditionModel(**width).half().requires_grad_(False)
    TrainableLowRank(unet, 1, torch.Generator())
    return unet


def call(unet: UNet2DConditionModel, side: int, rows: int) -> dict[str, Any]:
    def half(*shape: int) -> Tensor:
        return torch.empty((rows, *shape), dtype=torch.float16, device="meta")

    given: dict[str, Any] = {"sample": half(4, side, side), "timestep": torch.ones(rows, device="meta")}
    given["encoder_hidden_states"] = half(77, unet.config.cross_attention_dim)
    if unet.config.addition_embed_type is not None:
        given["added_cond_kwargs"] = {"text_embeds": half(1280), "time_ids": half(6)}
    return given


class Flash(TorchFunctionMode):
    """Attention that never writes its matrix of probabilities, as on a GPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        query, key, value = args[:3] if args else (kwargs[name] for name in ("query", "key", "value"))
        return query * key.mean() * value.mean()  # keeps what the kernel keeps, and two numbers


def kept_by(unet: UNet2DConditionModel, given: dict[str, Any]) -> float:
    """GiB of all different tensors that autograd saves of a call, weights left out."""
    weights = {one.untyped_storage()._cdata for one in unet.parameters()}
    saved: dict[int, tuple[int, Tensor]] = {}

    def pack(tensor: Tensor) -> Tensor:
        if (place := tensor.untyped_storage()._cdata) not in weights:
            saved[place] = tensor.untyped_storage().nbytes(), tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), Flash():
        unet(**given)
    return sum(size for size, _ in saved.values()) / 2**30


@pytest.mark.parametrize("model", ["sd1", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_the_default_batch_fits_on_the_cards_that_people_have(model: str) -> None:
    side, card, weights, most = CARDS[model]
    unet = exact_unet(model)
    room = 0.75 * (card - weights) * 2**30
    plan = fitted(
        34, room, lambda less: kept_by_one_row(unet, call(unet, side, 1), checkpointing=less), "the exact U-Net"
    )
    assert plan.kept <= min(room, most * 2**30)
    assert plan.split.rows is not None
    if not plan.split.checkpointing:
        found = kept_by(unet, call(unet, side, plan.split.rows))
        assert found == pytest.approx(plan.kept / 2**30, rel=0.05)
        assert found <= most


def test_what_does_not_fit_is_refused_with_what_makes_it_fit() -> None:
    with pytest.raises(RecipeError, match=r"keeps 3.0 GiB for its gradient, and 2.0 GiB are(.|\n)*--dtype bfloat16"):
        fitted(8, 2 * 2**30, lambda less: 3 * 2**30, "a model")


@pytest.mark.parametrize(
    ("room", "split"), [(80, Split()), (79, Split(7)), (19, Split(1)), (9, Split(None, True)), (7, Split(7, True))]
)
def test_the_fewest_passes_that_fit_are_taken(room: int, split: Split) -> None:
    """A row keeps 10, or 1 with its blocks' inputs alone."""
    assert fitted(8, room, lambda less: 1 if less else 10, "a model").split == split


def test_rows_are_those_of_the_batches() -> None:
    """The forecast's rows against those that a source really draws, for every source."""
    for values in ({}, {"x_t": {**SMALL["x_t"], "source": "student"}}, {"x_t": {**SMALL["x_t"], "source": "q_sample"}}):
        plan = Recipe.make(**{"target": "snoopy", **SMALL, "batch_size": 8, "steps": 1, **values})
        pipe = pico_pipeline()
        base = TeacherModel(pipe)
        method = find_method(plan.method)
        assert method is not None
        assert method.objective is not None
        run = PredictionRun(Task(plan, base, select_modules(base.denoiser, "targets"), method.objective(plan)))
        drawn = run.source.batch(0)
        run.trainable.remove()
        assert rows_with_gradient(plan) == len(drawn.latents) + len(drawn.anchor_latents)
