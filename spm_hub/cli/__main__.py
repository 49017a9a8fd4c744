"""Runs `python -m spm_hub.cli`, for when the console script is not on the path."""

from spm_hub.cli import main

main()
