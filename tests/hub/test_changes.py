"""A pull says what a new version changes, and refuses one that is another eraser."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from loopback import LoopbackHub
from test_pull import REPO, eraser, repository
from typer.testing import CliRunner

from spm_hub.adapters.adapter import Adapter, increment_info
from spm_hub.adapters.increments import Dense, Increment, LowRank, Mask
from spm_hub.adapters.manifest import Concept, GateDefaults
from spm_hub.cli.app import app
from spm_hub.errors import HubError
from spm_hub.hub import pull as hub_pull
from spm_hub.hub.changes import changes_between, similarity
from spm_hub.registry.registry import Registry

PATH = "mid_block.attentions.0.proj_in"


def changed(made: Adapter, **keys: Any) -> Adapter:
    return Adapter(made.manifest.model_copy(update=keys), made.increments)


def with_increments(made: Adapter, increments: dict[str, Increment]) -> Adapter:
    return Adapter(made.manifest.model_copy(update={"increment": increment_info(increments)}), increments)


def concept(**keys: Any) -> Concept:
    return Concept(**{"target": "snoopy", "aliases": ("beagle",), **keys})


BEFORE = changed(eraser(), concept=concept())
NEGATIVE = with_increments(BEFORE, {PATH: LowRank(BEFORE.increments[PATH].down, -BEFORE.increments[PATH].up)})  # type: ignore[union-attr]
GRAVE: dict[str, tuple[Adapter, str]] = {
    "another concept": (changed(BEFORE, concept=concept(target="mickey")), "concept.target 'snoopy' -> 'mickey'"),
    "another surrogate": (changed(BEFORE, concept=concept(surrogate="a cat")), "concept.surrogate '' -> 'a cat'"),
    "another kind": (changed(BEFORE, concept=concept(kind="style")), "concept.kind 'other' -> 'style'"),
    "a name fewer": (changed(BEFORE, concept=concept(aliases=())), "no longer knows the names 'beagle'"),
    "a negative strength": (changed(BEFORE, gate=GateDefaults(strength=-5.0)), "strength 1 -> -5"),
    "no strength": (changed(BEFORE, gate=GateDefaults(strength=0.0)), "strength 1 -> 0"),
    "negative weights": (NEGATIVE, "mostly the opposite of the old one (cosine -1.00)"),
}
SAID: dict[str, tuple[Adapter, str]] = {
    "a name more": (changed(BEFORE, concept=concept(aliases=("beagle", "a dog"))), "also acts on the names 'a dog'"),
    "a strength": (changed(BEFORE, gate=GateDefaults(strength=2.0)), "strength 1 -> 2"),
    "a gate": (changed(BEFORE, gate=GateDefaults(kind="always")), "gate.kind calibrated -> always"),
    "rows": (changed(BEFORE, gate=GateDefaults(rows="conditional")), "gate.rows both -> conditional"),
    "protection": (changed(BEFORE, gate=GateDefaults(protected=("a dog",))), "no effect on 1 prompt: 'a dog'"),
    "modules": (
        with_increments(BEFORE, {**BEFORE.increments, "conv_out": LowRank(torch.ones(2, 3), torch.ones(3, 2))}),
        "also changes 1 module: conv_out",
    ),
    "other modules": (
        with_increments(BEFORE, {"conv_out": BEFORE.increments[PATH]}), f"no longer changes 1 module: {PATH}",
    ),
    "weights": (changed(eraser(seed=7), concept=concept()), "the weights"),
}  # fmt: skip


@pytest.fixture
def hub(empty_hub: LoopbackHub, tmp_path: Path) -> LoopbackHub:
    empty_hub.publish(REPO, repository(tmp_path / "made", BEFORE))
    return empty_hub


@pytest.fixture
def registry(hub: LoopbackHub, tmp_path: Path) -> Registry:
    kept = Registry(tmp_path / "registry")
    hub_pull.pull(REPO, registry=kept)
    return kept


@pytest.mark.parametrize("case", GRAVE)
def test_another_concept_or_sign_is_refused(case: str, hub: LoopbackHub, registry: Registry, tmp_path: Path) -> None:
    new, says = GRAVE[case]
    hub.publish(REPO, repository(tmp_path / "new", new))
    before = registry.get("snoopy").adapter_path.read_bytes()
    with pytest.raises(HubError) as caught:
        hub_pull.pull(REPO, registry=registry)
    assert says in caught.value.message
    assert registry.get("snoopy").adapter_path.read_bytes() == before
    command = ["pull", REPO, "--registry", str(registry.root)]
    assert CliRunner().invoke(app, command).exit_code == 1
    done = CliRunner().invoke(app, [*command, "--force"])
    assert done.exit_code == 0
    assert says in done.stderr


@pytest.mark.parametrize("case", SAID)
def test_any_other_change_is_said(case: str, hub: LoopbackHub, registry: Registry, tmp_path: Path) -> None:
    new, says = SAID[case]
    hub.publish(REPO, repository(tmp_path / "new", new))
    done = CliRunner().invoke(app, ["pull", REPO, "--registry", str(registry.root), "--json"])
    assert done.exit_code == 0
    assert f"snoopy changed: {says}" in done.stderr or says in done.stderr
    assert any(says in change for change in json.loads(done.stdout)[0]["changes"])


def test_the_similarity_is_that_of_the_weights_multiplied_out() -> None:
    random = torch.Generator().manual_seed(1)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random)

    one: dict[str, Increment] = {
        "a": LowRank(drawn(2, 5), drawn(4, 2)),
        "b": Dense(drawn(3, 2, 3, 3)),
        "c": Mask(torch.ones(4, dtype=torch.bool), 0),
        "norm": Dense(drawn(6)),
    }
    other: dict[str, Increment] = {
        "a": Dense(drawn(4, 5)),
        "b": LowRank(drawn(1, 2, 3, 3), drawn(3, 1, 1, 1)),
        "d": Dense(drawn(2, 2)),
        "norm": Dense(drawn(6)),
    }
    weights = {"a": torch.empty(4, 5), "b": torch.empty(3, 2, 3, 3), "norm": torch.empty(6)}
    flat = [
        torch.cat([each[path].delta_for(weight).double().flatten() for path, weight in weights.items()])
        for each in (one, other)
    ]
    expected = float(flat[0] @ flat[1] / flat[0].norm() / flat[1].norm())

    class Made:
        """What `similarity` reads of an adapter; an Adapter has one kind of increments only."""

        def __init__(self, increments: dict[str, Increment], strength: float) -> None:
            self.increments = increments
            self.manifest = changed(BEFORE, gate=GateDefaults(strength=strength)).manifest

    for strengths, sign in (((1.0, 2.0), 1), ((1.0, -2.0), -1), ((-1.0, -1.0), 1)):
        made: Any = [Made(each, strength) for each, strength in zip((one, other), strengths, strict=True)]
        assert similarity(*made) == pytest.approx(sign * expected, abs=1e-6)
    nothing: Any = Made({"d": Dense(drawn(2, 2))}, 1.0)
    assert similarity(nothing, made[0]) is None


def test_the_same_version_changes_nothing() -> None:
    assert changes_between(BEFORE, BEFORE).said == ()
