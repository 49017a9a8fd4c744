"""Asks the denoiser for evidence of erased concepts: see `gates.evidence`."""
