"""spmhub apply: draw pictures with erasers attached."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from spm_hub.cli import options
from spm_hub.cli.app import Example, command
from spm_hub.cli.output import Output, silence_libraries, table
from spm_hub.errors import NotFoundError, UsageError
from spm_hub.io.progress import ProgressCallback, progress_if_long
from spm_hub.io.wording import counted, quoted

if TYPE_CHECKING:
    from spm_hub.evaluation.application import Applied
    from spm_hub.registry.entry import EraserEntry


ERASE = (
    "Concepts to erase, separated by commas, by erasers that fit the model. Those that no registry has are computed in "
    "seconds (method instant) and kept."
)


@command(
    "apply",
    Example('spmhub apply -a snoopy --prompt "snoopy" --compare', "with and without, side by side"),
    Example(
        "spmhub apply -a snoopy,mickey --prompts prompts.txt --num 4 --grid", "a file of prompts, four pictures each"
    ),
    Example('spmhub apply -a nudity --strength nudity=2 --prompt "a person"', "an eraser that acts twice as much"),
    Example('spmhub apply --erase "snoopy, parachute" --prompt "snoopy"', "erasers that need not exist before"),
    panel="Use",
)
def apply(
    out: Output,
    *,
    adapters: Annotated[list[str] | None, options.ADAPTERS] = None,
    erase: Annotated[list[str] | None, typer.Option("--erase", metavar="CONCEPTS", help=ERASE)] = None,
    model: options.Model = "sketchbook",
    config: options.Config = None,
    prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p", help="What to draw; repeatable.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="A file with one prompt a line.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the first picture; the next one has the next seed.")] = 0,
    steps: Annotated[int | None, typer.Option(help="Denoising steps. Default: the pipeline's.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale. Default: the pipeline's.")] = None,
    num: Annotated[int, typer.Option(help="Pictures for each prompt.")] = 1,
    at_once: Annotated[
        int | None,
        typer.Option("--at-once", min=1, help="Pictures in one batch. Default: 8, fewer if large.", show_default=False),
    ] = None,
    to: Annotated[Path, typer.Option("--out", help="Folder for the pictures.")] = Path("pictures"),
    compare: Annotated[
        bool, typer.Option("--compare", help="Also draw without the erasers, and a grid of both side by side.")
    ] = False,
    grid: Annotated[bool, typer.Option("--grid", help="Also draw all pictures as one labelled grid.")] = False,
    look: options.Look = True,
    gate: options.Gate = None,
    strength: options.Strength = None,
    registry: options.Registry = None,
    pull: options.Pull = False,
    require_signature: options.RequireSignature = None,
    force: options.ForceAttach = False,
    device: options.Device = "auto",
    dtype: options.Precision = "auto",
) -> None:
    """Draw pictures with erasers attached.

    Prints how strongly each eraser acted on each prompt.
    """
    from spm_hub.models.base_choice import BaseChoice

    if prompt and prompts:
        raise UsageError("--prompt and --prompts are both given", mend="put all prompts into the file")
    if not adapters and not erase:
        raise UsageError("no eraser is named", mend="--adapters NAME, or --erase CONCEPT; spmhub list has all names")
    wanted, concepts = options.names(adapters or []), options.names(erase or [], "--erase")
    acting, strengths = options.gate(gate), options.strengths(strength)
    options.require_signature(require_signature)
    base = BaseChoice(model, config, device, dtype)
    if remark := base.check():
        out.say(remark)
    with progress_if_long(out, "downloading erasers", after=0.0) as progress:
        entries = [_resolved(reference, registry, progress, out, pull=pull) for reference in wanted]
    with silence_libraries():
        from spm_hub.evaluation import application
        from spm_hub.evaluation.pictures import DrawingOptions, read_prompts

        texts = read_prompts(prompts) if prompts is not None else prompt or []
        drawing = DrawingOptions(seed=seed, number=num, steps=steps, guidance=guidance, at_once=at_once)
        applied = application.apply(
            entries, texts, base, drawing, out,
            gate=acting, strength=strengths, force=force, compare=compare, out=to, grid=grid or compare,
            erase=concepts, look=look, registry=registry,
        )  # fmt: skip
    _print(out, applied, to)


def _print(out: Output, applied: "Applied", folder: Path) -> None:
    """Print how strongly each eraser acted on each prompt, and where the pictures are."""
    paths = [str(path) for group in applied.files.values() for path in group]
    out.data(
        {
            "files": applied.files,
            "gates": [{"prompt": one.prompt, "gates": dict(one.gates)} for one in applied.shown],
            "sources": applied.sources,
        },
        table(["prompt", *applied.names], [[one.prompt, *map(one.gates.get, applied.names)] for one in applied.shown]),
        brief=paths,
    )
    drawn = len(paths) - len(applied.files.get("grid", ()))
    side_by_side = f"; side by side: {applied.files['grid'][0]}" if "grid" in applied.files else ""
    out.say(f"{counted(drawn, 'picture')} in {folder}{side_by_side}")


def _resolved(
    reference: str, registry: Path | None, progress: ProgressCallback, out: Output, *, pull: bool
) -> "EraserEntry":
    """Resolve a reference; the error for an unknown name offers to make an eraser of that concept."""
    from spm_hub.hub.resolve import resolve

    try:
        return resolve(reference, registry, pull=pull, progress=progress, say=out.say)
    except NotFoundError as error:
        # Of a name that is mistyped no eraser is wanted.
        if "/" in reference or reference.endswith(".safetensors") or "did you mean" in error.message:
            raise
        offer = f"--erase {quoted(reference)}, which makes one for this model now; or {error.mend}"
        raise NotFoundError(error.message, mend=offer) from error
