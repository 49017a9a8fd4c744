"""Command convert: imports a file of any format into a registry, and exports an eraser to any format."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from spm_hub.adapters.manifest import GammaLaw
from spm_hub.cli import options
from spm_hub.cli.app import Example, command
from spm_hub.cli.output import Output, silence_libraries
from spm_hub.errors import UsageError
from spm_hub.io.wording import counted

if TYPE_CHECKING:
    from spm_hub.hub.convert import Conversion

Law = Annotated[
    GammaLaw | None,
    typer.Option(
        "--gamma",
        help="How the change follows from gamma; squared: as the code released with SPM draws.",
        show_default=False,
    ),
]


@command(
    "convert",
    Example("spmhub convert lora.safetensors --concept snoopy", "another program's file, into the registry"),
    Example("spmhub convert esd-nudity.safetensors --model sd-v1-4", "whole weights: their difference to the base"),
    Example("spmhub convert spm-snoopy.safetensors --concept snoopy --gamma squared", "as SPM's released code draws"),
    Example("spmhub convert lora.safetensors --without-text-encoder", "the part for the denoiser alone"),
    Example("spmhub convert snoopy --to comfyui --out snoopy-lora.safetensors", "for another program"),
    Example("spmhub convert esd-nudity --to kohya --svd-rank 8", "a dense eraser as a LoRA, its error stated"),
    interrupted="nothing was written",
    panel="Share",
)
def convert(
    out: Output,
    source: Annotated[str, typer.Argument(metavar="FILE", help="A file or folder of any format, or an eraser's name.")],
    *,
    to: Annotated[
        str | None,
        typer.Option("--to", help="Program (comfyui, webui, invoke) or format; else the registry.", show_default=False),
    ] = None,
    place: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="File to write (a folder for peft). Default: in the working folder, named by eraser and format.",
            show_default=False,
        ),
    ] = None,
    svd_rank: Annotated[
        int | None,
        typer.Option("--svd-rank", min=1, help="Approximate by at most this rank, and state the relative error."),
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="Of the eraser; made from the concept or file.")] = None,
    concept: Annotated[
        str | None,
        typer.Option("--concept", help="The concept it erases, if the file does not say it or says another."),
    ] = None,
    base: Annotated[
        str | None, typer.Option("--base", help="Model family (sd1, sdxl, flux ...), if the file does not say.")
    ] = None,
    law: Law = None,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="The base it was trained on: for whole weights, DoRA, masks, --to esd."),
    ] = None,
    without_text_encoder: Annotated[
        bool,
        typer.Option("--without-text-encoder", help="Leave out the tensors of text encoders, instead of refusing."),
    ] = False,
    config: options.Config = None,
    registry: options.Registry = None,
    require_signature: options.RequireSignature = None,
    force: options.Force = False,
) -> None:
    """Convert an eraser from or to another program's format.

    Reads SPM, kohya, LyCORIS, diffusers, PEFT, XLabs, LECO, concept sliders, cloneofsimo, ESD, UCE, Concept Ablation
    and Minimalist files; pickles (.pt, .ckpt, .bin) too, as tensors only. Exact unless --svd-rank is given.
    """
    from spm_hub.hub.convert import convert as run

    if config is not None and model is None:
        raise UsageError("--config is for a --model that is a single file, and there is no --model")
    if to is None and place is not None:
        raise UsageError(
            "--out is for --to FORMAT; without it the eraser goes into the registry", mend="--registry DIR"
        )
    options.require_signature(require_signature)
    with silence_libraries():
        done = run(
            source, to=to, out=place, keep=to is None, svd_rank=svd_rank, name=name, concept=concept, family=base,
            law=law, model=model, config=config, without_text_encoder=without_text_encoder, registry=registry,
            replace=force, reporter=out,
        )  # fmt: skip
    _remark(out, done, svd_rank)
    _show(out, done)


def _remark(out: Output, done: "Conversion", svd_rank: int | None) -> None:
    """State the error of an approximation, and warn of a file without a concept."""
    if done.relative_error is not None:
        lost = f", {done.biases_left_out} biases and norms left out" * bool(done.biases_left_out)
        out.say(f"rank {svd_rank}: relative error {done.relative_error:.3g}{lost}")
    if done.adapter.manifest.concept.target is None:
        out.say(
            f"warning: {done.adapter.name} names no concept, so it acts fully on every prompt; to have a gate, say "
            "which it is: --concept NAME"
        )


def _show(out: Output, done: "Conversion") -> None:
    info = done.adapter.manifest
    files = [str(file) for file in done.files]
    kind = f"{info.increment.kind}{f' of rank {info.increment.rank}' if info.increment.rank else ''}"
    out.data(
        {
            "name": info.name,
            "concept": info.concept.target,
            "family": info.base.family,
            "kind": info.increment.kind,
            "rank": info.increment.rank,
            "modules": len(info.increment.modules),
            "read_as": done.read_as,
            "written_as": done.written_as,
            "files": files,
            "relative_error": done.relative_error,
            "biases_left_out": done.biases_left_out,
        },
        f"{info.name} ({done.read_as}, {info.base.family}): {kind}, "
        f"{counted(len(info.increment.modules), 'module')} -> " + ", ".join(files),
        brief=files,
    )
