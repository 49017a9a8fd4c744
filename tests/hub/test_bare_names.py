"""A bare name means one eraser: its own name or target, and nothing is asked of the Hub that the user did not want."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from loopback import LoopbackHub
from test_pull import eraser, repository
from typer.testing import CliRunner

from spm_hub.adapters.manifest import Concept
from spm_hub.cli.app import app
from spm_hub.errors import HubError, NotFoundError
from spm_hub.hub import first_party
from spm_hub.hub import pull as hub_pull
from spm_hub.hub.resolve import letters_apart, resolve
from spm_hub.io.environment import OWNER_VARIABLE
from spm_hub.registry.registry import Registry

LETTERS = "abcdefghijklmnopqrstuvwxyz"


@pytest.fixture
def hub(empty_hub: LoopbackHub, tmp_path: Path) -> LoopbackHub:
    """A Hub with erasers of the account spm-hub and of another one."""
    for owner, name in (("spm-hub", "nudity"), ("spm-hub", "mickey"), ("mine", "nudity")):
        empty_hub.publish(f"{owner}/{name}", repository(tmp_path / owner / name, eraser(name=name)))
    return empty_hub


@pytest.fixture
def registry(empty_registry: Registry) -> Registry:
    return empty_registry


def called(name: str, **concept: Any) -> Any:
    """An eraser of that name, of any concept."""
    made = eraser(name=name)
    manifest = made.manifest.model_copy(update={"concept": Concept(**{"target": name, **concept})})
    return type(made)(manifest, made.increments)


def test_an_alias_is_no_name(hub: LoopbackHub, registry: Registry) -> None:
    registry.add(called("sharper-hands", target="blurry hands", aliases=("nudity", "violence", "gore")))
    for reference in ("nudity", "Nudity", "violence"):
        with pytest.raises(NotFoundError, match=rf"no eraser '{reference}' in .*an alias of sharper-hands"):
            resolve(reference, registry.root)
    done = CliRunner().invoke(
        app, ["apply", "--adapters", "nudity", "--prompt", "a dog", "--registry", str(registry.root)]
    )
    assert done.exit_code == 2
    assert "no eraser 'nudity'" in done.stderr
    assert hub.requests == []
    assert resolve("blurry hands", registry.root).name == "sharper-hands"
    # Where a Hub may be asked, the alias does not keep the real one from being found.
    assert resolve("nudity", registry.root, pull=True).read_manifest().name == "nudity"


@pytest.mark.parametrize("reference", ["nuditty", "nudty", "nudiyt", "Nudify", "nud ity", "udity", "nnuditty"])
@pytest.mark.parametrize("owner", [None, "mine"])
def test_a_typo_of_a_held_name_is_refused_before_any_request(
    reference: str, owner: str | None, hub: LoopbackHub, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.add(called("nudity"))
    hub.publish("mine/nuditty", hub.content("mine/nudity"))
    if owner is not None:
        monkeypatch.setenv(OWNER_VARIABLE, owner)
    for pull in (False, True):
        with pytest.raises(NotFoundError, match="did you mean nudity") as caught:
            resolve(reference, registry.root, pull=pull)
        assert "spmhub pull" in str(caught.value.mend)
    done = CliRunner().invoke(
        app, ["apply", "-a", reference, "--prompt", "a dog", "--registry", str(registry.root), "--pull"]
    )
    assert done.exit_code == 2
    assert hub.requests == []


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), name=st.text(LETTERS, min_size=5, max_size=12))
def test_any_one_or_two_mistakes_are_seen(data: st.DataObject, name: str) -> None:
    word, mistakes = name, data.draw(st.integers(1, 2))
    for _ in range(mistakes):
        at, letter = data.draw(st.integers(0, len(word) - 1)), data.draw(st.sampled_from(LETTERS))
        # A swap and another mistake at the same place may count as three; see "optimal string alignment".
        kinds = ["add", "drop", "change", "swap"] if mistakes == 1 else ["add", "drop", "change"]
        match data.draw(st.sampled_from(kinds)):
            case "add":
                word = word[:at] + letter + word[at:]
            case "drop" if len(word) > 1:
                word = word[:at] + word[at + 1 :]
            case "change":
                word = word[:at] + letter + word[at + 1 :]
            case _:
                word = word[:at] + word[at : at + 2][::-1] + word[at + 2 :]
    assert letters_apart(name, word) <= mistakes
    assert letters_apart(name, word) == letters_apart(word, name)
    assert (letters_apart(name, word) == 0) == (name == word)


def test_distances_that_are_known() -> None:
    for one, other, apart in (("", "", 0), ("", "ab", 2), ("kitten", "sitting", 3), ("ca", "abc", 3), ("ab", "ba", 1)):
        assert letters_apart(one, other) == apart


def test_nothing_is_asked_of_the_hub_unless_somebody_wanted_it(
    hub: LoopbackHub, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    for reference in ("nudity", "project-x-secret-person", "van gogh"):
        with pytest.raises(NotFoundError, match=f"no eraser '{reference}' in") as caught:
            resolve(reference, registry.root)
        assert "--pull" in str(caught.value.mend)
    monkeypatch.setenv(OWNER_VARIABLE, "")
    monkeypatch.setattr(first_party, "FIRST_PARTY", {"nudity": "spm-hub/nudity"})
    with pytest.raises(NotFoundError):
        resolve("nudity", registry.root)
    assert hub.requests == []


def test_whom_a_name_is_pulled_from(hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pulled(name: str, place: str, **options: Any) -> str:
        root, said = tmp_path / place, list[str]()
        root.mkdir(exist_ok=True)
        entry = resolve(name, root, say=said.append, **options)
        repo = str(Registry(root).get("nudity").read_manifest().origin.repo)  # type: ignore[union-attr]
        assert said == [f"{name} is in no registry; pulling {repo} ..."]
        # From now on it is here, and nothing is asked.
        hub.requests.clear()
        assert resolve(name, root).adapter_path == entry.adapter_path
        assert hub.requests == []
        return repo

    assert pulled("nudity", "by pull", pull=True) == "spm-hub/nudity"
    with monkeypatch.context() as patch:
        patch.setattr(first_party, "FIRST_PARTY", {"nudity": "mine/nudity"})
        assert pulled("Nudity", "first party") == "mine/nudity"
        with pytest.raises(NotFoundError):
            resolve("mickey", tmp_path / "first party")
    monkeypatch.setenv(OWNER_VARIABLE, "mine")
    assert pulled("nudity", "configured") == "mine/nudity"
    with pytest.raises(NotFoundError, match="nor on the Hub as mine/van-gogh"):
        resolve("van gogh", tmp_path / "configured")


def test_a_repository_that_serves_another_eraser_is_refused(
    hub: LoopbackHub, registry: Registry, tmp_path: Path
) -> None:
    hub.publish("spm-hub/violence", repository(tmp_path / "made", eraser(name="snoopy")))
    with pytest.raises(HubError, match=r"spm-hub/violence holds an eraser named 'snoopy'.* not 'violence'"):
        resolve("violence", registry.root, pull=True)
    assert registry.entries() == ()
    # Pulled on purpose, it keeps its own name, and that of its repository does not come to mean it.
    assert hub_pull.pull("spm-hub/violence", registry=registry).entry.name == "snoopy"
    with pytest.raises(HubError, match="not 'violence'"):
        resolve("violence", registry.root, pull=True)
