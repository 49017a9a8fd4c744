"""Docstrings and messages are plain English: subject first, active verbs, one meaning per word.

Exceptions are listed in `prose_exceptions.txt`, a list that only shrinks. `python tests/test_prose.py [PREFIX]` prints
what is left to rewrite.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "spm_hub"
EXCEPTIONS = Path(__file__).with_name("prose_exceptions.txt")
LONGEST = 100
MOST_EXCEPTIONS = 60

# Words that the project once used with many meanings each, and relative clauses without a subject.
RIDDLES = r"\b(told|hears?|heard|stands?|lies?|beside|whoever|whom|nobody|of which|of whom|whence|thereof|anew)\b"
RELATIVE = r"\bwhat (is|it|they|that|of|has|was|all|others?|anything|there|no)\b"
OPENINGS = r"^(Of|As|In|Where|What|Whether|Whom?|How) "
# Functions that show a text to a user, beside every error that is raised and every `help=` and `mend=`.
SHOWS = {"warn", "say", "print", "echo", "secho", "fail", "note"}
Node = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module


def problems_of_docstring(text: str) -> list[str]:
    first = text.strip().splitlines()[0]
    found = [match[0] for pattern in (RIDDLES, RELATIVE, OPENINGS) if (match := re.search(pattern, first))]
    return [*found, *(["longer than a line"] if len(first) > LONGEST else [])]


def problems_of_message(text: str) -> list[str]:
    return [match[0] for pattern in (RIDDLES, RELATIVE) for match in re.finditer(pattern, text)]


def docstrings(path: Path) -> Iterator[tuple[str, str]]:
    """(module:qualified name, docstring) of everything in the file that has one."""

    def walk(node: Node, name: str) -> Iterator[tuple[str, str]]:
        if text := ast.get_docstring(node):
            yield name, text
        for child in ast.walk(node) if isinstance(node, ast.Module) else node.body:
            if child is not node and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                if isinstance(node, ast.Module) and child not in node.body:
                    continue
                yield from walk(child, f"{name}.{child.name}" if name[-1] != ":" else name + child.name)

    yield from walk(ast.parse(path.read_text(encoding="utf-8")), f"{path.relative_to(PACKAGE)}:")


def _texts(node: ast.AST) -> Iterator[str]:
    for part in ast.walk(node):
        if isinstance(part, ast.Constant) and isinstance(part.value, str):
            yield part.value


def messages(path: Path) -> Iterator[tuple[str, str]]:
    """(module:line, text) of what a user can come to read: errors, their mends, warnings, notes and help."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Raise) and node.exc is not None:
            shown: list[ast.AST] = [node.exc]
        elif isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            shown = [word.value for word in node.keywords if word.arg in ("help", "mend", "epilog", "short_help")]
            if called in SHOWS or called.endswith("Error") or called in ("Option", "Argument"):
                shown += node.args
        else:
            continue
        for part in shown:
            for text in _texts(part):
                yield f"{path.relative_to(PACKAGE)}:{getattr(part, 'lineno', 0)}", text


def offending_docstrings() -> dict[str, list[str]]:
    every = (pair for path in sorted(PACKAGE.rglob("*.py")) for pair in docstrings(path))
    return {name: found for name, text in every if (found := problems_of_docstring(text))}


def offending_messages() -> dict[str, list[str]]:
    every = (pair for path in sorted(PACKAGE.rglob("*.py")) for pair in messages(path))
    return {f"{place} {text!r}": found for place, text in every if (found := problems_of_message(text))}


def test_docstrings_open_in_plain_english() -> None:
    listed = EXCEPTIONS.read_text(encoding="utf-8").split()
    offending = offending_docstrings()
    new = {name: found for name, found in offending.items() if name not in listed}
    assert not new, f"rewrite the first line of {new}"
    assert sorted(set(listed) - offending.keys()) == [], "plain by now: take these off the list"
    assert len(listed) <= MOST_EXCEPTIONS


def test_messages_are_plain_english() -> None:
    assert offending_messages() == {}


def test_riddles_are_seen(tmp_path: Path) -> None:
    assert problems_of_docstring("Whether the recipe is joint.") == ["Whether "]
    assert problems_of_docstring("The rows that the model is told.") == ["told"]
    assert problems_of_docstring("Refuse a recipe that nothing reads.") == []
    assert problems_of_message("clip=1 is nothing that it tells the encoder beside the prompt") == ["beside"]


if __name__ == "__main__":
    import sys

    prefix = sys.argv[1] if len(sys.argv) > 1 else ""
    for name, found in (offending_docstrings() | offending_messages()).items():
        if name.startswith(prefix):
            print(name, found)
