"""Trains the embedded base model from scratch: `python -m spm_hub.sketchbook.train --out DIR`.

Stages, each saved, and skipped if it exists: drawings, tokenizer and CLIP (contrastive), probe, autoencoder, denoiser
`base`, and `chalk`, a second checkpoint fine-tuned from it to another look. The denoisers' stages also save checkpoints
of their training, so that a killed run resumes. `seconds.json` records how long each stage took.

The defaults take about two hours on two slow cores. The committed weights were trained for longer: `--clip-steps 1500
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
from dataclasses import dataclass
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


def _print_progress(stage: str, step: int, total: int, loss: float, start: float) -> None:
    left = (time.monotonic() - start) / step * (total - step)
    print(f"{stage:9s} {step:6d}/{total}  loss {loss:.4f}  {left / 60:5.1f} min left", file=sys.stderr, flush=True)


class LossPrinter:
    """Prints a stage's smoothed loss every hundred steps."""

    def __init__(self, stage: str, total: int, first: int = 0) -> None:
        self.stage, self.total, self.first = stage, total, first
        self.start, self.mean = time.monotonic(), 0.0

    def __call__(self, step: int, loss: float) -> None:
        self.mean = loss if self.mean == 0.0 else 0.98 * self.mean + 0.02 * loss
        if step % 100 == 0 or step == self.total:
            _print_progress(self.stage, step - self.first, self.total - self.first, self.mean, self.start)


@contextmanager
def atomic_path(place: Path) -> Iterator[Path]:
    """Yield a temporary path to write to; it is renamed to `place`, a file or folder, at the end."""
    temporary = place.with_name(f"{place.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # the remains of a killed run
    yield temporary
    if place.is_dir():
        shutil.rmtree(place)
    temporary.replace(place)


@contextmanager
def record_seconds(out: Path, stage: str) -> Iterator[None]:
    """Record the duration of the block in `seconds.json`; for a resumed stage, of its last run only."""
    start, file = time.monotonic(), out / "seconds.json"
    yield
    seconds = json.loads(file.read_text()) if file.exists() else {}
    with atomic_path(file) as place:
        place.write_text(json.dumps({**seconds, stage: round(time.monotonic() - start, 1)}, indent=1))


def make_drawings(out: Path, count: int, look: str, seed: int) -> dict[str, Any]:
    """Make or load drawings: uint8 pictures (n, 3, 64, 64), targets (n, 2) and n captions.

    They are cached on disk as safetensors and text.
    """
    from safetensors.torch import load_file, save_file

    file, text = out / f"drawings-{look}-{seed}.safetensors", out / f"captions-{look}-{seed}.txt"
    if not file.exists():
        with record_seconds(out, f"drawings {look}"):
            rows = drawings(count, torch.Generator().manual_seed(seed), look)
            pictures = torch.from_numpy(np.stack([np.asarray(picture) for _, picture, _ in rows])).permute(0, 3, 1, 2)
            targets = torch.tensor([labels(drawing) for drawing, _, _ in rows])
            # Write the captions first: the stage is skipped once the file of pictures exists.
            with atomic_path(text) as place:
                place.write_text("\n".join(caption for _, _, caption in rows))
            with atomic_path(file) as place:
                save_file({"pictures": pictures.contiguous(), "targets": targets}, place)
    return {**load_file(file), "captions": text.read_text().split("\n")}


def _loop(
    stage: str, steps: int, parameters: list[torch.nn.Parameter], lr: float, loss_of: Callable[[int], torch.Tensor],
    weight_decay: float = 1e-2,
) -> None:  # fmt: skip
    optimiser = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=lr, total_steps=steps, pct_start=0.08)
    report = LossPrinter(stage, steps)
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
    """Train CLIP by symmetric InfoNCE; equal captions in a batch are not each other's negatives."""

    def loss_of(step: int) -> torch.Tensor:
        rows = torch.randint(len(ids), (128,), generator=generator)
        output = clip(input_ids=ids[rows], pixel_values=scale(pictures[rows]))
        same = (ids[rows][:, None] == ids[rows][None]).all(-1)
        target = same.float() / same.sum(1, keepdim=True)
        return 0.5 * (
            F.cross_entropy(output.logits_per_image, target) + F.cross_entropy(output.logits_per_text, target)
        )

    clip.train()
    _loop("clip", steps, [each for each in clip.parameters() if each.requires_grad], 1e-3, loss_of, weight_decay=0.05)
    clip.eval()


def train_vae(vae: AutoencoderKL, pictures: torch.Tensor, steps: int, generator: torch.Generator) -> None:
    """Train the autoencoder by the errors of pixels and of edges (their differences), and a small KL."""

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
    """Sharpen the decoder for one look; the encoder is frozen, so latents and denoisers stay valid.

    The loss adds the error of CLIP's image states to those of pixels and edges: it weighs the content of a picture.
    """
    latents = encode(vae, pictures)

    def states(batch: torch.Tensor) -> torch.Tensor:
        seen: torch.Tensor = clip.vision_model(pixel_values=batch, output_hidden_states=True).hidden_states[-2]
        return seen

    def loss_of(step: int) -> torch.Tensor:
        rows = torch.randint(len(pictures), (16,), generator=generator)
        batch, seen = scale(pictures[rows]), latents[rows]
        # Add a little noise, as sampled latents differ slightly from the encoder's.
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
    """Train a denoiser by epsilon prediction with min-SNR weights and 10 % empty captions.

    The weights use gamma 5 (arXiv 2303.09556). The denoiser ends with the exponential moving average of its weights
    (decay 0.998). `checkpoint` is written every `save_every` steps and resumed from.
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
    report = LossPrinter(stage, steps, first=first)
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
            with atomic_path(checkpoint) as place:
                torch.save(state, place)
    with torch.no_grad():
        for parameter, mean in zip(unet.parameters(), average, strict=True):
            parameter.copy_(mean)
    unet.eval()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the stages and the results")
    parser.add_argument("--drawings", type=int, default=40000)
    parser.add_argument("--clip-steps", type=int, default=1000)
    parser.add_argument("--vae-steps", type=int, default=2000)
    parser.add_argument("--decoder-steps", type=int, default=300)
    parser.add_argument("--probe-steps", type=int, default=2400)
    parser.add_argument("--base-steps", type=int, default=3200)
    parser.add_argument("--refine-steps", type=int, default=0, help="of a second, gentler cycle for `base`")
    parser.add_argument("--chalk-steps", type=int, default=450)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def _generator(seed: int, stage: int) -> torch.Generator:
    """Return a stage's own generator: skipping a finished stage does not change the next one's draws."""
    torch.manual_seed(seed + stage)  # diffusers and transformers initialise weights from the global generator
    return torch.Generator().manual_seed(seed + stage)


def make_clip_stage(out: Path, captions: list[str], pictures: torch.Tensor, steps: int, seed: int) -> None:
    """Train tokenizer and CLIP and save them as `clip`."""
    with record_seconds(out, "clip"):
        generator = _generator(seed, 1)
        tokenizer = make_tokenizer(captions)
        clip = make_clip(tokenizer)
        train_clip(clip, tokens_of(tokenizer, captions), pictures, steps, generator)
        with atomic_path(out / "clip") as place:
            tokenizer.save_pretrained(place)
            clip.save_pretrained(place)


def make_probe_stage(out: Path, pictures: torch.Tensor, targets: torch.Tensor, steps: int, seed: int) -> None:
    """Train the probe and save it as `probe`."""
    with record_seconds(out, "probe"):
        generator, report = _generator(seed, 2), LossPrinter("probe", steps)
        probe = train_probe(pictures, targets, steps=steps, generator=generator, report=report)
        with atomic_path(out / "probe") as place:
            probe.model.save_pretrained(place)


def make_autoencoder_stage(out: Path, pictures: torch.Tensor, steps: int, seed: int) -> None:
    """Train the autoencoder for both looks and save it as `vae`; its scaling gives latents of variance 1."""
    with record_seconds(out, "autoencoder"):
        generator = _generator(seed, 3)
        vae = make_vae()
        train_vae(vae, pictures, steps, generator)
        vae.register_to_config(scaling_factor=float(1 / encode(vae, pictures[:2000]).std()))
        with atomic_path(out / "vae") as place:
            vae.save_pretrained(place)


def make_decoder_stage(
    out: Path, look: str, clip: CLIPModel, pictures: torch.Tensor, steps: int, seed: int, stage: int
) -> None:
    """Sharpen the autoencoder's decoder for one look and save it as `vae-LOOK`."""
    with record_seconds(out, f"decoder {look}"):
        vae = AutoencoderKL.from_pretrained(out / "vae")
        train_decoder(vae, clip, pictures, steps, _generator(seed, stage))
        with atomic_path(out / f"vae-{look}") as place:
            vae.save_pretrained(place)


@dataclass(frozen=True)
class DenoiserStage:
    """Training of one denoiser: its name, the one that it starts from, its look, steps and learning rate."""

    number: int
    name: str
    start: str | None
    look: str
    steps: int
    lr: float

    def make(
        self, out: Path, tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, data: dict[str, Any], seed: int
    ) -> None:
        """Train the denoiser and save it as `unet-NAME`; with 0 steps, save the one that it starts from."""
        with record_seconds(out, f"denoiser {self.name}"):
            _generator(seed, self.number)
            start = None if self.start is None else out / f"unet-{self.start}"
            unet = make_unet() if start is None else UNet2DConditionModel.from_pretrained(start)
            if self.steps:
                vae = AutoencoderKL.from_pretrained(out / f"vae-{self.look}").eval()
                latents = encode(vae, data["pictures"]) * vae.config.scaling_factor
                train_unet(
                    unet, text_encoder, tokens_of(tokenizer, data["captions"]), tokens_of(tokenizer, [""])[0], latents,
                    stage=self.name, steps=self.steps, lr=self.lr, checkpoint=out / f"{self.name}.pt",
                    seed=seed + self.number,
                )  # fmt: skip
            with atomic_path(out / f"unet-{self.name}") as place:
                unet.save_pretrained(place)


def main() -> None:
    """Run the stages that are not in `--out` yet."""
    options = _arguments()
    out, seed = options.out, options.seed
    out.mkdir(parents=True, exist_ok=True)
    ink = make_drawings(out, options.drawings, "ink", seed)
    chalk = make_drawings(out, options.drawings // 4, "chalk", seed + 1)
    pictures = torch.cat([ink["pictures"], chalk["pictures"]])
    if not (out / "clip").exists():
        make_clip_stage(out, ink["captions"] + chalk["captions"], pictures, options.clip_steps, seed)
    if not (out / "probe").exists():
        make_probe_stage(out, pictures, torch.cat([ink["targets"], chalk["targets"]]), options.probe_steps, seed)
    if not (out / "vae").exists():
        make_autoencoder_stage(out, pictures, options.vae_steps, seed)

    tokenizer = CLIPTokenizer.from_pretrained(out / "clip")
    clip = CLIPModel.from_pretrained(out / "clip").eval().requires_grad_(False)
    text_encoder = CLIPTextModel(clip.config.text_config)
    text_encoder.load_state_dict(clip.text_model.state_dict())
    text_encoder.eval().requires_grad_(False)
    looks = {"base": ink, "chalk": chalk}
    for number, look in ((14, "base"), (15, "chalk")):
        if not (out / f"vae-{look}").exists():
            make_decoder_stage(out, look, clip, looks[look]["pictures"], options.decoder_steps, seed, number)
    for stage in (
        DenoiserStage(4, "drafted", None, "base", options.base_steps, 1.2e-3),
        # The second, gentler cycle improves subjects that the first one draws almost right: cats, sailboats.
        DenoiserStage(6, "base", "drafted", "base", options.refine_steps, 5e-4),
        DenoiserStage(5, "chalk", "base", "chalk", options.chalk_steps, 3e-4),
    ):
        if not (out / f"unet-{stage.name}").exists():
            stage.make(out, tokenizer, text_encoder, looks[stage.look], seed)
        if stage.name == stage.look:
            vae = AutoencoderKL.from_pretrained(out / f"vae-{stage.look}").eval()
            unet = UNet2DConditionModel.from_pretrained(out / f"unet-{stage.name}").eval()
            with atomic_path(out / stage.name) as place:
                save_pipeline(place, tokenizer, text_encoder, vae, unet)


if __name__ == "__main__":
    main()
