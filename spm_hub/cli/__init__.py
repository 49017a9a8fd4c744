"""The command `spmhub`: parse, call, print. Everything heavy is imported inside the commands that need it."""

# Each of these registers its commands, which `spmhub --help` shows in this order.
# isort: off
from spm_hub.cli import train, demo, apply, bake, evaluate, attack, registry, keep, trust, hub, convert, models  # noqa: F401

# isort: on
from spm_hub.cli.app import app


def main() -> None:
    """The console script."""
    app()
