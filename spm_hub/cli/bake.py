"""Commands bake and recover: fold erasers into a checkpoint, and take one out again."""

from pathlib import Path
from typing import Annotated

import typer

from spm_hub.cli import options
from spm_hub.cli.app import Example, command
from spm_hub.cli.output import Output, silence_libraries
from spm_hub.io.wording import counted, quoted


@command(
    "bake",
    Example("spmhub bake --adapters snoopy,mickey --out safe", "the embedded model without snoopy and mickey"),
    Example("spmhub bake -m dreamshaper-8 -a nudity --out clean --strength nudity=2", "a community checkpoint"),
    interrupted="nothing was written",
    panel="Use",
)
def bake(
    out: Output,
    *,
    adapters: options.Adapters,
    to: Annotated[Path, typer.Option("--out", help="Folder for the new checkpoint.")],
    model: options.Model = "sketchbook",
    config: options.Config = None,
    strength: options.Strength = None,
    registry: options.Registry = None,
    pull: options.Pull = False,
    require_signature: options.RequireSignature = None,
    force: options.ForceBake = False,
) -> None:
    """Write a plain checkpoint with erasers folded in: a diffusers folder, also of a single file.

    Any program can load the checkpoint. It erases at gamma 1, for every prompt. Each part of the base keeps its
    precision, and spmhub recover can take an eraser out again.
    """
    from spm_hub.hub.bake import bake as run
    from spm_hub.hub.resolve import resolve
    from spm_hub.models.references import parse_reference

    strengths = options.strengths(strength)
    options.require_signature(require_signature)
    if remark := parse_reference(model, config=config).remark:
        out.say(remark)
    erasers = options.names(adapters)
    with silence_libraries():
        out.say(f"baking {counted(len(erasers), 'eraser')} into {model} ...")
        entries = [resolve(one, registry, pull=pull, say=out.say).load() for one in erasers]
        provenance = run(
            entries, to, model=model, config=config, strength=strengths, registry=registry, replace=force, force=force
        )
    names = ", ".join(eraser.name for eraser in provenance.erasers)
    out.data(
        {"checkpoint": to, **provenance.model_dump(mode="json")}, f"{to}: {model} without {names}", brief=[str(to)]
    )
    out.say(f"take one out again: spmhub recover {provenance.erasers[0].name} --checkpoint {quoted(to)}")


@command(
    "recover",
    Example("spmhub recover snoopy --checkpoint safe", "snoopy is back, the other erasers stay"),
    panel="Use",
)
def recover(
    out: Output,
    name: Annotated[str, typer.Argument(help="The eraser to take out.")],
    *,
    checkpoint: Annotated[Path, typer.Option("--checkpoint", help="A folder that spmhub bake wrote.")],
    registry: options.Registry = None,
    require_signature: options.RequireSignature = None,
    force: Annotated[
        bool, typer.Option("--force", help="Fold the others again at any strength that the checkpoint records.")
    ] = False,
) -> None:
    """Take one eraser out of a baked checkpoint.

    The folder then equals a bake without it, bit for bit.
    """
    options.require_signature(require_signature)
    with silence_libraries():
        from spm_hub.hub.bake import recover as run

        provenance = run(checkpoint, name, registry, force=force)
    left = ", ".join(eraser.name for eraser in provenance.erasers)
    out.data(
        {"checkpoint": checkpoint, "recovered": name, **provenance.model_dump(mode="json")},
        f"{checkpoint}: {name} is back; " + (f"still erased: {left}" if left else "it is the plain base again"),
        brief=[str(checkpoint)],
    )
