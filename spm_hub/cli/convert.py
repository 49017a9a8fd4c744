"""spmhub convert: from any format into the registry, and from an eraser to any format."""

from pathlib import Path
from typing import Annotated, Any

import typer

from spm_hub.cli import options
from spm_hub.cli.app import Example, command
from spm_hub.cli.output import Output, silence_libraries
from spm_hub.errors import UsageError


@command(
    "convert",
    Example("spmhub convert lora.safetensors --concept snoopy", "another program's file, into the registry"),
    Example("spmhub convert esd-nudity.safetensors --model sd-v1-4", "whole weights: what they are away from the base"),
    Example("spmhub convert lora.safetensors --without-text-encoder", "what it has for the denoiser alone"),
    Example("spmhub convert snoopy --to diffusers --out snoopy-lora.safetensors", "for another program"),
    Example("spmhub convert esd-nudity --to kohya --svd-rank 8", "a dense eraser as a LoRA, its error stated"),
    panel="Share",
)
def convert(
    out: Output,
    source: Annotated[str, typer.Argument(metavar="FILE", help="A file or folder of any format, or an eraser's name.")],
    *,
    to: Annotated[
        str | None,
        typer.Option("--to", help="Format to write; without it the eraser goes into the registry.", show_default=False),
    ] = None,
    place: Annotated[
        Path | None,
        typer.Option(
            "--out", help="File to write (a folder for peft). Unless given: here, by name.", show_default=False
        ),
    ] = None,
    svd_rank: Annotated[
        int | None,
        typer.Option("--svd-rank", min=1, help="Approximate by at most this rank, and state the relative error."),
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="Of the eraser; made from the concept or file.")] = None,
    concept: Annotated[
        str | None, typer.Option("--concept", help="What it erases, where the file does not say.")
    ] = None,
    base: Annotated[
        str | None, typer.Option("--base", help="Model family (sd1, sdxl, flux ...), where the file does not tell.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="The base it was trained on: for whole weights, DoRA, masks, and --to esd."),
    ] = None,
    without_text_encoder: Annotated[
        bool,
        typer.Option("--without-text-encoder", help="Leave out what it holds for text encoders, instead of refusing."),
    ] = False,
    config: options.Config = None,
    registry: options.Registry = None,
    force: options.Force = False,
) -> None:
    """Convert an eraser from or to another program's format.

    Reads SPM, kohya, LyCORIS, diffusers, PEFT, LECO, concept sliders, cloneofsimo, ESD, UCE, Concept Ablation and
    Minimalist files; pickles (.pt, .ckpt, .bin) too, as tensors only. Exact unless --svd-rank is given.
    """
    from spm_hub.adapters.manifest import slug
    from spm_hub.hub.resolve import resolve
    from spm_hub.registry.registry import registries

    if config is not None and model is None:
        raise UsageError("--config is for a --model that is a single file, and there is no --model")
    if to is None and place is not None:
        raise UsageError(
            "--out is for --to FORMAT; without it the eraser goes into the registry", mend="--registry DIR"
        )
    said_name = None if name is None else slug(name)
    with silence_libraries():
        from spm_hub.adapters import conversion
        from spm_hub.adapters import low_rank_approximation as reduction
        from spm_hub.models.architectures import denoiser_of
        from spm_hub.models.loading import identity_of, load_pipeline
        from spm_hub.registry.registry import Registry

        target = None if to is None else conversion.writer_named(to)
        original = None
        if model is not None:
            out.say(f"reading {model} ...")
            pipe = load_pipeline(model, config=config)
            original = conversion.BaseModel(denoiser_of(pipe), *identity_of(model, pipe))
        said = conversion.Description(said_name, concept, base, without_text_encoder)
        path = Path(source).expanduser()
        if path.exists():
            with out.progress("reading") as move:
                adapter, read_as = conversion.read(path, said, original, lambda step, total: move(step, total))
        else:
            adapter, read_as = conversion.described(resolve(source, registry).load(), said), "spm"
        error = left_out = None
        if svd_rank is not None:
            if original is not None:
                adapter = conversion.densified(adapter, original)
            with out.progress(f"rank {svd_rank}") as move:
                reduced = reduction.reduce(adapter, svd_rank, lambda step, total: move(step, total))
            adapter, error, left_out = reduced.adapter, reduced.relative_error, reduced.biases_left_out
        if target is None:
            written = [Registry(registry or registries()[0].root).add(adapter, replace=force).adapter_path]
        else:
            here = Path(f"{adapter.name}-{to}" + (".safetensors" if to != "peft" else ""))
            written = conversion.write(adapter, target, place or here, original, replace=force)
    info = adapter.manifest
    result: dict[str, Any] = {
        "name": adapter.name,
        "concept": info.concept.target,
        "family": info.base.family,
        "kind": info.increment.kind,
        "rank": info.increment.rank,
        "modules": len(info.increment.modules),
        "read_as": read_as,
        "written_as": to or "spm",
        "files": [str(file) for file in written],
        "relative_error": error,
        "biases_left_out": left_out,
    }
    if error is not None:
        lost = f", {left_out} biases left out" * bool(left_out)
        out.say(f"rank {svd_rank}: relative error {error:.3g}{lost}")
    kind = f"{info.increment.kind}{f' of rank {info.increment.rank}' if info.increment.rank else ''}"
    out.data(
        result,
        f"{adapter.name} ({read_as}, {info.base.family}): {kind}, {len(info.increment.modules)} modules -> "
        + ", ".join(map(str, written)),
        brief=[str(file) for file in written],
    )
