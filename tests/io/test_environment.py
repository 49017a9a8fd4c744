"""The user's folders are those of platformdirs, whether it is installed or not."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from platformdirs import windows
from platformdirs.macos import MacOS
from platformdirs.unix import Unix

from spm_hub.io import environment


@pytest.mark.parametrize("given", [None, "", "relative", "/somewhere/of mine"])
@pytest.mark.parametrize(("platform", "kind"), [("linux", Unix), ("darwin", MacOS)])
def test_folders_without_platformdirs(
    platform: str, kind: Any, given: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("XDG_DATA_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
        if given is not None:
            monkeypatch.setenv(variable, given)
    monkeypatch.setattr(sys, "platform", platform)
    expected = kind("spm-hub", appauthor=False)
    assert environment.usual_folder("data") == Path(expected.user_data_dir)
    assert environment.usual_folder("cache") == Path(expected.user_cache_dir)


def test_folders_on_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCALAPPDATA", "/c/local")
    monkeypatch.setattr(windows, "get_win_folder", windows.get_win_folder_from_env_vars)
    expected = windows.Windows("spm-hub", appauthor=False)
    data, cache = expected.user_data_dir, expected.user_cache_dir
    monkeypatch.setattr(sys, "platform", "win32")
    assert environment.usual_folder("data") == Path(data.replace("\\", "/"))
    assert environment.usual_folder("cache") == Path(cache.replace("\\", "/"))


def test_folders_with_and_without_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    found = environment.user_folder("data"), environment.user_folder("cache")
    monkeypatch.setitem(sys.modules, "platformdirs", None)
    assert (environment.user_folder("data"), environment.user_folder("cache")) == found
