"""Erasers on the Hugging Face Hub: resolving references, pull, push, search and model cards."""
