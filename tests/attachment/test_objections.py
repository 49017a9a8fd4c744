"""What is said of erasers before they act, and the eraser that would undo another."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from pico import pico_eraser, pico_pipeline

import spm_hub
from spm_hub.adapters.adapter import Adapter
from spm_hub.adapters.compatibility import remark_on_fingerprint
from spm_hub.adapters.increments import Dense, Increment, LowRank
from spm_hub.adapters.manifest import Concept, GateDefaults
from spm_hub.attachment import attach
from spm_hub.errors import CompatibilityError, UsageError
from spm_hub.models.architectures import fingerprint_of


@pytest.fixture(scope="module")
def pipe() -> Any:
    return pico_pipeline()


def renamed(adapter: Adapter, name: str, increments: dict[str, Increment] | None = None, **about: Any) -> Adapter:
    made = adapter if increments is None else adapter.with_increments(increments)
    about = {"name": name, "concept": Concept(target=name), **about}
    return Adapter(made.manifest.model_copy(update=about), made.increments)


def times(adapter: Adapter, factor: float) -> dict[str, Increment]:
    return {
        path: LowRank(one.down, factor * one.up) for path, one in adapter.increments.items() if isinstance(one, LowRank)
    }


@pytest.fixture(scope="module")
def snoopy(pipe: Any) -> Adapter:
    return pico_eraser(pipe.unet, "snoopy", gate=GateDefaults(kind="always"))


@pytest.fixture(scope="module", params=[1.0, 0.2, 5.0, "whole", "by its strength"])
def hands(request: pytest.FixtureRequest, snoopy: Adapter) -> Adapter:
    """An eraser that takes snoopy's change back, in several disguises."""
    if request.param == "by its strength":
        return renamed(snoopy, "hands", gate=GateDefaults(kind="always", strength=-1.0))
    if request.param == "whole":
        negative = times(snoopy, -1.0)
        wholes: dict[str, Increment] = {
            path.replace(".", "_"): Dense((one.up.flatten(1) @ one.down.flatten(1)).reshape(one.weight_shape))
            for path, one in negative.items()
            if isinstance(one, LowRank)
        }
        return renamed(snoopy, "hands", wholes)
    return renamed(snoopy, "hands", times(snoopy, -request.param))


def test_an_eraser_that_undoes_another_is_refused_by_name(pipe: Any, snoopy: Adapter, hands: Adapter) -> None:
    before = {key: value.clone() for key, value in pipe.unet.state_dict().items()}
    for order in ([snoopy, hands], [hands, snoopy]):
        with pytest.raises(UsageError, match="undoes") as refused:
            attach(pipe, order)
        assert "snoopy" in refused.value.message
        assert "hands" in refused.value.message
        assert "force=True" in str(refused.value.mend)
    with attach(pipe, [snoopy]) as erasers:
        with pytest.raises(UsageError, match=r"undoes .*nothing was attached"):
            erasers.add(hands)
        assert erasers.names == ("snoopy",)
        with pytest.warns(UserWarning, match="undoes"):
            erasers.add(hands, force=True)
        erasers.recover("snoopy")
        with pytest.raises(UsageError, match="undoes"):
            erasers.add(snoopy)
        erasers.recover("hands")
        erasers.add(snoopy)
    assert all(torch.equal(before[key], value) for key, value in pipe.unet.state_dict().items())


def test_who_asks_for_it_gets_it_with_a_warning(pipe: Any, snoopy: Adapter) -> None:
    hands = renamed(snoopy, "hands", times(snoopy, -1.0))
    with (
        pytest.warns(UserWarning, match=r"(hands undoes snoopy|snoopy undoes hands).*cosine -1\.00"),
        spm_hub.attach(pipe, [snoopy, hands], force=True) as erasers,
    ):
        assert len(erasers) == 2


def test_unlike_and_like_erasers_are_attached_without_a_word(pipe: Any, snoopy: Adapter) -> None:
    made = [pico_eraser(pipe.unet, name, seed) for seed, name in enumerate(("mickey", "a fish", "van gogh"), start=5)]
    others = [renamed(one, one.name, times(one, 0.5)) for one in made]
    alike = renamed(snoopy, "beagle", times(snoopy, 0.7))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with attach(pipe, [snoopy, alike, *others], gate="always"):
            pass


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda one: renamed(one, "loud", gate=GateDefaults(strength=9.0)), "loud: its strength is 9"),
        (lambda one: renamed(one, "loud", concept=Concept(target="blur", aliases=("the",))), "every other sentence"),
        (lambda one: renamed(one, "loud", gate=GateDefaults(protected=("loud music",))), "names its own concept"),
        (lambda one: renamed(one, "loud", times(one, 50.0)), r"loud: it changes \S+ by \d+(\.\d+)? times"),
    ],
)
def test_what_is_more_than_an_honest_eraser_needs_is_said(pipe: Any, snoopy: Adapter, made: Any, said: str) -> None:
    with pytest.warns(UserWarning, match=said), attach(pipe, [made(snoopy)], gate="always"):
        pass


def test_a_users_own_strength_is_no_claim_of_the_manifest(pipe: Any, snoopy: Adapter) -> None:
    loud = renamed(snoopy, "loud", gate=GateDefaults(kind="always", strength=9.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with attach(pipe, [loud], strength=0.5):
            pass


def test_the_greatest_change_is_that_of_the_whole_weights(pipe: Any, snoopy: Adapter) -> None:
    path, one = next(iter(times(snoopy, 40.0).items()))
    assert isinstance(one, LowRank)
    weight = pipe.unet.get_submodule(path).weight.double()
    share = float((one.up.double().flatten(1) @ one.down.double().flatten(1)).norm() / weight.norm())
    assert share > 1
    with pytest.warns(UserWarning, match="times that weight's own norm") as told:
        attach(pipe, [renamed(snoopy, "loud", {path: one})], gate="always").detach()
    (text,) = [str(each.message) for each in told if path in str(each.message)]
    assert float(text.partition(" by ")[2].split()[0]) == pytest.approx(share, rel=0.1)


@pytest.mark.parametrize("family", ["sdxl", "sd2", "sd3", "flux"])
def test_another_family_than_the_models_is_refused_with_both(pipe: Any, snoopy: Adapter, family: str) -> None:
    base = snoopy.manifest.base.model_copy(update={"family": family})
    with pytest.raises(CompatibilityError, match=f"base.family '{family}', this model is of 'sd1'"):
        attach(pipe, [renamed(snoopy, "other", base=base)])


def test_another_layout_of_the_same_family_is_a_note(
    pipe: Any, snoopy: Adapter, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="spm_hub")
    own = fingerprint_of(pipe.unet)
    honest = renamed(snoopy, "here", base=snoopy.manifest.base.model_copy(update={"fingerprint": own}))
    elsewhere = renamed(snoopy, "there", base=snoopy.manifest.base.model_copy(update={"fingerprint": "0" * 64}))
    assert remark_on_fingerprint(honest, own) is None
    with attach(pipe, [honest], gate="always"):
        assert "fingerprint" not in caplog.text
    with attach(pipe, [elsewhere], gate="always"):
        assert f"fingerprint 000000000000..., this model's is {own[:12]}..." in caplog.text
