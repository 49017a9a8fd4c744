"""The command `spmhub`: parse, call, print. Everything heavy is imported inside the commands that need it."""

import sys
from typing import Any

from spm_hub.errors import UsageError

# Each of these registers its commands, which `spmhub --help` shows in this order.
# isort: off
from spm_hub.cli import train, demo, apply, bake, evaluate, attack, registry, keep, trust, hub, convert, models  # noqa: F401

# isort: on
from spm_hub.cli.app import app
from spm_hub.cli.output import Output


def main() -> None:
    """The console script."""
    if "--json" not in sys.argv:
        app()
        return
    try:
        sys.exit(app(standalone_mode=False))
    except Exception as error:
        # What typer says of a command line it cannot read it says in a box, to people.
        said: Any = error
        if not hasattr(error, "format_message"):
            raise
        Output(json=True).fail(UsageError(said.format_message(), mend="spmhub --help"))
        sys.exit(said.exit_code)
