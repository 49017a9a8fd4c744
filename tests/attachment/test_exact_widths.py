"""Erasers of exact real size on blocks of each family's exact widths, against float64.

Whole SDXL and FLUX do not fit a test; what one block computes, all of them do. Names and shapes of the whole ones are
tested in test_families.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from test_families import SD35_MEDIUM, SDXL, eraser
from torch import Tensor, nn

import spm_hub
from spm_hub.adapters.adapter import Adapter
from spm_hub.models.architectures import denoiser_of, family_of, targets

pytestmark = pytest.mark.slow

UNET: dict[str, Any] = {"layers_per_block": 1, "up_block_types": ("UpBlock2D",), "down_block_types": ("DownBlock2D",)}
ATTENDING: dict[str, Any] = {
    "layers_per_block": 1, "down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("UpBlock2D",),
}  # fmt: skip
MODELS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "sd1": (UNet2DConditionModel, {**ATTENDING, "block_out_channels": (320,), "cross_attention_dim": 768}),
    "sd2": (
        UNet2DConditionModel,
        {**ATTENDING, "block_out_channels": (640,), "cross_attention_dim": 1024, "use_linear_projection": True},
    ),
    "sdxl": (
        UNet2DConditionModel,
        {**SDXL, **UNET, "block_out_channels": (1280,), "transformer_layers_per_block": 1, "attention_head_dim": 20},
    ),
    # The first block has a second attention, the last one no feed-forward of the text.
    "sd3": (
        SD3Transformer2DModel,
        {**SD35_MEDIUM, "num_layers": 2, "dual_attention_layers": (0,), "sample_size": 8},
    ),
    # Every width of FLUX is in its single block, and the double one is four times as slow.
    "flux": (FluxTransformer2DModel, {"num_layers": 0, "num_single_layers": 1}),
}
CASES = [(name, torch.float32) for name in MODELS] + [("sd1", torch.bfloat16), ("sd2", torch.bfloat16)]
ROWS = 2


class Bare(DiffusionPipeline):
    """A pipeline of a denoiser alone, under the name that its family gives it."""

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__()
        self.register_modules(**{family_of(denoiser).denoiser: denoiser})

    def __call__(self) -> None: ...


def built(make: type[nn.Module], config: dict[str, Any], dtype: torch.dtype) -> nn.Module:
    """Random weights of a trained network's size, without the slow initialisation that they would replace.

    All are cut from one pool of a prime length, which no row of a weight divides. Modulations are zero: their gates
    then are, and every target still sees what it would.
    """
    with torch.device("meta"):
        denoiser = make(**config).to(dtype)
    denoiser = denoiser.to_empty(device="cpu").eval().requires_grad_(False)
    pool = (torch.rand(1_000_003, generator=torch.Generator().manual_seed(0)) * 2 - 1).to(dtype)
    for name, tensor in [*denoiser.named_parameters(), *denoiser.named_buffers()]:
        if ".norm" in name and tensor.dim() > 1:
            tensor.zero_()
            continue
        flat, size = tensor.view(-1), tensor[0].numel() ** -0.5 if tensor.dim() > 1 else 0.5
        scaled = pool * size
        for start in range(0, len(flat), len(pool)):
            flat[start : start + len(pool)] = scaled[: len(flat) - start]
    return denoiser


def inputs(denoiser: Any, dtype: torch.dtype) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> Tensor:
        return torch.randn(ROWS, *shape, generator=generator).to(dtype)

    config = denoiser.config
    time = torch.full((ROWS,), 0.5).to(dtype)
    if isinstance(denoiser, UNet2DConditionModel):
        given = {
            "sample": noise(4, 4, 4),
            "timestep": 500,
            "encoder_hidden_states": noise(7, config.cross_attention_dim),
        }
        if config.addition_embed_type:
            given["added_cond_kwargs"] = {"text_embeds": noise(1280), "time_ids": torch.ones(ROWS, 6, dtype=dtype)}
        return given
    given = {
        "timestep": time, "encoder_hidden_states": noise(7, config.joint_attention_dim),
        "pooled_projections": noise(config.pooled_projection_dim),
    }  # fmt: skip
    if isinstance(denoiser, SD3Transformer2DModel):
        return {**given, "hidden_states": noise(16, 8, 8)}
    guidance = {"guidance": time} if config.guidance_embeds else {}
    places = {"img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(7, 3)}
    return {**given, **guidance, **places, "hidden_states": noise(16, config.in_channels)}


def summed(module: Any, path: str, adapters: list[Adapter], gammas: dict[str, float]) -> Tensor:
    """W + sum gamma dW in float64."""
    weight: Tensor = module.weight.double()
    for adapter in adapters:
        pair: Any = adapter.increments[path]
        up, down = pair.up.double().flatten(1), pair.down.double().flatten(1)
        weight.flatten(1).addmm_(up, down, alpha=gammas[adapter.name])
    return weight


def applied(module: Any, weight: Tensor, x: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return the output of `module` with this weight for x, in `dtype`."""
    bias = None if module.bias is None else module.bias.to(dtype)
    product = F.linear if isinstance(module, nn.Linear) else F.conv2d
    return product(x.to(dtype), weight.to(dtype), bias)


def relative(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def watch(passed: dict[str, tuple[Tensor, Tensor]], path: str) -> Any:
    return lambda module, args, output: passed.update({path: (args[0], output)})


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_outputs_are_those_of_the_float64_sum_and_weights_come_back(name: str, dtype: torch.dtype) -> None:
    make, config = MODELS[name]
    denoiser: Any = built(make, config, dtype)
    pipe, given = Bare(denoiser), inputs(denoiser, dtype)
    gammas = {"snoopy": 0.7, "van-gogh": -0.4}
    adapters: list[Adapter] = [eraser(pipe, key, seed) for seed, key in enumerate(gammas)]
    modules = targets(denoiser_of(pipe))
    before = {path: module.weight.clone() for path, module in modules.items()}
    # One module of every kind and shape: what they compute depends on nothing else.
    kinds = {
        (path.split(".", 2)[0], path.rsplit(".", 2)[-2:][0], path[-6:], module.weight.shape): path
        for path, module in modules.items()
    }
    seen: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
    for mode in ("fold", "branch"):
        with spm_hub.attach(pipe, adapters, mode=mode, strength=gammas), torch.no_grad():
            denoiser(**given)
            # After the first call whatever is in effect stays, and these hooks see what the next layer sees.
            passed = seen.setdefault(mode, {})
            hooks = [modules[path].register_forward_hook(watch(passed, path)) for path in kinds.values()]
            denoiser(**given)
            for hook in hooks:
                hook.remove()
            if mode == "fold":
                folded = {path: modules[path].weight.clone() for path in kinds.values()}
        assert passed.keys() == set(kinds.values())
        assert all(torch.equal(module.weight, before[path]) for path, module in modules.items())
    for path in kinds.values():
        module = modules[path]
        exact_weight, bare_weight = summed(module, path, adapters, gammas), module.weight.double()
        assert relative(folded[path], exact_weight) <= (1e-7 if dtype == torch.float32 else 2e-3), path
        for mode, passed in seen.items():
            x, output = passed[path]
            exact = applied(module, exact_weight, x)
            bare = applied(module, bare_weight, x)
            assert relative(bare, exact) > 0.01, "the erasers are too weak to be seen"
            if dtype == torch.float32:
                assert relative(output, exact) <= 1e-5, (mode, path)
            else:
                # No bfloat16 layer is nearer than the exact sum, rounded once, and its output, rounded once: 2.3e-3.
                # A branch rounds more often: the base's output, the pair's inner and outer product.
                best = relative(applied(module, exact_weight, x, dtype), exact)
                assert relative(output, exact) <= (1.1 * best if mode == "fold" else 5e-3), (mode, path)
