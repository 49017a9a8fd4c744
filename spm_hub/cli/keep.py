"""spmhub remove, gc, export and import: the registry as a folder that is tidied and carried about."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from spm_hub.cli import options
from spm_hub.cli.app import Example, command
from spm_hub.cli.output import Output, size

if TYPE_CHECKING:
    from spm_hub.registry.archive import Transfer

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

    Each from the registry that is asked for, or unless one is, from where its name is found, as apply would find it.
    All names are looked up before any goes.
    """
    from spm_hub.registry.registry import registry_with

    found = [(name, registry_with(name, registry)) for name in dict.fromkeys(names)]
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
    from spm_hub.registry.registry import registries

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


@command(
    "export",
    Example("spmhub export snoopy mickey --to erasers.tar", "one file for a machine without a network"),
    Example("spmhub export snoopy --to /media/stick/erasers", "a folder that is itself a registry"),
    panel="Keep",
)
def export_(
    out: Output,
    names: Annotated[list[str], typer.Argument(help="Names in a registry, files, or owner/name on the Hub.")],
    *,
    to: Annotated[Path, typer.Option("--to", help="A folder, or a file that ends with .tar.")],
    registry: options.Registry = None,
    force: options.Force = False,
) -> None:
    """Copy erasers, verified, into a folder or a tar file."""
    from spm_hub.hub.resolve import resolve
    from spm_hub.registry.archive import export

    _show(out, export([resolve(name, registry) for name in names], to, replace=force), to)


@command(
    "import",
    Example("spmhub import erasers.tar", "all erasers that it holds, or none"),
    panel="Keep",
)
def import_(
    out: Output,
    source: Annotated[Path, typer.Argument(help="A folder or a .tar file made by spmhub export.")],
    *,
    registry: options.Registry = None,
    force: options.Force = False,
) -> None:
    """Install the erasers of an exported folder or tar file.

    All are verified before, and all are installed or none.
    """
    from spm_hub.registry.archive import import_ as run
    from spm_hub.registry.registry import Registry, registries

    kept = Registry(registry) if registry is not None else registries()[0]
    _show(out, run(source, kept, replace=force), kept.root)


def _show(out: Output, moved: "tuple[Transfer, ...]", to: Path) -> None:
    rows = [{"name": one.entry.name, "state": one.state, "to": str(to)} for one in moved]
    lines = [f"{row['name']}: {row['state']} in {row['to']}" for row in rows]
    out.data(rows, "\n".join(lines), brief=[row["name"] for row in rows])
