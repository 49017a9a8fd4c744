"""What is known of often-erased concepts before anybody trains: their kind and their other names.

`spmhub train nudity` should mean what the papers mean, a naked body however it is called, without an option.
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


def known(target: str) -> dict[str, Any]:
    """Recipe keys (kind, aliases) for a well-known concept, or nothing."""
    return dict(KNOWN.get(" ".join(target.lower().split()), {}))
