"""Changes of norms: folded and branched, row by row, against the definition in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.normalization import FP32LayerNorm
from diffusers.models.normalization import RMSNorm as DiffusersRMSNorm
from pico import pico_pipeline
from torch import Tensor, nn

import spm_hub
from spm_hub.adapters.adapter import Adapter, increment_info
from spm_hub.adapters.increments import Dense, LowRank, Mask
from spm_hub.adapters.manifest import Base, Concept, Manifest
from spm_hub.attachment.layers import Layers
from spm_hub.errors import CompatibilityError
from spm_hub.models.architectures import changeable, matrices, targets

EPS = 1e-5
NORMS: dict[str, Any] = {
    "layer": lambda: nn.LayerNorm(8, eps=EPS),
    "layer in float32": lambda: FP32LayerNorm(8, eps=EPS),
    "layer without bias": lambda: nn.LayerNorm(8, eps=EPS, bias=False),
    "group": lambda: nn.GroupNorm(2, 8, eps=EPS),
    "rms": lambda: nn.RMSNorm(8, eps=EPS),
    "rms of diffusers": lambda: DiffusersRMSNorm(8, eps=EPS),
    "rms of diffusers with bias": lambda: DiffusersRMSNorm(8, eps=EPS, bias=True),
}


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def made(kind: str) -> nn.Module:
    norm: nn.Module = NORMS[kind]().requires_grad_(False)
    for seed, parameter in enumerate(norm.parameters()):
        parameter.copy_(1 + noise(seed, 8))
    return norm


def by_definition(kind: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    x = x.double()
    if kind == "group":
        parts = x.reshape(len(x), 2, -1)
        centred = parts - parts.mean(-1, keepdim=True)
        whitened = (centred / (centred.square().mean(-1, keepdim=True) + EPS).sqrt()).reshape(x.shape)
        shape = (1, 8, *[1] * (x.dim() - 2))
    else:
        centred = x if kind.startswith("rms") else x - x.mean(-1, keepdim=True)
        whitened = centred / (centred.square().mean(-1, keepdim=True) + EPS).sqrt()
        shape = (8,)
    out = whitened * weight.double().reshape(shape)
    return out if bias is None else out + bias.double().reshape(shape)


@pytest.mark.parametrize("dims", [3, 4])
@pytest.mark.parametrize("kind", NORMS)
def test_norms_change_as_their_definition_says(kind: str, dims: int) -> None:
    norm = made(kind)
    bias: Tensor | None = getattr(norm, "bias", None)
    x = noise(5, 2, 8, *[3] * (dims - 2)) if kind == "group" else noise(5, 2, *[3] * (dims - 2), 8)
    both = {
        name: {"n": Dense(noise(seed, 8), None if bias is None else noise(seed + 1, 8))}
        for seed, name in enumerate(("snoopy", "mickey"), 20)
    }
    before, plain = {key: value.clone() for key, value in norm.state_dict().items()}, norm(x)
    layers = Layers()
    for name, increments in both.items():
        layers.install(name, {"n": norm}, increments)

    def expected(row: Tensor, gammas: tuple[float, float]) -> Tensor:
        weight, moved = before["weight"].double(), None if bias is None else before["bias"].double()
        for gamma, increments in zip(gammas, both.values(), strict=True):
            weight = weight + gamma * increments["n"].delta.double()
            if moved is not None:
                delta_bias = increments["n"].delta_bias
                assert delta_bias is not None
                moved = moved + gamma * delta_bias.double()
        return by_definition(kind, row, weight, moved)

    layers.fold({"snoopy": 0.5, "mickey": -2.0})
    torch.testing.assert_close(norm(x).double(), expected(x, (0.5, -2.0)), rtol=1e-5, atol=1e-5)
    layers.branch({"snoopy": [0.0, 1.5], "mickey": [1.0, 0.25]})
    out = norm(x).double()
    torch.testing.assert_close(out[:1], expected(x[:1], (0.0, 1.0)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out[1:], expected(x[1:], (1.5, 0.25)), rtol=1e-5, atol=1e-5)
    layers.restore()
    assert all(torch.equal(before[key], value) for key, value in norm.state_dict().items())
    assert torch.equal(norm(x), plain)


def test_norms_take_no_product_and_no_mask() -> None:
    weight = torch.ones(8)
    with pytest.raises(CompatibilityError, match=r"n: the adapter's increment is for a weight \(8, 1\)"):
        LowRank(torch.ones(1, 1), torch.ones(8, 1)).check_fits("n", weight)
    for dim in (0, 1):
        with pytest.raises(CompatibilityError, match="mask has 8 entries"):
            Mask(torch.ones(8, dtype=torch.bool), dim).check_fits("n", weight)  # type: ignore[arg-type]


def test_an_eraser_of_norms_acts_in_a_pipeline_and_leaves_it() -> None:
    """No training chooses norms, but what others trained attaches like everything else."""
    pipe: Any = pico_pipeline()
    norms = sorted(changeable(pipe.unet).keys() - matrices(pipe.unet).keys())
    assert norms
    assert all("norm" in path for path in norms)
    assert not set(norms) & set(targets(pipe.unet))
    increments = {path: Dense(noise(i, n := len(pipe.unet.get_submodule(path).weight)), noise(-i - 1, n))
                  for i, path in enumerate(norms)}  # fmt: skip
    manifest = Manifest(
        name="norms", concept=Concept(target="snoopy"), increment=increment_info(increments),
        base=Base(family="sd1", id="pico", fingerprint=""), recipe={},
    )  # fmt: skip
    adapter = Adapter(manifest, increments)
    before = {key: value.clone() for key, value in pipe.unet.state_dict().items()}

    def draw() -> Tensor:
        random = torch.Generator().manual_seed(0)
        found: Tensor = pipe("a dog", num_inference_steps=2, generator=random, output_type="pt").images
        return found

    bare = draw()
    with spm_hub.attach(pipe, [adapter], gate="always"):
        erased = draw()
    assert (erased - bare).abs().max() > 0.01
    assert torch.equal(draw(), bare)
    assert all(torch.equal(before[key], value) for key, value in pipe.unet.state_dict().items())
    with torch.no_grad():
        for path, increment in increments.items():
            pipe.unet.get_submodule(path).weight += increment.delta
            pipe.unet.get_submodule(path).bias += increment.delta_bias
    torch.testing.assert_close(draw(), erased, rtol=1e-4, atol=1e-4)
