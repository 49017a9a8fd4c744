"""Fixtures of tests about gates."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from spm_hub.attachment.gates import bank


@pytest.fixture(scope="module")
def small_bank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """An eighth of the general sentences, in a cache of these tests, to encode them in a moment."""
    some = bank.sentences()[::8]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(bank, "sentences", lambda: some)
        yield
