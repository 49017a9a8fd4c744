"""Reads the fenced blocks of Markdown pages and runs them: Python in one namespace a page, commands in its folder."""

from __future__ import annotations

import functools
import inspect
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from diffusers import StableDiffusionPipeline

import spm_hub

ROOT = Path(__file__).resolve().parents[1]
PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")),
)
NEEDS = (
    "needs a GPU", "needs the Hub", "needs a package index", "needs ComfyUI", "needs a web UI",
    "runs until you stop it",
)  # fmt: skip
"""Marks of what no test runs: an HTML comment before a block, or words in the comment at the end of a line."""


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, the line it begins on, and the mark before it."""

    language: str
    text: str
    line: int
    mark: str | None


@dataclass(frozen=True)
class Command:
    """One command line of a block; `mark` says why it is not run, if it is not."""

    words: tuple[str, ...]
    line: int
    mark: str | None


def blocks(page: str) -> list[Block]:
    """Return the fenced blocks of a page in order."""
    found: list[Block] = []
    mark, language, start, collected = None, None, 0, list[str]()
    for number, line in enumerate((ROOT / page).read_text(encoding="utf-8").splitlines(), start=1):
        if language is not None:
            if line.strip() == "```":
                found.append(Block(language, "\n".join(collected), start, mark))
                language = mark = None
            else:
                collected.append(line)
        elif line.startswith("```"):
            language, start, collected = line[3:].strip(), number + 1, []
        elif line.strip():
            comment = re.fullmatch(r"<!-- (.*) -->", line.strip())
            mark = comment[1] if comment and comment[1] in NEEDS else None
    assert language is None, f"{page}: the block of line {start} has no end"
    return found


def commands(block: Block) -> Iterator[Command]:
    """Yield the command lines of a block of shell."""
    for offset, line in enumerate(block.text.splitlines()):
        if words := shlex.split(line, comments=True):
            said = line.rpartition("#")[2] if "#" in line else ""
            mark = next((mark for mark in NEEDS if mark in said), block.mark)
            yield Command(tuple(words), block.line + offset, mark)


SHORT_RECIPE: dict[str, Any] = {
    "steps": 1,
    "batch_size": 1,
    "x_t": {"trajectories": 2, "steps": 2, "chunks": 1},
}
"""Recipe keys of a training that takes a second."""


def shorten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let pictures take one step unless the caller says otherwise, and trainings in Python one."""
    call = inspect.unwrap(StableDiffusionPipeline.__call__)
    names = list(inspect.signature(call).parameters)
    defaults = list(call.__defaults__ or ())
    defaults[names.index("num_inference_steps") - names.index("prompt")] = 1
    monkeypatch.setattr(call, "__defaults__", tuple(defaults))
    train = spm_hub.train

    @functools.wraps(train)
    def short_train(concept: Any, **options: Any) -> Any:
        return train(concept, **{**options, **SHORT_RECIPE})

    monkeypatch.setattr(spm_hub, "train", short_train)
