"""Draws pictures with and without erasers from the same seeds, and saves them with their settings."""

from __future__ import annotations

import io
import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from spm_hub.adapters.manifest import slug
from spm_hub.attachment.attachment import Attachment, attach
from spm_hub.errors import NotFoundError, UsageError
from spm_hub.evaluation.grid import GridRow, draw_grid
from spm_hub.evaluation.step_callback import StepCallback
from spm_hub.io.atomic import write_atomic, write_new
from spm_hub.io.progress import ProgressCallback, Reporter
from spm_hub.io.wording import quoted
from spm_hub.models.architectures import is_modular, native_side

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from spm_hub.adapters.adapter import Adapter
    from spm_hub.attachment.options import GateChoice, Mode, Rows

WITHOUT, WITH, RESTORED = "without", "with", "restored"
"""The conditions of a picture; "restored" has all erasers but the first, which was attached and taken away."""

METADATA_KEY = "spmhub"
BUDGET_OF_PIXELS = 2**21
"""Pixels of one batch unless its size is chosen: eight pictures of 512 x 512, two of 1,024 x 1,024."""

_AT_ONCE = 8
"""The most pictures of one batch unless its size is chosen: more draw hardly faster."""

SEEDS = 2**64
"""Number of seeds that torch accepts: 0 to 2^64 - 1."""


@dataclass(frozen=True)
class DrawingOptions:
    """Settings for drawing pictures.

    Picture `i` of every prompt starts from the noise of `seed + i`, independent of `number`, the pictures per prompt.
    guidance: the classifier-free guidance scale. None for `steps` or `guidance` means the pipeline's default.
    at_once: pictures of different prompts in one call of the pipeline, all pictures of a prompt at least; None for
    eight, or fewer where they are large. A picture depends by rounding on the others of its call.
    """

    seed: int = 0
    number: int = 1
    steps: int | None = None
    guidance: float | None = None
    at_once: int | None = None

    def __post_init__(self) -> None:
        least_of = {"seed": 0, "number": 1, "steps": 1, "at_once": 1}
        for name, value, least in ((name, getattr(self, name), least) for name, least in least_of.items()):
            if value is not None and value < least:
                raise UsageError(f"{name} must be at least {least}, got {value}", mend=f"{name} = {least}")
        if self.seed + self.number > SEEDS:
            raise UsageError(
                f"seed must be at most 2^64 - number = {SEEDS - self.number}, got {self.seed}", mend="seed = 0"
            )
        if self.guidance is not None and not math.isfinite(self.guidance):
            raise UsageError(f"guidance must be a finite number, got {self.guidance}", mend="guidance = 7.5")


@dataclass(frozen=True)
class PromptPictures:
    """One prompt's pictures by condition ("without", "with"), and every eraser's gamma for it (`gates`)."""

    prompt: str
    gates: Mapping[str, float]
    pictures: Mapping[str, tuple[Image.Image, ...]]


def show(
    pipe: DiffusionPipeline,
    adapters: Sequence[Adapter],
    prompts: Sequence[str],
    drawing: DrawingOptions,
    *,
    gate: GateChoice | None = None,
    strength: Mapping[str, float] | float | None = None,
    rows: Rows | None = None,
    mode: Mode = "auto",
    threshold: float | None = None,
    top_k: int | None = None,
    force: bool = False,
    compare: bool = True,
    reporter: Reporter | None = None,
    progress: ProgressCallback | None = None,
    each: Callable[[int, PromptPictures], None] = lambda index, shown: None,
) -> tuple[PromptPictures, ...]:
    """Draw every prompt with `adapters` attached and, if `compare`, from the same noise without them.

    gate, strength, rows, mode, threshold, top_k, force, reporter: as for `attach`; None means the setting in each
    eraser's manifest.
    progress: called with the denoising steps done and their total.
    each: called with a prompt's index and its pictures under one condition, as soon as they are drawn.
    The pipeline is restored at the end. Raises UsageError if there is no prompt, or an empty one.
    """
    check_prompts(prompts)
    conditions = (WITHOUT, WITH) if compare else (WITH,)
    count = _Counter(len(conditions) * len(prompts), progress)
    drawn: dict[str, list[tuple[Image.Image, ...]]] = {condition: [] for condition in conditions}

    def attached() -> Attachment:
        return attach(
            pipe, adapters, gate=gate, strength=strength, rows=rows, mode=mode, threshold=threshold, top_k=top_k,
            force=force, reporter=reporter,
        )  # fmt: skip

    def draw_all(condition: str, erasers: Attachment | None = None) -> None:
        for batch in _batches(pipe, prompts, drawing, 1 if mode == "fold" else None):
            count.at_once = len(batch)
            drawn[condition] += draw(pipe, batch, drawing, count)
            first = len(drawn[condition]) - len(batch)
            for place, index in enumerate(range(first, len(drawn[condition]))):
                if erasers is not None:  # more than `gates` says, where the denoiser was asked too
                    gates[index] |= {name: gammas[place] for name, gammas in erasers.last_gammas.items()}
                each(index, PromptPictures(prompts[index], gates[index], {condition: drawn[condition][index]}))

    with attached() as erasers:
        gates = [erasers.gates(prompt) for prompt in prompts]
    if compare:
        draw_all(WITHOUT)
    with attached() as erasers:
        draw_all(WITH, erasers)
    return tuple(
        PromptPictures(prompt, gates[index], {condition: drawn[condition][index] for condition in conditions})
        for index, prompt in enumerate(prompts)
    )


def check_prompts(prompts: Sequence[str]) -> None:
    """Refuse an empty list of prompts, and an empty prompt. Raises UsageError."""
    if not prompts:
        raise UsageError("there is no prompt", mend="add --prompt TEXT or --prompts FILE")
    for number, prompt in enumerate(prompts, start=1):
        if not prompt.strip():
            raise UsageError(f"prompt {number} is empty", mend="--prompt TEXT with some text")


def _batches(
    pipe: DiffusionPipeline, prompts: Sequence[str], drawing: DrawingOptions, most: int | None
) -> Iterator[Sequence[str]]:
    """Yield the prompts of each call of the pipeline: at most `most`, None for as many as `drawing` says."""
    at_once = drawing.at_once or min(_AT_ONCE, BUDGET_OF_PIXELS // native_side(pipe) ** 2)
    if is_modular(type(pipe)):
        most = 1  # it may take one prompt alone
    size = most or max(1, at_once // drawing.number)
    yield from (prompts[start : start + size] for start in range(0, len(prompts), size))


def draw(
    pipe: DiffusionPipeline, prompts: Sequence[str], drawing: DrawingOptions, progress: ProgressCallback | None = None
) -> list[tuple[Image.Image, ...]]:
    """Draw `drawing.number` pictures of each prompt in one call of the pipeline; return them by prompt.

    progress: called with the denoising steps done and their total.
    Raises UsageError if the pipeline refuses the settings (for instance more steps than its scheduler has), or its
    latents overflow.
    """
    given = {"num_inference_steps": drawing.steps, "guidance_scale": drawing.guidance}
    seeds = [drawing.seed + index for _ in prompts for index in range(drawing.number)]
    callback = StepCallback(pipe, progress)
    chosen = {name: value for name, value in given.items() if value is not None}
    modular = is_modular(type(pipe))
    if modular:
        _check_inputs(pipe, chosen)
    try:
        made = pipe(
            prompt=prompts[0] if len(prompts) == 1 else list(prompts),
            num_images_per_prompt=drawing.number,
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
            **({"output": "images"} if modular else callback.options),
            **chosen,
        )
    except ValueError as error:
        asked = ", ".join(f"{name} {value}" for name, value in chosen.items()) or "its default settings"
        raise UsageError(
            f"{type(pipe).__name__} cannot draw {prompts[0]!r} with {asked}: {str(error).strip()}",
            mend="leave out --steps and --guidance" if chosen else None,
        ) from error
    callback.check(*prompts)
    if modular and progress is not None:
        progress(1, 1)  # its steps are not reported
    pictures = iter(made if modular else made.images)
    return [tuple(itertools.islice(pictures, drawing.number)) for _ in prompts]


def _check_inputs(pipe: Any, chosen: Mapping[str, Any]) -> None:
    """Refuse settings that a modular pipeline would leave aside, with a line in a log. Raises UsageError."""
    if unknown := sorted(chosen.keys() - set(pipe.blocks.input_names)):
        raise UsageError(
            f"{type(pipe).__name__} has no input {unknown[0]}: a modular pipeline keeps it in one of its components",
            mend="leave it out, and set it there (guidance in pipe.guider)",
        )


def save(
    shown: Sequence[PromptPictures],
    out: Path,
    drawing: DrawingOptions,
    *,
    title: str,
    grid: bool,
    described: Mapping[str, Any],
) -> dict[str, list[Path]]:
    """Write the pictures as PNG files into `out`, and a grid of them if `grid`, as `PictureFolder` does.

    `title` is the heading of the column with erasers. Returns the paths by condition.
    """
    folder = PictureFolder(out, drawing, described)
    for index, one in enumerate(shown):
        folder.keep(index, one)
    if grid:
        folder.keep_grid(shown, title)
    return folder.files


class PictureFolder:
    """Writes the pictures of one run as PNG files into a folder, under names that no file there has.

    A prompt's pictures are called NUMBER-WORDS-SEED-with.png and -without.png. The numbers go on where earlier runs
    ended. Each file has `described`, its prompt, seed and gates as JSON in a text chunk, and is written atomically.

    folder: where they go. files: the paths that were written, by condition ("with", "without", "grid").
    """

    def __init__(self, folder: Path, drawing: DrawingOptions, described: Mapping[str, Any]) -> None:
        self.folder, self._drawing, self._described = folder, drawing, described
        taken = [int(match[1]) for path in folder.glob("*.png") if (match := re.match(r"(\d{2,9})-", path.name))]
        self._first = max(taken, default=-1) + 1
        self.files: dict[str, list[Path]] = {}

    def keep(self, index: int, one: PromptPictures) -> None:
        """Write the pictures of prompt number `index` of the run. Raises RegistryError if the disk refuses."""
        for condition, pictures in one.pictures.items():
            for offset, picture in enumerate(pictures):
                seed = self._drawing.seed + offset
                rest = f"{slug(one.prompt)[:48]}-{seed}-{condition}.png"
                numbers = itertools.count(self._first + index)
                about = {"condition": condition, "prompt": one.prompt, "seed": seed, "gates": one.gates}
                self._write(condition, (f"{number:02d}-{rest}" for number in numbers), picture, about)

    def keep_grid(self, shown: Sequence[PromptPictures], title: str) -> Path:
        """Write all pictures as one: grid.png, or else grid-2.png and so on. Raises RegistryError."""
        names = itertools.chain(["grid.png"], (f"grid-{number}.png" for number in itertools.count(2)))
        return self._write("grid", names, grid_of(shown, title), {})

    def _write(self, condition: str, names: Iterable[str], picture: Image.Image, about: Mapping[str, Any]) -> Path:
        """Write a picture under the first free name; another process may take a name meanwhile."""
        content = png_of(picture, {**self._described, **about})
        for name in names:
            path = self.folder / name
            with suppress(FileExistsError):
                write_new(path, content)
                self.files.setdefault(condition, []).append(path)
                return path
        raise AssertionError("there are always more names")


def grid_of(shown: Sequence[PromptPictures], title: str) -> Image.Image:
    """Draw all pictures as one grid: a row for each prompt with its gammas, a column for each condition."""
    conditions = list(shown[0].pictures)
    rows = [
        GridRow(
            one.prompt,
            tuple(one.pictures[condition] for condition in conditions),
            "\n".join(f"{name} {gamma:.2f}" for name, gamma in one.gates.items()),
        )
        for one in shown
    ]
    return draw_grid(rows, [f"{WITH} {title}" if condition == WITH else condition for condition in conditions])


def write_png(path: Path, picture: Image.Image, about: Mapping[str, Any]) -> None:
    """Write one PNG atomically, with `about` as JSON in its text chunk "spmhub"."""
    write_atomic(path, png_of(picture, about))


def png_of(picture: Image.Image, about: Mapping[str, Any]) -> bytes:
    """Return a picture as a PNG file, with `about` as JSON in its text chunk "spmhub"."""
    text = PngInfo()
    text.add_itxt(METADATA_KEY, json.dumps(about, sort_keys=True))
    file = io.BytesIO()
    picture.save(file, format="PNG", pnginfo=text)
    return file.getvalue()


def read_prompts(path: Path) -> list[str]:
    """Read a file of prompts, one per line.

    Raises NotFoundError if there is no file; UsageError for blank lines, which it names, and for an empty file.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()  # Windows marks its files
    except FileNotFoundError as error:
        raise NotFoundError(
            f"{path}: no such file of prompts", mend="--prompts FILE, with one prompt per line"
        ) from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    blank = [number for number, line in enumerate(lines, start=1) if not line.strip()]
    if blank:
        which = ", ".join(map(str, blank[:10])) + (", ..." if len(blank) > 10 else "")
        raise UsageError(
            f"{path}: blank line{'s' if len(blank) > 1 else ''} {which}; every line must be a prompt",
            mend=f"sed -i '/^[[:space:]]*$/d' {quoted(path)}",
        )
    if not lines:
        raise UsageError(f"{path} contains no prompt", mend="write one prompt per line into it, or use --prompt TEXT")
    return lines


class _Counter:
    """Reports the steps of several drawings as one total, for a single progress bar."""

    def __init__(self, drawings: int, progress: ProgressCallback | None) -> None:
        self._drawings, self._progress, self._done = drawings, progress, 0
        self.at_once = 1
        """The drawings of the call in progress."""

    def __call__(self, step: int, total: int) -> None:
        if self._progress is not None:
            self._progress(self._done * total + step * self.at_once, self._drawings * total)
        if step == total:
            self._done += self.at_once
