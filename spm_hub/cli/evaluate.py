"""spmhub eval: measure how much erasers take away, and how much they change everything else."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spm_hub.cli import options
from spm_hub.cli.app import Example, command
from spm_hub.cli.output import Output, silence_libraries, table
from spm_hub.cli.recording import check_recordable, keep_numbers
from spm_hub.errors import UsageError
from spm_hub.io.wording import counted

if TYPE_CHECKING:
    from spm_hub.adapters.manifest import GateName
    from spm_hub.evaluation.effect import Effect
    from spm_hub.evaluation.protocols.running import Asked
    from spm_hub.io.runners.runner import Runner
    from spm_hub.models.base_choice import BaseChoice
    from spm_hub.registry.entry import EraserEntry

TOGETHER = "Erasers, attached together: names, files, or owner/name."
Names = Annotated[list[str], typer.Argument(metavar="NAME", autocompletion=options.complete_name, help=TOGETHER)]
Protocol = Annotated[
    str | None,
    typer.Option(
        "--protocol", help="Evaluate by a protocol and keep every picture: spmhub protocols.", show_default=False
    ),
]
Prompts = Annotated[
    str | None,
    typer.Option(
        "--prompts",
        metavar="FILE",
        help="Prompts for the protocol: CSV, JSON lines, text or Parquet, or hf://datasets/OWNER/NAME@REVISION/PATH.",
        show_default=False,
    ),
]
Columns = Annotated[
    str | None,
    typer.Option(
        "--columns", metavar="PROPERTY=COLUMN", help="Columns of --prompts: prompt=text,seed=s.", show_default=False
    ),
]
Folder = Annotated[
    Path | None,
    typer.Option("--out", help="Folder of the protocol's run. Default: NAME-PROTOCOL.", show_default=False),
]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the run in --out, drawing only the missing pictures.")]
Limit = Annotated[
    int | None,
    typer.Option(min=1, help="Draw the first rows only; the report says that it is incomplete.", show_default=False),
]
AtOnce = Annotated[
    int | None,
    typer.Option("--at-once", min=1, help="Pictures in one batch. Default: by their size.", show_default=False),
]
Size = Annotated[
    str | None,
    typer.Option(
        "--size", metavar="WIDTHxHEIGHT", help="Pixels of all pictures without their own.", show_default=False
    ),
]
Strengths = Annotated[
    str | None,
    typer.Option(
        "--strengths", metavar="S,S", help="Draw at these strengths too, for a plot of erasure and damage.",
        show_default=False,
    ),
]  # fmt: skip
Quick = Annotated[bool, typer.Option("--quick", help="The protocol's first look: few pictures, few steps.")]
Samples = Annotated[int | None, typer.Option(min=1, help="Pictures of each subject. Default: 20.", show_default=False)]
Steps = Annotated[
    int | None, typer.Option(min=1, help="Denoising steps. Default: 25, or the protocol's.", show_default=False)
]
Guidance = Annotated[
    float | None, typer.Option(help="Guidance scale. Default: 7.5, or the protocol's.", show_default=False)
]
Record = Annotated[
    bool, typer.Option("--record", help="Keep the numbers in the eraser's manifest, where spmhub show has them.")
]
Force = Annotated[
    bool,
    typer.Option(
        "--force",
        help="Attach erasers although one takes back what another changes; with --record: replace numbers of more "
        "pictures.",
    ),
]
_OF_PROTOCOLS = ("prompts", "columns", "metric", "out", "resume", "limit", "at_once", "size", "strengths", "quick",
                 "runner", "workers", "judge_device")  # fmt: skip
_OF_DETECTION = ("samples",)


@command(
    "eval",
    Example("spmhub eval snoopy", "how often snoopy and all other concepts are drawn, without it and with it"),
    Example("spmhub eval snoopy --samples 50 --record", "more pictures, and the numbers kept for spmhub show"),
    Example("spmhub eval snoopy mickey --model sketchbook-chalk", "both at once, on another checkpoint"),
    Example(
        "spmhub eval nudity --model sd-v1-4 --device cuda --judge my.judges:nude", "another base, with your own judge"
    ),
    Example("spmhub eval snoopy --protocol spm-objects --quick", "a paper's protocol: neighbours, distances, a report"),
    Example(
        "spmhub eval nudity --protocol i2p-nudity --model sd-v1-4 --device cuda --prompts i2p.csv",
        "nudity on published prompts; --resume continues after an interruption",
    ),
    interrupted="nothing was recorded; a protocol's pictures are kept, and --resume continues",
    panel="Look",
)
def evaluate(
    out: Output,
    names: Names,
    *,
    protocol: Protocol = None,
    model: options.Model = "sketchbook",
    config: options.Config = None,
    prompts: Prompts = None,
    columns: Columns = None,
    judge: options.Judges = None,
    metric: options.Metrics = None,
    folder: Folder = None,
    resume: Resume = False,
    quick: Quick = False,
    runner: options.Runner = None,
    workers: options.Workers = None,
    judge_device: options.JudgeDevice = None,
    limit: Limit = None,
    at_once: AtOnce = None,
    size: Size = None,
    strengths: Strengths = None,
    samples: Samples = None,
    record: Record = False,
    force: Force = False,
    gate: options.Gate = None,
    strength: options.Strength = None,
    seed: Annotated[int, typer.Option(help="Seed of the pictures.")] = 2024,
    steps: Steps = None,
    guidance: Guidance = None,
    registry: options.Registry = None,
    pull: options.Pull = False,
    require_signature: options.RequireSignature = None,
    device: options.Device = "auto",
    dtype: options.Precision = "auto",
) -> None:
    """Count how often concepts are drawn without erasers and with them, the erased ones and others.

    Both draw the same sentences, on which no eraser was trained, from the same noise. On the sketchbook its probe looks
    for all concepts that it knows; a judge of your own (--judge) looks for the erased ones.
    With --protocol an evaluation of a paper, or of your own prompts, keeps every picture with its scores in a folder,
    and writes a report with intervals as JSON, Markdown and one HTML page.
    """
    from spm_hub.hub.resolve import resolve
    from spm_hub.io.runners.named import runner_named
    from spm_hub.models.base_choice import BaseChoice

    options.require_signature(require_signature)
    given = {"prompts": prompts, "columns": columns, "metric": metric, "out": folder, "resume": resume, "limit": limit,
             "at_once": at_once, "size": size, "strengths": strengths, "quick": quick, "runner": runner,
             "workers": workers, "judge_device": judge_device, "samples": samples, "record": record}  # fmt: skip
    _check_options(protocol, given)
    if force and not record and len(names) == 1:
        raise UsageError("--force is for several erasers, or for --record", mend="leave it out, or add --record")
    base = BaseChoice(model, config, device, dtype)
    how = _Settings(base, options.gate(gate), options.strengths(strength), force, seed, steps, guidance)
    entries = [resolve(reference, registry, pull=pull, say=out.say) for reference in names]
    if protocol is not None:
        asked = _asked(how, given, (*(judge or ()), *(metric or ())))
        doing = runner_named(runner or "serial", workers)
        _by_protocol(out, protocol, entries, how, folder, asked, doing, resume=resume, record=record)
        return
    _detect(out, entries, how, judge, samples or 20, record=record)


@dataclass(frozen=True)
class _Settings:
    """The base, the erasers' settings and the drawing, for both ways to evaluate."""

    base: "BaseChoice"
    gate: "GateName | float | None"
    strengths: dict[str, float] | None
    force: bool
    seed: int
    steps: int | None
    guidance: float | None


def _check_options(protocol: str | None, given: Mapping[str, object]) -> None:
    """Refuse options that would have no effect. Raises UsageError."""
    wrong = [name for name in (_OF_PROTOCOLS if protocol is None else _OF_DETECTION) if given[name]]
    if not wrong:
        return
    option = f"--{wrong[0].replace('_', '-')}"
    if protocol is None:
        raise UsageError(f"{option} is for an evaluation by a protocol", mend="add --protocol: spmhub protocols")
    raise UsageError(f"{option} has no effect with --protocol {protocol}", mend=f"leave {option} out, or --limit N")


def _asked(how: _Settings, given: dict[str, Any], measure: tuple[str, ...]) -> "Asked":
    from spm_hub.evaluation.prompts.columns import ColumnMap
    from spm_hub.evaluation.protocols.running import Asked

    columns, size = given["columns"], given["size"]
    if columns is not None and given["prompts"] is None:
        raise UsageError("--columns is for --prompts, which is not given", mend="add --prompts FILE")
    return Asked(
        seed=how.seed, prompts=given["prompts"], columns=None if columns is None else ColumnMap.parse(columns),
        measure=measure, limit=given["limit"], at_once=given["at_once"], quick=given["quick"], steps=how.steps,
        guidance=how.guidance, size=None if size is None else _pixels(size), judge_device=given["judge_device"],
        strengths=_numbers(given["strengths"] or ""),
    )  # fmt: skip


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(",") if text)
    except ValueError:
        raise UsageError(f"--strengths {text!r} is not numbers with commas between", mend="--strengths 0.5,2") from None


def _pixels(size: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", size)
    if match is None or int(match[1]) % 8 or int(match[2]) % 8:
        raise UsageError(f"--size {size!r} is not WIDTHxHEIGHT in multiples of 8 pixels", mend="--size 512x512")
    return int(match[1]), int(match[2])


def _by_protocol(
    out: Output,
    name: str,
    entries: list["EraserEntry"],
    how: _Settings,
    folder: Path | None,
    asked: "Asked",
    runner: "Runner",
    *,
    resume: bool,
    record: bool,
) -> None:
    from spm_hub.cli.protocols import show_report
    from spm_hub.evaluation.protocols.protocol import protocol_named
    from spm_hub.evaluation.reports.recording import check_whole, evaluations_of

    protocol = protocol_named(name)
    how.base.check()
    if record:
        check_recordable(entries, asked=(how.gate, how.strengths))
        check_whole(quick=asked.quick, limit=asked.limit)
    place = folder or Path(f"{'-'.join(entry.name for entry in entries)}-{name}")
    with silence_libraries():
        from spm_hub.evaluation.protocols import running

        report = running.evaluate(
            protocol, [entry.load() for entry in entries], how.base, place, asked, out,
            resume=resume, gate=how.gate, strength=how.strengths, force=how.force, runner=runner,
        )  # fmt: skip
    if record:
        found = evaluations_of(report, place, entries[0].read_manifest().default_gate)
        keep_numbers(out, entries[0], found, replace=how.force)
    show_report(out, report, place)


def _detect(
    out: Output,
    entries: list["EraserEntry"],
    how: _Settings,
    judges: list[str] | None,
    samples: int,
    *,
    record: bool,
) -> None:
    """Count detections on the project's own sentences; keep the numbers if asked to."""
    from spm_hub.models.references import parse_reference
    from spm_hub.registry.registry import check_richness
    from spm_hub.sketchbook import PROTOCOL

    if judges and len(judges) > 1:
        raise UsageError(f"--judge is given {len(judges)} times", mend="several judges are for --protocol")
    judge = judges[0] if judges else None
    steps, guidance = how.steps or 25, 7.5 if how.guidance is None else how.guidance
    assert how.base.reference is not None
    options.check_judge(judge, parse_reference(how.base.reference, config=how.base.config))
    how.base.check()
    if record:
        check_recordable(entries, asked=(judge, how.gate, how.strengths))
        if not how.force:
            check_richness(entries[0].read_manifest(), PROTOCOL, how.base.public_name, samples, steps)
    with silence_libraries():
        from spm_hub.evaluation.effect import measure

        effect = measure(
            [entry.load() for entry in entries], how.base, out, samples=samples, seed=how.seed, steps=steps,
            guidance=guidance, judge=judge, gate=how.gate, strength=how.strengths, force=how.force,
        )  # fmt: skip
    if record:
        found = effect.evaluations(entries[0].read_manifest().default_gate)
        keep_numbers(out, entries[0], found, replace=how.force)
    _show(out, effect, samples)


def _show(out: Output, effect: "Effect", samples: int) -> None:
    rows = effect.rows()
    out.data(
        {"erasers": list(effect.erasers), "model": effect.base, "samples": samples, "seed": effect.seed,
         "steps": effect.steps, "guidance_scale": effect.guidance, "rows": rows, **effect.summary()},
        table(
            ["", "", "without", "with", "points"],
            [["erased" if row["erased"] else "", row["name"], f"{row['without']:.0%}", f"{row['with']:.0%}",
              f"{row['change_points']:+.1f}"] for row in rows],
            title=f"{counted(samples, 'picture')} each on {effect.base}",
        ),
        brief=[f"{row['name']} {row['without']:.2f} {row['with']:.2f}" for row in rows if row["erased"]],
    )  # fmt: skip
