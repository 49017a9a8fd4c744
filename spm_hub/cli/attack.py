"""spmhub attack: try to bring an erased concept back."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spm_hub.cli import options
from spm_hub.cli.app import Example, command
from spm_hub.cli.output import Output, literal, silence_libraries, table
from spm_hub.cli.recording import check_recordable, keep_numbers
from spm_hub.errors import UsageError
from spm_hub.evaluation.attacks.settings import ATTACKS, CONTROLS, AttackSettings, attacks_named
from spm_hub.io.wording import counted

if TYPE_CHECKING:
    from spm_hub.adapters.adapter import Adapter
    from spm_hub.evaluation.attacks.outcome import Case, Report
    from spm_hub.evaluation.attacks.tries import AttackDrawingOptions
    from spm_hub.io.runners.runner import Runner
    from spm_hub.models.base_choice import BaseChoice
    from spm_hub.registry.entry import EraserEntry

    _Found = tuple[str, Any, Report]

NAME = "The eraser to attack: a name, a file, or owner/name on the Hub."
WITH = f"Attacks, separated by commas: {', '.join(ATTACKS)}."
PROMPTS = "How many sentences of the concept, or a file with one prompt a line."
TOKENS = "Adversarial tokens. Default: the papers': 5 for nudity, else 3; 16 for whole prompts; 1 for cce."
EVERY = "p4d-k: keep the sentences, with a token in front and after every so many words. Default: the paper's 3."
ITERATIONS = "Steps of the search before each try. Default: the papers'."
TRIES = "Tries drawn and judged for each prompt. Default: the papers'."
TOKEN_FREE = "Search no token of the concept's names: p4d-n, pez, random (ring-a-bell never does)."
ADAPTIVE = "p4d: add this factor times the logarithm of the gate's score to the loss; for gates that have one."
FRESH = "Draw each try that succeeds again at so many fresh seeds."
CONTROLLED = "Also run random tokens and seed search with as many tries as each attack."
With = Annotated[str, typer.Option("--with", help=WITH)]
Tokens = Annotated[int | None, typer.Option(min=1, help=TOKENS, show_default=False)]
Every = Annotated[int | None, typer.Option(min=1, help=EVERY, show_default=False)]
Iterations = Annotated[int | None, typer.Option(min=1, help=ITERATIONS, show_default=False)]
Tries = Annotated[int | None, typer.Option(min=1, help=TRIES, show_default=False)]
TokenFree = Annotated[bool, typer.Option("--token-free", help=TOKEN_FREE)]
Adaptive = Annotated[float, typer.Option("--adaptive", metavar="LAMBDA", help=ADAPTIVE, show_default=False)]
Steps = Annotated[int | None, typer.Option(help="Denoising steps. Default: the pipeline's.", show_default=False)]
Folder = Annotated[
    Path | None, typer.Option("--out", help="Keep every picture and a report in this folder.", show_default=False)
]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the attacks in --out.")]
AtOnce = Annotated[
    int | None, typer.Option(min=1, help="Prompts attacked side by side. Default: 16.", show_default=False)
]
Guidance = Annotated[float | None, typer.Option(help="Guidance scale. Default: the pipeline's.", show_default=False)]
Record = Annotated[
    bool, typer.Option("--record", help="Keep the success of each attack in the eraser's manifest; needs --out.")
]
Force = Annotated[bool, typer.Option("--force", help="With --record: replace numbers of more prompts.")]


@command(
    "attack",
    Example("spmhub attack snoopy --with unlearndiff", "ten prompts, the paper's settings, on the embedded model"),
    Example("spmhub attack snoopy --prompts 4 --tries 5 --iterations 20", "a first look, in a minute"),
    Example("spmhub attack snoopy --with p4d-n --gate always", "a whole prompt of its own, no gate in its way"),
    Example("spmhub attack snoopy --with p4d-k --every 3", "the same sentences, with tokens in between"),
    Example(
        "spmhub attack nudity --with ring-a-bell,pez --iterations 100 --gate transport",
        "prompts found with the text encoder alone, under the paper's gate",
    ),
    Example(
        "spmhub attack nudity --model sd-v1-4 --device cuda --prompts prompts.txt --judge my.judges:nude",
        "another base, with your own prompts and judge",
    ),
    Example(
        "spmhub attack nudity --with ring-a-bell --out nudity-attacked --runner processes",
        "keep every picture and a report; --resume continues after an interruption",
    ),
    interrupted="its results are not kept, except in --out, where --resume continues",
    panel="Look",
)
def attack(
    out: Output,
    name: Annotated[str, typer.Argument(autocompletion=options.complete_name, help=NAME)],
    *,
    with_: With = ATTACKS[0],
    model: options.Model = "sketchbook",
    config: options.Config = None,
    prompts: Annotated[str, typer.Option(help=PROMPTS)] = "10",
    judge: options.Judge = None,
    tokens: Tokens = None,
    every: Every = None,
    iterations: Iterations = None,
    tries: Tries = None,
    token_free: TokenFree = False,
    adaptive: Adaptive = 0.0,
    fresh: Annotated[int, typer.Option(min=0, help=FRESH)] = 4,
    controls: Annotated[bool, typer.Option(help=CONTROLLED)] = True,
    gate: options.Gate = None,
    strength: options.Strength = None,
    seed: Annotated[int, typer.Option(help="Seed of the pictures and of the attack.")] = 2024,
    steps: Steps = None,
    guidance: Guidance = None,
    registry: options.Registry = None,
    pull: options.Pull = False,
    require_signature: options.RequireSignature = None,
    device: options.Device = "auto",
    dtype: options.Precision = "auto",
    folder: Folder = None,
    resume: Resume = False,
    at_once: AtOnce = None,
    runner: options.Runner = None,
    workers: options.Workers = None,
    record: Record = False,
    force: Force = False,
) -> None:
    """Try to bring an erased concept back: by text, seeds, embeddings, or noise.

    Prints the share of prompts that draw the concept without an attack and with it (ASR, with a 95 % interval), what
    the attacker must be able to do, how often the tries that succeeded do so again at fresh seeds, and their gammas.
    With --out every judged picture is kept with a report, and spmhub score judges the pictures again.
    """
    from spm_hub.hub.resolve import resolve
    from spm_hub.io.runners.named import runner_named
    from spm_hub.models.base_choice import BaseChoice
    from spm_hub.models.references import parse_reference

    settings = attacks_named(
        with_, tokens=tokens, every=every, iterations=iterations, tries=tries, token_free=token_free, adaptive=adaptive
    )
    options.require_signature(require_signature)
    entry = resolve(name, registry, pull=pull, say=out.say)
    acting, strengths = options.gate(gate), options.strengths(strength)
    options.check_judge(judge, parse_reference(model, config=config))
    base = BaseChoice(model, config, device, dtype)
    base.check()
    wanted = _count_or_file(prompts)
    _check_options(folder, {"resume": resume, "runner": runner, "record": record}, force=force)
    if record:
        check_recordable([entry], asked=(gate, strengths))
    doing = runner_named(runner or "serial", workers)
    how = _How(entry, base, judge, seed, fresh, acting, strengths, steps, guidance, at_once or 16)
    with silence_libraries():
        if folder is None:
            _print_only(out, how, settings, wanted, gate, controls=controls)
        else:
            report = _keep(out, how, settings, wanted, folder, doing, controls=controls, resume=resume)
            if record:
                _record(out, entry, report, folder, replace=force)
            show_attack_report(out, report, folder)


def _check_options(folder: Path | None, kept: Mapping[str, object], *, force: bool) -> None:
    """Refuse options that would have no effect. Raises UsageError.

    kept: those that are for attacks with a folder, by name.
    """
    if folder is None and (option := next((name for name, given in kept.items() if given), None)):
        raise UsageError(f"--{option} is for attacks whose pictures are kept", mend="add --out DIR")
    if force and not kept["record"]:
        raise UsageError("--force is for --record, which is not given", mend="add --record, or leave --force out")


@dataclass(frozen=True)
class _How:
    """The eraser, the base, the judge and the drawing of an attack, whether pictures are kept or not."""

    entry: "EraserEntry"
    base: "BaseChoice"
    judge: str | None
    seed: int
    fresh: int
    gate: Any
    strength: Any
    steps: int | None
    guidance: float | None
    at_once: int

    def cases(self, eraser: "Adapter", wanted: int | Path) -> "list[Case]":
        """Return the prompts. Raises UsageError, NotFoundError for a file or concept that gives none."""
        from spm_hub.evaluation.judging import cases_for

        concept = eraser.manifest.concept
        if self.judge is None or isinstance(wanted, int):
            concept.require_target(eraser.source)
        return cases_for(concept, wanted, self.seed)

    @property
    def drawing(self) -> "AttackDrawingOptions":
        from spm_hub.evaluation.attacks import AttackDrawingOptions

        return AttackDrawingOptions(steps=self.steps, guidance=self.guidance, at_once=self.at_once)


def _print_only(
    out: Output, how: _How, settings: Sequence[AttackSettings], wanted: int | Path, gate: str | None, *, controls: bool
) -> None:
    """Attack and print the results; no picture is kept."""
    from spm_hub.evaluation import attacks
    from spm_hub.evaluation.judging import judge_of_concept

    eraser = how.entry.load()
    concept = eraser.manifest.concept
    cases = how.cases(eraser, wanted)
    judge, _ = judge_of_concept(how.judge, concept)
    methods = {one: one.attack(concept.kind) for one in settings}
    methods |= {one: one.attack(concept.kind) for one in _controls(methods) if controls}
    pipe = how.base.open(for_gradients=True)
    with out.progress(f"attacking {eraser.name}") as progress:
        reports = attacks.run_all(
            pipe, [eraser], cases, judge, list(methods.values()),
            drawing=how.drawing, seed=how.seed, fresh=how.fresh, progress=progress, gate=how.gate,
            strength=how.strength, reporter=out,
        )  # fmt: skip
    found = [(one.name, made, report) for (one, made), report in zip(methods.items(), reports, strict=True)]
    about = {"eraser": eraser.name, "model": how.base.reference, "gate": gate, "seed": how.seed, "steps": how.steps,
             "guidance": how.guidance}  # fmt: skip
    _show(out, about, found, attacked=len(settings))


def _keep(
    out: Output,
    how: _How,
    settings: Sequence[AttackSettings],
    wanted: int | Path,
    folder: Path,
    runner: "Runner",
    *,
    controls: bool,
    resume: bool,
) -> dict[str, Any]:
    """Attack, keep every picture in a folder, and return its report."""
    from spm_hub.evaluation.attacks.records.recording import record_attacks

    eraser = how.entry.load()
    kind = eraser.manifest.concept.kind
    compared = _controls({one: one.attack(kind) for one in settings}) if controls else []
    return record_attacks(
        how.base, eraser, how.cases(eraser, wanted), settings, folder, out, judge=how.judge, drawing=how.drawing,
        seed=how.seed, fresh=how.fresh, options={"gate": how.gate, "strength": how.strength}, controls=compared,
        runner=runner, resume=resume,
    )  # fmt: skip


def _record(out: Output, entry: "EraserEntry", report: dict[str, Any], folder: Path, *, replace: bool) -> None:
    from spm_hub.evaluation.reports.recording import evaluations_of_attacks

    manifest = entry.read_manifest()
    found = evaluations_of_attacks(report, folder, manifest.default_gate, manifest.concept.require_target(entry.name))
    keep_numbers(out, entry, found, replace=replace)


def show_attack_report(out: Output, report: dict[str, Any], folder: Path) -> None:
    """Print a report of kept attacks: a table for each judge, and where its pages are."""
    from rich.console import Group

    from spm_hub.evaluation.attacks.records.wording import HEADINGS, rows_of_judge, summary

    tables = [table(list(HEADINGS), rows_of_judge(one), title=summary(one)) for one in report["judges"]]
    won = [one["text"] for attack in report["judges"][0]["attacks"] for one in attack["winners"]]
    out.data(report, Group(*(literal(part) if isinstance(part, str) else part for part in tables)), brief=won)
    out.say(f"report: {folder / 'report.html'}, report.md and report.json in the same folder")


def _controls(methods: dict[AttackSettings, Any]) -> list[AttackSettings]:
    """Return the controls of these attacks, each with as many tries as an attack has."""
    tries = dict.fromkeys(made.tries for one, made in methods.items() if one.name not in CONTROLS)
    token_free = any(one.token_free for one in methods)
    return [
        AttackSettings(name, tries=count, token_free=token_free and name == "random")
        for count in tries
        for name in CONTROLS
        if not any(one.name == name for one in methods)
    ]


def _show(out: Output, about: dict[str, Any], found: "Sequence[_Found]", *, attacked: int) -> None:
    """Print one row for each attack and control, and one for each try that succeeded."""
    from rich.console import Group

    described = [
        {"attack": name, **asdict(made), "tries": made.tries, **report.as_dict()} for name, made, report in found
    ]
    first = found[0][2]
    value = {**about, "asr_before": first.before, "attacks": described[:attacked], "controls": described[attacked:]}
    summary = table(
        ["attack", "attacker", "tries", "success", "95 %", "again at fresh seeds"],
        [_row(place < attacked, *one) for place, one in enumerate(found)],
        title=f"{about['eraser']}: {first.before:.0%} before an attack, of {counted(len(first.outcomes), 'prompt')} "
        f"({first.given} given, those that the base draws)",
    )
    won = [(name, one) for name, _, report in found for one in report.outcomes if one.adversarial is not None]
    winners = table(
        ["attack", "prompt", "brought back by", "tried", "gamma"],
        [
            [name, one.case.prompt, one.adversarial, one.rounds, ", ".join(f"{g:.2f}" for g in one.gammas.values())]
            for name, one in won
        ],
    )
    brief = [one.adversarial for _, _, report in found[:attacked] for one in report.outcomes if one.adversarial]
    parts = [summary, winners] if won else [summary]
    out.data(value, Group(*(literal(part) if isinstance(part, str) else part for part in parts)), brief=brief)


def _row(is_attack: bool, name: str, made: Any, report: "Report") -> list[object]:
    low, high = report.interval
    shown, drawn = report.fresh
    return [
        name if is_attack else f"{name} (control)", report.threat.value, made.tries, f"{report.asr:.0%}",
        f"{low:.0%} to {high:.0%}", f"{shown} of {drawn}" if drawn else "-",
    ]  # fmt: skip


def _count_or_file(prompts: str) -> int | Path:
    """Return --prompts as a number or as a path. Raises UsageError for a number below 1."""
    try:
        count = int(prompts)
    except ValueError:
        return Path(prompts)
    if count < 1:
        raise UsageError(f"--prompts {prompts}: there is nothing to attack", mend="--prompts 10")
    return count
