"""Commands models and doctor: the base models that can be named, and problems of the installation."""

import sys
from dataclasses import asdict

from spm_hub.cli import options
from spm_hub.cli.app import Example, command
from spm_hub.cli.output import Output, silence_libraries, table


@command("models", Example("spmhub models", "list base models and whether they are on this machine"), panel="Look")
def models(out: Output) -> None:
    """List the short names of base models; folders, single files and Hub ids work as well."""
    from spm_hub.models.aliases import ALIASES
    from spm_hub.models.references import is_available

    found = [
        {
            "alias": alias.name,
            "family": alias.family,
            "source": alias.hub_id or "embedded",
            "here": "yes" if is_available(alias) else "download" if alias.hub_id else "missing",
            "about": alias.about,
        }
        for alias in ALIASES.values()
    ]
    rows = [[row["alias"], row["family"], row["source"], row["here"], row["about"]] for row in found]
    out.data(
        found, table(["alias", "family", "source", "here", ""], rows), brief=[alias.name for alias in ALIASES.values()]
    )


@command("doctor", Example("spmhub doctor", "find out why something does not work"), panel="Look")
def doctor(out: Output, *, registry: options.Registry = None) -> None:
    """Examine versions, devices, folders, plug-ins and models, and say how to mend problems.

    The exit code is 1 if something is missing or broken.
    """
    from spm_hub.cli.diagnosis import diagnose
    from spm_hub.registry.registry import registry_for_new

    with silence_libraries():
        findings = list(diagnose(registry_for_new(registry).root))
    lines = [
        f"{one.status:5} {one.subject:18} {one.detail}" + f"\n      try: {one.mend}" * bool(one.mend)
        for one in findings
    ]
    failed = [one.subject for one in findings if one.status == "fail"]
    out.data([asdict(one) for one in findings], "\n".join(lines), brief=failed)
    sys.exit(1 if failed else 0)
