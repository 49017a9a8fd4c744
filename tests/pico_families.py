"""A pico pipeline of every family: each family's own classes, random weights, tens of channels, 16x16 pictures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from pico import TEXT_WIDTH, WORDS, pico_pipeline, pico_text_encoder, pico_tokenizer
from transformers import CLIPTextModelWithProjection, T5Config, T5EncoderModel, T5Tokenizer

T5_WIDTH = 2 * TEXT_WIDTH  # SD3 pads what CLIP gives to the width of T5


def pico_t5() -> tuple[T5EncoderModel, T5Tokenizer]:
    """T5's encoder, one layer, and a tokenizer of whole words and letters."""
    pieces = [*(f"▁{word}" for word in WORDS), "▁", *(chr(code) for code in range(97, 123)), ","]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    vocab += [(piece, -1.0 if len(piece) > 1 else -8.0) for piece in dict.fromkeys(pieces)]
    tokenizer = T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=16)
    encoder = T5EncoderModel(
        T5Config(vocab_size=len(tokenizer), d_model=T5_WIDTH, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    )
    return encoder, tokenizer


def pico_clip_with_projection() -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(pico_text_encoder(pico_tokenizer()).config)


def pico_vae(channels: int = 4) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=16,
        shift_factor=0.0,
        scaling_factor=1.0,
    )


def unet(**config: Any) -> UNet2DConditionModel:
    values: dict[str, Any] = {
        "sample_size": 8, "block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "cross_attention_dim": TEXT_WIDTH,
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "attention_head_dim": 2, "use_linear_projection": True,
    }  # fmt: skip
    return UNet2DConditionModel(**(values | config))


def sd2() -> StableDiffusionPipeline:
    pipe = pico_pipeline(unet=unet())
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, prediction_type="v_prediction")
    return pipe


def sdxl() -> StableDiffusionXLPipeline:
    tokenizer = pico_tokenizer()
    return StableDiffusionXLPipeline(
        vae=pico_vae(), text_encoder=pico_text_encoder(tokenizer), text_encoder_2=pico_clip_with_projection(),
        tokenizer=tokenizer, tokenizer_2=pico_tokenizer(),
        unet=unet(
            cross_attention_dim=2 * TEXT_WIDTH, transformer_layers_per_block=(1, 2), addition_embed_type="text_time",
            addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + TEXT_WIDTH,
        ),
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
            timestep_spacing="leading",
        ),
        add_watermarker=False,
    )  # fmt: skip


def sd3() -> StableDiffusion3Pipeline:
    t5, tokenizer_3 = pico_t5()
    return StableDiffusion3Pipeline(
        vae=pico_vae(), text_encoder=pico_clip_with_projection(), text_encoder_2=pico_clip_with_projection(),
        text_encoder_3=t5, tokenizer=pico_tokenizer(), tokenizer_2=pico_tokenizer(), tokenizer_3=tokenizer_3,
        transformer=SD3Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=8,
            num_attention_heads=4, caption_projection_dim=32, joint_attention_dim=T5_WIDTH,
            pooled_projection_dim=2 * TEXT_WIDTH, pos_embed_max_size=8, qk_norm="rms_norm", dual_attention_layers=(0,),
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )  # fmt: skip


def flux(guidance_embeds: bool = True) -> FluxPipeline:
    t5, tokenizer_2 = pico_t5()
    tokenizer = pico_tokenizer()
    pipe = FluxPipeline(
        vae=pico_vae(), text_encoder=pico_text_encoder(tokenizer), tokenizer=tokenizer, text_encoder_2=t5,
        tokenizer_2=tokenizer_2,
        transformer=FluxTransformer2DModel(
            in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=T5_WIDTH, pooled_projection_dim=TEXT_WIDTH, axes_dims_rope=(4, 4, 8),
            guidance_embeds=guidance_embeds,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(
            shift=3.0 if guidance_embeds else 1.0, use_dynamic_shifting=guidance_embeds
        ),
    )  # fmt: skip
    pipe.default_sample_size = 8  # the pipeline's own is FLUX's, whatever the denoiser's size
    return pipe


def flux_schnell() -> FluxPipeline:
    return flux(guidance_embeds=False)


def pixart() -> PixArtSigmaPipeline:
    encoder, tokenizer = pico_t5()
    return PixArtSigmaPipeline(
        tokenizer=tokenizer, text_encoder=encoder, vae=pico_vae(),
        transformer=PixArtTransformer2DModel(
            num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=2,
            cross_attention_dim=32, sample_size=8, caption_channels=T5_WIDTH, interpolation_scale=1,
            use_additional_conditions=False,
        ),
        scheduler=DPMSolverMultistepScheduler(),
    )  # fmt: skip


FAMILY_PIPELINES: dict[str, Callable[[], DiffusionPipeline]] = {
    "sd1": pico_pipeline, "sd2": sd2, "sdxl": sdxl, "sd3": sd3, "flux-dev": flux, "flux-schnell": flux_schnell,
    "pixart": pixart,
}  # fmt: skip


def family_pipeline(name: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> DiffusionPipeline:
    """The pipeline called `name`, frozen, its weights drawn from `seed`; zero-initialised layers are drawn too.

    A fresh transformer predicts nothing at all, as its last layers begin at zero.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipe = FAMILY_PIPELINES[name]()
        denoiser = getattr(pipe, "transformer", None) or pipe.unet
        with torch.no_grad():
            for parameter in denoiser.parameters():
                if not parameter.any():
                    parameter.normal_(std=0.1)
    pipe.to(dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval().requires_grad_(False)
    return pipe
