"""Runners: long work in pieces, one after the other, in several processes, or on a Ray cluster."""
