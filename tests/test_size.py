"""No function is longer than what a reader takes in at once, its signature and docstring counted."""

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "spm_hub"
MOST_LINES = 70
# A format recognises and reads itself: where files are read, there is no case for any of them.
SHORT = {"adapters/conversion.py:read": 24}


def functions(source: str) -> Iterator[tuple[str, int]]:
    """Name and number of lines of every function in a module's source, from `def` to its last line."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            yield node.name, node.end_lineno - node.lineno + 1


def test_no_function_is_longer_than_a_page() -> None:
    found = [
        (f"{path.relative_to(PACKAGE)}:{name}", lines)
        for path in sorted(PACKAGE.rglob("*.py"))
        for name, lines in functions(path.read_text(encoding="utf-8"))
    ]
    long = {name: lines for name, lines in found if lines > SHORT.get(name, MOST_LINES)}
    assert not long, f"split these into functions of at most {MOST_LINES} lines, or of {SHORT}: {long}"
    assert SHORT.keys() <= dict(found).keys(), "a function with a limit of its own has moved"


def test_lines_are_counted() -> None:
    source = "@decorator\ndef outer(\n    x,\n):\n    async def inner():\n        pass\n    return inner\n"
    assert dict(functions(source)) == {"outer": 6, "inner": 2}
