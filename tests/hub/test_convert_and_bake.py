"""`spm_hub.convert` and `spm_hub.bake`: the commands' work as functions, on references, adapters and pipelines."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from pico import pico_eraser, pico_pipeline
from safetensors.torch import load_file as load_tensors

import spm_hub
from spm_hub.adapters import baking
from spm_hub.adapters.adapter import Adapter
from spm_hub.adapters.increments import Dense, LowRank
from spm_hub.adapters.manifest import Concept, Evaluation
from spm_hub.errors import CompatibilityError, NotFoundError, UsageError
from spm_hub.registry.registry import Registry
from spm_hub.training.verdict import OTHERS_RECOGNISED, QUICK_LOOK


@pytest.fixture
def pipe() -> Any:
    return pico_pipeline()


@pytest.fixture
def kept(pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    """A registry with a low-rank and a dense eraser; the working folder is another, empty one."""
    registry = Registry(tmp_path / "registry")
    registry.add(pico_eraser(pipe.unet, "snoopy", rank=2))
    registry.add(pico_eraser(pipe.unet, "van gogh", kind="dense"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return registry


def names_in(registry: Registry) -> list[str]:
    return [entry.name for entry in registry.entries()]


@pytest.mark.parametrize("function", [spm_hub.convert, spm_hub.bake])
def test_every_parameter_is_named_typed_and_documented(function: Any) -> None:
    parameters = inspect.signature(function).parameters.values()
    assert {one.kind for one in parameters} <= {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY}
    text = inspect.getdoc(function)
    assert text is not None
    for one in parameters:
        assert one.annotation is not inspect.Parameter.empty
        assert f"{one.name}:" in text or f"{one.name}," in text, one.name


def test_out_of_a_registry_and_in_again(kept: Registry) -> None:
    written = spm_hub.convert("snoopy", to="diffusers", registry=kept.root)
    assert (written.read_as, written.written_as, written.relative_error) == ("spm", "diffusers", None)
    assert written.files == (Path("snoopy-diffusers.safetensors"),)
    with pytest.raises(UsageError, match="exists already"):
        spm_hub.convert("snoopy", to="diffusers", registry=kept.root)
    tensors = load_tensors(written.files[0])
    read = spm_hub.convert(written.files[0], name="The Dog", concept="a beagle")
    assert (read.adapter.name, read.adapter.manifest.concept.target) == ("the-dog", "a beagle")
    assert names_in(kept) == ["snoopy", "van-gogh"], "nothing is kept unless it is asked for"
    for path, one in read.adapter.increments.items():
        assert isinstance(one, LowRank)
        assert torch.equal(one.up, tensors[f"unet.{path}.lora_B.weight"])
    again = spm_hub.convert(read.adapter, keep=True, registry=kept.root)
    assert (again.written_as, names_in(kept)) == ("spm", ["snoopy", "the-dog", "van-gogh"])
    assert load_tensors(again.files[0]).keys() == load_tensors(kept.get("snoopy").adapter_path).keys()


def test_a_loaded_pipeline_is_the_base(kept: Registry, pipe: Any) -> None:
    before = {key: tensor.clone() for key, tensor in pipe.unet.state_dict().items()}
    done = spm_hub.convert("van gogh", to="esd", out="esd.safetensors", pipe=pipe, registry=kept.root)
    whole = load_tensors("esd.safetensors")
    eraser = kept.get("van-gogh").load()
    for path, one in eraser.increments.items():
        assert isinstance(one, Dense)
        expected = before[f"{path}.weight"] + one.delta.reshape(before[f"{path}.weight"].shape)
        torch.testing.assert_close(whole[f"{path}.weight"], expected, rtol=1e-6, atol=1e-6)
    with pytest.raises(UsageError, match="difference to the base"):
        spm_hub.convert(done.files[0])
    again = spm_hub.convert(done.files[0], pipe=pipe)
    assert (again.read_as, again.adapter.manifest.base.id) == ("esd", "StableDiffusionPipeline")
    assert again.adapter.increments.keys() == eraser.increments.keys()
    assert all(torch.equal(before[key], tensor) for key, tensor in pipe.unet.state_dict().items())
    with pytest.raises(CompatibilityError):
        spm_hub.convert("snoopy", to="kohya", pipe=pico_pipeline(channels=(8, 16)), registry=kept.root)


def test_an_approximation_states_its_error_and_shows_its_progress(kept: Registry) -> None:
    seen: list[tuple[int, int, Mapping[str, float]]] = []
    done = spm_hub.convert("van gogh", svd_rank=2, registry=kept.root, progress=lambda *figures: seen.append(figures))
    eraser = kept.get("van-gogh").load()
    missed = whole = 0.0
    for path, one in eraser.increments.items():
        assert isinstance(one, Dense)
        near = done.adapter.increments[path]
        assert isinstance(near, LowRank)
        assert near.rank <= 2
        product = (near.up.double().flatten(1) @ near.down.double().flatten(1)).reshape(one.delta.shape)
        bias = 0.0 if one.delta_bias is None else float(one.delta_bias.double().square().sum())
        missed += float((one.delta.double() - product).square().sum()) + bias
        whole += float(one.delta.double().square().sum()) + bias
    assert done.relative_error == pytest.approx((missed / whole) ** 0.5, rel=1e-6)
    assert done.biases_left_out == sum(
        isinstance(one, Dense) and one.delta_bias is not None for one in eraser.increments.values()
    )
    count = len(eraser.increments)
    assert seen == [(step, count, {}) for step in range(1, count + 1)]


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"out": "x.safetensors"}, "there is no format"),
        ({"config": "sd-v1-4"}, "there is none to load"),
        ({"to": "kohia"}, "did you mean kohya"),
        ({"family": "sdxl"}, "manifest says sd1"),
    ],
)
def test_contradicting_arguments_write_nothing(given: dict[str, Any], complaint: str, kept: Registry) -> None:
    with pytest.raises(UsageError, match=complaint):
        spm_hub.convert("snoopy", registry=kept.root, **given)
    assert list(Path().iterdir()) == []
    assert names_in(kept) == ["snoopy", "van-gogh"]


def test_baked_weights_are_the_bases_plus_the_erasers(kept: Registry, pipe: Any) -> None:
    before = {key: tensor.clone() for key, tensor in pipe.unet.state_dict().items()}
    record = spm_hub.bake(
        ["snoopy", kept.get("van-gogh").load()], "safe", pipe=pipe, strength={"snoopy": 0.5}, registry=kept.root
    )
    assert record.base == "StableDiffusionPipeline"
    assert {one.name: one.strength for one in record.erasers} == {"snoopy": 0.5, "van-gogh": 1.0}
    saved = load_tensors("safe/unet/diffusion_pytorch_model.safetensors")
    strengths = {"snoopy": 0.5, "van-gogh": 1.0}
    expected = {key: tensor.double() for key, tensor in before.items()}
    for name, factor in strengths.items():
        for path, one in kept.get(name).load().increments.items():
            expected[f"{path}.weight"] += factor * one.delta_for(before[f"{path}.weight"]).double()
    for key in (key for key in expected if key.endswith(".weight")):
        torch.testing.assert_close(saved[key].double(), expected[key], rtol=1e-5, atol=1e-5)
    assert all(torch.equal(before[key], tensor) for key, tensor in pipe.unet.state_dict().items())
    for name in strengths:
        baking.recover(Path("safe"), name)
    plain = load_tensors("safe/unet/diffusion_pytorch_model.safetensors")
    assert all(torch.equal(plain[key], before[key]) for key in before)


def test_an_eraser_that_undoes_another_is_not_baked_with_it(kept: Registry, pipe: Any) -> None:
    adapter = kept.get("snoopy").load()
    negative = {
        path: LowRank(one.down, -one.up) for path, one in adapter.increments.items() if isinstance(one, LowRank)
    }
    manifest = adapter.manifest.model_copy(update={"name": "hands", "concept": Concept(target="blurry hands")})
    both = [adapter, Adapter(manifest, adapter.with_increments(negative).increments)]
    with pytest.raises(UsageError, match=r"undoes .*nothing was written") as refused:
        spm_hub.bake(both, "safe", pipe=pipe)
    assert "--force" in str(refused.value.mend)
    with pytest.raises(UsageError, match="undoes"):  # to replace a checkpoint is another wish
        spm_hub.bake(both, "safe", pipe=pipe, replace=True)
    assert not Path("safe").exists()
    with pytest.warns(UserWarning, match="undoes"):
        spm_hub.bake(both, "safe", pipe=pipe, force=True)
    assert Path("safe/model_index.json").is_file()


def test_a_base_by_reference_is_loaded_after_all_else_was_checked(
    kept: Registry, pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe.save_pretrained("base")
    record = spm_hub.bake("snoopy", "safe", model="base", registry=kept.root)
    assert record.base == "base"
    monkeypatch.setattr("spm_hub.models.loading.load_pipeline", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(NotFoundError, match="snopy"):
        spm_hub.bake("snopy", "other", model="base", registry=kept.root)
    with pytest.raises(NotFoundError, match="lucy"):
        spm_hub.bake("snoopy", "other", model="base", strength={"lucy": 1.0}, registry=kept.root)
    with pytest.raises(spm_hub.errors.RegistryError, match="exists already"):
        spm_hub.bake("snoopy", "safe", model="base", registry=kept.root)
    with pytest.raises(UsageError, match="pipe is loaded already"):
        spm_hub.bake("snoopy", "other", pipe=pipe, config="base", registry=kept.root)
    assert not Path("other").exists()


@pytest.mark.parametrize(("kept_names", "warned"), [(0.5, True), (0.875, False)])
def test_an_eraser_that_costs_others_without_a_gate_says_so_where_there_is_none(
    kept: Registry, pipe: Any, kept_names: float, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    adapter = kept.get("snoopy").load()
    row = Evaluation(
        protocol=QUICK_LOOK, base="pico", subject="others", metric=OTHERS_RECOGNISED, value=kept_names, samples=8,
        seed=0, gate="always",
    )  # fmt: skip
    manifest = adapter.manifest.model_copy(update={"evaluation": (row,)})
    costly = Adapter(manifest, adapter.increments)
    caplog.set_level("INFO", logger="spm_hub")
    spm_hub.convert(costly, to="spm")
    assert not [one for one in caplog.messages if "gate" in one]
    spm_hub.convert(costly, to="diffusers")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        spm_hub.bake(costly, "safe", pipe=pipe)
    cost = "snoopy costs other things without a gate: fully on, the base recognised 4 of 8 other names (a quick look)"
    assert (f"warning: {cost}; a diffusers file has no gate" in caplog.messages) is warned
    assert any(f"spm_hub: {cost}; a baked checkpoint has no gate" == str(one.message) for one in seen) is warned
