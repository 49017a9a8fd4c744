"""The training recipe: its schema, presets and checks. Imports no torch."""
