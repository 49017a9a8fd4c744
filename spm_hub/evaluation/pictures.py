"""Pictures with and without erasers: drawn from the same seeds, saved with what they were drawn from."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from spm_hub.adapters.manifest import slug
from spm_hub.attachment.attachment import Attachment, attach
from spm_hub.errors import NotFoundError, UsageError
from spm_hub.evaluation.grid import Row, draw_grid
from spm_hub.evaluation.step_callback import Watch
from spm_hub.io.atomic import write_atomic

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from spm_hub.adapters.adapter import Adapter
    from spm_hub.attachment.gate import Gate

WITHOUT, WITH = "without", "with"
METADATA_KEY = "spmhub"
SEEDS = 2**64
"""torch takes as many."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Drawing:
    """How pictures are drawn: picture `i` of every prompt starts from the noise of `seed + i`, whatever `number` is.

    `guidance` is the classifier-free guidance scale; `steps` and `guidance` None leave the pipeline's own defaults.
    """

    seed: int = 0
    number: int = 1
    steps: int | None = None
    guidance: float | None = None

    def __post_init__(self) -> None:
        for name, value, least in (("seed", self.seed, 0), ("number", self.number, 1), ("steps", self.steps, 1)):
            if value is not None and value < least:
                raise UsageError(f"{name} must be at least {least}, got {value}", mend=f"{name} = {least}")
        if self.seed + self.number > SEEDS:
            raise UsageError(
                f"seed must be at most 2^64 - number = {SEEDS - self.number}, got {self.seed}", mend="seed = 0"
            )
        if self.guidance is not None and not math.isfinite(self.guidance):
            raise UsageError(f"guidance must be a finite number, got {self.guidance}", mend="guidance = 7.5")


@dataclass(frozen=True)
class Shown:
    """One prompt's pictures by condition ("without", "with"), and the gate of every eraser for it."""

    prompt: str
    gates: Mapping[str, float]
    pictures: Mapping[str, tuple[Image.Image, ...]]


def show(
    pipe: DiffusionPipeline,
    adapters: Sequence[Adapter],
    prompts: Sequence[str],
    drawing: Drawing,
    *,
    gate: str | float | Gate | None = None,
    strength: float | Mapping[str, float] | None = None,
    compare: bool = True,
    progress: Progress | None = None,
    each: Callable[[int, Shown], None] = lambda index, shown: None,
) -> tuple[Shown, ...]:
    """Draw every prompt with `adapters` attached and, where `compare`, from the same noise without them.

    `gate` and `strength` are those of `attach`, None what each eraser's manifest asks for. `progress` is told the
    denoising steps done and their total; `each` is given the number of a prompt and its pictures under one condition
    as soon as they are drawn. The pipeline is left as it was.
    Raises UsageError when there is no prompt, or an empty one.
    """
    check_prompts(prompts)
    conditions = (WITHOUT, WITH) if compare else (WITH,)
    count = _Counter(len(conditions) * len(prompts), progress)
    drawn: dict[str, list[tuple[Image.Image, ...]]] = {condition: [] for condition in conditions}

    def attached() -> Attachment:
        return attach(pipe, adapters, gate=gate, strength=strength)  # type: ignore[arg-type] # attach checks it

    def draw_all(condition: str) -> None:
        for index, prompt in enumerate(prompts):
            drawn[condition].append(draw(pipe, prompt, drawing, count))
            each(index, Shown(prompt, gates[index], {condition: drawn[condition][index]}))

    with attached() as erasers:
        gates = [erasers.gates(prompt) for prompt in prompts]
    if compare:
        draw_all(WITHOUT)
    with attached():
        draw_all(WITH)
    return tuple(
        Shown(prompt, gates[index], {condition: drawn[condition][index] for condition in conditions})
        for index, prompt in enumerate(prompts)
    )


def check_prompts(prompts: Sequence[str]) -> None:
    """Raises UsageError when there is no prompt, or an empty one."""
    if not prompts:
        raise UsageError("there is no prompt", mend="add --prompt TEXT or --prompts FILE")
    for number, prompt in enumerate(prompts, start=1):
        if not prompt.strip():
            raise UsageError(f"prompt {number} is empty", mend=f"--prompt TEXT for each of the {len(prompts)}")


def draw(
    pipe: DiffusionPipeline, prompt: str, drawing: Drawing, progress: Progress | None = None
) -> tuple[Image.Image, ...]:
    """`drawing.number` pictures of one prompt; `progress` is told each denoising step of this call and their total.

    Raises UsageError for what the pipeline refuses: more steps than its scheduler has, for instance.
    """
    given = {"num_inference_steps": drawing.steps, "guidance_scale": drawing.guidance}
    generators = [torch.Generator("cpu").manual_seed(drawing.seed + index) for index in range(drawing.number)]

    watch = Watch(pipe, progress)
    chosen = {name: value for name, value in given.items() if value is not None}
    try:
        made = pipe(
            prompt,
            num_images_per_prompt=drawing.number,
            generator=generators,
            **watch.options,
            **chosen,
        )
    except ValueError as error:
        asked = ", ".join(f"{name} {value}" for name, value in chosen.items()) or "its own settings"
        raise UsageError(
            f"{type(pipe).__name__} refuses {prompt!r} with {asked}: {str(error).strip()}",
            mend="leave --steps and --guidance to the pipeline" if chosen else None,
        ) from error
    watch.check(prompt)
    return tuple(made.images)


def save(
    shown: Sequence[Shown], out: Path, drawing: Drawing, *, title: str, grid: bool, described: Mapping[str, Any]
) -> dict[str, list[Path]]:
    """Write the pictures as PNG files into `out`, and `grid.png` where `grid`; returns the paths by condition.

    Each file holds `described`, its prompt, seed and gates as JSON in a text chunk. `title` heads the column of
    pictures with erasers. Every file is written atomically; raises RegistryError where the disk refuses.
    """
    files: dict[str, list[Path]] = {}
    for index, one in enumerate(shown):
        for condition, paths in save_one(index, one, out, drawing, described).items():
            files.setdefault(condition, []).extend(paths)
    if grid:
        files["grid"] = [save_grid(shown, out, title, described)]
    return files


def save_one(
    index: int, one: Shown, out: Path, drawing: Drawing, described: Mapping[str, Any]
) -> dict[str, list[Path]]:
    """The pictures of prompt number `index` as `save` writes them."""
    files: dict[str, list[Path]] = {}
    for condition, pictures in one.pictures.items():
        for offset, picture in enumerate(pictures):
            seed = drawing.seed + offset
            path = out / f"{index:02d}-{slug(one.prompt)[:48]}-{seed}-{condition}.png"
            about = {**described, "condition": condition, "prompt": one.prompt, "seed": seed, "gates": one.gates}
            write_png(path, picture, about)
            files.setdefault(condition, []).append(path)
    return files


def save_grid(shown: Sequence[Shown], out: Path, title: str, described: Mapping[str, Any]) -> Path:
    """`grid.png` as `save` writes it."""
    path = out / "grid.png"
    write_png(path, grid_of(shown, title), dict(described))
    return path


def grid_of(shown: Sequence[Shown], title: str) -> Image.Image:
    """One labelled picture of all: a row for each prompt with its gates, a column for each condition."""
    conditions = list(shown[0].pictures)
    rows = [
        Row(
            one.prompt,
            tuple(one.pictures[condition] for condition in conditions),
            "\n".join(f"{name} {gamma:.2f}" for name, gamma in one.gates.items()),
        )
        for one in shown
    ]
    return draw_grid(rows, [f"{WITH} {title}" if condition == WITH else condition for condition in conditions])


def write_png(path: Path, picture: Image.Image, about: Mapping[str, Any]) -> None:
    """Write one PNG atomically, with `about` as JSON in its text chunk "spmhub"."""
    text = PngInfo()
    text.add_itxt(METADATA_KEY, json.dumps(about, ensure_ascii=False, sort_keys=True))
    file = io.BytesIO()
    picture.save(file, format="PNG", pnginfo=text)
    write_atomic(path, file.getvalue())


def read_prompts(path: Path) -> list[str]:
    """One prompt a line. Raises NotFoundError, or UsageError naming the blank lines, or that there is none at all."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as error:
        raise NotFoundError(f"{path}: no such file of prompts", mend="--prompts FILE, one prompt a line") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    blank = [number for number, line in enumerate(lines, start=1) if not line.strip()]
    if blank:
        which = ", ".join(map(str, blank[:10])) + (", ..." if len(blank) > 10 else "")
        raise UsageError(
            f"{path}: blank line{'s' if len(blank) > 1 else ''} {which}; one prompt is expected on every line",
            mend=f"sed -i '/^[[:space:]]*$/d' {path}",
        )
    if not lines:
        raise UsageError(f"{path} holds no prompt", mend="write one prompt a line into it, or use --prompt TEXT")
    return lines


class _Counter:
    """Adds the steps of several drawings up, so that one bar covers them all."""

    def __init__(self, drawings: int, progress: Progress | None) -> None:
        self._drawings, self._progress, self._done = drawings, progress, 0

    def __call__(self, step: int, total: int) -> None:
        if self._progress is not None:
            self._progress(self._done * total + step, self._drawings * total)
        if step == total:
            self._done += 1
