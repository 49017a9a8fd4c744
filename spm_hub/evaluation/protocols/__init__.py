"""Protocols as data: the rows, drawing and metrics of an evaluation, and papers' numbers."""
