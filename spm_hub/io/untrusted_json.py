"""Parses JSON from strangers: refuses malformed text, and text that takes far more memory than it has."""

import json
import math
import re
from collections import Counter
from typing import Any, Never

COST_OF_CONTAINER, COST_OF_ITEM, COST_OF_KEY = 88, 96, 64
"""Bytes that Python spends on an empty list or dict, on one more item, and on the key that it may have."""

MAX_NAME_LENGTH = 512
"""Characters of a tensor's key or a module's path; the longest in use have a third of them."""

_LONELY = re.compile(r"[\ud800-\udfff]")


def parse(text: bytes, *, unfolds: int) -> Any:
    """Return the value of a JSON text in which no key occurs twice and every number is finite.

    unfolds: how many times its length an honest text takes in memory, at most.

    Raises ValueError (also for text that only Python takes for JSON, that is not Unicode, is nested too deeply, or
    unfolds into far more memory than it has bytes).
    """
    containers, items, keys = text.count(b"[") + text.count(b"{"), text.count(b","), text.count(b'":')
    cost = COST_OF_CONTAINER * containers + COST_OF_ITEM * items + COST_OF_KEY * keys
    if cost > unfolds * len(text) + 4096:
        raise ValueError(f"it has {containers} brackets, {items} commas and {keys} keys in {len(text)} bytes")
    try:
        # Decoded here: given bytes, json would also take UTF-16 and encoded halves of characters.
        value = json.loads(text.decode(), object_pairs_hook=_object, parse_constant=_no_number, parse_float=_finite)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    # Halves of a character are legal in JSON's escapes, and cannot be printed or written anywhere.
    if re.search(rb"\\u[dD]", text) and _LONELY.search(json.dumps(value, ensure_ascii=False)):
        raise ValueError("it holds half of a character")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        key, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"key {key[:120]!r} appears twice")
    return result


def _finite(digits: str) -> float:
    number = float(digits)
    return number if math.isfinite(number) else _no_number(digits)


def _no_number(digits: str) -> Never:
    raise ValueError(f"{digits[:40]} is no finite number")
