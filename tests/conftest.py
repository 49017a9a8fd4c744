"""No test asks the real Hub for anything: those that need one start their own (loopback.py)."""

import os

# Before anything imports the Hub's client, which reads it once.
os.environ["HF_HUB_OFFLINE"] = "1"
