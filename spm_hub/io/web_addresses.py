"""Addresses where a name is wanted: those of the Hub's pages and files mean the repository."""

import os
import re
from urllib.parse import unquote, urlsplit

from spm_hub.errors import UsageError

_HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")
# The first word of addresses on the Hub that are no model's.
_OTHER_KINDS = {"datasets": "a dataset", "spaces": "a Space", "papers": "a paper", "collections": "a collection"}
_FILE_VIEWS = ("tree", "blob", "resolve", "raw", "commit", "commits", "edit", "blame")


def hub_reference(text: str, use: str = "spmhub convert FILE --concept CONCEPT") -> str:
    """Return owner/name[@revision] for the address of a model on the Hub; other texts are unchanged.

    A slash at the end is left out: owner/name/ is owner/name.  use: what a downloaded file is for, in messages.
    Raises UsageError for an address of another site, or of no model.
    """
    plain = text.strip()
    host, path = _parts(plain)
    if host is None:
        return plain.rstrip("/") if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(@[\w./-]+)?/+", plain) else text
    shown = f"https://{host}{path}"[:200]
    if host not in (*_HOSTS, _endpoint()):
        raise UsageError(
            f"{shown} is an address, and nothing is downloaded from {host}",
            mend=f"download the file in a browser, then: {use}",
        )
    words = [unquote(word) for word in path.split("/") if word]
    if words[:1] == ["models"]:
        words = words[1:]
    if not words or words[0] in _OTHER_KINDS or len(words) < 2:
        kind = _OTHER_KINDS.get(words[0] if words else "", "no model")
        raise UsageError(f"{shown} is the address of {kind}", mend="give a model's address, or owner/name")
    owner, name, *rest = words
    name, _, revision = name.removesuffix(".git").partition("@")
    if len(rest) > 1 and rest[0] in _FILE_VIEWS:
        # A branch has no slash here, but a pull request's is refs/pr/1.
        revision = "/".join(rest[1:4]) if rest[1] == "refs" else rest[1]
    return f"{owner}/{name}@{revision}" if revision and revision != "main" else f"{owner}/{name}"


def _parts(text: str) -> tuple[str | None, str]:
    """Return host and path of an address, or (None, "")."""
    if match := re.fullmatch(r"git@([\w.-]+):(.+)", text):
        return match[1], f"/{match[2]}"
    if text.startswith("hf://"):
        return _HOSTS[0], f"/{text.removeprefix('hf://')}"
    known = "|".join(map(re.escape, _HOSTS))
    if re.match(rf"(?:{known}|(?:www\.)?civitai\.com|(?:www\.)?github\.com)/", text, re.IGNORECASE):
        text = f"https://{text}"
    if not re.match(r"[a-z][a-z0-9+.-]*://", text, re.IGNORECASE):
        return None, ""
    try:
        found = urlsplit(text)
        return (found.hostname or "?"), found.path
    except ValueError:
        return "?", ""


def _endpoint() -> str:
    """Return the host of HF_ENDPOINT, which names a mirror of the Hub."""
    return urlsplit(os.environ.get("HF_ENDPOINT", "")).hostname or _HOSTS[0]
