"""Objectives: one file per paper, one line of registration here."""

from __future__ import annotations

from .spm import SPM

OBJECTIVES: dict[str, type[SPM]] = {"spm": SPM}
