"""spmhub demo: train one eraser, draw with and without it, and count the concepts in the pictures."""

from pathlib import Path
from typing import Annotated

import typer

from spm_hub.cli.app import Example, command
from spm_hub.cli.output import Output, silence_libraries, table
from spm_hub.io.wording import counted

CONCEPT = "snoopy"
SUBJECTS = (CONCEPT, "mickey", "spongebob", "pikachu", "dog", "cat")
STYLES = ("van gogh",)
QUICK = ("steps=200", "anchoring.per_target=1")
"""A third of the batch rows of `spmhub train`: it erases as much, and changes other pictures slightly more."""
PROMPTS = ("snoopy", "snoopy at the beach by van gogh", "mickey", "a dog", "a cat by van gogh")


@command("demo", Example("spmhub demo", "everything in ./demo, in a few minutes on two cores"), panel="Make")
def demo(
    out: Output,
    *,
    to: Annotated[Path, typer.Option("--out", help="Folder for the eraser and the pictures.")] = Path("demo"),
    samples: Annotated[int, typer.Option(min=1, help="Pictures of each subject to count in.")] = 16,
) -> None:
    """Erase snoopy from the embedded model and show it.

    The training is shorter than that of `spmhub train snoopy`.
    Writes a grid of pictures with and without, and prints a table of the concepts detected in them.
    """
    with silence_libraries():
        from spm_hub.attachment.attachment import attach
        from spm_hub.evaluation.pictures import DrawingOptions, grid_of, show, write_png
        from spm_hub.evaluation.sketchbook import detection_table
        from spm_hub.models.loading import load_pipeline
        from spm_hub.registry.registry import Registry
        from spm_hub.training import train
        from spm_hub.training.recipe.recipe import Recipe

        kept_in, picture = Registry(to), to / "before-after.png"
        # Without the picture of an earlier demo, an eraser there is the user's own.
        kept_in.check_room_for(CONCEPT, replace=picture.exists())
        pipe = load_pipeline("sketchbook")
        with out.progress(f"erasing {CONCEPT}") as progress:
            eraser = train(Recipe.plan(None, QUICK, target=CONCEPT), pipe=pipe, progress=progress)
        entry = kept_in.add(eraser, replace=True)
        with out.progress("drawing") as progress:
            shown = show(pipe, [eraser], PROMPTS, DrawingOptions(seed=1, number=3), progress=progress)
        write_png(picture, grid_of(shown, CONCEPT), {"model": "sketchbook", "adapters": [CONCEPT]})

        tables = []
        with out.progress("counting concepts, without the eraser") as progress:
            tables.append(detection_table(pipe, SUBJECTS, STYLES, samples=samples, progress=progress))
        with attach(pipe, [eraser], reporter=out), out.progress("counting concepts, with the eraser") as progress:
            tables.append(detection_table(pipe, SUBJECTS, STYLES, samples=samples, progress=progress))
    rows = [
        {"name": before.name, "kind": before.kind, "without": before.detected, "with": after.detected}
        for before, after in zip(*tables, strict=True)
    ]
    out.data(
        {"adapter": entry.adapter_path, "picture": picture, "samples": samples, "detected": rows},
        table(
            ["asked for", "without", "with the eraser"],
            [[row["name"], *(f"{row[key]:.0%}" for key in ("without", "with"))] for row in rows],
            title=f"detected, of {counted(samples, 'picture')} each",
        ),
        brief=[str(picture)],
    )
    out.say(f"side by side: {picture}")
