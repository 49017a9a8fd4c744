"""The command `spmhub`: parses arguments, calls the package, prints results.

Heavy imports are inside the commands that need them, so that `spmhub --help` is quick.
"""

import sys
from typing import Any

from spm_hub.cli.terminal import INTERRUPTED, prepare_streams, restart_in_utf8
from spm_hub.errors import UsageError

try:
    # Importing a module registers its commands; `spmhub --help` lists them in this order.
    # isort: off
    from spm_hub.cli import train, demo, apply, ui, serve, bake, evaluate, protocols, gates, attack  # noqa: F401
    from spm_hub.cli import registry, keep, trust, hub, convert, methods, models  # noqa: F401

    # isort: on
    from spm_hub.cli.app import app
    from spm_hub.cli.output import Output
except KeyboardInterrupt:  # a traceback through the imports would say nothing to a user
    sys.exit(INTERRUPTED)


def main() -> None:
    """Run the command line; this is the console script `spmhub`."""
    try:
        restart_in_utf8()
        prepare_streams()
        _run()
    except KeyboardInterrupt:  # before or after a command, whose own Ctrl-C has a message
        sys.exit(INTERRUPTED)


def _run() -> None:
    if "--json" not in sys.argv:
        app()
        return
    try:
        sys.exit(app(standalone_mode=False))
    except Exception as error:
        # typer would print an error of the command line as a box for people; print it as JSON.
        click_error: Any = error
        if not hasattr(error, "format_message"):
            raise
        Output(json=True).fail(UsageError(click_error.format_message(), mend="spmhub --help"))
        sys.exit(click_error.exit_code)
