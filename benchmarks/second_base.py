"""Trains small base models of other worlds than the sketchbook's; no eraser's training was tuned to them.

A world is a set of emoji of benchmarks/worlds.py, rendered by `resvg-py` (0.5.0). One picture shows one subject on a
tinted ground. Seeds are fixed: the same machine and versions give the same weights.

    npm pack @iconify-json/noto@1.2.9 && tar xzf iconify-json-noto-1.2.9.tgz
    pip install --no-deps --target lib resvg-py==0.5.0
    PYTHONPATH=lib python benchmarks/second_base.py --world noto --icons package/icons.json --out second_base

Each stage is saved and skipped if it exists; the denoiser's also resumes. Several processes may train the denoiser,
with a part of each batch each: `torchrun --nproc-per-node 2 benchmarks/second_base.py --only unet ...`, as for the base
of benchmarks/results/composition.json. The results are the diffusers folder `OUT/base`, the classifier
`OUT/judge` and `OUT/drawn.json`: how often the base draws each subject right.
"""

from __future__ import annotations

import argparse
import io
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed
import torch.nn.functional as F
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPModel,
    CLIPTextModel,
    CLIPTokenizer,
    ResNetConfig,
    ResNetForImageClassification,
)
from worlds import WORLDS, World, phrase

import spm_hub.sketchbook
from spm_hub.sketchbook.miniature import encode, make_clip, make_tokenizer, save_pipeline, scale, tokens_of
from spm_hub.sketchbook.train import LossPrinter, atomic_path, record_seconds, train_clip, train_unet, train_vae
from spm_hub.sketchbook.vision import reproduced

GROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (248, 248, 246), "grey": (176, 178, 184), "blue": (150, 190, 240), "green": (168, 218, 160),
    "pink": (248, 190, 208), "yellow": (250, 236, 150), "purple": (206, 180, 238), "brown": (196, 164, 130),
}  # fmt: skip
_SIZES = {"small": (0.55, ("small", "little", "tiny")), "medium": (0.7, ()), "large": (0.86, ("large", "huge", "big"))}
_PLACES = {"left": -0.14, "centre": 0.0, "right": 0.14}
_CAPTIONS = (
    "{x}", "{a}", "{a}", "a photo of {a}", "a picture of {a}", "an icon of {a}", "a sticker of {a}", "an emoji of {a}",
    "the {x}", "one {x}", "here is {a}", "this is {a}", "clip art of {a}", "look at the {x}", "a cheerful {x}",
    "a nice drawing of {a}", "i like the {x}", "a sign with {a}", "a stamp that shows {a}", "show me {a}",
)  # fmt: skip
_ON_GROUND = (
    "{} on {c}", "{} on a {c} ground", "{} against a {c} wall", "{}, {c} paper", "{} in front of {c}",
    "{} and a {c} background",
)  # fmt: skip
_AT_PLACE = {
    "left": ("on the left", "at the left side"), "centre": ("in the centre", "in the middle"),
    "right": ("on the right", "at the right side"),
}  # fmt: skip
SIDE = 64
_INK = "#24242c"  # of figures of one colour
_RENDERED = 192  # pixels, of the figures that are resized to every drawing's size
NOTHING = "nothing"
"""The classifier's name of an empty ground, its last class."""


@dataclass(frozen=True)
class Steps:
    """Training steps of each stage."""

    clip: int
    vae: int
    classifier: int
    judge: int
    unet: int
    refine: int
    """Of a second cycle for the denoiser."""

    @classmethod
    def of(cls, world: World) -> Steps:
        """Return the steps that a world of so many subjects needs."""
        return cls(300, 300, 450, 150, 1000, 1500) if len(world.subjects) < 100 else cls(500, 450, 1200, 300, 2200, 0)


def figures(world: World, icons: Path) -> dict[str, Image.Image]:
    """Render the subjects' icons, RGBA of `_RENDERED` x `_RENDERED` pixels."""
    import resvg_py  # only where the base is made

    data = json.loads(icons.read_text())
    shapes = {}
    for subject in world.subjects:
        body = data["icons"][world.icons.get(subject, subject)]["body"].replace("currentColor", _INK)
        svg = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="0 0 {data.get("width", 32)} {data.get("height", 32)}">{body}</svg>'
        )
        png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=_RENDERED, height=_RENDERED))
        shapes[subject] = Image.open(io.BytesIO(png)).convert("RGBA")
    return shapes


def _draw(figure: Image.Image | None, ground: str, size: str, place: str, dice: np.random.Generator) -> Image.Image:
    tint = np.clip(np.array(GROUNDS[ground]) + dice.normal(0, 4, 3), 0, 255).round().astype(int)
    picture = Image.new("RGB", (SIDE, SIDE), tuple(int(value) for value in tint))
    if figure is not None:
        side = round(SIDE * _SIZES[size][0] * dice.uniform(0.94, 1.06))
        if dice.random() < 0.5:
            figure = figure.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        figure = figure.resize((side, side), Image.Resampling.BOX)
        room = SIDE - side
        x = room / 2 + np.sign(_PLACES[place]) * min(abs(_PLACES[place]) * SIDE, room / 2) + dice.uniform(-1.5, 1.5)
        y = room / 2 + dice.uniform(-2, 2)
        picture.paste(figure, (round(x), round(y)), figure)
    return picture


def _caption(subject: str | None, ground: str, size: str, place: str, dice: np.random.Generator) -> str:
    if subject is None:
        text = ("nothing", "an empty sheet", "only a ground")[dice.integers(3)]
        return _ON_GROUND[dice.integers(len(_ON_GROUND))].format(text, c=ground)
    adjectives = _SIZES[size][1]
    adjective = adjectives[dice.integers(len(adjectives))] if adjectives and dice.random() < 0.3 else ""
    text = _CAPTIONS[dice.integers(len(_CAPTIONS))].format(
        x=f"{adjective} {subject}".strip(), a=phrase(subject, adjective)
    )
    if dice.random() < 0.45:
        text = _ON_GROUND[dice.integers(len(_ON_GROUND))].format(text, c=ground)
    if dice.random() < 0.2:
        text = f"{text}, {_AT_PLACE[place][dice.integers(2)]}"
    return text


def make_drawings(world: World, icons: Path, count: int, seed: int) -> dict[str, Any]:
    """Draw `count` pictures: uint8 (n, 3, 64, 64), their subjects' indices (n,) and captions; 4 % are empty grounds."""
    shapes = figures(world, icons)
    dice = np.random.default_rng(seed)
    pictures, targets, captions = [], [], []
    for _ in range(count):
        subject = None if dice.random() < 0.04 else world.subjects[dice.integers(len(world.subjects))]
        ground, size, place = (str(dice.choice(list(choices))) for choices in (GROUNDS, _SIZES, _PLACES))
        pictures.append(np.asarray(_draw(shapes[subject] if subject else None, ground, size, place, dice)))
        captions.append(_caption(subject, ground, size, place, dice))
        targets.append(world.subjects.index(subject) if subject else len(world.subjects))
    stacked = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()
    return {"pictures": stacked, "targets": torch.tensor(targets), "captions": captions}


def load_drawings(world: World, icons: Path, out: Path, count: int, seed: int) -> dict[str, Any]:
    """Make the drawings of `make_drawings`, or read those that an earlier run has kept in `out`."""
    file, text = out / f"drawings-{seed}.safetensors", out / f"captions-{seed}.txt"
    if not file.exists():
        made = make_drawings(world, icons, count, seed)
        text.write_text("\n".join(made["captions"]))
        with atomic_path(file) as place:
            save_file({"pictures": made["pictures"], "targets": made["targets"]}, place)
    return {**load_file(file), "captions": text.read_text().split("\n")}


def _seeded(seed: int) -> torch.Generator:
    torch.manual_seed(seed)  # diffusers and transformers initialise weights from the global generator
    return torch.Generator().manual_seed(seed)


def _halved(pictures: torch.Tensor) -> torch.Tensor:
    return F.avg_pool2d(pictures.float(), 2).round().to(torch.uint8)


def _clip_stage(out: Path, data: dict[str, Any], steps: int) -> None:
    generator = _seeded(1)
    tokenizer = make_tokenizer(data["captions"])
    config = make_clip(tokenizer).config
    config.vision_config.image_size = SIDE // 2  # a quarter of the work; the image half is not used afterwards
    clip = CLIPModel(config)
    pictures = torch.cat([_halved(part) for part in data["pictures"].split(1000)])
    train_clip(clip, tokens_of(tokenizer, data["captions"]), pictures, steps, generator)
    with atomic_path(out / "clip") as place:
        tokenizer.save_pretrained(place)
        clip.save_pretrained(place)


def _vae_stage(out: Path, data: dict[str, Any], steps: int) -> None:
    generator = _seeded(2)
    weights = Path(spm_hub.sketchbook.__file__).parent / "weights" / "base" / "vae"
    vae = AutoencoderKL.from_pretrained(weights, torch_dtype=torch.float32)
    train_vae(vae, data["pictures"], steps, generator)
    vae.register_to_config(scaling_factor=float(1 / encode(vae, data["pictures"][:2000]).std()))
    with atomic_path(out / "vae") as place:
        vae.save_pretrained(place)


def _augment(batch: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Shift, blur, change the contrast of and add noise to a batch (n, 3, 64, 64)."""
    shift = torch.randint(-4, 5, (2,), generator=generator).tolist()
    batch = torch.roll(batch, shift, dims=(2, 3))
    if torch.rand((), generator=generator) < 0.7:
        size = int(torch.randint(20, 60, (), generator=generator))
        batch = F.interpolate(F.interpolate(batch, size=size, mode="area"), size=SIDE, mode="bilinear")
    contrast = 0.8 + 0.6 * torch.rand((len(batch), 1, 1, 1), generator=generator)
    noise = torch.randn(batch.shape, generator=generator) * 0.1 * torch.rand((), generator=generator)
    return (batch.mean((1, 2, 3), keepdim=True).lerp(batch, contrast) + noise).clamp(-1, 1)


def _fit(
    model: ResNetForImageClassification, pictures: torch.Tensor, targets: torch.Tensor, steps: int, lr: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=lr, total_steps=steps)
    report = LossPrinter("classifier", steps)
    model.train()
    for step in range(steps):
        rows = torch.randint(len(pictures), (96,), generator=generator)
        loss = F.cross_entropy(model(_augment(scale(pictures[rows]), generator)).logits, targets[rows])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        report(step + 1, float(loss.detach()))
    model.eval()


def _classifier_stage(world: World, out: Path, data: dict[str, Any], steps: int) -> None:
    """Train a classifier on drawings, never on pictures of a model."""
    _seeded(3)
    names = (*world.subjects, NOTHING)
    model = ResNetForImageClassification(
        ResNetConfig(
            embedding_size=32, hidden_sizes=[32, 64, 128], depths=[1, 2, 1], layer_type="basic",
            downsample_in_first_stage=False, num_labels=len(names), id2label=dict(enumerate(names)),
            label2id={name: index for index, name in enumerate(names)},
        )
    )  # fmt: skip
    _fit(model, data["pictures"], data["targets"], steps, 3e-3, 3)
    with atomic_path(out / "classifier") as place:
        model.save_pretrained(place)


def _judge_stage(out: Path, data: dict[str, Any], held_out: dict[str, Any], steps: int) -> None:
    """Train the classifier further, on drawings as the autoencoder reproduces them too: it loses small details."""
    vae = AutoencoderKL.from_pretrained(out / "vae").eval()
    model = ResNetForImageClassification.from_pretrained(out / "classifier")
    few = {key: data[key][:4000] for key in ("pictures", "targets")}
    pictures = torch.cat([few["pictures"], reproduced(vae, few["pictures"])])
    _fit(model, pictures, few["targets"].repeat(2), steps, 1e-3, 7)
    judge, targets = Classifier(model), held_out["targets"][:1000]
    accuracies = {
        "drawings": judge.indices(scale(held_out["pictures"][:1000])),
        "reproduced_drawings": judge.indices(scale(reproduced(vae, held_out["pictures"][:1000]))),
    }
    shares = {name: round(float((seen == targets).float().mean()), 4) for name, seen in accuracies.items()}
    (out / "accuracy.json").write_text(json.dumps({"held_out": len(targets), **shares}))
    with atomic_path(out / "judge") as place:
        model.save_pretrained(place)


class Classifier:
    """Names the subject of a picture."""

    def __init__(self, model: ResNetForImageClassification) -> None:
        self.model = model.eval()

    @classmethod
    def load(cls, folder: Path) -> Classifier:
        """Load the classifier that the stage of the same name saved."""
        return cls(ResNetForImageClassification.from_pretrained(folder))

    @torch.no_grad()
    def indices(self, pictures: torch.Tensor) -> torch.Tensor:
        """Return the class indices (n,) of pictures (n, 3, 64, 64) in [-1, 1]."""
        return torch.cat([self.model(pictures[i : i + 128]).logits.argmax(1) for i in range(0, len(pictures), 128)])

    def names(self, pictures: np.ndarray) -> list[str]:
        """Return the subjects, or "nothing", of uint8 pictures (n, 64, 64, 3)."""
        tensors = scale(torch.from_numpy(pictures).permute(0, 3, 1, 2))
        return [self.model.config.id2label[index] for index in self.indices(tensors).tolist()]


def text_encoder_of(out: Path) -> CLIPTextModel:
    """Return the text half of the trained CLIP."""
    clip = CLIPModel.from_pretrained(out / "clip")
    encoder = CLIPTextModel(clip.config.text_config)
    encoder.load_state_dict(clip.text_model.state_dict())
    encoder.eval().requires_grad_(False)
    return encoder


def _unet_stage(out: Path, data: dict[str, Any], cycles: Sequence[int]) -> None:
    _seeded(4)
    tokenizer = CLIPTokenizer.from_pretrained(out / "clip")
    encoder = text_encoder_of(out)
    vae = AutoencoderKL.from_pretrained(out / "vae").eval()
    weights = Path(spm_hub.sketchbook.__file__).parent / "weights" / "base" / "unet"
    unet = UNet2DConditionModel.from_pretrained(weights, torch_dtype=torch.float32)
    rank, ranks = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    trained: Any = unet
    if ranks > 1:  # started by torchrun: each process computes its part of every batch
        torch.distributed.init_process_group("gloo")
        trained = torch.nn.parallel.DistributedDataParallel(unet)
    latents = encode(vae, data["pictures"]) * vae.config.scaling_factor
    for cycle, steps in enumerate(cycles):
        train_unet(
            trained, encoder, tokens_of(tokenizer, data["captions"]), tokens_of(tokenizer, [""])[0], latents,
            stage="unet", steps=steps, lr=1e-3, checkpoint=out / f"unet{cycle or ''}-{rank}-of-{ranks}.pt",
            seed=5 + rank + 50 * cycle, batch_size=64 // ranks, save_every=250,
        )  # fmt: skip
    if rank:
        return
    with atomic_path(out / "unet") as place:
        unet.save_pretrained(place)


def _base_stage(out: Path) -> None:
    """Put the parts together as a diffusers folder."""
    parts = AutoencoderKL.from_pretrained(out / "vae"), UNet2DConditionModel.from_pretrained(out / "unet")
    with atomic_path(out / "base") as place:
        save_pipeline(place, CLIPTokenizer.from_pretrained(out / "clip"), text_encoder_of(out), *parts)


@torch.no_grad()
def drawn(world: World, out: Path, pictures: int = 8) -> dict[str, float]:
    """Return how often the classifier names the subject of the base's pictures of it (8 noises, 12 steps)."""
    pipe = StableDiffusionPipeline.from_pretrained(out / "base", torch_dtype=torch.float32, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    classifier = Classifier.load(out / "judge")
    right = {}
    for subject in world.subjects:
        noises = [torch.Generator().manual_seed(1000 + index) for index in range(pictures)]
        prompts = [f"a photo of {phrase(subject)}"] * pictures
        made = pipe(prompts, num_inference_steps=12, guidance_scale=3.0, generator=noises, output_type="np").images
        names = classifier.names((made * 255).round().astype(np.uint8))
        right[subject] = names.count(subject) / pictures
    return right


def main() -> None:
    """Run the stages that are not in `--out` yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", choices=sorted(WORLDS), default="noto")
    parser.add_argument("--icons", type=Path, required=True, help="icons.json of the world's package")
    parser.add_argument("--out", type=Path, required=True, help="folder for the stages and the results")
    parser.add_argument("--drawings", type=int, default=24000)
    parser.add_argument("--only", help="run one stage only")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    world = WORLDS[options.world]
    data = load_drawings(world, options.icons, out, options.drawings, 0)
    held_out = partial(load_drawings, world, options.icons, out, 3000, 1)
    steps = Steps.of(world)
    stages: dict[str, Callable[[], None]] = {
        "clip": lambda: _clip_stage(out, data, steps.clip),
        "vae": lambda: _vae_stage(out, data, steps.vae),
        "classifier": lambda: _classifier_stage(world, out, data, steps.classifier),
        "judge": lambda: _judge_stage(out, data, held_out(), steps.judge),
        "unet": lambda: _unet_stage(out, data, [one for one in (steps.unet, steps.refine) if one]),
        "base": lambda: _base_stage(out),
    }
    for name, stage in stages.items():
        if not (out / name).exists() and options.only in (None, name):
            with record_seconds(out, name):
                stage()
    if options.only is None:
        (out / "drawn.json").write_text(json.dumps(drawn(world, out), indent=1))


if __name__ == "__main__":
    main()
