"""Help panel "Keep": the commands remove, gc, export and import, which maintain a registry."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from spm_hub.cli import options
from spm_hub.cli.app import Example, command
from spm_hub.cli.output import Output, size
from spm_hub.io.wording import counted

if TYPE_CHECKING:
    from spm_hub.registry.archive import Transfer

Names = Annotated[list[str], typer.Argument(autocompletion=options.complete_name, help="Names in the registry.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="List the files that would be deleted; delete nothing.")]


@command(
    "remove",
    Example("spmhub remove snoopy", "delete an eraser and its manifest"),
    Example("spmhub remove snoopy mickey --dry-run", "list the files that would be deleted"),
    panel="Keep",
)
def remove(out: Output, names: Names, *, registry: options.Registry = None, dry_run: DryRun = False) -> None:
    """Delete erasers from the registry.

    Without --registry, each is deleted from the first registry that has its name. If a name is unknown, nothing is
    deleted.
    """
    from spm_hub.registry.registry import registry_with

    found = [(name, registry_with(name, registry)) for name in dict.fromkeys(names)]
    for name, place in () if dry_run else found:
        place.remove(name)
    rows = [{"name": name, "registry": str(place.root), "removed": not dry_run} for name, place in found]
    action = "would be removed from" if dry_run else "removed from"
    out.data(rows, "\n".join(f"{row['name']}: {action} {row['registry']}" for row in rows), brief=list(names))


@command(
    "gc",
    Example("spmhub gc --dry-run", "list files that belong to no eraser"),
    Example("spmhub gc", "delete them"),
    panel="Keep",
)
def gc(out: Output, *, registry: options.Registry = None, dry_run: DryRun = False) -> None:
    """Delete files that belong to no eraser.

    These are temporary files of killed commands, and manifests and signatures without an adapter file.
    """
    from spm_hub.registry.registry import registries

    kept = registries(registry)[0]
    rows = kept.gc(dry_run=dry_run)
    total = sum(row.bytes for row in rows)
    action = "would be deleted" if dry_run else "deleted"
    out.data(
        {
            "registry": kept.root,
            "files": [{"file": row.path, "bytes": row.bytes} for row in rows],
            "deleted": not dry_run,
        },
        "\n".join(
            (*(str(row.path) for row in rows), f"{counted(len(rows), 'file')}, {size(total)}, {action} in {kept.root}")
        ),
        brief=[str(row.path) for row in rows],
    )


@command(
    "export",
    Example("spmhub export snoopy mickey --out erasers.tar", "make one file for a machine without a network"),
    Example("spmhub export snoopy --out /media/stick/erasers", "make a folder that can be used as a registry"),
    interrupted="nothing was written",
    panel="Keep",
)
def export_(
    out: Output,
    names: Annotated[
        list[str],
        typer.Argument(
            autocompletion=options.complete_name, help="Names in a registry, files, or owner/name on the Hub."
        ),
    ],
    *,
    to: Annotated[Path, typer.Option("--out", "--to", help="Folder, or file with the ending .tar.")],
    registry: options.Registry = None,
    force: options.Force = False,
) -> None:
    """Verify erasers and copy them into a folder or a tar file."""
    from spm_hub.hub.resolve import resolve
    from spm_hub.registry.archive import export

    _show(out, export([resolve(name, registry, say=out.say) for name in names], to, replace=force), to)


@command(
    "import",
    Example("spmhub import erasers.tar", "install all erasers of the file, or none"),
    interrupted="nothing was installed",
    panel="Keep",
)
def import_(
    out: Output,
    source: Annotated[Path, typer.Argument(help="Folder or .tar file made by spmhub export.")],
    *,
    registry: options.Registry = None,
    force: options.Force = False,
) -> None:
    """Install the erasers of an exported folder or tar file.

    All are verified first; if one is invalid, none is installed.
    """
    from spm_hub.registry.archive import import_ as run
    from spm_hub.registry.registry import registry_for_new

    kept = registry_for_new(registry)
    _show(out, run(source, kept, replace=force), kept.root)


def _show(out: Output, moved: "tuple[Transfer, ...]", to: Path) -> None:
    rows = [{"name": one.entry.name, "state": one.state, "to": str(to)} for one in moved]
    lines = [f"{row['name']}: {row['state']} in {row['to']}" for row in rows]
    out.data(rows, "\n".join(lines), brief=[row["name"] for row in rows])
