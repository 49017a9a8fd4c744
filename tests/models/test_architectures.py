"""What a pipeline is made of, and what fits it."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from pico import pico_eraser, pico_pipeline, pico_unet, target_modules
from torch import nn

from spm_hub.adapters.adapter import Adapter
from spm_hub.adapters.compatibility import check, resolve_modules
from spm_hub.adapters.formats.module_names import flat
from spm_hub.errors import CompatibilityError
from spm_hub.models import architectures
from spm_hub.models.architectures import Family, denoiser_of, family_of, fingerprint, fingerprint_of, targets

CONFORMANCE = Path(__file__).resolve().parents[3] / "shared" / "conformance"


@pytest.fixture(scope="module")
def pipe():
    return pico_pipeline()


def test_a_pipeline_has_its_unet_and_family(pipe):
    assert denoiser_of(pipe) is pipe.unet
    assert family_of(pipe).name == family_of(pipe.unet).name == "sd1"


def test_a_pipeline_without_a_denoiser_is_refused():
    with pytest.raises(CompatibilityError, match="object has no denoiser"):
        denoiser_of(object())


def test_a_denoiser_that_is_not_of_diffusers_is_refused():
    with pytest.raises(CompatibilityError, match=r"Linear .*no known family \(known: sd1, sd2, .*generic\)"):
        family_of(nn.Linear(2, 2))


def test_targets_are_the_attention_blocks_linears_and_convolutions(pipe):
    found = targets(pipe.unet)
    assert found == target_modules(pipe.unet)
    assert {type(module) for module in found.values()} == {nn.Linear, nn.Conv2d}
    assert not any("resnets" in path or "sampler" in path or path.startswith("conv") for path in found)


@pytest.mark.skipif(not CONFORMANCE.is_dir(), reason="no conformance files beside this checkout")
def test_the_targets_of_sd14_are_those_of_an_official_file():
    keys = json.loads((CONFORMANCE / "spm_sd14_keys.json").read_text())
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768)
    found = targets(unet)
    assert len(found) == 192
    expected = {}
    for path, module in found.items():
        out, width, *kernel = module.weight.shape
        expected[f"lora_unet_{flat(path)}.lora_down.weight"] = [1, width, *kernel]
        expected[f"lora_unet_{flat(path)}.lora_up.weight"] = [out, 1, *[1] * len(kernel)]
    assert expected == {key: shape for key, shape in keys.items() if not key.endswith(".alpha")}
    assert sum(torch.Size(shape).numel() for shape in expected.values()) == 423_936


def test_the_fingerprint_is_that_of_the_sorted_shapes(pipe):
    shapes = {"b.conv": (4, 3, 1, 1), "a": (2, 3)}
    assert fingerprint(shapes) == hashlib.sha256(b"a:2,3\nb.conv:4,3,1,1\n").hexdigest()
    assert fingerprint_of(pipe.unet) == fingerprint_of(pico_pipeline(seed=5).unet)
    assert fingerprint_of(pipe.unet) != fingerprint_of(pico_unet(channels=(16, 48)))


def test_one_more_family_is_one_more_entry(monkeypatch):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = nn.Linear(3, 4)

    class ToyTransformer(nn.Module):
        def __init__(self):
            super().__init__()
            self.config = {"toy": True}
            self.block, self.out = Block(), nn.Linear(4, 4)

    class ToyPipeline:
        transformer = ToyTransformer()

    toy = Family("toy", "transformer", ("ToyTransformer",), ("Block",), lambda config: config["toy"])
    monkeypatch.setattr(architectures, "FAMILIES", (*architectures.FAMILIES, toy))
    assert family_of(ToyPipeline()) is toy
    assert list(targets(denoiser_of(ToyPipeline()))) == ["block.proj"]


def flattened(adapter):
    increments = {flat(path): increment for path, increment in adapter.increments.items()}
    info = adapter.manifest.increment.model_copy(update={"modules": tuple(sorted(increments))})
    return Adapter(adapter.manifest.model_copy(update={"increment": info}), increments)


def test_flat_and_dotted_names_find_the_same_modules(pipe):
    adapter = pico_eraser(pipe.unet)
    check(adapter, pipe)
    found = resolve_modules(flattened(adapter), pipe.unet)
    assert {path: module for path, (module, _) in found.items()} == target_modules(pipe.unet)
    dotted = resolve_modules(adapter, pipe.unet)
    assert {path: module for path, (module, _) in found.items()} == {
        path: module for path, (module, _) in dotted.items()
    }
    assert {path: name for path, (_, name) in found.items()} == {path: flat(path) for path in dotted}


def test_another_width_names_the_first_module_and_both_shapes(pipe):
    adapter = replace(pico_eraser(pico_unet(channels=(16, 48))), source="wide.safetensors")
    with pytest.raises(CompatibilityError) as caught:
        check(adapter, pipe)
    first = next(p for p, i in adapter.increments.items() if i.weight_shape != pipe.unet.get_submodule(p).weight.shape)
    theirs = tuple(pipe.unet.get_submodule(first).weight.shape)
    for part in (first, str(adapter.increments[first].weight_shape), str(theirs), "wide.safetensors", "sd1"):
        assert part in str(caught.value)


def test_a_module_that_is_not_there_names_its_nearest(pipe):
    path = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    adapter = pico_eraser(pipe.unet, paths=[path])
    renamed = {path.replace("to_q", "to_p"): adapter.increments[path]}
    info = adapter.manifest.increment.model_copy(update={"modules": tuple(renamed)})
    with pytest.raises(CompatibilityError) as caught:
        check(Adapter(adapter.manifest.model_copy(update={"increment": info}), renamed), pipe)
    assert "to_p" in str(caught.value)
    assert f"nearest: {path[:-1]}" in str(caught.value)


def test_peft_layers_keep_their_base_modules_paths():
    from peft import LoraConfig

    bare, unet = pico_unet(), pico_unet()
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k"]))
    assert targets(unet).keys() == targets(bare).keys()
    assert all(type(module) in (nn.Linear, nn.Conv2d) for module in targets(unet).values())


def test_what_an_ip_adapter_brings_along_is_no_target():
    unet = pico_unet()
    before = fingerprint_of(unet)
    for path, module in list(unet.named_modules()):
        if path.endswith("attn2"):
            module.set_processor(IPAdapterAttnProcessor2_0(module.inner_dim, module.cross_attention_dim))
    assert any(path.endswith("to_k_ip.0") for path, _ in unet.named_modules())
    assert targets(unet).keys() == target_modules(pico_unet()).keys()
    assert fingerprint_of(unet) == before
