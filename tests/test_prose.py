"""Docstrings and messages are plain English: subject first, active verbs, one meaning per word.

There are no exceptions. `python tests/test_prose.py [PREFIX]` prints what is to rewrite.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "spm_hub"
LONGEST = 100

# Words that the project once used with many meanings each, and relative clauses without a subject.
RIDDLES = r"\b(told|hears?|heard|stands?|lies?|beside|whoever|whom|nobody|of which|of whom|whence|thereof|anew)\b"
RELATIVE = r"\bwhat (is|it|they|that|of|has|was|all|others?|anything|there|no)\b"
OPENINGS = r"^(Of|As|In|Where|What|Whether|Whom?|How) "
# Calls whose texts a user reads, in addition to every error that is raised; a name that ends in Error is one too.
SHOWS = {"warn", "say", "print", "echo", "secho", "fail", "note", "Option", "Argument", "Example", "Finding", "Check"}
SHOWN_KEYWORDS = {"help", "mend", "epilog", "short_help", "about", "remark", "description"}
# Decorators that turn a function's docstring into the help text of a command.
COMMANDS = {"command", "callback"}
Node = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module


def problems_of_docstring(text: str) -> list[str]:
    first = text.strip().splitlines()[0]
    found = [match[0] for pattern in (RIDDLES, RELATIVE, OPENINGS) if (match := re.search(pattern, first))]
    return [*found, *(["longer than a line"] if len(first) > LONGEST else [])]


def problems_of_message(text: str) -> list[str]:
    return [match[0] for pattern in (RIDDLES, RELATIVE) for match in re.finditer(pattern, text, re.IGNORECASE)]


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


def _name(node: ast.AST) -> str:
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def _constants(module: ast.Module) -> dict[str, ast.expr]:
    """The module's constants by name, as a help text or a mend may be one of them."""
    return {
        target.id: node.value
        for node in module.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }


def _shown(node: ast.AST) -> Iterator[ast.AST]:
    """The parts of a statement that a user can come to read."""
    if isinstance(node, ast.Raise) and node.exc is not None:
        yield node.exc
    elif isinstance(node, ast.Call):
        yield from (word.value for word in node.keywords if word.arg in SHOWN_KEYWORDS)
        if _name(node.func) in SHOWS or _name(node.func).endswith("Error"):
            yield from node.args
    elif isinstance(node, ast.FunctionDef):
        decorators = (one.func for one in node.decorator_list if isinstance(one, ast.Call))
        if any(_name(decorator) in COMMANDS for decorator in decorators) and ast.get_docstring(node):
            yield node.body[0]


def messages(path: Path) -> Iterator[tuple[str, str]]:
    """(module:line, text) of everything that a user can come to read: errors, their mends, warnings, notes and help."""
    module = ast.parse(path.read_text(encoding="utf-8"))
    constants = _constants(module)
    found = [part for node in ast.walk(module) for part in _shown(node)]
    while found:
        for part in ast.walk(found.pop()):
            if isinstance(part, ast.Constant) and isinstance(part.value, str):
                yield f"{path.relative_to(PACKAGE)}:{part.lineno}", part.value
            elif isinstance(part, ast.Name) and part.id in constants:
                found.append(constants.pop(part.id))


def offending_docstrings() -> dict[str, list[str]]:
    every = (pair for path in sorted(PACKAGE.rglob("*.py")) for pair in docstrings(path))
    return {name: found for name, text in every if (found := problems_of_docstring(text))}


def offending_messages() -> dict[str, list[str]]:
    every = (pair for path in sorted(PACKAGE.rglob("*.py")) for pair in messages(path))
    return {f"{place} {text!r}": found for place, text in every if (found := problems_of_message(text))}


def test_docstrings_open_in_plain_english() -> None:
    assert offending_docstrings() == {}


def test_messages_are_plain_english() -> None:
    assert offending_messages() == {}


def test_riddles_are_seen() -> None:
    assert problems_of_docstring("Whether the recipe is joint.") == ["Whether "]
    assert problems_of_docstring("The rows that the model is told.") == ["told"]
    assert problems_of_docstring("Refuse a recipe that nothing reads.") == []
    assert problems_of_message("clip=1 is nothing that it tells the encoder beside the prompt") == ["beside"]


def test_every_text_that_a_user_reads_is_seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("test_prose.PACKAGE", tmp_path)
    module = tmp_path / "some.py"
    module.write_text(
        '''
HELP = "told in a constant"
@command("show", Example("spmhub show", "told in an example"))
def show(model: str = Option(help=HELP)) -> None:
    """Show something.

    Told in a second line.
    """
    raise UsageError(f"told in an {error}", mend="told in a mend")
def internal() -> None:
    """Do something.

    Told to no user.
    """
''',
        encoding="utf-8",
    )
    seen = " ".join(text for _, text in messages(module))
    for words in ("told in a constant", "told in an example", "Told in a second line", "told in an ", "told in a mend"):
        assert words in seen
    assert "Told to no user" not in seen
    assert problems_of_message("Told in a second line") == ["Told"]


if __name__ == "__main__":
    import sys

    prefix = sys.argv[1] if len(sys.argv) > 1 else ""
    for name, found in (offending_docstrings() | offending_messages()).items():
        if name.startswith(prefix):
            print(name, found)
