"""spmhub gates: how strongly each eraser would act on prompts, and why."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from spm_hub.cli import options
from spm_hub.cli.app import Example, command
from spm_hub.cli.output import Output, silence_libraries, table
from spm_hub.errors import RegistryError, UsageError
from spm_hub.io.progress import progress_if_long

if TYPE_CHECKING:
    from spm_hub.attachment.gates.gate import Explanation

Prompts = Annotated[list[str] | None, typer.Argument(metavar="PROMPT", help="Prompts to ask the gates about.")]
PromptFile = Annotated[Path | None, typer.Option(help="A file with one prompt a line.", show_default=False)]
Picture = Annotated[
    Path | None, typer.Option("--out", help="Also draw a heat map of prompts and erasers (PNG).", show_default=False)
]


@command(
    "gates",
    Example('spmhub gates "snoopy on the beach" "a dog" -a snoopy,van-gogh', "gamma of each eraser, and what gave it"),
    Example(
        "spmhub gates --prompts prompts.txt -a snoopy,nudity --gate calibrated --out gates.png",
        "a file of prompts, as a heat map",
    ),
    interrupted="nothing was written",
    panel="Look",
)
def gates(
    out: Output,
    texts: Prompts = None,
    *,
    adapters: options.Adapters,
    model: options.Model = "sketchbook",
    config: options.Config = None,
    prompts: PromptFile = None,
    gate: options.Gate = None,
    to: Picture = None,
    force: options.Force = False,
    registry: options.Registry = None,
    pull: options.Pull = False,
    require_signature: options.RequireSignature = None,
    device: options.Device = "auto",
    dtype: options.Precision = "auto",
) -> None:
    """Show how strongly each eraser would act on prompts, and why, without drawing anything.

    Prints for each prompt and eraser its gamma, the term of the gate that gave it, and the words or the token that
    mattered. The first use of the calibrated gate on a model encodes some thousand sentences, and keeps the result.
    """
    from spm_hub.hub.resolve import resolve
    from spm_hub.io.atomic import check_writable
    from spm_hub.models.base_choice import BaseChoice

    if texts and prompts:
        raise UsageError("prompts and --prompts are both given", mend="put all prompts into the file")
    if not texts and prompts is None:
        raise UsageError("there is no prompt", mend='spmhub gates "a dog" --adapters snoopy, or --prompts FILE')
    wanted, acting = options.names(adapters), options.gate(gate)
    options.require_signature(require_signature)
    base = BaseChoice(model, config, device, dtype)
    if remark := base.check():
        out.say(remark)
    with progress_if_long(out, "downloading erasers", after=0.0) as progress:
        entries = [resolve(one, registry, pull=pull, progress=progress, say=out.say) for one in wanted]
    with silence_libraries():
        from spm_hub.adapters.lookup import check_names
        from spm_hub.attachment.attachment import attach
        from spm_hub.evaluation.heat_map import draw_heat_map
        from spm_hub.evaluation.pictures import check_prompts, read_prompts, write_png
        from spm_hub.evaluation.sketchbook import remark_on_words

        asked = read_prompts(prompts) if prompts is not None else texts or []
        check_prompts(asked)
        if remark := remark_on_words(base, asked):
            out.say(remark)
        if to is not None:
            if to.exists() and not force:
                raise RegistryError(f"{to} exists already", mend="another --out, or replace it with --force")
            check_writable(to.parent)
        loaded = [entry.load() for entry in entries]
        check_names(loaded)
        pipe = base.open()
        # No picture is drawn, so erasers that undo each other do no harm.
        with attach(pipe, loaded, gate=acting, force=True, reporter=out) as erasers:
            found = [erasers.explain(prompt) for prompt in asked]
        names = [one.name for one in loaded]
        described = {"model": base.name(pipe), "gate": gate, "adapters": names}
        if to is not None:
            gammas = [[one.gamma for one in each.values()] for each in found]
            write_png(to, draw_heat_map(gammas, asked, names), {**described, "prompts": asked})
    _show(out, described, list(zip(asked, found, strict=True)), to)


def _show(
    out: Output,
    described: Mapping[str, object],
    found: "Sequence[tuple[str, Mapping[str, Explanation]]]",
    to: Path | None,
) -> None:
    """Print the explanations of each prompt, by eraser."""
    rows = [(prompt, name, one) for prompt, each in found for name, one in each.items()]
    out.data(
        {
            **described,
            "prompts": [
                {"prompt": prompt, "erasers": {name: asdict(one) for name, one in each.items()}}
                for prompt, each in found
            ],
            "picture": to,
        },
        table(
            ["prompt", "eraser", "gamma", "term", "what gave it"],
            [[prompt, name, one.gamma, one.term, _reason(one)] for prompt, name, one in rows],
        ),
        brief=[f"{one.gamma:.3f} {name} {prompt}" for prompt, name, one in rows] if to is None else [str(to)],
    )
    if to is not None:
        out.say(f"heat map: {to}")


def _reason(found: "Explanation") -> str:
    """Return the words, the token or the score that a gamma comes from."""
    return f'"{found.token}", {found.shown}' if found.token else found.shown
