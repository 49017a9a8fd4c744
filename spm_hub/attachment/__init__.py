"""Erasers on a running pipeline: attach, gate per prompt, recover, detach; and baking them in."""
