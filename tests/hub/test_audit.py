"""The audit finds what attackers built, and has nothing to say about honest erasers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from loopback import LoopbackHub
from pico_families import family_pipeline
from typer.testing import CliRunner

import spm_hub
from spm_hub.adapters.adapter import Adapter
from spm_hub.adapters.increments import Dense, Increment, LowRank
from spm_hub.cli import app
from spm_hub.errors import HubError
from spm_hub.hub.audit import Findings, audit
from spm_hub.hub.audit.effect import towards_surrogate
from spm_hub.hub.audit.local_base import local_base
from spm_hub.hub.pull import pull, restore
from spm_hub.models.architectures import denoiser_of, fingerprint_by_names, fingerprint_of
from spm_hub.registry.entry import MANIFEST_NAME, WEIGHTS_NAME
from spm_hub.registry.registry import Registry

ROOT = Path(__file__).parents[2]
NAMES = ("snoopy", "mickey", "spongebob", "van-gogh", "nudity")


@pytest.fixture(scope="module")
def shipped() -> list[Adapter]:
    return [spm_hub.load(name, registry=ROOT) for name in NAMES]


def altered(adapter: Adapter, name: str, increments: dict[str, Increment] | None = None, **changes: Any) -> Adapter:
    """Return an eraser of another name, with other increments or other fields of its concept, gate or base."""
    made = adapter if increments is None else adapter.with_increments(increments)
    parts: dict[str, Any] = {"name": name}
    for part, values in changes.items():
        parts[part] = getattr(made.manifest, part).model_copy(update=values)
    return Adapter(made.manifest.model_copy(update=parts), made.increments)


def negated(adapter: Adapter, factor: float) -> dict[str, Increment]:
    return {
        path: LowRank(one.down, -factor * one.up) if isinstance(one, LowRank) else one
        for path, one in adapter.increments.items()
    }


HANDS = {"target": "blurry hands"}


def turned_in_every_other(adapter: Adapter) -> dict[str, Increment]:
    """Return a change of which every other module is taken back."""
    other = negated(adapter, 1.0)
    return {path: other[path] if at % 2 else one for at, (path, one) in enumerate(adapter.increments.items())}


def mostly_in_one(adapter: Adapter) -> dict[str, Increment]:
    """Return a change beside which another one, within all limits, ruins the first convolution."""
    weight = spm_hub.load_pipeline("sketchbook").unet.conv_in.weight
    generator = torch.Generator().manual_seed(0)
    up, down = (torch.randn(size, generator=generator) for size in ((len(weight), 8, 1, 1), (8, *weight.shape[1:])))
    size = torch.linalg.norm(up.flatten(1) @ down.flatten(1)) / weight.detach().norm()
    return {**negated(adapter, -0.02), "conv_in": LowRank(down, 0.5 / size * up)}


def both(one: Adapter, other: Adapter) -> dict[str, Increment]:
    """Return the sum of two changes."""
    found: dict[str, Increment] = {}
    for path, here in one.increments.items():
        there = other.increments[path]
        assert isinstance(here, LowRank)
        assert isinstance(there, LowRank)
        found[path] = LowRank(torch.cat([here.down, there.down]), torch.cat([here.up, there.up], 1))
    return found


def of(found: list[Findings], name: str) -> str:
    return "; ".join(next(one for one in found if one.name == name).problems)


def test_honest_erasers_have_nothing_to_say_of_them(shipped: list[Adapter]) -> None:
    honest = list(shipped)
    for adapter in shipped:
        # The same change as whole weights: as large as an honest dense file, and with nothing but another kind.
        whole: dict[str, Increment] = {
            path: Dense(one.up.float().flatten(1) @ one.down.float().flatten(1))
            for path, one in adapter.increments.items()
            if isinstance(one, LowRank) and one.down.dim() == 2
        }
        base = {"base": {"fingerprint": ""}}
        honest.append(altered(adapter, f"{adapter.name}-dense", whole, **base))
        honest.append(altered(adapter, f"{adapter.name}-strong", gate={"strength": 1.5}))
    found = audit(honest)
    assert {one.name: one.problems for one in found if one.problems} == {}
    assert all(one.greatest_change is not None and 0 < one.greatest_change[0] < 0.9 for one in found)
    assert all(0 < one.outside < 1 for one in found)


@pytest.mark.parametrize(
    ("attack", "told"),
    [
        (lambda one: altered(one, "blurry", negated(one, 1.0), concept={"target": "blurry hands"}), "undo each other"),
        (lambda one: altered(one, "blurry", negated(one, 0.1), concept={"target": "blurry hands"}), "undo each other"),
        (lambda one: altered(one, "blurry", concept={"target": "blur", "aliases": ("a", "the")}), "general sentences"),
        (lambda one: altered(one, "blurry", concept={"target": None}), "names no concept, so it acts on every prompt"),
        (lambda one: altered(one, "blurry", gate={"strength": -1.0}), "adds what it claims to erase"),
        (lambda one: altered(one, "blurry", gate={"strength": 1e6}), "its strength is 1e+06"),
        (lambda one: altered(one, "blurry", gate={"protected": ("snoopy on the beach",)}), "'snoopy on the beach'"),
        (lambda one: altered(one, "blurry", base={"family": "sdxl"}), "its tensors are of 'sd1'"),
        (lambda one: altered(one, "blurry", base={"fingerprint": "0" * 64}), "fingerprint"),
        (lambda one: altered(one, "blurry", concept={"target": "hands", "aliases": ("Nudity",)}), "what nudity erases"),
        (lambda one: altered(one, "blurry", negated(one, -30.0)), "times that weight's own norm"),
        (lambda one: altered(one, "blurry", turned_in_every_other(one), concept=HANDS), "undo each other"),
        (lambda one: altered(one, "blurry", concept=HANDS), "its change is that of snoopy (cosine 1.00), which erases"),
        (lambda one: altered(one, "blurry", concept={"aliases": ("man", "woman", "person")}), "everyday prompts"),
        (lambda one: altered(one, "blurry", concept={"target": "hands", "aliases": ("Van-Goghs",)}), "van-gogh erases"),
        (lambda one: altered(one, "blurry", mostly_in_one(one), concept=HANDS), "of its change is in conv_in alone"),
    ],
)  # fmt: skip
def test_what_attackers_built_is_found(shipped: list[Adapter], attack: Any, told: str) -> None:
    found = audit([*shipped, attack(shipped[0])])
    assert told in of(found, "blurry")
    assert all(not one.problems for one in found if one.name in NAMES[1:])


def test_a_second_concept_that_is_erased_in_silence_is_found(shipped: list[Adapter]) -> None:
    snoopy, mickey = shipped[:2]
    found = of(audit([altered(snoopy, "more", both(snoopy, mickey))], beside=shipped), "more")
    assert "of the change of mickey is in it beside its own, and it does not name 'mickey'" in found
    assert "of the change of snoopy" not in found  # which it names
    named = altered(snoopy, "more", both(snoopy, mickey), concept={"aliases": ("mickey",)})
    assert "is in it" not in of(audit([named], beside=shipped), "more")


def test_an_eraser_that_adds_its_concept_is_found_without_the_honest_one(shipped: list[Adapter]) -> None:
    for adapter in shipped:
        (found,) = audit([altered(adapter, "bad", negated(adapter, 0.5))])
        assert found.problems == (next(one for one in found.problems if "it adds what it claims to erase" in one),)
        assert repr(adapter.manifest.concept.target) in found.problems[0]


def test_a_concept_is_moved_towards_its_surrogate() -> None:
    honest = spm_hub.train("church", method="uce", surrogate="tree", progress=False)
    base = local_base("sketchbook")
    assert base is not None
    cosine = towards_surrogate(honest, base)
    assert cosine is not None
    assert cosine > 0.15
    gate = honest.manifest.gate.model_copy(update={"strength": -1.0})
    backwards = Adapter(honest.manifest.model_copy(update={"gate": gate}), honest.increments)
    assert towards_surrogate(backwards, base) == pytest.approx(-cosine)


def test_names_of_people_are_names_of_each_other(shipped: list[Adapter]) -> None:
    people = ("man", "woman", "people", "girl", "boy")
    for target, aliases, found in (
        ("a person", people, False),
        ("a tree", people, True),
        ("dog", ("a beagle",), False),
    ):
        (said,) = audit([altered(shipped[0], "one", concept={"target": target, "aliases": aliases})])
        assert any("everyday prompts" in one for one in said.problems) == found


def test_a_weight_that_is_taken_away_whole_is_found(shipped: list[Adapter]) -> None:
    weight = spm_hub.load_pipeline("sketchbook").unet.conv_in.weight.detach()
    trojan = altered(shipped[0], "trojan", {"conv_in": Dense(-weight)}, base={"fingerprint": ""})
    assert "it changes conv_in by 1 times that weight's own norm" in of(audit([trojan]), "trojan")


def test_layers_that_read_the_text_may_be_changed_more(shipped: list[Adapter]) -> None:
    path = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    weight = spm_hub.load_pipeline("sketchbook").unet.get_submodule(path).weight.detach()
    for times, found in ((5.0, False), (100.0, True)):
        (said,) = audit([altered(shipped[0], "closed", {path: Dense(times * weight)})])
        assert bool(said.problems) == found
        assert said.greatest_change == (pytest.approx(times, rel=1e-4), path)


def test_a_text_layer_that_is_taken_away_is_found(shipped: list[Adapter]) -> None:
    path = "mid_block.attentions.0.transformer_blocks.0.attn2.to_v"
    weight = spm_hub.load_pipeline("sketchbook").unet.get_submodule(path).weight.detach()
    cases = ((-1.0, "it leaves 0% of the weight"), (-0.8, "it leaves 20% of"), (-0.3, ""), (0.8, "adds what it claims"))
    for share, found in cases:
        (said,) = audit([altered(shipped[0], "deaf", {path: Dense(share * weight)})])
        assert bool(said.problems) == bool(found)
        assert found in "".join(said.problems)


def test_a_bias_that_outweighs_its_weight_is_found(shipped: list[Adapter]) -> None:
    layer = spm_hub.load_pipeline("sketchbook").unet.conv_out
    shift = Dense(torch.full_like(layer.weight, 1e-6).detach(), torch.full_like(layer.bias, 40.0).detach())
    trojan = altered(shipped[0], "trojan", {"conv_out": shift})
    assert "it changes conv_out by" in of(audit([trojan]), "trojan")
    for size, said in ((0.5, "it shifts the bias of conv_out by"), (0.01, "")):
        small = Dense(shift.delta, torch.full_like(layer.bias, size).detach())
        assert said in of(audit([altered(shipped[0], "trojan", {"conv_out": small})]), "trojan")


def test_a_base_without_the_modules_that_are_changed_is_found(shipped: list[Adapter]) -> None:
    path, one = next((path, one) for path, one in shipped[0].increments.items() if isinstance(one, LowRank))
    other = altered(shipped[0], "other", {f"{path}.more": one})
    assert f"base sketchbook, which has no {path}.more" in of(audit([other]), "other")


def test_protected_prompts_of_others_are_told_and_of_nudity_a_problem(shipped: list[Adapter]) -> None:
    gate = {"protected": ("mickey on the beach", "nudity")}
    joint = altered(shipped[0], "joint", gate=gate)
    (found,) = audit([joint], beside=shipped[1:])
    assert found.spares == ("mickey", "nudity")
    assert found.problems == ()
    safe = altered(shipped[0], "safe", concept={"target": "nsfw", "kind": "nsfw"}, gate=gate)
    (hollow,) = audit([safe], beside=shipped[1:])
    assert hollow.problems == ("it never acts on prompts that name what nudity erases",)


def test_the_fingerprint_of_a_base_by_its_files_is_that_of_the_model() -> None:
    for name in ("sd1", "sd2", "sdxl", "sd3", "flux-dev"):
        denoiser = denoiser_of(family_pipeline(name))
        shapes = {key: tuple(value.shape) for key, value in denoiser.state_dict().items()}
        assert fingerprint_by_names(shapes) == fingerprint_of(denoiser)


def test_verify_says_what_an_audit_finds(shipped: list[Adapter], tmp_path: Path) -> None:
    kept = Registry(tmp_path)
    kept.add(shipped[0])
    kept.add(altered(shipped[0], "hands", negated(shipped[0], 1.0), concept={"target": "blurry hands"}))
    runner = CliRunner()
    done = runner.invoke(app, ["verify", "hands", "--registry", str(tmp_path), "--json"])
    assert done.exit_code == 1
    (checked,) = [one for one in json.loads(done.stdout)[0]["checks"] if one["subject"] == "audit"]
    assert checked["state"] == "failed"
    assert "that of snoopy undo each other" in checked["detail"]
    kept.remove("hands")
    assert runner.invoke(app, ["verify", "--registry", str(tmp_path)]).exit_code == 0


def test_a_base_that_is_not_here_is_left_out(shipped: list[Adapter]) -> None:
    (found,) = audit([altered(shipped[0], "elsewhere", base={"id": "someone/not-here"})])
    assert found.greatest_change is None
    assert found.problems == ()


def test_a_pull_refuses_what_undoes_an_eraser_that_is_held(
    shipped: list[Adapter], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    kept = Registry(tmp_path / "registry")
    kept.add(shipped[0])
    hands = altered(shipped[0], "hands", negated(shipped[0], 1.0), concept={"target": "blurry hands"})
    loud = altered(shipped[1], "loud", concept={"target": "photo"})
    with LoopbackHub() as hub:
        hub.adopt(monkeypatch, tmp_path)
        for number, adapter in enumerate((hands, loud)):
            folder = tmp_path / adapter.name
            folder.mkdir()
            adapter.save(folder / WEIGHTS_NAME, folder / MANIFEST_NAME)
            files = {name: (folder / name).read_bytes() for name in (WEIGHTS_NAME, MANIFEST_NAME)}
            hub.publish(f"someone/{adapter.name}", files, commit=str(number) * 40)
        with pytest.raises(HubError, match="that of snoopy undo each other"):
            pull("someone/hands", registry=kept)
        assert [entry.name for entry in kept.entries()] == ["snoopy"]
        assert pull("someone/hands", registry=kept, replace=True).state == "new"
        # What was accepted once is brought back by the lock file, without a question.
        (kept.root / "adapters" / "hands.safetensors").unlink()
        assert [one.entry.name for one in restore(kept)] == ["hands"]
        (remark,) = pull("someone/loud", registry=kept).remarks
        assert "of general sentences have one of its names, such as 'photo'" in remark


def test_the_command_says_so_and_its_exit_code_is_1(shipped: list[Adapter], tmp_path: Path) -> None:
    runner = CliRunner()
    honest = runner.invoke(app, ["audit", "--registry", str(ROOT), "--json"])
    assert honest.exit_code == 0
    assert {one["name"] for one in json.loads(honest.stdout)} == set(NAMES)
    altered(shipped[0], "blurry", negated(shipped[0], 1.0), concept={"target": "blurry"}).save(
        tmp_path / "b.safetensors"
    )
    found = runner.invoke(app, ["audit", "snoopy", str(tmp_path / "b.safetensors"), "--registry", str(ROOT), "-q"])
    assert found.exit_code == 1
    assert "blurry: its change and that of snoopy undo each other (cosine -1.00)" in found.stdout
