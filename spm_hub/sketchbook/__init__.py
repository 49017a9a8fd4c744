"""The embedded base model and its world: 64x64 drawings, what trains on them, and the probe that judges pictures.

Everything here stands on its own, so that erasers can be trained and measured on any machine, without a download.
"""
