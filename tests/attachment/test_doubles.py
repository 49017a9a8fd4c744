"""Erasers that would change nothing, or act twice: attached twice, the same file, baked into the model before."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pico import pico_eraser, pico_pipeline

import spm_hub
from spm_hub.adapters.adapter import Adapter, load_file
from spm_hub.adapters.baking import bake, recover
from spm_hub.adapters.increments import Dense, LowRank, Mask
from spm_hub.adapters.manifest import Concept, slug
from spm_hub.adapters.presence import share_in_weights
from spm_hub.attachment.attachment import attach
from spm_hub.errors import AdapterFileError, UsageError
from spm_hub.models.architectures import changeable


def renamed(adapter: Adapter, name: str, target: str | None = None) -> Adapter:
    concept = adapter.manifest.concept if target is None else Concept(target=target)
    return replace(adapter, manifest=adapter.manifest.model_copy(update={"name": name, "concept": concept}))


def zeroed(adapter: Adapter, part: str) -> Adapter:
    def zero(one: Any) -> Any:
        if isinstance(one, Mask):
            return Mask(torch.ones_like(one.keep), one.dim)
        if isinstance(one, Dense):
            return Dense(torch.zeros_like(one.delta), None if one.delta_bias is None else 0 * one.delta_bias)
        up, down = (0 * tensor if part in (name, "terms") else tensor for name, tensor in one.tensors().items())
        if part == "terms":  # one half of each term is zero, and neither factor is
            down, up = one.down.clone(), one.up.clone()
            down[0], up[:, 1] = 0, 0
            return LowRank(down, up)
        return LowRank(one.down * (part != "down"), one.up * (part != "up"))

    return replace(adapter, increments={path: zero(one) for path, one in adapter.increments.items()})


@pytest.mark.parametrize(
    ("kind", "part"), [("low_rank", "up"), ("low_rank", "down"), ("low_rank", "terms"), ("dense", ""), ("mask", "")]
)
def test_increments_of_zeros_are_refused_wherever_they_come_in(kind: str, part: str, tmp_path: Path) -> None:
    pipe = pico_pipeline()
    adapter = zeroed(pico_eraser(pipe.unet, "snoopy", kind=kind, rank=2), part)
    with pytest.raises(AdapterFileError, match=rf"changes nothing.*\({len(adapter.increments)} modules\)"):
        attach(pipe, [adapter])
    assert not [key for key in (*vars(pipe), *vars(pipe.unet)) if "spm_hub" in key]
    with attach(pipe, []) as erasers, pytest.raises(AdapterFileError, match="changes nothing"):
        erasers.add(adapter)
    adapter.save(tmp_path / "zero.safetensors")
    with pytest.raises(AdapterFileError, match="changes nothing"):
        spm_hub.convert(tmp_path / "zero.safetensors", to="spm", out=tmp_path / "written.safetensors")
    with pytest.raises(AdapterFileError, match="changes nothing"):
        spm_hub.convert(adapter)
    assert not (tmp_path / "written.safetensors").exists()
    lazy = load_file(tmp_path / "zero.safetensors", lazy=True)
    with attach(pipe, [lazy], gate="always"), pytest.raises(AdapterFileError, match="changes nothing"):
        pipe("snoopy", num_inference_steps=1, output_type="latent")


def test_one_module_that_changes_is_enough() -> None:
    pipe = pico_pipeline()
    adapter = pico_eraser(pipe.unet, "snoopy")
    increments = dict(zeroed(adapter, "up").increments)
    path = max(increments)
    increments[path] = adapter.increments[path]
    attach(pipe, [replace(adapter, increments=increments)]).detach()


def test_the_same_file_under_two_names_is_refused(tmp_path: Path) -> None:
    pipe = pico_pipeline()
    first = pico_eraser(pipe.unet, "snoopy")
    first.save(tmp_path / "one.safetensors")
    second = renamed(load_file(tmp_path / "one.safetensors"), "snoopy-2")
    for attempt in (lambda: attach(pipe, [first, second]), lambda: spm_hub.bake([first, second], tmp_path / "out")):
        with pytest.raises(UsageError, match=r"snoopy-2 .* is snoopy .* under another name") as refused:
            attempt()
        assert "snoopy=2" in str(refused.value.mend)
    with attach(pipe, [first]) as erasers:
        with pytest.raises(UsageError, match="under another name"):
            erasers.add(second)
        assert erasers.names == ("snoopy",)
        erasers.recover("snoopy")
        erasers.add(second)
    # For another concept it may be meant.
    with pytest.warns(UserWarning, match="beagle makes the same change as snoopy"):
        attach(pipe, [first, renamed(first, "beagle", "beagle")]).detach()


def test_a_checkpoint_refuses_the_eraser_that_is_baked_into_it(tmp_path: Path) -> None:
    pipe = pico_pipeline()
    inside, other = pico_eraser(pipe.unet, "snoopy", seed=1), pico_eraser(pipe.unet, "mickey", seed=2)
    bake(pipe, [inside], tmp_path / "baked")
    baked = type(pipe).from_pretrained(tmp_path / "baked", safety_checker=None)
    for again in (inside, renamed(inside, "snoopy-2")):
        with pytest.raises(UsageError, match="is baked into this model already") as refused:
            attach(baked, [again])
        assert f"spmhub recover snoopy --checkpoint {tmp_path / 'baked'}" in str(refused.value.mend)
    parts = pico_pipeline().components | {"unet": baked.unet, "requires_safety_checker": False}
    with pytest.raises(UsageError, match="is baked into"):  # only the denoiser is from there
        attach(type(pipe)(**parts), [inside])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        attach(baked, [other], gate="always").detach()
    with pytest.warns(UserWarning, match="another eraser named snoopy is baked"):
        attach(baked, [pico_eraser(pipe.unet, "snoopy", seed=5)]).detach()
    recover(tmp_path / "baked", "snoopy")
    attach(type(pipe).from_pretrained(tmp_path / "baked", safety_checker=None), [inside]).detach()


@pytest.mark.parametrize("kind", ["low_rank", "dense", "mask"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_baked_change_is_seen_in_weights_that_lost_their_mark(kind: str, dtype: torch.dtype) -> None:
    """As after a conversion to a single file: nothing but the numbers is left."""
    pipe = pico_pipeline(channels=(32, 64), dtype=dtype)
    inside, other = (
        pico_eraser(pipe.unet, name, seed=seed, kind=kind) for seed, name in ((1, "snoopy"), (2, "mickey"))
    )
    modules = {path: changeable(pipe.unet)[path] for path in inside.increments}
    shares = [share_in_weights(modules, adapter.increments) for adapter in (inside, other)]
    assert shares == [None, None]
    for path, increment in inside.increments.items():
        weight = modules[path].weight
        weight.data = (weight.float() + increment.delta_for(weight.float())).to(dtype)
    share = share_in_weights(modules, inside.increments)
    assert share == pytest.approx(1, abs=0.2)
    assert share_in_weights(modules, other.increments) is None
    if dtype == torch.float32:
        with pytest.warns(UserWarning, match="seem to contain snoopy already"):
            attach(pipe, [inside], gate="always").detach()
        with attach(pipe, [other], gate="always") as erasers:
            pipe("a dog", num_inference_steps=1, output_type="latent")
            with pytest.warns(UserWarning, match="seem to contain snoopy already"):
                erasers.add(inside)


def test_baking_twice_is_said_where_the_record_was_lost(tmp_path: Path) -> None:
    pipe = pico_pipeline(channels=(32, 64))
    inside = pico_eraser(pipe.unet, "snoopy", seed=1)
    with attach(pipe, [inside], gate="always"), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # an attached pipeline is baked with its own weights
        pipe("a dog", num_inference_steps=1, output_type="latent")
        spm_hub.bake(inside, tmp_path / "once", pipe=pipe)
    again = type(pipe).from_pretrained(tmp_path / "once", safety_checker=None)
    with pytest.raises(UsageError, match="holds snoopy already"):
        spm_hub.bake(inside, tmp_path / "twice", pipe=again)
    pipe.unet.load_state_dict(again.unet.state_dict())
    with pytest.warns(UserWarning, match="seem to contain snoopy already"):
        spm_hub.bake(inside, tmp_path / "twice", pipe=pipe)


def test_the_shipped_erasers_are_not_taken_for_baked_ones() -> None:
    pipe = spm_hub.load_pipeline("sketchbook")
    erasers = [spm_hub.load(slug(name)) for name in ("snoopy", "nudity", "van gogh")]
    modules = changeable(pipe.unet)
    for adapter in erasers:
        assert share_in_weights(modules, adapter.increments) is None
    shares = []
    for _ in range(2):
        for path, increment in erasers[0].increments.items():
            weight = modules[path].weight.data
            weight += increment.delta_for(weight)
        shares.append(share_in_weights(modules, erasers[0].increments) or 0.0)
    # What the plain weights have of it by chance is in both; the second time adds the change once more.
    assert shares[0] == pytest.approx(1, abs=0.15)
    assert shares[1] - shares[0] == pytest.approx(1, abs=0.02)
    assert share_in_weights(modules, erasers[1].increments) is None
