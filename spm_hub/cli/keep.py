"""spmhub remove, gc, export and import: the registry as a folder that is tidied and carried about."""

from typing import Annotated

import typer

from spm_hub.cli import options
from spm_hub.cli.app import Example, command
from spm_hub.cli.output import Output, size

Names = Annotated[list[str], typer.Argument(help="Names in the registry.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be deleted, and delete nothing.")]


@command(
    "remove",
    Example("spmhub remove snoopy", "delete an eraser and its manifest"),
    Example("spmhub remove snoopy mickey --dry-run", "say which files that would be"),
    panel="Keep",
)
def remove(out: Output, names: Names, *, registry: options.Registry = None, dry_run: DryRun = False) -> None:
    """Delete erasers from the registry.

    Each from the registry where its name is found, as apply would find it. All names are looked up before any goes.
    """
    from spm_hub.hub.registry import holding

    found = [(name, holding(name, registry)) for name in dict.fromkeys(names)]
    for name, place in () if dry_run else found:
        place.remove(name)
    rows = [{"name": name, "registry": str(place.root), "removed": not dry_run} for name, place in found]
    said = "would be removed from" if dry_run else "removed from"
    out.data(rows, "\n".join(f"{row['name']}: {said} {row['registry']}" for row in rows), brief=list(names))


@command(
    "gc",
    Example("spmhub gc --dry-run", "what is lying about"),
    Example("spmhub gc", "delete it"),
    panel="Keep",
)
def gc(out: Output, *, registry: options.Registry = None, dry_run: DryRun = False) -> None:
    """Delete what belongs to no eraser.

    Temporary files of commands that were killed, and manifests whose adapter file is gone.
    """
    from spm_hub.hub.registry import registries

    kept = registries(registry)[0]
    rows = kept.gc(dry_run=dry_run)
    total = sum(row.bytes for row in rows)
    said = "would be deleted" if dry_run else "deleted"
    out.data(
        {
            "registry": kept.root,
            "files": [{"file": row.path, "bytes": row.bytes} for row in rows],
            "deleted": not dry_run,
        },
        "\n".join((*(str(row.path) for row in rows), f"{len(rows)} files, {size(total)}, {said} in {kept.root}")),
        brief=[str(row.path) for row in rows],
    )
