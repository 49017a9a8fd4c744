"""Audits erasers of strangers: looks in their tensors and names for harm that they do not admit.

An audit compares the eraser's claims with its tensors, its change with the weights that it is added to and with the
changes of other erasers, and its names and protected prompts with general sentences. It finds no trigger that is in
none of these sentences, and no small change that was trained to do harm.
"""

from spm_hub.hub.audit.auditing import Findings, audit

__all__ = ["Findings", "audit"]
