"""No test asks the real Hub for anything, or writes into the user's cache.

Tests that need a Hub start their own (loopback.py). A session and all of its workers share one cache, so that what a
gate keeps of a text encoder is encoded once.
"""

import gc
import os
import shutil
import tempfile

import pytest

# Before anything imports the Hub's client, which reads both once.
os.environ["HF_HUB_OFFLINE"] = "1"
_WORKER = "PYTEST_XDIST_WORKER" in os.environ
if not _WORKER:
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="spm-hub-tests-")
_CACHE = os.environ["XDG_CACHE_HOME"]

# Imports make a million objects that stay. No search for garbage while they are made, and none through them
# afterwards: this is a tenth of all that the tests compute.
gc.disable()


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def pytest_unconfigure(config: pytest.Config) -> None:
    if not _WORKER:
        shutil.rmtree(_CACHE, ignore_errors=True)
