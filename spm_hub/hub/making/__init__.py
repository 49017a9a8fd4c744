"""Erasers that are made when they are first wanted, and a quick look at them."""
