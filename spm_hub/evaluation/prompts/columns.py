"""Which column of a prompt file holds what: a map given as data, or found by the names in use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

from pydantic import BaseModel, ConfigDict

from spm_hub.errors import UsageError, did_you_mean

KNOWN_NAMES: dict[str, tuple[str, ...]] = {
    "prompt": ("prompt", "text", "caption", "sensitive prompt", "adv_prompt", "target_prompt"),
    "seed": ("seed", "evaluation_seed", "sd_seed"),
    "guidance": ("guidance", "guidance_scale", "evaluation_guidance", "sd_guidance_scale"),
    "width": ("width", "sd_image_width"),
    "height": ("height", "sd_image_height"),
    "negative": ("negative", "negative_prompt"),
    "subject": ("subject", "concept", "class", "label_str", "artist", "target"),
}
"""Names of columns in published sets, by what they hold."""


class ColumnMap(BaseModel):
    """For each property of a prompt row the name of its column; None where the file has none.

    A number as text, from "1", counts the columns of a file that begins without their names.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompt: str
    seed: str | None = None
    guidance: str | None = None
    width: str | None = None
    height: str | None = None
    negative: str | None = None
    subject: str | None = None

    @property
    def counts(self) -> bool:
        """True if the columns have numbers, as the file has no names for them."""
        return self.prompt.isdigit()

    def named(self) -> dict[str, str]:
        """Return the columns that are named, by property."""
        return {key: value for key, value in self.model_dump().items() if value is not None}

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse "prompt=TEXT,seed=SEED". Raises UsageError."""
        found: dict[str, str] = {}
        for part in text.split(","):
            key, equals, column = part.partition("=")
            if not equals or not column or key not in KNOWN_NAMES or key in found:
                hint = did_you_mean(key, KNOWN_NAMES, otherwise=f"; known: {', '.join(KNOWN_NAMES)}")
                raise UsageError(
                    f"--columns {text!r}: {part!r} is not PROPERTY=COLUMN{hint}", mend="--columns prompt=text"
                )
            found[key] = column
        if "prompt" not in found:
            raise UsageError(
                f"--columns {text!r} does not name the column of the prompts", mend="--columns prompt=text"
            )
        return cls(**found)

    @classmethod
    def found_in(cls, names: Sequence[str], source: object) -> Self:
        """Return the map of a file with these columns, by the names in use.

        Raises UsageError if no column, or more than one, is known to hold the prompts.
        """
        by_folded = {name.strip().casefold(): name for name in names}
        found: dict[str, str] = {}
        for key, known in KNOWN_NAMES.items():
            there = [by_folded[name] for name in known if name in by_folded]
            if key == "prompt" and len(there) != 1:
                which = "none of them is" if not there else f"{' and '.join(there)} both may be"
                raise UsageError(
                    f"{source} has the columns {', '.join(names)}, and {which} known to hold the prompts",
                    mend=f"--columns prompt={(*there, *names, 'COLUMN')[0]}",
                )
            if there:
                found[key] = there[0]
        return cls(**found)
