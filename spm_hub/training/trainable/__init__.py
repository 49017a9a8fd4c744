"""Trainable increments: low-rank, dense, null-space, masks, and PEFT's kinds."""
