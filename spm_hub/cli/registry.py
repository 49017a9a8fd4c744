"""Commands list, show and check: erasers, their manifests, and whether they fit a model."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from spm_hub.cli import options
from spm_hub.cli.app import Example, command
from spm_hub.cli.output import Output, silence_hub, silence_libraries, size, table
from spm_hub.cli.summary import UNKNOWN_CONCEPT, summary, whole
from spm_hub.errors import CompatibilityError, NotFoundError, SpmHubError, UsageError
from spm_hub.io.untrusted_text import one_line
from spm_hub.io.wording import counted, quoted

Name = Annotated[
    str,
    typer.Argument(
        autocompletion=options.complete_name, help="A name in a registry, a file, or owner/name on the Hub."
    ),
]

CheckedModel = Annotated[
    str | None,
    typer.Option("--model", "-m", help="As for spmhub apply. Default: the sketchbook.", show_default=False),
]
StrictKey = Annotated[
    Path | None, typer.Option("--key", help="With --strict: public key (PEM) that made every signature.")
]
Strict = Annotated[
    bool, typer.Option("--strict", help="Check the whole registry, as a team does that keeps one in git.")
]


@command(
    "list",
    Example("spmhub list", "list all erasers in your registries"),
    Example("spmhub list -q", "print only their names, one per line"),
    Example("spmhub list --remote", "list erasers on the Hugging Face Hub"),
    panel="Look",
)
def list_(
    out: Output,
    *,
    registry: options.Registry = None,
    remote: Annotated[bool, typer.Option("--remote", help="List erasers on the Hub; see spmhub search.")] = False,
) -> None:
    """List the erasers in your registries."""
    from spm_hub.registry.registry import listed_registries

    if remote:
        from spm_hub.cli.hub import show_results
        from spm_hub.hub.search import search

        silence_hub()
        show_results(out, search())
        return
    found: list[dict[str, Any]] = []
    for place in listed_registries(registry):
        for entry in place.entries():
            row: dict[str, Any] = {"name": entry.name, "registry": str(place.root)}
            try:
                row["bytes"] = entry.adapter_path.stat().st_size
                manifest = entry.read_manifest()
            except (FileNotFoundError, NotFoundError):
                continue  # another process has removed it meanwhile
            except SpmHubError as error:
                found.append({**row, "broken": error.message})
                continue
            found.append(
                {
                    **row,
                    "concept": manifest.concept.target,
                    "kind": manifest.concept.kind,
                    "method": manifest.recipe.get("method"),
                    "base": manifest.base.family,
                    "rank": manifest.increment.rank,
                }
            )
    for row in found:
        if "broken" in row:
            out.say(f"warning: {row['name']} in {row['registry']} cannot be read: {row['broken']}")
    if not found:
        out.data(found, "")
        out.say("there is no eraser yet; make one: spmhub train snoopy")
        return
    columns = ("name", "concept", "kind", "method", "base", "rank")
    # The concept of a whole eraser is None where nobody has named it; a broken one has none to show.
    shown = [{**row, "concept": row["concept"] or UNKNOWN_CONCEPT} if "concept" in row else row for row in found]
    rows = [[*(row.get(key) for key in columns), size(row["bytes"]), row["registry"]] for row in shown]
    out.data(found, table([*columns, "size", "registry"], rows), brief=[row["name"] for row in found])


@command(
    "show",
    Example("spmhub show snoopy", "its effect, gate, base and file, in a few lines"),
    Example("spmhub show snoopy --full", "the whole manifest, with the recipe and all measurements"),
    Example("spmhub show snoopy --json", "the same for programs"),
    panel="Look",
)
def show(
    out: Output,
    name: Name,
    *,
    registry: options.Registry = None,
    full: Annotated[bool, typer.Option("--full", help="Show the whole manifest, recipe and measurements.")] = False,
) -> None:
    """Show what an eraser does: its measured effect, its gate, base and file."""
    from rich.console import Group

    from spm_hub.hub.resolve import resolve

    entry = resolve(name, registry, say=out.say)
    manifest = entry.read_manifest()
    asked = quoted(name) + ("" if registry is None else f" --registry {quoted(registry)}")
    human = Group(*whole(entry, manifest)) if full else "\n".join(map(one_line, summary(entry, manifest, asked)))
    out.data(
        {**manifest.model_dump(mode="json"), "path": str(entry.adapter_path)}, human, brief=[str(entry.adapter_path)]
    )


@command(
    "check",
    Example("spmhub check snoopy --model sketchbook-chalk", "check that it fits another checkpoint"),
    Example("spmhub check --strict --registry .", "check a registry that is kept in git, before a commit"),
    panel="Look",
)
def check(
    out: Output,
    name: Annotated[str | None, typer.Argument(autocompletion=options.complete_name, help="As for show.")] = None,
    *,
    model: CheckedModel = None,
    config: options.Config = None,
    registry: options.Registry = None,
    strict: Strict = False,
    key: Annotated[
        Path | None, typer.Option("--key", help="With --strict: public key (PEM) of all signatures.")
    ] = None,
) -> None:
    """Check that an eraser fits a model or, with --strict, that a whole registry is in order.

    If it does not fit, the exit code is 1, and the first mismatched module and its shapes are printed. --strict
    verifies and audits every eraser, wants a manifest of each, and no file and no pin that belongs to none.
    """
    if strict:
        if name is not None or model is not None or config is not None:
            raise UsageError("--strict checks a whole registry, without a model", mend="spmhub check --strict")
        _check_strictly(out, registry, key)
        return
    if name is None or key is not None:
        raise UsageError("check needs the name of an eraser", mend="spmhub check NAME, or spmhub check --strict")
    _check_fit(out, name, model or "sketchbook", config, registry)


def _check_strictly(out: Output, registry: Path | None, key: Path | None) -> None:
    """Print the problems of a registry; exit with code 1 if there are any."""
    from spm_hub.cli.trust import FAILED, verified
    from spm_hub.registry import lockfile
    from spm_hub.registry.registry import registries

    place = registries(registry)[0]
    entries = place.entries()
    if not entries:
        raise NotFoundError(f"there is no eraser in {place.root}", mend="--registry FOLDER")
    found = verified(out, entries, entries, key)
    problems = [
        [one["name"], check["subject"], check["detail"]]
        for one in found
        for check in one["checks"]
        if check["state"] == "failed" or (check["subject"], check["state"]) == ("manifest", "not checked")
    ]
    names = {entry.name for entry in entries}
    pins = lockfile.read(place.root)
    problems += [
        [name, "pin", "the lock file pins an eraser that is not there"] for name in sorted(pins.keys() - names)
    ]
    problems += [[row.path.stem, "file", f"{row.path} belongs to no eraser"] for row in place.gc(dry_run=True)]
    out.data(
        {
            "registry": str(place.root),
            "ok": not problems,
            "erasers": found,
            "problems": [dict(zip(("name", "check", "found"), row, strict=True)) for row in problems],
        },
        table(["eraser", "check", "problem"], problems) if problems else "",
        brief=[f"{name}: {subject}: {detail}" for name, subject, detail in problems],
    )
    out.say(f"{counted(len(entries), 'eraser')} in {place.root}: {counted(len(problems), 'problem')}")
    if problems:
        sys.exit(FAILED)


def _check_fit(out: Output, name: str, model: str, config: str | None, registry: Path | None) -> None:
    """Print whether an eraser fits a model; exit with code 1 if not."""
    from spm_hub.hub.resolve import resolve
    from spm_hub.models.loading import load_pipeline
    from spm_hub.models.references import parse_reference

    parse_reference(model, config=config)
    entry = resolve(name, registry, say=out.say)
    with silence_libraries():
        from spm_hub.adapters import compatibility

        adapter = entry.load()
        pipe = load_pipeline(model, config=config, device="cpu")
    answer = {"adapter": adapter.name, "model": model}
    try:
        compatibility.check(adapter, pipe)
    except CompatibilityError as error:
        out.data({**answer, "compatible": False, "mismatch": error.message}, f"does not fit: {error}")
        sys.exit(CompatibilityError.exit_code)
    fits = f"{adapter.name} fits {model}: all of its {counted(len(adapter.increments), 'module')}"
    out.data({**answer, "compatible": True, "modules": len(adapter.increments)}, fits, brief=[adapter.name])
