"""Runs a protocol on erasers and a base, in one folder that can be resumed."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spm_hub.adapters.adapter import Adapter
from spm_hub.errors import UsageError
from spm_hub.evaluation.attacks.records.folder import AttackFolder, is_attack
from spm_hub.evaluation.attacks.records.recording import digest_of, judge_attacks_again
from spm_hub.evaluation.metrics.named import distances, metrics_named
from spm_hub.evaluation.metrics.placement import metrics_on
from spm_hub.evaluation.pictures import RESTORED, WITH, WITHOUT
from spm_hub.evaluation.prompts.columns import ColumnMap
from spm_hub.evaluation.prompts.reading import PromptFile, read_prompt_file
from spm_hub.evaluation.protocols.attacking import attack_rows, judge_for_attacks
from spm_hub.evaluation.protocols.conditions import DrawingElsewhere, at_strength, conditions_of
from spm_hub.evaluation.protocols.protocol import Protocol, Variant
from spm_hub.evaluation.protocols.rows import nearest_by_text, rows_of
from spm_hub.evaluation.records.drawing import Drawing, RowDefaults, draw_missing
from spm_hub.evaluation.records.folder import RunFolder
from spm_hub.evaluation.records.rows import PromptRow, pictures_at_once
from spm_hub.evaluation.records.scoring import score
from spm_hub.evaluation.reports.writing import write_reports
from spm_hub.io.progress import Reporter
from spm_hub.io.runners.runner import Runner, Serial, Work
from spm_hub.models.architectures import native_side
from spm_hub.models.base_choice import BaseChoice

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from spm_hub.attachment.options import GateChoice

_LIBRARIES = ("spm-hub", "torch", "diffusers", "transformers")


@dataclass(frozen=True)
class Asked:
    """A user's wishes, beyond the protocol's own settings.

    seed: of the first picture. prompts: a file for its first set, with columns, if not found by name. measure: metrics
    and judges in place of the protocol's. limit: at most so many rows, which marks the report as incomplete.
    at_once: pictures of a batch; None for a number that suits their size. quick: the protocol's first look.
    steps, guidance, size (width and height in pixels): in place of the protocol's. strengths: each row is drawn at each
    of these too. judge_device: of the networks of judges and metrics; None for the CPU.
    """

    seed: int = 2024
    prompts: str | None = None
    columns: ColumnMap | None = None
    measure: tuple[str, ...] = ()
    limit: int | None = None
    at_once: int | None = None
    quick: bool = False
    steps: int | None = None
    guidance: float | None = None
    size: tuple[int, int] | None = None
    strengths: tuple[float, ...] = ()
    judge_device: str | None = None

    def __post_init__(self) -> None:
        """Refuse numbers that draw nothing."""
        for name, value in (("limit", self.limit), ("at-once", self.at_once), ("steps", self.steps)):
            if value is not None and value < 1:
                raise UsageError(f"--{name} is {value}, not 1 or more", mend=f"--{name} 1")
        if wrong := [one for one in self.strengths if not (0 < one < math.inf)]:
            raise UsageError(f"--strengths has {wrong[0]:g}, not a number above 0", mend="--strengths 0.5,2")


def evaluate(
    protocol: Protocol,
    erasers: Sequence[Adapter],
    base: BaseChoice,
    out: Path,
    asked: Asked,
    reporter: Reporter,
    *,
    resume: bool = False,
    gate: GateChoice | None = None,
    strength: Mapping[str, float] | float | None = None,
    force: bool = False,
    runner: Runner | None = None,
) -> dict[str, Any]:
    """Draw and measure what a protocol asks, with and without the erasers, and return the report.

    out: a new folder, or that of the same run if `resume`: what it has is not drawn again. gate, strength, force:
    as for `attach`. base: after its `check`. runner: who draws; None for this process.
    Raises UsageError, NotFoundError before anything is drawn; MetricError, ModelError, CompatibilityError.
    """
    runner = runner or Serial()
    if base.pipe is not None and not isinstance(runner, Serial):
        raise UsageError("workers load the base themselves, but a pipeline is given", mend="--model NAME, or serial")
    variant = protocol.sketchbook if base.is_embedded else protocol.usual
    with metrics_on(asked.judge_device):
        metrics = metrics_named(asked.measure or variant.measure)
    if protocol.attacked is not None:
        judge_for_attacks(metrics)
    concepts = [eraser.manifest.concept for eraser in erasers]
    first = concepts[0].require_target(erasers[0].source)
    file = None
    if asked.prompts is not None:
        file = read_prompt_file(asked.prompts, subject=first, seed=asked.seed, columns=asked.columns)
    pipe = base.open()
    _say_what_does_not_fit(protocol, erasers, base.name(pipe), reporter)
    defaults = _defaults(pipe, variant, protocol, asked, reporter)
    rows = rows_of(
        variant, concepts, seed=asked.seed, nearest=nearest_by_text(pipe),
        samples=protocol.quick.samples if asked.quick else None,
        given=() if file is None else _some(file, protocol, asked),
    )  # fmt: skip
    kept = rows if asked.limit is None else rows[: asked.limit]
    options = {"gate": gate, "strength": strength, "force": force}
    conditions = conditions_of(pipe, erasers, {**options, "reporter": reporter}, asked.strengths)
    with conditions[WITH]():
        pass  # erasers that do not go together are refused before there is a folder
    run = _run(protocol, variant, erasers, base.name(pipe), defaults, asked, file)
    run |= {"gate": _gate_name(gate), "strength": _strength(strength), "all_rows": len(rows)}
    if protocol.restores:
        run |= {"restored": first, "conditions": [*run["conditions"], RESTORED]}
    run["at_once"] = asked.at_once or _at_once(pipe, kept, defaults)
    folder = RunFolder.start(out, run, kept, resume=resume)
    with folder.locked():
        with reporter.progress("drawing") as progress:
            if isinstance(runner, Serial):
                work: Work = Drawing(folder, pipe, conditions, defaults, as_loaded=base.pipe is None)
            else:
                work = DrawingElsewhere(base, tuple(erasers), options, folder.path, defaults, asked.strengths)
                del pipe, conditions  # each worker has its own
            draw_missing(folder, work, runner, progress, reporter.say)
        with metrics_on(asked.judge_device):
            score(folder, metrics, reporter)
        if protocol.attacked is not None:
            attack_rows(
                protocol.attacked, protocol.quick if asked.quick else None, base, erasers[0], kept, defaults,
                judge_for_attacks(metrics), out, reporter, seed=asked.seed, at_once=run["at_once"], options=options,
                runner=runner,
            )  # fmt: skip
        return write_reports(folder, distances())


def _say_what_does_not_fit(protocol: Protocol, erasers: Sequence[Adapter], model: str, reporter: Reporter) -> None:
    """Say which erasers and which base a protocol is not meant for."""
    for eraser in erasers:
        if protocol.kinds and (kind := eraser.manifest.concept.kind) not in protocol.kinds:
            reporter.say(f"{protocol.name} is for {' and '.join(protocol.kinds)}, and {eraser.name} is of kind {kind}")
    if protocol.elsewhere and erasers[0].manifest.base.id == model:
        reporter.say(f"{protocol.name} is for another base than the eraser's own, and this is its own: {model}")


def score_again(
    path: Path, measure: Sequence[str], reporter: Reporter, *, judge_device: str | None = None
) -> dict[str, Any]:
    """Measure the kept pictures of a run without a model, and return the new report.

    judge_device: of the networks of judges and metrics; None for the CPU. Numbers of other metrics stay.
    Raises NotFoundError, UsageError, MetricError.
    """
    folder = RunFolder.open(path)
    if is_attack(folder.run):
        with metrics_on(judge_device):
            return judge_attacks_again(AttackFolder.open(path), measure, reporter)
    metrics = metrics_named(measure)
    with folder.locked(), metrics_on(judge_device):
        score(folder, metrics, reporter)
        return write_reports(folder, distances())


def _some(file: PromptFile, protocol: Protocol, asked: Asked) -> tuple[PromptRow, ...]:
    return file.rows[: protocol.quick.samples] if asked.quick else file.rows


def _defaults(
    pipe: DiffusionPipeline, variant: Variant, protocol: Protocol, asked: Asked, reporter: Reporter
) -> RowDefaults:
    drawing = variant.drawing
    steps = asked.steps or (min(protocol.quick.steps, drawing.steps) if asked.quick else drawing.steps)
    width, height = asked.size or (drawing.width, drawing.height)
    guidance = drawing.guidance if asked.guidance is None else asked.guidance
    defaults = RowDefaults(steps, guidance, drawing.negative, width, height)
    known = inspect.signature(type(pipe).__call__).parameters
    if defaults.negative and "negative_prompt" not in known:
        reporter.say(f"{type(pipe).__name__} takes no negative prompt: the protocol's is left out")
        return replace(defaults, negative=None)
    return defaults


def _run(
    protocol: Protocol,
    variant: Variant,
    erasers: Sequence[Adapter],
    model: str,
    defaults: RowDefaults,
    asked: Asked,
    file: PromptFile | None,
) -> dict[str, Any]:
    """Return everything that decides the pictures, and how the protocol was departed from, for run.json."""
    kind = erasers[0].manifest.concept.kind
    wanted = next((one.file for one in variant.sets if not one.kinds or kind in one.kinds), None)
    erased = {name.casefold() for one in erasers for name in one.manifest.concept.names}
    return {
        "protocol": {
            "name": protocol.name, "version": protocol.version, "sha256": protocol.sha256, "about": protocol.about,
            "paper": protocol.paper, "base": protocol.base, "differs": list(protocol.differs),
        },
        "published": [one.model_dump() for one in protocol.published if one.erased is None or one.erased in erased],
        "model": model,
        "erasers": [
            {"name": one.name, "concept": list(one.manifest.concept.names), "sha256": digest_of(one)} for one in erasers
        ],
        "conditions": [WITHOUT, WITH, *map(at_strength, dict.fromkeys(asked.strengths))],
        "drawing": asdict(defaults),
        "seed": asked.seed,
        "quick": asked.quick,
        "limit": asked.limit,
        "prompts": None if file is None else file.as_dict(),
        "stand_in_for": wanted if file is None else None,
        "versions": {name: version(name) for name in _LIBRARIES},
    }  # fmt: skip


def _gate_name(gate: object) -> str | float | None:
    return gate if gate is None or isinstance(gate, str | float | int) else type(gate).__name__


def _strength(strength: Mapping[str, float] | float | None) -> Any:
    return dict(strength) if isinstance(strength, Mapping) else strength


def _at_once(pipe: Any, rows: Sequence[PromptRow], defaults: RowDefaults) -> int:
    """Return a number of pictures that suits the largest of them."""
    side = native_side(pipe)
    sizes = [(row.width or defaults.width or side, row.height or defaults.height or side) for row in rows]
    return pictures_at_once(*max(sizes, key=lambda size: size[0] * size[1]))
