"""A pico pipeline of every family: each family's own classes, random weights, tens of channels, 16x16 pictures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from pico import TEXT_WIDTH, WORDS, pico_pipeline, pico_text_encoder, pico_tokenizer
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextModelWithProjection,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

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


TURN = "<|im_start|>{}<|im_end|>\n<|im_start|>"


def pico_qwen_tokenizer() -> Qwen2Tokenizer:
    """A byte-level tokenizer with a token for each of the words, as language models have them."""
    vocab = {token: index for index, token in enumerate(["<|endoftext|>", *sorted(ByteLevel.alphabet())])}
    merges = []
    for word in (*WORDS, *(f"Ġ{word}" for word in WORDS)):
        head = word[0]
        for piece in word[1:]:
            if (head, piece) not in merges:
                merges.append((head, piece))
            head += piece
            vocab.setdefault(head, len(vocab))
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=merges)
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    content = "message['content'] if message['content'] is string else message['content'][0]['text']"
    tokenizer.chat_template = f"{{% for message in messages %}}{TURN.format('{{ ' + content + ' }}')}{{% endfor %}}"
    return tokenizer


LANGUAGE_MODEL: dict[str, Any] = {
    "hidden_size": TEXT_WIDTH, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 8, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip


def qwen() -> QwenImagePipeline:
    """Its language model gives a longer text more states, and its negative prompts have a call of their own."""
    tokenizer = pico_qwen_tokenizer()
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    pipe = QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=AutoencoderKLQwenImage(
            base_dim=4, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[False],
            latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
        ),
        text_encoder=Qwen2_5_VLForConditionalGeneration(
            Qwen2_5_VLConfig(
                text_config=LANGUAGE_MODEL | {"rope_scaling": rope, "vocab_size": len(tokenizer)}, vision_config=vision
            )
        ),
        tokenizer=tokenizer,
        transformer=QwenImageTransformer2DModel(
            patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=TEXT_WIDTH, axes_dims_rope=(4, 6, 6),
        ),
    )  # fmt: skip
    pipe.prompt_template_encode, pipe.prompt_template_encode_start_idx = TURN, 1
    return pipe


class TextProcessor(ProcessorMixin):
    """Stands for the processor of pictures and texts that FLUX.2 has as its tokenizer, and which needs torchvision."""

    def __init__(self, tokenizer: Any = None, chat_template: str | None = None) -> None:
        super().__init__(tokenizer, chat_template=chat_template)

    @classmethod
    def get_attributes(cls) -> list[str]:
        return ["tokenizer"]


def flux2() -> Flux2Pipeline:
    """FLUX.2 dev; its call has to be given `text_encoder_out_layers`, as this language model has three."""
    tokenizer = pico_qwen_tokenizer()
    vision = {
        "model_type": "pixtral", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "head_dim": 8, "image_size": 32, "patch_size": 16,
    }  # fmt: skip
    text = LANGUAGE_MODEL | {"model_type": "mistral", "vocab_size": len(tokenizer)}
    return Flux2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=AutoencoderKLFlux2(
            block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4, sample_size=16,
        ),
        text_encoder=Mistral3ForConditionalGeneration(Mistral3Config(text_config=text, vision_config=vision)),
        tokenizer=TextProcessor(tokenizer, tokenizer.chat_template),
        transformer=Flux2Transformer2DModel(
            in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=3 * TEXT_WIDTH, axes_dims_rope=(4, 4, 4, 4),
        ),
    )  # fmt: skip


FAMILY_PIPELINES: dict[str, Callable[[], DiffusionPipeline]] = {
    "sd1": pico_pipeline, "sd2": sd2, "sdxl": sdxl, "sd3": sd3, "flux-dev": flux, "flux-schnell": flux_schnell,
    "pixart": pixart,
}  # fmt: skip
OTHER_PIPELINES: dict[str, Callable[[], DiffusionPipeline]] = {"qwen-image": qwen, "flux-2": flux2}
"""Denoisers like those, behind text encoders unlike theirs."""


def family_pipeline(name: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> DiffusionPipeline:
    """The pipeline called `name`, frozen, its weights drawn from `seed`; zero-initialised layers are drawn too.

    A fresh transformer predicts nothing at all, as its last layers begin at zero.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipe = (FAMILY_PIPELINES | OTHER_PIPELINES)[name]()
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
