"""Searches the Hub for erasers by the tags of their model cards."""

from collections.abc import Iterator
from dataclasses import dataclass

from huggingface_hub import HfApi, ModelInfo

from spm_hub.hub.card import ERASES, METHOD, hub_id
from spm_hub.io.hub_client import reach, retry, translate_errors
from spm_hub.models.aliases import ALIASES

_BASE = "base_model:adapter:"


@dataclass(frozen=True)
class SearchResult:
    """A repository as its tags describe it."""

    repo: str
    erases: tuple[str, ...]
    method: str | None
    base: str | None
    downloads: int
    likes: int
    updated: str | None


def search(
    query: str = "", *, base: str | None = None, method: str | None = None, author: str | None = None
) -> tuple[SearchResult, ...]:
    """Find erasers on the Hub whose name, concept or aliases contain every word of `query`.

    The most downloaded come first.
    base: a family (sd1, sdxl ...), an alias or the id of a model. method: as in recipes. author: a Hub user.
    Raises HubError, NetworkError.
    """
    tags = ["spmhub"]
    if base is not None:
        # sdxl is a family and an alias; the family finds the erasers of the alias too.
        repo = None if base in {alias.family for alias in ALIASES.values()} else hub_id(base)
        tags.append(base if repo is None else f"{_BASE}{repo}")
    if method is not None:
        tags.append(f"{METHOD}{method}")

    def ask() -> list[ModelInfo]:
        return list(HfApi().list_models(filter=tags, author=author, full=True))

    with translate_errors("the list of erasers", None, otherwise="list your own: spmhub list", why="is needed"):
        reach()
        models = retry(ask)
    words = query.casefold().replace("-", " ").split()
    found = [_read(model) for model in models]
    matching = [one for one in found if all(word in _words_of(one) for word in words)]
    return tuple(sorted(matching, key=lambda one: (-one.downloads, -one.likes, one.repo)))


def _words_of(result: SearchResult) -> str:
    return " ".join((result.repo, *result.erases)).casefold().replace("-", " ")


def _read(model: ModelInfo) -> SearchResult:
    tags = model.tags or []

    def after(beginning: str) -> Iterator[str]:
        return (tag.removeprefix(beginning) for tag in tags if tag.startswith(beginning))

    return SearchResult(
        repo=model.id,
        erases=tuple(after(ERASES)),
        method=next(after(METHOD), None),
        base=next(after(_BASE), None),
        downloads=model.downloads or 0,
        likes=model.likes or 0,
        updated=None if model.last_modified is None else model.last_modified.date().isoformat(),
    )
