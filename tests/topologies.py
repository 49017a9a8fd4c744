"""Denoisers with every module of the real ones, each a few channels wide: their key lists are the real key lists."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DiffusionPipeline, FluxTransformer2DModel, UNet2DConditionModel
from torch import Tensor, nn

import spm_hub
from spm_hub.adapters.adapter import Adapter, increment_info
from spm_hub.adapters.increments import Dense, Increment, LowRank, Mask
from spm_hub.adapters.manifest import Base, Concept, Manifest
from spm_hub.models.architectures import family_of, targets

TEXT = 24
_SMALL: dict[str, Any] = {"sample_size": 8, "norm_num_groups": 4, "cross_attention_dim": TEXT, "attention_head_dim": 2}
_FOUR: dict[str, Any] = {"block_out_channels": (8, 12, 16, 20), **_SMALL}


def _unet(**config: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(**config)


def _flux(guidance: bool) -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        in_channels=8, num_layers=19, num_single_layers=38, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=TEXT, pooled_projection_dim=TEXT, axes_dims_rope=(2, 2, 4), guidance_embeds=guidance,
    )  # fmt: skip


BUILDERS = {
    "sd1": lambda: _unet(**_FOUR),
    "sd2": lambda: _unet(**_FOUR, use_linear_projection=True),
    "sdxl": lambda: _unet(
        **_SMALL, block_out_channels=(8, 12, 16), use_linear_projection=True, transformer_layers_per_block=(1, 2, 10),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), addition_embed_type="text_time",
        addition_time_embed_dim=4, projection_class_embeddings_input_dim=6 * 4 + TEXT,
    ),
    "flux": lambda: _flux(guidance=True),
    "flux-schnell": lambda: _flux(guidance=False),
}  # fmt: skip


def topology(name: str, seed: int = 0) -> nn.Module:
    """The denoiser called `name`, frozen, its weights drawn from `seed`; what begins at zero is drawn too."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        denoiser = BUILDERS[name]()
        with torch.no_grad():
            for parameter in denoiser.parameters():
                if not parameter.any():
                    parameter.normal_(std=0.1)
    return denoiser.eval().requires_grad_(False)


class Bare(DiffusionPipeline):
    """Nothing but a denoiser, under the name its family gives it."""

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__()
        self.register_modules(**{family_of(denoiser).denoiser: denoiser})

    def __call__(self) -> None: ...


def output_with(denoiser: nn.Module, adapter: Adapter) -> Tensor:
    """The prediction with an eraser at full strength; the denoiser is then as it was."""
    with spm_hub.attach(Bare(denoiser), [adapter], gate="always"):
        return predict(denoiser)


def predict(denoiser: Any) -> Tensor:
    """What the denoiser makes of two fixed rows."""
    random = torch.Generator().manual_seed(3)

    def noise(*shape: int) -> Tensor:
        return torch.randn(2, *shape, generator=random)

    time, text, pooled = torch.full((2,), 0.5), noise(5, TEXT), noise(TEXT)
    if isinstance(denoiser, FluxTransformer2DModel):
        given = {"guidance": time} if denoiser.config.guidance_embeds else {}
        places = {"img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(5, 3)}
        with torch.no_grad():
            return denoiser(
                hidden_states=noise(16, 8), encoder_hidden_states=text, pooled_projections=pooled, timestep=time,
                **given, **places,
            ).sample.clone()  # fmt: skip
    added = {"text_embeds": pooled, "time_ids": torch.ones(2, 6)} if denoiser.config.addition_embed_type else None
    with torch.no_grad():
        return denoiser(noise(4, 8, 8), 500, encoder_hidden_states=text, added_cond_kwargs=added).sample.clone()


def random_eraser(
    denoiser: nn.Module, kind: str = "low_rank", *, rank: int = 1, seed: int = 1, size: float = 0.3
) -> Adapter:
    """A random eraser on every target, scaled by the widths."""
    random = torch.Generator().manual_seed(seed)
    increments: dict[str, Increment] = {}
    for path, module in targets(denoiser).items():
        out, width, *kernel = module.weight.shape
        if kind == "low_rank":
            down = torch.randn(rank, width, *kernel, generator=random) / width**0.5
            up = size * torch.randn(out, rank, *[1] * len(kernel), generator=random)
            increments[path] = LowRank(down, up)
        elif kind == "dense":
            bias = None if module.bias is None else 0.05 * torch.randn(out, generator=random)
            delta = size * torch.randn(module.weight.shape, generator=random) / width**0.5
            increments[path] = Dense(delta, bias)
        else:
            dim = len(increments) % 2
            increments[path] = Mask(torch.rand(module.weight.shape[dim], generator=random) > 0.2, dim)
    manifest = Manifest(
        name="snoopy",
        concept=Concept(target="snoopy"),
        increment=increment_info(increments),
        base=Base(family=family_of(denoiser).name, id="topology", fingerprint="0" * 64),
        recipe={"method": "spm"},
    )
    return Adapter(manifest, increments)
