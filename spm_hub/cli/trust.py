"""Help panel "Trust": verify, audit and sign, which check erasers before they are used."""

import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spm_hub.cli import options
from spm_hub.cli.app import Example, command
from spm_hub.cli.output import Output, table
from spm_hub.errors import SpmHubError

if TYPE_CHECKING:
    from spm_hub.adapters.adapter import Adapter
    from spm_hub.registry.entry import EraserEntry
    from spm_hub.registry.verification import Check

FAILED = 1

Names = Annotated[
    list[str] | None,
    typer.Argument(
        autocompletion=options.complete_name,
        help="Names, files, or owner/name on the Hub. Default: all erasers in the registry.",
    ),
]


@command(
    "verify",
    Example("spmhub verify snoopy", "check its file, manifest, hashes and numbers"),
    Example("spmhub verify someone/spm-van-gogh --key key.pub", "check its signature too"),
    Example("spmhub verify --json", "check all erasers in the registry"),
    panel="Trust",
)
def verify(
    out: Output,
    names: Names = None,
    *,
    key: Annotated[Path | None, typer.Option("--key", help="Public key (PEM) to check the signatures with.")] = None,
    registry: options.Registry = None,
) -> None:
    """Check erasers without using them.

    It checks size and sha256 against the manifest, the layout of the file, that its numbers are finite, the manifest
    inside it, its entry in the lock file, its signature, its recipe's keys, and what `spmhub audit` says of it together
    with the others of the registry. The exit code is 1 if a check failed.
    """
    from spm_hub.hub.resolve import resolve
    from spm_hub.registry.registry import registries

    held = registries(registry)[0].entries()
    entries = [resolve(name, registry, say=out.say) for name in names] if names else held
    found = verified(out, entries, held, key)
    rows = [[one["name"], *check.values()] for one in found for check in one["checks"]]
    out.data(
        found,
        table(["eraser", "check", "state", "found"], rows),
        brief=[f"{one['name']}: {'ok' if one['ok'] else 'failed'}" for one in found],
    )
    if not all(one["ok"] for one in found):
        sys.exit(FAILED)


def verified(
    out: Output, entries: "Sequence[EraserEntry]", held: "Sequence[EraserEntry]", key: Path | None
) -> list[dict[str, Any]]:
    """Return the name, file and checks of erasers, audited together with the others of a registry."""
    from spm_hub.registry.verification import verify as run

    found: list[dict[str, Any]] = []
    with out.progress("verifying") as progress:
        audits = _audits(entries, held)
        for number, entry in enumerate(entries):
            checks = [vars(check) for check in (*run(entry, key), _recipe(entry), audits[number])]
            ok = all(check["state"] != "failed" for check in checks)
            found.append({"name": entry.name, "file": str(entry.adapter_path), "ok": ok, "checks": checks})
            progress(number + 1, len(entries))
    return found


def _recipe(entry: "EraserEntry") -> "Check":
    """Check that the recipe is valid and can be trained again.

    Reading a manifest does not check this: it keeps any recipe as it is.
    """
    from spm_hub.registry.verification import Check
    from spm_hub.training.recipe.recipe import Recipe

    try:
        manifest = entry.read_manifest()
    except (SpmHubError, OSError):
        return Check("recipe", "not checked", "the manifest cannot be read")
    if "spm-hub" not in manifest.versions:
        return Check("recipe", "not checked", "it was made by another program, or there is none")
    try:
        recipe = Recipe.make(**manifest.recipe)
    except SpmHubError as error:
        return Check("recipe", "failed", error.message)
    return Check("recipe", "ok", f"every key is known: {recipe.method} on {recipe.target}")


def _audits(entries: "Sequence[EraserEntry]", held: "Sequence[EraserEntry]") -> "list[Check]":
    """Audit erasers together with the others of a registry, as far as these can be read.

    That one names no concept is no failure: other programs' files name none.
    """
    from spm_hub.hub.audit import audit as run
    from spm_hub.registry.verification import Check

    loaded: dict[Path, Adapter] = {}
    for entry in (*entries, *held):
        with suppress(SpmHubError, OSError):
            loaded.setdefault(entry.adapter_path, entry.load())
    asked = dict.fromkeys(entry.adapter_path for entry in entries if entry.adapter_path in loaded)
    beside = [adapter for path, adapter in loaded.items() if path not in asked]
    findings = dict(zip(asked, run([loaded[path] for path in asked], beside=beside), strict=True))
    checks = []
    for entry in entries:
        if (found := findings.get(entry.adapter_path)) is None:
            checks.append(Check("audit", "not checked", "the eraser cannot be read"))
            continue
        unknown = loaded[entry.adapter_path].manifest.concept.target is None
        bad = len(found.problems) > unknown
        checks.append(Check("audit", "failed" if bad else "ok", "; ".join(found.problems) or "nothing to say"))
    return checks


@command(
    "audit",
    Example("spmhub audit", "audit all erasers in the registry, each against the others"),
    Example("spmhub audit nudity someone/spm-hands", "two of them, one from the Hub"),
    Example("spmhub audit nudity --model dreamshaper-8", "compare its change with the weights of another base"),
    panel="Trust",
)
def audit(
    out: Output,
    names: Names = None,
    *,
    model: Annotated[
        str | None,
        typer.Option("--model", help="Base to compare the changes with. Default: the one it was trained on."),
    ] = None,
    registry: options.Registry = None,
) -> None:
    """Say what erasers really do, before you rely on one that somebody else made.

    It measures how much an eraser changes the base, and whether it takes its concept away or adds it. It compares the
    eraser with all others in the registry, which it may undo or copy, and looks at its names and protected prompts. It
    finds no trigger that is an uncommon phrase. The exit code is 1 if there is something to say.
    """
    from spm_hub.hub.audit import audit as run
    from spm_hub.hub.resolve import resolve
    from spm_hub.registry.registry import registries

    held = registries(registry)[0].entries()
    entries = [resolve(name, registry) for name in names] if names else held
    asked = {entry.name for entry in entries}
    beside = []
    for entry in held:
        if entry.name not in asked:
            with suppress(SpmHubError, OSError):  # a damaged one is another command's to tell
                beside.append(entry.load())
    found = run([entry.load() for entry in entries], beside=beside, model=model)
    rows = [
        [
            one.name, "; ".join(one.problems) or "nothing to say", f"{one.norm:.3g}",
            "-" if one.greatest_change is None else f"{one.greatest_change[0]:.1%}", f"{one.acting:.1%}",
        ]
        for one in found
    ]  # fmt: skip
    out.data(
        [asdict(one) for one in found],
        table(["eraser", "found", "norm", "greatest change", "sentences with its names"], rows),
        brief=[f"{one.name}: {'; '.join(one.problems) or 'ok'}" for one in found],
    )
    if any(one.problems for one in found):
        sys.exit(FAILED)


@command(
    "sign",
    Example("spmhub sign snoopy --key key.pem", "sign an eraser of yours"),
    panel="Trust",
)
def sign(
    out: Output,
    names: Annotated[list[str], typer.Argument(autocompletion=options.complete_name, help="Names in the registry.")],
    *,
    key: Annotated[Path, typer.Option("--key", help="Private elliptic-curve key (PEM), not encrypted.")],
    registry: options.Registry = None,
) -> None:
    """Sign erasers and their manifests with your key.

    It needs the extra: pip install "spm-hub[sign]". The signature is kept in the registry and uploaded by a push.
    """
    from spm_hub.registry.registry import registry_with

    places = [(name, registry_with(name, registry)) for name in names]
    signed = [{"name": name, "signature": str(place.sign(name, key))} for name, place in places]
    out.data(
        signed,
        "\n".join(f"{row['name']}: {row['signature']}" for row in signed),
        brief=[row["signature"] for row in signed],
    )
