"""Options that several commands share, each with one name, type and help text."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, get_args

import typer

from spm_hub.errors import SpmHubError, UsageError, nearest
from spm_hub.io.environment import KEY_VARIABLE, REGISTRY_VARIABLE

if TYPE_CHECKING:
    from spm_hub.adapters.manifest import GateName
    from spm_hub.models.references import ModelRef

Registry = Annotated[
    Path | None,
    typer.Option(
        "--registry",
        envvar=REGISTRY_VARIABLE,
        help="Registry folder. Default: your own registry; in a clone of spm-hub, that of the clone.",
        show_default=False,
    ),
]
Model = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        help="Alias, diffusers folder, single .safetensors file, or owner/name on the Hub, also with @revision.",
    ),
]
Config = Annotated[
    str | None,
    typer.Option(
        "--config",
        help="For a single file: a model of the same family to take the configuration from (alias, diffusers folder, "
        "owner/name). Default: chosen by the file's contents.",
        show_default=False,
    ),
]


def complete_name(incomplete: str) -> list[str]:
    """Return the names of erasers that complete the last of several, separated by commas."""
    from spm_hub.registry.registry import registries

    before, comma, begun = incomplete.rpartition(",")
    try:
        names = [entry.name for place in registries() for entry in place.entries()]
    except SpmHubError:  # a shell has no place for messages
        return []
    return [f"{before}{comma}{name}" for name in dict.fromkeys(names) if name.startswith(begun)]


ADAPTERS = typer.Option(
    "--adapters",
    "-a",
    autocompletion=complete_name,
    help="Erasers, separated by commas: names, files, or owner/name on the Hub; repeatable.",
)
Adapters = Annotated[list[str], ADAPTERS]
Strength = Annotated[
    list[str] | None,
    typer.Option(
        "--strength", metavar="NAME=NUMBER", help="Factor on an eraser's effect; repeatable.", show_default=False
    ),
]
Device = Annotated[
    str, typer.Option("--device", help="Device to compute on: cpu, cuda, cuda:1, mps; auto is a GPU if there is one.")
]
Look = Annotated[
    bool,
    typer.Option(
        "--look/--no-look",
        help="Draw a few pictures of the names nearest to a new eraser's concept, and say which were lost.",
    ),
]
Precision = Annotated[
    Literal["auto", "float32", "float16", "bfloat16"],
    typer.Option(
        "--dtype",
        help="Precision to compute in. auto: half where the base is, else float32; never float16 on a CPU or to train.",
    ),
]
RequireSignature = Annotated[
    Path | None,
    typer.Option(
        "--require-signature",
        metavar="KEY",
        envvar=KEY_VARIABLE,
        help="Public key (PEM): refuse erasers that were not signed with its private key.",
        show_default=False,
    ),
]
Pull = Annotated[
    bool,
    typer.Option("--pull", help="Look names that no registry has up on the Hub, among those of spm-hub."),
]
Gate = Annotated[
    str | None,
    typer.Option(
        "--gate",
        help="calibrated (acts on prompts that concern the concept), transport (the paper's rule, acts a little on "
        "every prompt), always, evidence (calibrated, and asks the denoiser about each prompt), or a number. "
        "Default: that of each eraser's manifest, calibrated as a rule.",
        show_default=False,
    ),
]
Judge = Annotated[
    str | None,
    typer.Option(
        "--judge",
        metavar="JUDGE",
        help="Decides which pictures show the concept: MODULE:FUNCTION, a Python function, also of the working folder, "
        "or nudenet:spm9 and others (spmhub protocols --metrics). Default: the sketchbook's probe.",
        show_default=False,
    ),
]
Runner = Annotated[
    str | None,
    typer.Option(
        "--runner",
        metavar="RUNNER",
        help="Where the work is done: serial, processes, or ray[:ADDRESS]. Default: serial.",
        show_default=False,
    ),
]
Workers = Annotated[
    int | None,
    typer.Option(min=1, help="Workers of --runner. Default: one on each GPU, or two.", show_default=False),
]
JudgeDevice = Annotated[
    str | None,
    typer.Option(
        "--judge-device",
        metavar="DEVICE",
        help="Device of CLIP, classifiers, vision-language models and Inception as judges and metrics. Default: cpu.",
        show_default=False,
    ),
]
Judges = Annotated[
    list[str] | None,
    typer.Option(
        "--judge",
        help="Decides which pictures show a concept: MODULE:FUNCTION, a Python function, also of the working folder, "
        "or nudenet:spm9 and others (spmhub protocols --metrics); with --protocol repeatable. Default: the "
        "sketchbook's probe, or the protocol's.",
        show_default=False,
    ),
]
Metrics = Annotated[
    list[str] | None,
    typer.Option("--metric", help="Metric, as spmhub protocols --metrics lists them; repeatable.", show_default=False),
]
ForceAttach = Annotated[
    bool, typer.Option("--force", help="Attach erasers although one takes back what another changes.")
]
Force = Annotated[bool, typer.Option("--force", help="Replace existing files and erasers.")]
ForceBake = Annotated[
    bool,
    typer.Option("--force", help="Replace a checkpoint, and bake erasers although one undoes another."),
]


def names(texts: list[str], option: str = "--adapters") -> list[str]:
    """Split ["a,b", "c"], the values of an option, into references. Raises UsageError if one is empty."""
    found = [name.strip() for text in texts for name in text.split(",")]
    if not all(found):
        raise UsageError(f"{option} {','.join(texts)!r} contains an empty name", mend="spmhub list")
    return found


def check_judge(judge: str | None, model: ModelRef) -> None:
    """Refuse a model other than the sketchbook if no judge is given. Raises UsageError."""
    from spm_hub.models.aliases import ALIASES

    alias = ALIASES.get(model.text)
    if judge is None and (alias is None or alias.embedded is None):
        raise UsageError(
            f"there is no built-in judge for pictures of {model.public_name}",
            mend="--judge MODULE:FUNCTION, or --model sketchbook",
        )


def strengths(texts: list[str] | None) -> dict[str, float] | None:
    """Parse ["a=0.5", ...] into numbers by eraser; None if there are none. Raises UsageError."""
    if not texts:
        return None
    found: dict[str, float] = {}
    for text in texts:
        name, separator, number = text.rpartition("=")
        if not separator or not name or (value := _number(number)) is None:
            raise UsageError(f"--strength {text!r} is not of the form NAME=NUMBER", mend="--strength snoopy=0.5")
        if name in found:
            raise UsageError(f"--strength names {name!r} twice: {found[name]} and {value}")
        found[name] = value
    return found


def gate(text: str | None) -> GateName | float | None:
    """Return a gate's name or number, None if none is given. Raises UsageError for anything else."""
    match text:
        case None | "calibrated" | "transport" | "always" | "evidence":
            return text
    from spm_hub.adapters import manifest

    names: tuple[str, ...] = get_args(manifest.GateName)
    if (value := _number(text)) is None:
        raise UsageError(
            f"--gate {text!r} is neither {' nor '.join(names)} nor a number",
            mend=f"--gate {(*nearest(text, names), *names)[0]}",
        )
    return value


def require_signature(key: Path | None) -> None:
    """Check everything that is loaded from now on against this public key; sets the environment variable."""
    if key is not None:
        os.environ[KEY_VARIABLE] = str(key)


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
