"""spmhub eval: what erasers take away, and what they leave as it was."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spm_hub.cli import options
from spm_hub.cli.app import Example, command
from spm_hub.cli.output import Output, silence_libraries, table
from spm_hub.errors import RegistryError, UsageError

if TYPE_CHECKING:
    from spm_hub.registry.entry import EraserEntry


@command(
    "eval",
    Example("spmhub eval snoopy", "what of snoopy and of everything else is drawn without it, and with it"),
    Example("spmhub eval snoopy --samples 50 --record", "more pictures, and the numbers kept for spmhub show"),
    Example("spmhub eval snoopy mickey --model sketchbook-chalk", "both at once, on another checkpoint"),
    Example(
        "spmhub eval nudity --model sd-v1-4 --device cuda --judge my.judges:nude", "another base, with your own judge"
    ),
    panel="Look",
)
def evaluate(
    out: Output,
    names: Annotated[
        list[str], typer.Argument(metavar="NAME...", help="Erasers, attached together: names, files, or owner/name.")
    ],
    *,
    model: options.Model = "sketchbook",
    config: options.Config = None,
    judge: options.Judge = None,
    samples: Annotated[int, typer.Option(min=1, help="Pictures of each subject and style.")] = 20,
    record: Annotated[
        bool, typer.Option("--record", help="Keep the numbers in the eraser's manifest, where spmhub show has them.")
    ] = False,
    gate: options.Gate = None,
    strength: options.Strength = None,
    seed: Annotated[int, typer.Option(help="Seed of the pictures.")] = 2024,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 25,
    guidance: Annotated[float, typer.Option(help="Guidance scale.")] = 7.5,
    registry: options.Registry = None,
    require_signature: options.RequireSignature = None,
    device: options.Device = "cpu",
    dtype: options.Precision = "float32",
) -> None:
    """Count how often what was erased is drawn without erasers and with them, and how often everything else is.

    The same sentences, on which no eraser was trained, from the same noise. On the sketchbook its probe looks for all
    that it knows; a judge of your own (--judge) for what was erased.
    """
    from spm_hub.hub.resolve import resolve
    from spm_hub.models.loading import load_pipeline
    from spm_hub.models.references import parse_reference

    acting, strengths = options.gate(gate), options.strengths(strength)
    options.require_signature(require_signature)
    base = parse_reference(model, config=config)
    options.check_judge(judge, base)
    entries = [resolve(reference, registry) for reference in names]
    if record:
        _check_recordable(entries, asked=(judge, gate, strength))
    with silence_libraries():
        from spm_hub.attachment.attachment import attach
        from spm_hub.evaluation import judging
        from spm_hub.evaluation.pictures import DrawingOptions
        from spm_hub.evaluation.sketchbook import evaluations, paint

        DrawingOptions(seed=seed, number=samples, steps=steps, guidance=guidance)  # refuses what would draw nothing
        erasers = [entry.load() for entry in entries]
        concepts = [eraser.manifest.concept for eraser in erasers]
        wanted, count = judging.table_of(concepts, judge, samples, seed)
        pipe = load_pipeline(model, config=config, dtype=dtype, device=device)

        def drawn(what: str) -> list[Any]:
            with out.progress(what) as progress:
                return count(paint(pipe, wanted, steps=steps, guidance_scale=guidance, progress=progress))

        without = drawn("drawing without")
        with attach(pipe, erasers, gate=acting, strength=strengths):
            given = drawn("drawing with")
    erased = {name.lower() for concept in concepts for name in (concept.target, *concept.aliases)}
    rows = [
        {"kind": new.kind, "name": new.name, "erased": new.name.lower() in erased, "without": old.detected,
         "with": new.detected, "change_points": round(100 * (new.detected - old.detected), 1)}
        for old, new in zip(without, given, strict=True)
    ]  # fmt: skip
    rows.sort(key=lambda row: (not row["erased"], row["change_points"]))
    others = [row["change_points"] for row in rows if not row["erased"]]
    summary: dict[str, float] = {}
    if others:
        summary = {"others_worst_points": min(others), "others_mean_points": round(sum(others) / len(others), 2)}
    if record:
        from spm_hub.registry.registry import Registry

        root = entries[0].adapter_path.parent.parent
        Registry(root).record_evaluation(entries[0].name, evaluations(without, given, base=base.public_name, seed=seed))
        out.say(f"kept in the manifest of {entries[0].name} in {root}: spmhub show {entries[0].name}")
    out.data(
        {"erasers": [eraser.name for eraser in erasers], "model": base.public_name, "samples": samples, "seed": seed,
         "steps": steps, "guidance_scale": guidance, "rows": rows, **summary},
        table(
            ["", "", "without", "with", "points"],
            [["erased" if row["erased"] else "", row["name"], f"{row['without']:.0%}", f"{row['with']:.0%}",
              f"{row['change_points']:+.1f}"] for row in rows],
            title=f"{samples} pictures each on {base.public_name}",
        ),
        brief=[f"{row['name']} {row['without']:.2f} {row['with']:.2f}" for row in rows if row["erased"]],
    )  # fmt: skip


def _check_recordable(entries: list["EraserEntry"], asked: tuple[object, ...]) -> None:
    """Raises UsageError, RegistryError where the numbers would not be those of one eraser as it is, in a registry."""
    from spm_hub.registry import storage

    if len(entries) > 1:
        raise UsageError(f"--record is for one eraser, and {len(entries)} are named", mend="one after the other")
    if any(given is not None for given in asked):
        raise UsageError(
            "--record keeps what an eraser does as it asks to be used, by the probe: --judge, --gate and --strength "
            "would make other numbers of it",
            mend="leave them out, or --record",
        )
    path: Path = entries[0].adapter_path
    if path.parent.name != storage.ADAPTERS or entries[0].manifest_path is None:
        raise RegistryError(f"{path} lies in no registry that could keep its numbers", mend=f"spmhub convert {path}")
