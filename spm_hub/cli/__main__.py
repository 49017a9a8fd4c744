"""`python -m spm_hub.cli`, where the console script is not on the path."""

from spm_hub.cli import main

main()
