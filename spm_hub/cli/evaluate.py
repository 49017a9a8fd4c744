"""spmhub eval: measure how much erasers take away, and how much they change everything else."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from spm_hub.cli import options
from spm_hub.cli.app import Example, command
from spm_hub.cli.output import Output, silence_libraries, table
from spm_hub.errors import RegistryError, UsageError
from spm_hub.io.wording import counted, quoted

if TYPE_CHECKING:
    from spm_hub.evaluation.effect import Effect
    from spm_hub.registry.entry import EraserEntry

TOGETHER = "Erasers, attached together: names, files, or owner/name."
Names = Annotated[list[str], typer.Argument(metavar="NAME", autocompletion=options.complete_name, help=TOGETHER)]


@command(
    "eval",
    Example("spmhub eval snoopy", "how often snoopy and all other concepts are drawn, without it and with it"),
    Example("spmhub eval snoopy --samples 50 --record", "more pictures, and the numbers kept for spmhub show"),
    Example("spmhub eval snoopy mickey --model sketchbook-chalk", "both at once, on another checkpoint"),
    Example(
        "spmhub eval nudity --model sd-v1-4 --device cuda --judge my.judges:nude", "another base, with your own judge"
    ),
    interrupted="nothing was recorded",
    panel="Look",
)
def evaluate(
    out: Output,
    names: Names,
    *,
    model: options.Model = "sketchbook",
    config: options.Config = None,
    judge: options.Judge = None,
    samples: Annotated[int, typer.Option(min=1, help="Pictures of each subject and style.")] = 20,
    record: Annotated[
        bool, typer.Option("--record", help="Keep the numbers in the eraser's manifest, where spmhub show has them.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="With --record: replace numbers of more pictures.")] = False,
    gate: options.Gate = None,
    strength: options.Strength = None,
    seed: Annotated[int, typer.Option(help="Seed of the pictures.")] = 2024,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 25,
    guidance: Annotated[float, typer.Option(help="Guidance scale.")] = 7.5,
    registry: options.Registry = None,
    pull: options.Pull = False,
    require_signature: options.RequireSignature = None,
    device: options.Device = "auto",
    dtype: options.Precision = "auto",
) -> None:
    """Count how often concepts are drawn without erasers and with them, the erased ones and others.

    Both draw the same sentences, on which no eraser was trained, from the same noise. On the sketchbook its probe looks
    for all concepts that it knows; a judge of your own (--judge) looks for the erased ones.
    """
    from spm_hub.hub.resolve import resolve
    from spm_hub.models.base_choice import BaseChoice
    from spm_hub.models.references import parse_reference
    from spm_hub.registry.registry import check_richness
    from spm_hub.sketchbook import PROTOCOL

    acting, strengths = options.gate(gate), options.strengths(strength)
    options.require_signature(require_signature)
    options.check_judge(judge, parse_reference(model, config=config))
    base = BaseChoice(model, config, device, dtype)
    base.check()
    if force and not record:
        raise UsageError("--force is for --record, which is not given", mend="add --record")
    entries = [resolve(reference, registry, pull=pull, say=out.say) for reference in names]
    if record:
        _check_recordable(entries, asked=(judge, gate, strength))
        if not force:
            check_richness(entries[0].read_manifest(), PROTOCOL, base.public_name, samples, steps)
    with silence_libraries():
        from spm_hub.evaluation.effect import measure

        effect = measure(
            [entry.load() for entry in entries], base, out,
            samples=samples, seed=seed, steps=steps, guidance=guidance, judge=judge, gate=acting, strength=strengths,
        )  # fmt: skip
    if record:
        _record(out, entries[0], effect, replace=force)
    rows = effect.rows()
    out.data(
        {"erasers": list(effect.erasers), "model": effect.base, "samples": samples, "seed": seed,
         "steps": steps, "guidance_scale": guidance, "rows": rows, **effect.summary()},
        table(
            ["", "", "without", "with", "points"],
            [["erased" if row["erased"] else "", row["name"], f"{row['without']:.0%}", f"{row['with']:.0%}",
              f"{row['change_points']:+.1f}"] for row in rows],
            title=f"{counted(samples, 'picture')} each on {effect.base}",
        ),
        brief=[f"{row['name']} {row['without']:.2f} {row['with']:.2f}" for row in rows if row["erased"]],
    )  # fmt: skip


def _record(out: Output, entry: "EraserEntry", effect: "Effect", *, replace: bool) -> None:
    from spm_hub.registry.registry import Registry

    root, gate = entry.adapter_path.parent.parent, entry.read_manifest().default_gate
    Registry(root).record_evaluation(entry.name, effect.evaluations(gate), replace=replace)
    out.say(f"kept in the manifest of {entry.name}: spmhub show {entry.name} --registry {quoted(root)}")


def _check_recordable(entries: list["EraserEntry"], asked: tuple[object, ...]) -> None:
    """Refuse to record numbers unless they are those of one eraser in a registry, used as it asks to be.

    Raises UsageError, RegistryError.
    """
    from spm_hub.registry import storage

    if len(entries) > 1:
        raise UsageError(
            f"--record is for one eraser, but {len(entries)} are named",
            mend="name one, and run it again for each other",
        )
    if any(given is not None for given in asked):
        raise UsageError(
            "--record keeps the effect of an eraser with its own settings, measured by the probe: --judge, --gate and "
            "--strength would change the numbers",
            mend="leave them out, or leave --record out",
        )
    path: Path = entries[0].adapter_path
    if path.parent.name != storage.ADAPTERS or entries[0].manifest_path is None:
        raise RegistryError(
            f"{path} is in no registry, so there is no manifest to keep the numbers in",
            mend=f"spmhub convert {quoted(path)}",
        )
