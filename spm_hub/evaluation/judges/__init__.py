"""Judges: they decide for each picture whether it shows a subject."""
