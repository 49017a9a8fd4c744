"""Kind and other names of often-erased concepts.

`spmhub train nudity` should erase a naked body under any name, as in the papers, without an option.
"""

from __future__ import annotations

from typing import Any

_STYLES = (
    "van gogh", "picasso", "rembrandt", "andy warhol", "caravaggio", "monet", "cezanne", "kelly mckernan",
    "thomas kinkade", "tyler edlin", "kilian eng", "ajin: demi human", "greg rutkowski", "salvador dali",
    "edvard munch", "hokusai",
)  # fmt: skip
_CHARACTERS = (
    "snoopy",
    "mickey",
    "mickey mouse",
    "spongebob",
    "pikachu",
    "hello kitty",
    "mario",
    "sonic",
    "donald duck",
)
_NAKED = ("nude", "naked")

KNOWN: dict[str, dict[str, Any]] = {
    **{name: {"kind": "style"} for name in _STYLES},
    **{name: {"kind": "character"} for name in _CHARACTERS},
    "nudity": {"kind": "nsfw", "aliases": _NAKED},
    "nude": {"kind": "nsfw", "aliases": ("nudity", "naked")},
}


# What Concept Ablation makes of them: its paper's anchor concepts, and the like.
_ANCHORS = {
    **dict.fromkeys(_STYLES, "painting"),
    "grumpy cat": "cat", "hello kitty": "cat", "snoopy": "dog", "mickey": "mouse", "mickey mouse": "mouse",
    "donald duck": "duck", "nemo": "fish", "r2d2": "robot", "nudity": "person", "nude": "person",
}  # fmt: skip


def known(target: str) -> dict[str, Any]:
    """Recipe keys (kind, aliases) for a well-known concept, or nothing."""
    return dict(KNOWN.get(_plain(target), {}))


def anchor_concept(target: str, kind: str | None) -> str:
    """Return the anchor concept that replaces a concept: "painting" for a style, "" if none is known."""
    return _ANCHORS.get(_plain(target), "painting" if kind == "style" else "")


def _plain(target: str) -> str:
    return " ".join(target.lower().split())
