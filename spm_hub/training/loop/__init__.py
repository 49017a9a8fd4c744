"""The training loops and their parts: checkpoints, early stopping, moving averages."""
