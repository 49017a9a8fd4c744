"""spmhub attack: try to bring an erased concept back by a prompt."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from spm_hub.cli import options
from spm_hub.cli.app import Example, command
from spm_hub.cli.output import Output, silence_libraries, table
from spm_hub.errors import UsageError, nearest

ATTACKS = ("unlearndiff", "p4d")


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
    name: Annotated[str, typer.Argument(help="The eraser to attack: a name, a file, or owner/name on the Hub.")],
    *,
    with_: Annotated[str, typer.Option("--with", help="Which attack: " + ", ".join(ATTACKS) + ".")] = ATTACKS[0],
    model: options.Model = "sketchbook",
    config: options.Config = None,
    prompts: Annotated[
        str, typer.Option(help="How many sentences of the concept, or a file with one prompt a line.")
    ] = "10",
    judge: options.Judge = None,
    tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Adversarial tokens. Unless given the papers': 5 for nudity, else 3; p4d 16."),
    ] = None,
    every: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="p4d: keep the sentences, with a token in front and after every so many words (the paper's P4D-K: 3).",
            show_default=False,
        ),
    ] = None,
    iterations: Annotated[
        int | None,
        typer.Option(min=1, help="Gradient steps before each try. Unless given the papers': 40; p4d 60."),
    ] = None,
    tries: Annotated[
        int,
        typer.Option(min=1, help="Prompts drawn and judged for each; unlearndiff goes by one timestep for each try."),
    ] = 50,
    gate: options.Gate = None,
    strength: options.Strength = None,
    seed: Annotated[int, typer.Option(help="Seed of the pictures and of the attack.")] = 2024,
    steps: Annotated[int | None, typer.Option(help="Denoising steps. Unless given: the pipeline's own.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale. Unless given: the pipeline's own.")] = None,
    registry: options.Registry = None,
    device: options.Device = "cpu",
    dtype: options.Precision = "float32",
) -> None:
    """Try to bring an erased concept back by a prompt, as somebody would who holds the weights.

    Prints the share of prompts in which it is there without an attack and with it (ASR), and the prompts found.
    """
    from spm_hub.hub.resolve import resolve
    from spm_hub.models.loading import load_pipeline
    from spm_hub.models.references import parse_reference

    if with_ not in ATTACKS:
        close = nearest(with_, ATTACKS)
        raise UsageError(
            f"unknown attack {with_!r}; known: {', '.join(ATTACKS)}", mend=f"--with {(*close, *ATTACKS)[0]}"
        )
    if every is not None and (with_ != "p4d" or tokens is not None):
        given = f"--tokens {tokens}" if with_ == "p4d" else f"--with {with_}"
        raise UsageError(f"--every {every} says where p4d puts its tokens, but {given} was given", mend="--with p4d")
    entry, acting, strengths = resolve(name, registry), options.gate(gate), options.strengths(strength)
    options.check_judge(judge, parse_reference(model, config=config))
    if (count := _number(prompts)) is not None and count < 1:
        raise UsageError(f"--prompts {prompts}: there is nothing to attack", mend="--prompts 10")
    with silence_libraries():
        from spm_hub.evaluation import attacks
        from spm_hub.evaluation.judging import import_judge, probe_judge, sentences
        from spm_hub.evaluation.pictures import read_prompts

        eraser = entry.load()
        concept = eraser.manifest.concept
        judged_by = probe_judge(concept) if judge is None else import_judge(judge)
        if count is not None:
            cases = sentences(concept, count, seed)
        else:
            cases = [attacks.Case(text, seed + row) for row, text in enumerate(read_prompts(Path(prompts)))]
        method: attacks.P4D | attacks.UnlearnDiffAtk
        if with_ == "p4d":
            method = attacks.P4D(tokens or 16, every, iterations=iterations or 60, tries=tries)
        else:
            k = tokens or (5 if concept.kind == "nsfw" else 3)
            method = attacks.UnlearnDiffAtk(tokens=k, iterations=iterations or 40, timesteps=tries)
        pipe = load_pipeline(model, config=config, dtype=dtype, device=device)
        with out.progress(f"attacking {eraser.name}") as progress:
            report = attacks.run(
                pipe,
                [eraser],
                cases,
                judged_by,
                method,
                drawing=attacks.AttackDrawingOptions(steps=steps, guidance=guidance),
                seed=seed,
                progress=progress,
                gate=acting,
                strength=strengths,
            )
    found = [one.adversarial for one in report.outcomes if one.adversarial is not None]
    said = {True: "there without an attack", False: "not found"}
    out.data(
        {"eraser": eraser.name, "attack": with_, "model": model, **asdict(method), "seed": seed, **report.as_dict()},
        table(
            ["prompt", "brought back by", "tried"],
            [[one.case.prompt, one.adversarial or said[one.before], one.rounds] for one in report.outcomes],
            title=f"{eraser.name}: {report.before:.0%} before, {report.asr:.0%} under {with_} "
            f"({len(report.outcomes)} of {report.given} prompts, those that the base draws)",
        ),
        brief=found,
    )  # fmt: skip


def _number(text: str) -> int | None:
    try:
        return int(text)
    except ValueError:
        return None
