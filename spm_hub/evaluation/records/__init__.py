"""Records of a run: its rows, batches, pictures and scores, in a folder that can be resumed."""
