"""spmhub demo: train one eraser, draw with and without it, and count the concepts in the pictures."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from spm_hub.cli.app import Example, command
from spm_hub.cli.output import Output, silence_libraries, table
from spm_hub.errors import SpmHubError
from spm_hub.io.wording import counted

if TYPE_CHECKING:
    from spm_hub.registry.entry import EraserEntry
    from spm_hub.training.recipe.recipe import Recipe

CONCEPT = "snoopy"
SUBJECTS = (CONCEPT, "mickey", "spongebob", "pikachu", "dog", "cat")
STYLES = ("van gogh",)
PROMPTS = ("snoopy", "snoopy at the beach by van gogh", "mickey", "a dog", "a cat by van gogh")


@command(
    "demo",
    Example("spmhub demo", "everything in ./demo, in a few minutes on two cores"),
    interrupted="run it again: it replaces its own files",
    panel="Make",
)
def demo(
    out: Output,
    *,
    to: Annotated[Path, typer.Option("--out", help="Folder for the eraser and the pictures.")] = Path("demo"),
    samples: Annotated[int, typer.Option(min=1, help="Pictures of each subject to count in.")] = 16,
) -> None:
    """Erase snoopy from the embedded model and show it.

    The training is that of `spmhub train snoopy`.
    Writes a grid of pictures with and without, and prints a table of the concepts detected in them.
    """
    with silence_libraries():
        from spm_hub.attachment.attachment import attach
        from spm_hub.evaluation.pictures import DrawingOptions, grid_of, show, write_png
        from spm_hub.evaluation.sketchbook import detection_table
        from spm_hub.io.progress import show_phases
        from spm_hub.models.loading import load_pipeline
        from spm_hub.registry.registry import Registry
        from spm_hub.training import train
        from spm_hub.training.recipe.recipe import Recipe
        from spm_hub.training.verdict import verdict, way

        kept_in, picture = Registry(to), to / "before-after.png"
        recipe = Recipe.plan(target=CONCEPT)
        # Without the picture or the recipe of an earlier demo, an eraser there is the user's own.
        kept_in.check_room_for(CONCEPT, replace=picture.exists() or _is_made_by(recipe, kept_in.find(CONCEPT)))
        pipe = load_pipeline("sketchbook")
        with out.progress(f"erasing {CONCEPT}") as move, show_phases(out):
            eraser = train(
                recipe, pipe=pipe, progress=lambda step, total, figures: move(step, total, figures, way(figures))
            )
        entry = kept_in.add(eraser, replace=True)
        out.say(f"{verdict(eraser.manifest)}; it is kept: {entry.adapter_path}")
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


def _is_made_by(recipe: "Recipe", entry: "EraserEntry | None") -> bool:
    """Return True if a demo made this eraser: one that was interrupted has left no picture."""
    try:
        return entry is not None and entry.read_manifest().recipe.get("steps") == recipe.steps
    except SpmHubError:
        return False
