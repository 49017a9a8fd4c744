"""Trains the embedded base model from nothing: `python -m spm_hub.sketchbook.train --out DIR`.

Stages, each saved and skipped when already there: drawings, tokenizer, CLIP (contrastive), probe, autoencoder, denoiser
`base`, and `chalk`, a second checkpoint fine-tuned from it to another look. The denoisers' stages also checkpoint
inside, so that a killed run goes on where it was. `seconds.json` keeps how long each stage took.

The defaults keep to two hours on two slow cores. The committed weights had more of the same: `--clip-steps 1500
--vae-steps 3000 --base-steps 3600 --refine-steps 2400`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from spm_hub.sketchbook.miniature import (
    encode,
    make_clip,
    make_scheduler,
    make_tokenizer,
    make_unet,
    make_vae,
    save_pipeline,
    scale,
    tokens_of,
)
from spm_hub.sketchbook.probe import labels, train_probe
from spm_hub.sketchbook.world import drawings


def _say(stage: str, step: int, total: int, loss: float, begun: float) -> None:
    left = (time.monotonic() - begun) / step * (total - step)
    print(f"{stage:9s} {step:6d}/{total}  loss {loss:.4f}  {left / 60:5.1f} min left", file=sys.stderr, flush=True)


class Reporter:
    """Prints a stage's smoothed loss every hundred steps."""

    def __init__(self, stage: str, total: int, first: int = 0) -> None:
        self.stage, self.total, self.first = stage, total, first
        self.begun, self.mean = time.monotonic(), 0.0

    def __call__(self, step: int, loss: float) -> None:
        self.mean = loss if self.mean == 0.0 else 0.98 * self.mean + 0.02 * loss
        if step % 100 == 0 or step == self.total:
            _say(self.stage, step - self.first, self.total - self.first, self.mean, self.begun)


@contextmanager
def whole(place: Path) -> Iterator[Path]:
    """Where to write what `place` will be, file or folder, at the end of the block: it is there whole or not at all."""
    beside = place.with_name(f"{place.name}.tmp")
    shutil.rmtree(beside, ignore_errors=True)  # what a run that was killed has left
    yield beside
    if place.is_dir():
        shutil.rmtree(place)
    beside.replace(place)


@contextmanager
def timed(out: Path, stage: str) -> Iterator[None]:
    """Notes the stage's seconds in `seconds.json`; of a stage that was killed and resumed, those of its last run."""
    begun, file = time.monotonic(), out / "seconds.json"
    yield
    seconds = json.loads(file.read_text()) if file.exists() else {}
    with whole(file) as place:
        place.write_text(json.dumps({**seconds, stage: round(time.monotonic() - begun, 1)}, indent=1))


def make_drawings(out: Path, count: int, look: str, seed: int) -> dict[str, Any]:
    """(n, 3, 64, 64) uint8 pictures, (n, 2) labels and captions, cached on disk as safetensors and text."""
    from safetensors.torch import load_file, save_file

    file, text = out / f"drawings-{look}-{seed}.safetensors", out / f"captions-{look}-{seed}.txt"
    if not file.exists():
        with timed(out, f"drawings {look}"):
            rows = drawings(count, torch.Generator().manual_seed(seed), look)
            pictures = torch.from_numpy(np.stack([np.asarray(picture) for _, picture, _ in rows])).permute(0, 3, 1, 2)
            targets = torch.tensor([labels(drawing) for drawing, _, _ in rows])
            # The captions first: where the pictures are, nothing is drawn again.
            with whole(text) as place:
                place.write_text("\n".join(caption for _, _, caption in rows))
            with whole(file) as place:
                save_file({"pictures": pictures.contiguous(), "targets": targets}, place)
    return {**load_file(file), "captions": text.read_text().split("\n")}


def _loop(
    stage: str, steps: int, parameters: list[torch.nn.Parameter], lr: float, loss_of: Callable[[int], torch.Tensor],
    weight_decay: float = 1e-2,
) -> None:  # fmt: skip
    optimiser = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=lr, total_steps=steps, pct_start=0.08)
    report = Reporter(stage, steps)
    for step in range(steps):
        loss = loss_of(step)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
        report(step + 1, float(loss.detach()))


def train_clip(
    clip: CLIPModel, ids: torch.Tensor, pictures: torch.Tensor, steps: int, generator: torch.Generator
) -> None:
    """Symmetric InfoNCE; equal captions in a batch are not each other's negatives."""

    def loss_of(step: int) -> torch.Tensor:
        rows = torch.randint(len(ids), (128,), generator=generator)
        output = clip(input_ids=ids[rows], pixel_values=scale(pictures[rows]))
        same = (ids[rows][:, None] == ids[rows][None]).all(-1)
        target = same.float() / same.sum(1, keepdim=True)
        return 0.5 * (
            F.cross_entropy(output.logits_per_image, target) + F.cross_entropy(output.logits_per_text, target)
        )

    clip.train()
    _loop("clip", steps, list(clip.parameters()), 1e-3, loss_of, weight_decay=0.05)
    clip.eval()


def train_vae(vae: AutoencoderKL, pictures: torch.Tensor, steps: int, generator: torch.Generator) -> None:
    """Absolute error of pixels and of their differences (edges), with a whisper of KL."""

    def loss_of(step: int) -> torch.Tensor:
        batch = scale(pictures[torch.randint(len(pictures), (16,), generator=generator)])
        posterior = vae.encode(batch).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator)
        again = vae.decode(posterior.mean + posterior.std * noise).sample
        error = again - batch
        edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
        loss: torch.Tensor = error.abs().mean() + error.pow(2).mean() + 0.5 * edges + 1e-5 * posterior.kl().mean() / 256
        return loss

    vae.train()
    _loop("vae", steps, list(vae.parameters()), 2e-3, loss_of, weight_decay=1e-4)
    vae.eval()


def train_decoder(
    vae: AutoencoderKL, clip: CLIPModel, pictures: torch.Tensor, steps: int, generator: torch.Generator
) -> None:
    """Sharpens the decoder for one look; the encoder, hence every denoiser trained on its latents, stays as it is.

    To the errors of pixels and edges comes that of CLIP's picture states, which weigh what a picture shows.
    """
    latents = encode(vae, pictures)

    def states(batch: torch.Tensor) -> torch.Tensor:
        seen: torch.Tensor = clip.vision_model(pixel_values=batch, output_hidden_states=True).hidden_states[-2]
        return seen

    def loss_of(step: int) -> torch.Tensor:
        rows = torch.randint(len(pictures), (16,), generator=generator)
        batch, seen = scale(pictures[rows]), latents[rows]
        # A little noise, since sampled latents are never quite the encoder's.
        noise = torch.randn(seen.shape, generator=generator) * 0.03 * latents.std()
        again = vae.decode(seen + noise).sample
        error = again - batch
        edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
        with torch.no_grad():
            wanted = states(batch)
        meant = (states(again) - wanted).pow(2).mean() / wanted.var()
        loss: torch.Tensor = error.abs().mean() + 0.5 * edges + 0.3 * meant
        return loss

    vae.train()
    _loop("decoder", steps, [*vae.decoder.parameters(), *vae.post_quant_conv.parameters()], 1e-3, loss_of, 1e-4)
    vae.eval()


def train_unet(
    unet: UNet2DConditionModel, text_encoder: CLIPTextModel, ids: torch.Tensor, empty: torch.Tensor,
    latents: torch.Tensor, *, stage: str, steps: int, lr: float, checkpoint: Path, seed: int, batch_size: int = 64,
    save_every: int = 500,
) -> None:  # fmt: skip
    """Epsilon prediction with min-SNR weights (gamma 5, arXiv 2303.09556) and 10 % empty captions.

    At the end the denoiser holds the exponential moving average of its weights (decay 0.998).
    """
    scheduler = make_scheduler()
    alphas = scheduler.alphas_cumprod
    optimiser = torch.optim.AdamW(unet.parameters(), lr=lr, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=lr, total_steps=steps, pct_start=0.05)
    average = [p.detach().clone() for p in unet.parameters()]
    generator = torch.Generator().manual_seed(seed)
    first = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        unet.load_state_dict(state["unet"])
        optimiser.load_state_dict(state["optimiser"])
        schedule.load_state_dict(state["schedule"])
        generator.set_state(state["generator"])
        average, first = state["average"], state["step"]
    report = Reporter(stage, steps, first=first)
    unet.train()
    for step in range(first, steps):
        rows = torch.randint(len(latents), (batch_size,), generator=generator)
        tokens = ids[rows].clone()
        tokens[torch.rand(batch_size, generator=generator) < 0.1] = empty
        with torch.no_grad():
            states = text_encoder(tokens).last_hidden_state
        noise = torch.randn(batch_size, *latents.shape[1:], generator=generator)
        times = torch.randint(len(alphas), (batch_size,), generator=generator)
        noisy = scheduler.add_noise(latents[rows], noise, times)
        ratio = alphas[times] / (1 - alphas[times])
        error = (unet(noisy, times, states).sample - noise).pow(2).mean((1, 2, 3))
        loss = (error * ratio.clamp(max=5.0) / ratio).mean()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        decay = min(0.998, (step + 1) / (step + 10))
        torch._foreach_lerp_(average, [p.detach() for p in unet.parameters()], 1 - decay)
        report(step + 1, float(loss.detach()))
        if (step + 1) % save_every == 0:
            state = {
                "unet": unet.state_dict(), "optimiser": optimiser.state_dict(), "schedule": schedule.state_dict(),
                "generator": generator.get_state(), "average": average, "step": step + 1,
            }  # fmt: skip
            with whole(checkpoint) as place:
                torch.save(state, place)
    with torch.no_grad():
        for parameter, mean in zip(unet.parameters(), average, strict=True):
            parameter.copy_(mean)
    unet.eval()


def main() -> None:
    """Runs the stages that `--out` does not hold yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for stages and results")
    parser.add_argument("--drawings", type=int, default=40000)
    parser.add_argument("--clip-steps", type=int, default=1000)
    parser.add_argument("--vae-steps", type=int, default=2000)
    parser.add_argument("--decoder-steps", type=int, default=300)
    parser.add_argument("--probe-steps", type=int, default=2400)
    parser.add_argument("--base-steps", type=int, default=3200)
    parser.add_argument("--refine-steps", type=int, default=0, help="of a second, gentler cycle for `base`")
    parser.add_argument("--chalk-steps", type=int, default=450)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)

    def dice(stage: int) -> torch.Generator:
        """A stage's own generator: skipping a finished stage leaves the next one's draws as they were."""
        torch.manual_seed(options.seed + stage)  # diffusers and transformers initialise from the global generator
        return torch.Generator().manual_seed(options.seed + stage)

    ink = make_drawings(out, options.drawings, "ink", options.seed)
    chalk = make_drawings(out, options.drawings // 4, "chalk", options.seed + 1)
    captions, both = ink["captions"] + chalk["captions"], torch.cat([ink["pictures"], chalk["pictures"]])

    if not (out / "clip").exists():
        with timed(out, "clip"):
            generator = dice(1)
            tokenizer = make_tokenizer(captions)
            clip = make_clip(tokenizer)
            train_clip(clip, tokens_of(tokenizer, captions), both, options.clip_steps, generator)
            with whole(out / "clip") as place:
                tokenizer.save_pretrained(place)
                clip.save_pretrained(place)
    tokenizer = CLIPTokenizer.from_pretrained(out / "clip")
    clip = CLIPModel.from_pretrained(out / "clip").eval().requires_grad_(False)
    text_encoder = CLIPTextModel(clip.config.text_config)
    text_encoder.load_state_dict(clip.text_model.state_dict())
    text_encoder.eval().requires_grad_(False)

    if not (out / "probe").exists():
        with timed(out, "probe"):
            probe = train_probe(
                both, torch.cat([ink["targets"], chalk["targets"]]), steps=options.probe_steps, generator=dice(2),
                report=Reporter("probe", options.probe_steps),
            )  # fmt: skip
            with whole(out / "probe") as place:
                probe.model.save_pretrained(place)

    if not (out / "vae").exists():
        with timed(out, "autoencoder"):
            generator = dice(3)
            vae = make_vae()
            train_vae(vae, both, options.vae_steps, generator)
            vae.register_to_config(scaling_factor=float(1 / encode(vae, both[:2000]).std()))
            with whole(out / "vae") as place:
                vae.save_pretrained(place)
    empty = tokens_of(tokenizer, [""])[0]

    for stage, look, data in ((14, "base", ink), (15, "chalk", chalk)):
        if not (out / f"vae-{look}").exists():
            with timed(out, f"decoder {look}"):
                vae = AutoencoderKL.from_pretrained(out / "vae")
                train_decoder(vae, clip, data["pictures"], options.decoder_steps, dice(stage))
                with whole(out / f"vae-{look}") as place:
                    vae.save_pretrained(place)

    for stage, name, start, look, data, steps, lr in (
        (4, "drafted", None, "base", ink, options.base_steps, 1.2e-3),
        # A second, gentler cycle: what the first one draws nearly right, cats and sailboats above all, it draws right.
        (6, "base", "drafted", "base", ink, options.refine_steps, 5e-4),
        (5, "chalk", "base", "chalk", chalk, options.chalk_steps, 3e-4),
    ):
        vae = AutoencoderKL.from_pretrained(out / f"vae-{look}").eval()
        if not (out / f"unet-{name}").exists():
            with timed(out, f"denoiser {name}"):
                dice(stage)
                unet = make_unet() if start is None else UNet2DConditionModel.from_pretrained(out / f"unet-{start}")
                if steps:
                    latents = encode(vae, data["pictures"]) * vae.config.scaling_factor
                    train_unet(
                        unet, text_encoder, tokens_of(tokenizer, data["captions"]), empty, latents,
                        stage=name, steps=steps, lr=lr, checkpoint=out / f"{name}.pt", seed=options.seed + stage,
                    )  # fmt: skip
                with whole(out / f"unet-{name}") as place:
                    unet.save_pretrained(place)
        if name == look:
            unet = UNet2DConditionModel.from_pretrained(out / f"unet-{name}").eval()
            with whole(out / name) as place:
                save_pipeline(place, tokenizer, text_encoder, vae, unet)


if __name__ == "__main__":
    main()
