"""Pico Stable Diffusion: a random-weights pipeline of SD1's own classes that runs a step in milliseconds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from spm_hub.adapters.adapter import Adapter, increment_info
from spm_hub.adapters.increments import Dense, Increment, LowRank, Mask
from spm_hub.adapters.manifest import Base, Concept, GateDefaults, Manifest, slug

WORDS = (
    "a photo of the by on with and in painting snoopy mickey mouse spongebob pikachu dog cat church van gogh "
    "picasso nudity nude person sunny beach red blue style beagle"
).split()
TEXT_WIDTH = 16
WINDOW = 12


def pico_tokenizer(words: Iterable[str] = WORDS, window: int = WINDOW) -> CLIPTokenizer:
    """A CLIP tokenizer whose vocabulary is the printable bytes and one token for each of `words`."""
    letters = [chr(code) for code in range(33, 127)]
    tokens = letters + [letter + "</w>" for letter in letters]
    merges: list[tuple[str, str]] = []
    for word in words:
        head, tail = word[0], [*word[1:-1], word[-1] + "</w>"]
        for piece in tail if len(word) > 1 else ():
            if (head, piece) not in merges:
                merges.append((head, piece))
            head += piece
            if head not in tokens:
                tokens.append(head)
    vocab = {token: index for index, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=window)


def pico_text_encoder(tokenizer: CLIPTokenizer, width: int = TEXT_WIDTH) -> CLIPTextModel:
    """CLIP's text tower, two layers; bos, eos and pad ids agree with `tokenizer`."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=tokenizer.model_max_length,
            projection_dim=width,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def pico_unet(cross_attention_dim: int = TEXT_WIDTH, channels: tuple[int, int] = (16, 32)) -> UNet2DConditionModel:
    """SD1's UNet classes at two resolutions, latents (4, 8, 8); 1x1 convolutions as proj_in and proj_out."""
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=channels,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=cross_attention_dim,
        attention_head_dim=2,
        norm_num_groups=4,
    )


def pico_pipeline(
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    *,
    channels: tuple[int, int] = (16, 32),
    text_width: int = TEXT_WIDTH,
    unet: UNet2DConditionModel | None = None,
) -> StableDiffusionPipeline:
    """A whole SD1 pipeline with weights drawn from `seed`, 16x16 pictures; `unet` replaces the drawn one."""
    tokenizer = pico_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipe = StableDiffusionPipeline(
            vae=AutoencoderKL(
                block_out_channels=(8, 16),
                down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
                up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
                latent_channels=4,
                norm_num_groups=4,
                sample_size=16,
            ),
            text_encoder=pico_text_encoder(tokenizer, text_width),
            tokenizer=tokenizer,
            unet=pico_unet(text_width, channels) if unet is None else unet,
            scheduler=DDIMScheduler(
                beta_start=0.00085,
                beta_end=0.012,
                beta_schedule="scaled_linear",
                clip_sample=False,
                set_alpha_to_one=False,
                steps_offset=1,
            ),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    if dtype != torch.float32:
        pipe.to(dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    for component in (pipe.unet, pipe.vae, pipe.text_encoder):
        component.eval().requires_grad_(False)
    return pipe


def target_modules(unet: UNet2DConditionModel) -> dict[str, nn.Module]:
    """SD1's targets, told by their names alone: everything inside an attention block, norms aside."""
    return {
        path: module
        for path, module in unet.named_modules()
        if ".attentions." in path and isinstance(module, nn.Linear | nn.Conv2d)
    }


def pico_eraser(
    unet: UNet2DConditionModel,
    target: str = "snoopy",
    seed: int = 1,
    *,
    kind: str = "low_rank",
    rank: int = 1,
    aliases: Sequence[str] = (),
    gate: GateDefaults | None = None,
    paths: Sequence[str] | None = None,
) -> Adapter:
    """A random eraser on all targets of `unet`, or on those at `paths`, strong enough to change every prediction.

    Its gate is transport unless given: it acts on every prompt, with gammas that differ.
    """
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    modules = target_modules(unet)
    increments: dict[str, Increment] = {}
    for path in modules if paths is None else paths:
        weight = modules[path].weight
        out, width, *kernel = weight.shape
        if kind == "low_rank":
            increments[path] = LowRank(0.2 * noise(rank, width, *kernel), 0.2 * noise(out, rank, *[1] * len(kernel)))
        elif kind == "dense":
            bias = None if modules[path].bias is None else 0.05 * noise(out)
            increments[path] = Dense(0.05 * noise(*weight.shape), bias)
        else:
            dim = len(increments) % 2
            increments[path] = Mask(torch.rand(weight.shape[dim], generator=generator) > 0.3, dim)
    manifest = Manifest(
        name=slug(target),
        concept=Concept(target=target, aliases=tuple(aliases)),
        increment=increment_info(increments),
        base=Base(family="sd1", id="pico", fingerprint="0" * 64),
        recipe={},
        gate=gate or GateDefaults(kind="transport"),
    )
    return Adapter(manifest, increments)
