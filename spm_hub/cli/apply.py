"""spmhub apply: draw pictures with erasers attached."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from spm_hub.cli import options
from spm_hub.cli.app import Example, command
from spm_hub.cli.output import Output, silence_libraries, table
from spm_hub.errors import UsageError
from spm_hub.io.atomic import check_writable

if TYPE_CHECKING:
    from spm_hub.evaluation.pictures import PromptPictures


@command(
    "apply",
    Example('spmhub apply -a snoopy --prompt "snoopy" --compare', "with and without, side by side"),
    Example(
        "spmhub apply -a snoopy,mickey --prompts prompts.txt --num 4 --grid", "a file of prompts, four pictures each"
    ),
    Example('spmhub apply -a nudity --strength nudity=2 --prompt "a person"', "an eraser that acts twice as much"),
    panel="Use",
)
def apply(
    out: Output,
    *,
    adapters: options.Adapters,
    model: options.Model = "sketchbook",
    config: options.Config = None,
    prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p", help="What to draw; repeatable.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="A file with one prompt a line.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the first picture; the next one has the next seed.")] = 0,
    steps: Annotated[int | None, typer.Option(help="Denoising steps. Unless given: the pipeline's own.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale. Unless given: the pipeline's own.")] = None,
    num: Annotated[int, typer.Option(help="Pictures for each prompt.")] = 1,
    to: Annotated[Path, typer.Option("--out", help="Folder for the pictures.")] = Path("pictures"),
    compare: Annotated[
        bool, typer.Option("--compare", help="Also draw without the erasers, and a grid of both side by side.")
    ] = False,
    grid: Annotated[bool, typer.Option("--grid", help="Also draw all pictures as one labelled grid.")] = False,
    gate: options.Gate = None,
    strength: options.Strength = None,
    registry: options.Registry = None,
    require_signature: options.RequireSignature = None,
    device: options.Device = "cpu",
    dtype: options.Precision = "float32",
) -> None:
    """Draw pictures with erasers attached.

    Prints how strongly each eraser acted on each prompt.
    """
    from spm_hub.hub.resolve import resolve
    from spm_hub.models.loading import load_pipeline
    from spm_hub.models.references import describe_source, local_files, parse_reference

    if prompt and prompts:
        raise UsageError("--prompt and --prompts are both given", mend="put all prompts into the file")
    wanted, acting = options.names(adapters), options.gate(gate)
    strengths = options.strengths(strength)
    options.require_signature(require_signature)
    base = parse_reference(model, config=config)
    if base.remark:
        out.say(base.remark)
    with out.progress("downloading erasers") as progress:
        entries = [resolve(reference, registry, progress=progress) for reference in wanted]
    with silence_libraries():
        from spm_hub.adapters.lookup import check_names
        from spm_hub.evaluation.pictures import DrawingOptions, check_prompts, read_prompts, save_grid, save_one, show

        # What can be said at once is not said after a model was downloaded.
        texts = read_prompts(prompts) if prompts is not None else prompt or []
        check_prompts(texts)
        drawing = DrawingOptions(seed=seed, number=num, steps=steps, guidance=guidance)
        check_writable(to)
        erasers = [entry.load() for entry in entries]
        check_names(erasers, strengths or ())
        held = local_files(base)
        pipe = load_pipeline(model, config=config, dtype=dtype, device=device)
        fetched = local_files(base) != held
        sources = {
            "model": describe_source(model, pipe, fetched=fetched),
            **{entry.name: entry.describe_source() for entry in entries},
        }
        for what, place in sources.items():
            out.say(f"{what}: {place}")
        names = [eraser.name for eraser in erasers]
        described = {"model": base.public_name, "adapters": names, "steps": steps, "guidance": guidance}
        files: dict[str, list[Path]] = {}

        def keep(index: int, one: "PromptPictures") -> None:
            # At once: whoever ends a long run early has what was drawn.
            for condition, made in save_one(index, one, to, drawing, described).items():
                files.setdefault(condition, []).extend(made)

        with out.progress("drawing") as progress:
            shown = show(
                pipe, erasers, texts, drawing,
                gate=acting, strength=strengths, compare=compare, progress=progress, each=keep,
            )  # fmt: skip
    if grid or compare:
        files["grid"] = [save_grid(shown, to, ", ".join(names), described)]
    gates = [{"prompt": one.prompt, "gates": dict(one.gates)} for one in shown]
    paths = [str(path) for group in files.values() for path in group]
    out.data(
        {"files": files, "gates": gates, "sources": sources},
        table(["prompt", *names], [[one.prompt, *(one.gates[name] for name in names)] for one in shown]),
        brief=paths,
    )
    beside = f"; side by side: {files['grid'][0]}" if "grid" in files else ""
    out.say(f"{len(paths)} picture{'s' * (len(paths) > 1)} in {to}{beside}")
