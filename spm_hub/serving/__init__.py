"""Serves pictures from one pipeline to many clients: a queue, batches, and an HTTP interface."""
