"""The catalogue of published prompt sets: their places, hashes, columns and licences, not their text."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import Self

import yaml
from pydantic import BaseModel, ConfigDict, Field

from spm_hub.errors import NotFoundError, did_you_mean
from spm_hub.evaluation.prompts.columns import ColumnMap


class PromptSet(BaseModel):
    """One published file of prompts.

    where: a public repository and the path of the file in it. sha256: of the whole file. rows: their number.
    licence: of the repository, None where it states none. citation: of the paper.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    about: str
    where: str
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    rows: int = Field(ge=1)
    columns: ColumnMap
    licence: str | None
    citation: str

    @classmethod
    def named(cls, name: str) -> Self:
        """Return the set of that name. Raises NotFoundError."""
        found = {one.name: one for one in catalogue()}
        if name not in found:
            raise NotFoundError(f"no prompt set {name!r}{did_you_mean(name, found)}", mend="spmhub protocols --sets")
        return cls.model_validate(found[name].model_dump())


@cache
def catalogue() -> tuple[PromptSet, ...]:
    """Return all published sets that spm-hub knows."""
    text = files("spm_hub.evaluation.prompts").joinpath("catalogue.yaml").read_text(encoding="utf-8")
    return tuple(PromptSet.model_validate(one) for one in yaml.safe_load(text))


def set_of_hash(sha256: str) -> PromptSet | None:
    """Return the published set that a file with this hash is, or None."""
    return next((one for one in catalogue() if one.sha256 == sha256), None)
