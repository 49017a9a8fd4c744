"""Commands list, show and check: erasers, their manifests, and whether they fit a model."""

import sys
from typing import Annotated, Any

import typer

from spm_hub.cli import options
from spm_hub.cli.app import Example, command
from spm_hub.cli.output import Output, silence_hub, silence_libraries, size, table
from spm_hub.cli.summary import UNKNOWN_CONCEPT, summary, whole
from spm_hub.errors import CompatibilityError, NotFoundError, SpmHubError
from spm_hub.io.untrusted_text import one_line
from spm_hub.io.wording import counted, quoted

Name = Annotated[
    str,
    typer.Argument(
        autocompletion=options.complete_name, help="A name in a registry, a file, or owner/name on the Hub."
    ),
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
    panel="Look",
)
def check(
    out: Output,
    name: Name,
    *,
    model: options.Model = "sketchbook",
    config: options.Config = None,
    registry: options.Registry = None,
) -> None:
    """Check that an eraser fits a model.

    If it does not fit, the exit code is 1, and the first mismatched module and its shapes are printed.
    """
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
