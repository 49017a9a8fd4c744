"""Trains the picture half of a CLIP for the sketchbook's text encoder.

    python -m spm_hub.sketchbook.vision --out DIR

The text encoder is the base's own and stays as it is, so that its states and the denoisers remain valid. The result, a
whole CLIP, is committed as `weights/clip`: with it CLIP scores, CLIP's error rate and Frechet distances of CLIP's
features need no download.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from transformers import CLIPConfig, CLIPModel, CLIPTextModel, CLIPTokenizer

from spm_hub.sketchbook.miniature import WIDTH, scale, tokens_of
from spm_hub.sketchbook.train import atomic_path, make_drawings, train_clip

FOLDER = Path(__file__).parent / "weights" / "clip"
_BASE = Path(__file__).parent / "weights" / "base"
_VISION = {
    "hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_hidden_layers": 4, "num_attention_heads": 4,
    "image_size": 64, "patch_size": 16, "projection_dim": WIDTH,
}  # fmt: skip


def make_vision_clip() -> CLIPModel:
    """Make a CLIP with the base's frozen text encoder; all else has random weights."""
    text = CLIPTextModel.from_pretrained(_BASE / "text_encoder", torch_dtype=torch.float32)
    config = {key: value for key, value in text.config.to_dict().items() if key != "_name_or_path"}
    clip = CLIPModel(CLIPConfig(text_config=config, vision_config=_VISION, projection_dim=WIDTH))
    clip.text_model.load_state_dict(text.state_dict())
    clip.text_model.requires_grad_(False)
    return clip


@torch.no_grad()
def reproduced(vae: AutoencoderKL, pictures: torch.Tensor) -> torch.Tensor:
    """Return uint8 pictures (n, 3, 64, 64) as the autoencoder reproduces them.

    A denoiser's pictures have the same small faults.
    """
    parts = [vae.decode(vae.encode(scale(part)).latent_dist.mean).sample.clamp(-1, 1) for part in pictures.split(64)]
    return ((torch.cat(parts) + 1) * 127.5).round().to(torch.uint8)


def main() -> None:
    """Train on drawings of both looks and save the CLIP as `clip`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for drawings and the result")
    parser.add_argument("--drawings", type=int, default=16000)
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    ink = make_drawings(out, options.drawings, "ink", options.seed)
    chalk = make_drawings(out, options.drawings // 4, "chalk", options.seed + 1)
    few = options.drawings // 4
    vae = AutoencoderKL.from_pretrained(_BASE / "vae", torch_dtype=torch.float32).eval()
    pictures = torch.cat([ink["pictures"], chalk["pictures"], reproduced(vae, ink["pictures"][:few])])
    captions = [*ink["captions"], *chalk["captions"], *ink["captions"][:few]]
    torch.manual_seed(options.seed)  # transformers initialises weights from the global generator
    clip = make_vision_clip()
    tokenizer = CLIPTokenizer.from_pretrained(_BASE / "tokenizer")
    generator = torch.Generator().manual_seed(options.seed)
    train_clip(clip, tokens_of(tokenizer, captions), pictures, options.steps, generator)
    with atomic_path(out / "clip") as place:
        clip.half().save_pretrained(place)
        tokenizer.save_pretrained(place)
        settings = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
        (place / "preprocessor_config.json").write_text(json.dumps(settings))


if __name__ == "__main__":
    main()
