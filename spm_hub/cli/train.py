"""spmhub train: make an eraser."""

import shlex
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spm_hub.cli import options
from spm_hub.cli.app import Example, command
from spm_hub.cli.output import Output, silence_libraries, size
from spm_hub.errors import UsageError

if TYPE_CHECKING:
    from spm_hub.registry.entry import EraserEntry
    from spm_hub.training.session import Session

CONCEPTS = "What to erase, in words; an eraser for each. The recipe may name it instead."
MODEL = "Base model: see spmhub models. Unless given: sketchbook."
METHOD = "One of {methods}. Unless given: spm. See spmhub methods."
INCREMENT = (
    "Kind of change to train: spm, dense, mask, null-space, or by rank lora:4, loha:4, lokr:4, vera:64, dora:4. "
    "Unless given: the method's."
)
SURROGATE = "To draw in the concept's place; auto: a general word for its kind. Unless given: nothing."
PROTECT = "A prompt whose pictures stay as they are; repeatable. See --separable."
AFTER = "An earlier eraser, whose concept is protected too; repeatable."
SEPARABLE = "Protect with any method that changes keys and values only; sepme always does."
RUN = "Folder for the state of the run. Unless given: in your cache folder."
MEMORY = "GiB that training may use, weights included. Unless given: all free memory."
BALANCE = (
    "Attributes, as 'a man, a woman' or 'a man=0.4, a woman=0.6': --method uce then erases nothing, and has the "
    "concept drawn with each of them that often."
)
BALANCE_JUDGE = "With --balance: scores each picture against each attribute. Unless given: CLIP."
PLAN = "Print rows, memory and time, and train nothing."
Memory = Annotated[float | None, typer.Option(metavar="GIB", min=0.1, help=MEMORY)]
Balance = Annotated[str | None, typer.Option("--balance", metavar="ATTRIBUTES", help=BALANCE)]
BalanceJudge = Annotated[str | None, typer.Option("--judge", metavar="JUDGE", help=BALANCE_JUDGE)]
Protect = Annotated[list[str] | None, typer.Option(metavar="TEXT", help=PROTECT)]
After = Annotated[list[str] | None, typer.Option(metavar="NAME", help=AFTER)]
Sets = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the recipe; repeatable.")
]


def _method_names() -> dict[str, str]:
    """Return the names of all methods, for the help text: it imports the plug-ins."""
    from spm_hub.training.methods import all_methods

    return {"methods": ", ".join(all_methods())}


@command(
    "train",
    Example("spmhub train snoopy", "erase snoopy, on the embedded model"),
    Example('spmhub train "van gogh" --model sd-v1-4 --device cuda', "erase a style from Stable Diffusion 1.4"),
    Example("spmhub train snoopy --surrogate auto", "something general is drawn in its place, not nothing"),
    Example("spmhub train church --set objective.eta=2 --seed 3", "another hyper-parameter, another seed"),
    Example("spmhub train mickey --method esd-x --increment lora:4", "another method, another increment"),
    Example('spmhub train snoopy mickey "van gogh" --method sepme', "one eraser each, made not to interfere"),
    Example('spmhub train pikachu --method sepme --after snoopy --protect "a dog"', "leave snoopy and dogs alone"),
    Example("spmhub train snoopy --model sdxl --plan --memory 16", "rows, memory and time on a card of 16 GiB"),
    Example('spmhub train doctor --method uce --balance "a man, a woman"', "not erased, drawn as either equally often"),
    Example("spmhub train snoopy --resume", "go on after Ctrl-C or a crash"),
    Example(
        "spmhub train snoopy mickey pikachu --runner processes", "each in a worker of its own, on every GPU in turn"
    ),
    panel="Make",
    help_values=_method_names,
)
def train(
    out: Output,
    concepts: Annotated[list[str] | None, typer.Argument(metavar="CONCEPT", help=CONCEPTS)] = None,
    *,
    model: Annotated[str | None, typer.Option("--model", "-m", help=MODEL)] = None,
    config: options.Config = None,
    method: Annotated[str | None, typer.Option(help=METHOD)] = None,
    increment: Annotated[str | None, typer.Option(help=INCREMENT)] = None,
    surrogate: Annotated[str | None, typer.Option(metavar="TEXT", help=SURROGATE)] = None,
    protect: Protect = None,
    after: After = None,
    separable: Annotated[bool, typer.Option("--separable", help=SEPARABLE)] = False,
    balance: Balance = None,
    judge: BalanceJudge = None,
    recipe: Annotated[Path | None, typer.Option(help="A recipe in YAML; other options win over it.")] = None,
    set_: Sets = None,
    name: Annotated[str | None, typer.Option(help="Name of the eraser. Unless given: made from the concept.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random. Unless given: 0.")] = None,
    registry: options.Registry = None,
    device: options.Device = "auto",
    dtype: options.Precision = "auto",
    checkpoint_dir: Annotated[Path | None, typer.Option(help=RUN)] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the state of an earlier run.")] = False,
    look: options.Look = True,
    memory: Memory = None,
    plan: Annotated[bool, typer.Option("--plan", help=PLAN)] = False,
    force: options.Force = False,
    runner: options.Runner = None,
    workers: options.Workers = None,
) -> None:
    """Train an eraser for each CONCEPT and keep it in the registry."""
    from spm_hub.hub.making.quick_look import looked
    from spm_hub.hub.resolve import resolve
    from spm_hub.io.runners.named import runner_named
    from spm_hub.io.runners.runner import Serial
    from spm_hub.models.base_choice import BaseChoice
    from spm_hub.registry.entry import EraserEntry
    from spm_hub.registry.registry import registry_for_new
    from spm_hub.training.elsewhere import train_elsewhere
    from spm_hub.training.planning import plan_runs
    from spm_hub.training.recipe.schema import IncrementRecipe
    from spm_hub.training.session import Session

    given: dict[str, Any] = {"model": model, "method": method, "surrogate": surrogate, "name": name, "seed": seed}
    given["increment"] = None if increment is None else IncrementRecipe.named(increment)
    find = partial(resolve, registry=registry)
    earlier = [find(one, say=out.say).read_manifest().concept.require_target(one) for one in after or ()]
    protection = {"prompts": protect, "erased": earlier, "separable": separable}
    given["protection"] = {key: value for key, value in protection.items() if value} or None
    stated = {key: value for key, value in given.items() if value is not None}
    plans = plan_runs(concepts or [], stated, file=recipe, sets=set_ or ())
    session = Session(
        plans, BaseChoice(plans[0].model, config, device, dtype), out, find, registry=registry_for_new(registry),
        replace=force, resume=resume, checkpoint_dir=checkpoint_dir, memory=memory, look=looked if look else None,
    )  # fmt: skip
    doing = runner_named(runner or "serial", workers)
    session.check()
    if plan:
        _print_forecasts(out, session)
        return
    with silence_libraries():
        session = _balanced(session, balance, judge)
        made = session.train() if isinstance(doing, Serial) else train_elsewhere(session, doing)
        entries = [one for one in made if isinstance(one, EraserEntry)]
    _print(out, entries)
    source = ["--model", plans[0].model, *(["--config", config] if config else [])]
    source += ["--registry", str(registry)] if registry is not None else []
    listed = ["--adapters", ",".join(entry.name for entry in entries)]
    look_at = ["spmhub", "apply", *source, *listed, "--prompt", plans[0].target, "--compare"]
    _say_how_it_went(out, entries, look_at, source)


def _balanced(session: "Session", balance: str | None, judge: str | None) -> "Session":
    """Return the session, with the weights that `--balance` asks for if it is given."""
    from spm_hub.evaluation.balancing import balanced_session

    if balance is not None:
        return balanced_session(session, balance, judge)
    if judge is not None:
        raise UsageError(f"--judge {judge} judges pictures for --balance, and there is none", mend="leave it out")
    return session


def _print_forecasts(out: Output, session: "Session") -> None:
    """Print what each run takes."""
    from spm_hub.training.forecast import Forecast, forecasts

    with silence_libraries():
        found = list(forecasts(session.plans, session.base, session.memory))
    lines = [one.describe() if isinstance(one, Forecast) else one for one in found]
    out.data([one.figures() if isinstance(one, Forecast) else {"remark": one} for one in found], "\n".join(lines))


def _say_how_it_went(out: Output, entries: "list[EraserEntry]", look_at: list[str], source: list[str]) -> None:
    """Print the verdict on each training, and what to do next, as one sentence.

    look_at: the command that draws with the erasers; source: its options of model and registry.
    """
    from spm_hub.training.verdict import is_short, still_recognised, verdict

    manifests = [entry.read_manifest() for entry in entries]
    short = [one.training for one in manifests if one.training is not None and is_short(one.training)]
    longer = ""
    if short:
        longer = f" (train longer: the same command with --set steps={2 * short[0].planned} --force)"
    measure = ""
    if left := [one.name for one in manifests if still_recognised(one) is not None]:
        measure = f" (measure it: {shlex.join(['spmhub', 'eval', left[0], *source])})"
    out.say(f"{'; '.join(map(verdict, manifests))}{longer}{measure}; try: {shlex.join(look_at)}")


def _print(out: Output, entries: "list[EraserEntry]") -> None:
    sizes = [entry.adapter_path.stat().st_size for entry in entries]
    made = [
        {"name": entry.name, "adapter": entry.adapter_path, "manifest": entry.manifest_path, "bytes": n_bytes}
        for entry, n_bytes in zip(entries, sizes, strict=True)
    ]
    out.data(
        made[0] if len(made) == 1 else made,
        "\n".join(f"{entry.name}: {entry.adapter_path} ({size(n)})" for entry, n in zip(entries, sizes, strict=True)),
        brief=[str(entry.adapter_path) for entry in entries],
    )
