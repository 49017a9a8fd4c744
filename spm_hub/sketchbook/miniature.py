"""The sketchbook's networks: Stable Diffusion 1's classes in miniature, with random weights."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPConfig, CLIPModel, CLIPTextModel, CLIPTokenizer

TOKENS = 32  # context window of the text encoder
WIDTH = 128  # of the text encoder's states, which the denoiser's cross-attention reads


def make_tokenizer(captions: list[str]) -> CLIPTokenizer:
    """Train CLIP's byte-level BPE on the captions.

    Every word of the world becomes one token; other words become several.
    """
    trainer = trainers.BpeTrainer(
        vocab_size=1400, min_frequency=20, end_of_word_suffix="</w>",
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    )  # fmt: skip
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Punctuation(),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.train_from_iterator(captions, trainer)
    state = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(pair) if isinstance(pair, list) else tuple(pair.split(" ")) for pair in state["merges"]]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet, *(letter + "</w>" for letter in alphabet), *("".join(pair) for pair in merges)]
    words = [*dict.fromkeys(words), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={word: index for index, word in enumerate(words)}, merges=merges, model_max_length=TOKENS
    )


def make_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    """Make a CLIP with random weights: three text layers and four image layers, `WIDTH` wide."""
    text = {
        "vocab_size": len(tokenizer), "hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_hidden_layers": 3,
        "num_attention_heads": 4, "max_position_embeddings": TOKENS, "projection_dim": WIDTH,
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    vision = {
        "hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_hidden_layers": 4, "num_attention_heads": 4,
        "image_size": 64, "patch_size": 8, "projection_dim": WIDTH,
    }  # fmt: skip
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH))


def tokens_of(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """Return token ids (n, TOKENS), padded and truncated."""
    ids = tokenizer(captions, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt").input_ids
    return ids if isinstance(ids, torch.Tensor) else torch.tensor(ids)


def scale(pictures: torch.Tensor) -> torch.Tensor:
    """Convert uint8 pictures to floats in [-1, 1] of the same shape."""
    return pictures.float() / 127.5 - 1.0


def make_vae() -> AutoencoderKL:
    """Make an autoencoder with random weights, from (3, 64, 64) pictures to (4, 8, 8) latents."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 96), layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=64,
    )  # fmt: skip


def make_unet() -> UNet2DConditionModel:
    """Make a denoiser with random weights: Stable Diffusion 1's class, three levels, (4, 8, 8) latents."""
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(64, 128, 192), layers_per_block=1, cross_attention_dim=WIDTH,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=4, norm_num_groups=16,
    )  # fmt: skip


def make_scheduler() -> DDIMScheduler:
    """Make a scheduler with Stable Diffusion 1's noise schedule."""
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1,
    )  # fmt: skip


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: torch.Tensor) -> torch.Tensor:
    """Return the posterior means (n, 4, 8, 8) of pictures, unscaled."""
    return torch.cat([vae.encode(scale(pictures[i : i + 64])).latent_dist.mean for i in range(0, len(pictures), 64)])


def save_pipeline(
    folder: Path, tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, vae: AutoencoderKL, unet: UNet2DConditionModel
) -> None:
    """Write a diffusers folder in half precision; the given modules are in float32 again afterwards."""
    for module in (vae, unet):
        module.register_to_config(_name_or_path="")  # diffusers would record where on this machine it was read from
    pipe = StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=make_scheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.to(torch.float16).save_pretrained(folder, safe_serialization=True)
    pipe.to(torch.float32)
