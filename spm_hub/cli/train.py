"""spmhub train: make an eraser."""

from pathlib import Path
from typing import Annotated, Any

import typer

from spm_hub.cli import options
from spm_hub.cli.app import Example, command
from spm_hub.cli.output import Output, silence_libraries, size


@command(
    "train",
    Example("spmhub train snoopy", "erase snoopy, on the embedded model"),
    Example('spmhub train "van gogh" --model sd-v1-4 --device cuda', "erase a style from Stable Diffusion 1.4"),
    Example("spmhub train church --set objective.eta=2 --seed 3", "another hyper-parameter, another seed"),
    Example("spmhub train mickey --method esd-x --increment lora:4", "another method, another increment"),
    Example("spmhub train snoopy --resume", "go on where Ctrl-C or a crash ended it"),
    panel="Make",
)
def train(
    out: Output,
    concept: Annotated[str | None, typer.Argument(help="What to erase, in words. May stand in the recipe.")] = None,
    *,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Base model: see spmhub models. Unless given: sketchbook.")
    ] = None,
    config: options.Config = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="spm, esd-x, esd-x-strict, esd-u, esd-all, esd-selfattn, race, race-spm, uce or minimalist. "
            "Unless given: spm."
        ),
    ] = None,
    increment: Annotated[
        str | None, typer.Option(help="What is trained: spm, lora:RANK, dense or mask. Unless given: the method's own.")
    ] = None,
    recipe: Annotated[Path | None, typer.Option(help="A recipe in YAML; other options win over it.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the recipe; repeatable.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the eraser. Unless given: made from the concept.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random. Unless given: 0.")] = None,
    registry: options.Registry = None,
    device: options.Device = "cpu",
    dtype: options.Precision = "float32",
    checkpoint_dir: Annotated[
        Path | None, typer.Option(help="Where to keep the state of the run. Unless given: your cache folder.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the state of an earlier run.")] = False,
    force: options.Force = False,
) -> None:
    """Train an eraser for CONCEPT and keep it in the registry."""
    from spm_hub.hub.registry import Registry, registries, resolve
    from spm_hub.models import identity_of, load_pipeline, parse_reference
    from spm_hub.training.parts import IncrementRecipe
    from spm_hub.training.recipe import Recipe

    given: dict[str, Any] = {"target": concept, "model": model, "method": method, "name": name, "seed": seed}
    given["increment"] = None if increment is None else IncrementRecipe.named(increment)
    plan = Recipe.plan(recipe, set_ or (), **{key: value for key, value in given.items() if value is not None})
    kept_in = Registry(registry) if registry is not None else registries()[0]
    kept_in.check_room_for(plan.slug, replace=force)
    if remark := parse_reference(plan.model, config=config).remark:
        out.say(remark)
    folder = checkpoint_dir or options.run_folder(plan.slug)
    begun = None if plan.start_from is None else resolve(plan.start_from, registry)

    out.say(f"erasing {plan.target!r} from {plan.model} with {plan.method} ...")
    with silence_libraries():
        from spm_hub.training.trainer import Checkpoint
        from spm_hub.training.trainer import train as run

        pipe = load_pipeline(plan.model, config=config, dtype=options.precision(dtype), device=device)
        base, revision = identity_of(plan.model, pipe)
        with out.progress("training") as progress:
            adapter = run(
                plan.model_copy(update={"model": base}),
                pipe=pipe,
                revision=revision,
                progress=progress,
                checkpoint_dir=folder,
                resume=resume,
                start=None if begun is None else begun.load(),
            )
    entry = kept_in.add(adapter, replace=force)
    Checkpoint(folder).remove()
    n_bytes = entry.adapter_path.stat().st_size
    out.data(
        {"name": entry.name, "adapter": entry.adapter_path, "manifest": entry.manifest_path, "bytes": n_bytes},
        f"{entry.name}: {entry.adapter_path} ({size(n_bytes)})",
        brief=[str(entry.adapter_path)],
    )
    source = f"{plan.model} --config {config}" if config else plan.model
    out.say(f'try: spmhub apply --model {source} --adapters {entry.name} --prompt "{plan.target}" --compare')
