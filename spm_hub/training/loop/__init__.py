"""The training loops and what they keep: optimiser state, checkpoints, early stopping."""
