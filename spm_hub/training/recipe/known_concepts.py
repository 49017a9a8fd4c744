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


# Anchor concepts of Concept Ablation: its paper's, and the like.
_ANCHORS = {
    **dict.fromkeys(_STYLES, "painting"),
    "grumpy cat": "cat", "hello kitty": "cat", "snoopy": "dog", "mickey": "mouse", "mickey mouse": "mouse",
    "donald duck": "duck", "nemo": "fish", "r2d2": "robot", "nudity": "person", "nude": "person",
}  # fmt: skip
AUTO = "auto"
"""The surrogate that is chosen here, by the concept's kind."""
# Words that any base draws something of, measured by `benchmarks/surrogates.py`: with them an erased concept's pictures
# come nearer to the base's own pictures of other things than with no prompt, which some bases draw as a dark blur.
_GENERAL = {"person": "a person"}
_GENERAL_OTHERWISE = "a picture"
_ANCHOR_OF_KIND = {"style": "painting", "person": "person", "nsfw": "person"}


def known(target: str) -> dict[str, Any]:
    """Recipe keys (kind, aliases) for a well-known concept, or nothing."""
    return dict(KNOWN.get(_plain(target), {}))


def anchor_concept(target: str, kind: str | None) -> str:
    """Return the anchor concept that replaces a concept, by its name or its kind; "" if none is known."""
    return _ANCHORS.get(_plain(target), _ANCHOR_OF_KIND.get(kind or "", ""))


def general_word(target: str, kind: str | None) -> str:
    """Return a surrogate for a concept: what a known character is like, else a general word for the kind."""
    like = _ANCHORS.get(_plain(target))
    if like is not None and kind in (None, "character", "object", "other"):
        return f"a {like}"
    return _GENERAL.get(kind or "", _GENERAL_OTHERWISE)


def _plain(target: str) -> str:
    return " ".join(target.lower().split())
