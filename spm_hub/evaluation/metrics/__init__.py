"""Metrics: numbers about one picture, a pair from the same noise, or two sets of pictures."""
