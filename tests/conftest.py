"""No test asks the real Hub for anything: those that need one start their own (loopback.py)."""

import gc
import os

# Before anything imports the Hub's client, which reads it once.
os.environ["HF_HUB_OFFLINE"] = "1"

# Imports make a million objects that stay. No search for garbage while they are made, and none through them
# afterwards: this is a tenth of all that the tests compute.
gc.disable()


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()
