"""spmhub attack: try to bring an erased concept back by a prompt."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from spm_hub.cli import options
from spm_hub.cli.app import Example, command
from spm_hub.cli.output import Output, silence_libraries, table
from spm_hub.errors import UsageError
from spm_hub.evaluation.attacks.settings import ATTACKS, AttackSettings

NAME = "The eraser to attack: a name, a file, or owner/name on the Hub."
With = Annotated[str, typer.Option("--with", help="Which attack: " + ", ".join(ATTACKS) + ".")]
Prompts = Annotated[str, typer.Option(help="How many sentences of the concept, or a file with one prompt a line.")]
TOKENS = "Adversarial tokens. Default: the papers': 5 for nudity, else 3; p4d 16."
EVERY = "p4d: keep the sentences, with a token in front and after every so many words (the paper's P4D-K: 3)."
ITERATIONS = "Gradient steps before each try. Default: the papers': 40; p4d 60."
TRIES = "Prompts drawn and judged for each; unlearndiff goes by one timestep for each try."
Every = Annotated[int | None, typer.Option(min=1, help=EVERY, show_default=False)]
Steps = Annotated[int | None, typer.Option(help="Denoising steps. Default: the pipeline's.")]
Guidance = Annotated[float | None, typer.Option(help="Guidance scale. Default: the pipeline's.")]


@command(
    "attack",
    Example("spmhub attack snoopy --with unlearndiff", "ten prompts, the paper's settings, on the embedded model"),
    Example("spmhub attack snoopy --prompts 4 --tries 5 --iterations 20", "a first look, in a minute"),
    Example("spmhub attack snoopy --with p4d --gate always", "a whole prompt of its own, no gate in its way"),
    Example("spmhub attack snoopy --with p4d --every 3", "the same sentences, with tokens in between"),
    Example(
        "spmhub attack nudity --model sd-v1-4 --device cuda --prompts prompts.txt --judge my.judges:nude",
        "another base, with your own prompts and judge",
    ),
    panel="Look",
)
def attack(
    out: Output,
    name: Annotated[str, typer.Argument(help=NAME)],
    *,
    with_: With = ATTACKS[0],
    model: options.Model = "sketchbook",
    config: options.Config = None,
    prompts: Prompts = "10",
    judge: options.Judge = None,
    tokens: Annotated[int | None, typer.Option(min=1, help=TOKENS)] = None,
    every: Every = None,
    iterations: Annotated[int | None, typer.Option(min=1, help=ITERATIONS)] = None,
    tries: Annotated[int, typer.Option(min=1, help=TRIES)] = 50,
    gate: options.Gate = None,
    strength: options.Strength = None,
    seed: Annotated[int, typer.Option(help="Seed of the pictures and of the attack.")] = 2024,
    steps: Steps = None,
    guidance: Guidance = None,
    registry: options.Registry = None,
    device: options.Device = "cpu",
    dtype: options.Precision = "float32",
) -> None:
    """Try to bring an erased concept back by a prompt, with the weights of the model at hand.

    Prints the share of prompts that draw the concept without an attack and with it (ASR), and the prompts found.
    """
    from spm_hub.hub.resolve import resolve
    from spm_hub.models.base_choice import BaseChoice
    from spm_hub.models.references import parse_reference

    settings = AttackSettings(with_, tokens, every, iterations, tries)
    entry, acting, strengths = resolve(name, registry), options.gate(gate), options.strengths(strength)
    options.check_judge(judge, parse_reference(model, config=config))
    base = BaseChoice(model, config, device, dtype)
    base.check()
    wanted = _count_or_file(prompts)
    with silence_libraries():
        from spm_hub.evaluation import attacks
        from spm_hub.evaluation.judging import cases_for, import_judge, probe_judge

        eraser = entry.load()
        concept = eraser.manifest.concept
        judged_by = probe_judge(concept) if judge is None else import_judge(judge)
        cases, method = cases_for(concept, wanted, seed), settings.attack(concept.kind)
        drawing, pipe = attacks.AttackDrawingOptions(steps=steps, guidance=guidance), base.open()
        with out.progress(f"attacking {eraser.name}") as progress:
            report = attacks.run(
                pipe, [eraser], cases, judged_by, method,
                drawing=drawing, seed=seed, progress=progress, gate=acting, strength=strengths,
            )  # fmt: skip
    said = {True: "there without an attack", False: "not found"}
    out.data(
        {"eraser": eraser.name, "attack": with_, "model": model, **asdict(method), "seed": seed, **report.as_dict()},
        table(
            ["prompt", "brought back by", "tried"],
            [[one.case.prompt, one.adversarial or said[one.before], one.rounds] for one in report.outcomes],
            title=f"{eraser.name}: {report.before:.0%} before, {report.asr:.0%} under {with_} "
            f"({len(report.outcomes)} of {report.given} prompts, those that the base draws)",
        ),
        brief=[one.adversarial for one in report.outcomes if one.adversarial is not None],
    )  # fmt: skip


def _count_or_file(prompts: str) -> int | Path:
    """Return --prompts as a number or as a path. Raises UsageError for a number below 1."""
    try:
        count = int(prompts)
    except ValueError:
        return Path(prompts)
    if count < 1:
        raise UsageError(f"--prompts {prompts}: there is nothing to attack", mend="--prompts 10")
    return count
