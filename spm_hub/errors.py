"""The hierarchy of errors.

A message says what happened, and names the offending key and both values; `mend` is a command that mends it.
"""

import difflib
import shlex
from collections.abc import Iterable

GET_AGAIN = "get the adapter again: spmhub pull OWNER/NAME --force, or spmhub train CONCEPT --force"
"""The mend for an adapter file that is damaged or was altered."""


class SpmHubError(Exception):
    """Root of the hierarchy.

    mend: a command or step that mends the problem. exit_code: exit code of a command that ends with this error.
    """

    exit_code = 1

    def __init__(self, message: str, *, mend: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.mend = mend

    def __str__(self) -> str:
        return self.message if self.mend is None else f"{self.message}\n  try: {self.mend}"

    def __reduce__(self) -> tuple[object, ...]:
        # The keyword-only `mend` is not in `args`; without this an error loses it when a worker process hands it back.
        return _rebuild, (type(self), self.message, self.mend)


def _rebuild(kind: type[SpmHubError], message: str, mend: str | None) -> SpmHubError:
    return kind(message, mend=mend)


class UsageError(SpmHubError):
    """A wrong request: an unknown name, a bad option value, an empty concept."""

    exit_code = 2


class NotFoundError(UsageError):
    """A name that does not exist; the message suggests the nearest ones."""


class RecipeError(UsageError):
    """A training recipe with an unknown key or an impossible value."""


class AdapterFileError(SpmHubError):
    """An adapter file that is truncated, altered, not finite, or of an unknown layout."""


class ManifestError(SpmHubError):
    """A manifest that is invalid or does not match its adapter file."""


class SignatureError(SpmHubError):
    """An adapter without the required signature, or with an invalid one."""


class CompatibilityError(SpmHubError):
    """An adapter and a model that do not fit; the message names the module and both shapes."""


class RegistryError(SpmHubError):
    """A folder or file that could not be read, written or replaced."""


class ModelError(SpmHubError):
    """A base model that cannot be loaded or is not of a supported kind."""


class NetworkError(SpmHubError):
    """A download or upload that the network did not allow."""


class HubError(SpmHubError):
    """A refusal by the Hub (access, name, conflicting change), or wrong data from it."""


class TooLargeError(HubError):
    """An eraser on the Hub that is too large to be downloaded without the user's consent."""


class HubNotFoundError(HubError):
    """A repository, revision or file that the Hub does not have, or not for this user."""


class BusyError(SpmHubError):
    """A request to a server that has too many already."""


class ClosingError(SpmHubError):
    """A request to a server that is shutting down."""


class ForbiddenError(SpmHubError):
    """A request to a server for something that its operator does not allow."""


def did_you_mean(name: str, candidates: Iterable[str], otherwise: str = "") -> str:
    """Return "; did you mean A or B?" for an unknown `name`, or `otherwise` if no candidate resembles it."""
    close = nearest(name, candidates)
    return f"; did you mean {' or '.join(close)}?" if close else otherwise


def ambiguous_eraser(reference: str, candidates: Iterable[str]) -> UsageError:
    """Return the error for a reference that matches several erasers; it lists the candidates."""
    listed = "".join(f"\n  {candidate}" for candidate in candidates)
    return UsageError(f"{reference!r} could be any of:{listed}", mend="name one of these")


def unknown_eraser(reference: str, names: Iterable[str], where: str) -> NotFoundError:
    """Return the error for a reference that matches no eraser `where`; it suggests the nearest of `names`."""
    known = tuple(names)
    mend = "spmhub list" if known else f"make one: spmhub train {shlex.quote(reference)}"
    if not known and reference.lower().endswith((".safetensors", ".pt", ".ckpt", ".bin")):
        mend = "the path of a file that is there"  # nobody erases a concept of such a name
    return NotFoundError(f"no eraser {reference!r} {where}{did_you_mean(reference, known)}", mend=mend)


def nearest(name: str, candidates: Iterable[str]) -> tuple[str, ...]:
    """Return up to three of `candidates` that resemble `name` most, best first; case is ignored."""
    by_folded = {candidate.casefold(): candidate for candidate in candidates}
    return tuple(by_folded[match] for match in difflib.get_close_matches(name.casefold(), by_folded, n=3, cutoff=0.6))
