"""SPM's released code multiplies both vectors of a layer by gamma: its change of the weights is times gamma squared."""

import json
from dataclasses import replace

import pytest
import torch
from pico import WINDOW, pico_eraser, pico_pipeline, target_modules

import spm_hub
from spm_hub.adapters.adapter import Adapter, load_file
from spm_hub.adapters.increments import LowRank
from spm_hub.adapters.manifest import GateDefaults, Manifest
from spm_hub.attachment.attachment import attach
from spm_hub.errors import UsageError

GAMMA = 0.6


@pytest.fixture
def pipe():
    return pico_pipeline()


def denoise(unet):
    generator = torch.Generator().manual_seed(3)
    noisy = torch.randn(2, 4, 8, 8, generator=generator)
    states = torch.randn(2, WINDOW, unet.config.cross_attention_dim, generator=generator)
    with torch.no_grad():
        return unet(noisy, 10, encoder_hidden_states=states).sample


def with_law(eraser, **gate):
    return Adapter(eraser.manifest.model_copy(update={"gate": GateDefaults(**gate)}), eraser.increments, eraser.source)


def scaled_as_released(eraser, gamma):
    """Multiply every tensor of a file by gamma, as the released `infer_spm.py` does with each file."""
    increments = {path: LowRank(one.down * gamma, one.up * gamma) for path, one in eraser.increments.items()}
    return Adapter(eraser.manifest, increments, eraser.source)


@pytest.mark.parametrize("mode", ["fold", "branch"])
@pytest.mark.parametrize("strength", [1.0, 2.0])
def test_squared_draws_as_the_released_code(pipe, mode, strength):
    eraser = pico_eraser(pipe.unet, "snoopy", seed=1)
    with attach(pipe, [scaled_as_released(eraser, GAMMA * strength)], gate="always", mode=mode):
        released = denoise(pipe.unet)
    with attach(pipe, [with_law(eraser, law="squared")], gate=GAMMA, strength=strength, mode=mode):
        own = denoise(pipe.unet)
    with attach(pipe, [eraser], law="squared", gate=GAMMA, strength=strength, mode=mode):
        asked = denoise(pipe.unet)
    bare = denoise(pipe.unet)
    assert float((own - released).abs().max()) < 1e-4 * float((released - bare).abs().max())
    assert torch.equal(own, asked)


def test_a_user_may_choose_the_other_law(pipe):
    eraser = pico_eraser(pipe.unet, "snoopy", seed=1)
    with attach(pipe, [eraser], gate=GAMMA):
        linear = denoise(pipe.unet)
    with attach(pipe, [with_law(eraser, law="squared")], law="linear", gate=GAMMA):
        assert torch.equal(denoise(pipe.unet), linear)
    with pytest.raises(UsageError, match="law is 'cubic'"):
        attach(pipe, [eraser], law="cubic")


def test_a_baked_eraser_of_doubled_strength_acts_fourfold(pipe, tmp_path):
    eraser = with_law(pico_eraser(pipe.unet, "snoopy", seed=1), law="squared", strength=1.5)
    path = next(iter(target_modules(pipe.unet)))
    before = pipe.unet.get_submodule(path).weight.detach().double().clone()
    spm_hub.bake(pipe=pipe, adapters=[eraser], out=tmp_path / "baked")
    baked = type(pipe.unet).from_pretrained(tmp_path / "baked" / "unet").get_submodule(path).weight.detach().double()
    one = eraser.increments[path]
    change = (one.up.double().flatten(1) @ one.down.double().flatten(1)).reshape(before.shape)
    assert float((baked - before - 2.25 * change).abs().max()) < 1e-5 * float(change.abs().max()) + 1e-7


def test_the_law_is_written_only_where_it_is_squared(pipe):
    manifest = pico_eraser(pipe.unet, "snoopy", seed=1).manifest
    squared = manifest.model_copy(update={"gate": GateDefaults(law="squared")})
    assert "law" not in json.loads(manifest.to_json())["gate"]
    assert "law" not in json.loads(manifest.to_embedded_json())["gate"]
    assert json.loads(squared.to_embedded_json())["gate"]["law"] == "squared"
    assert Manifest.from_json(squared.to_json()) == squared


def test_convert_records_the_law(pipe, tmp_path):
    eraser = pico_eraser(pipe.unet, "snoopy", seed=1)
    done = spm_hub.convert(eraser, keep=True, law="squared", registry=tmp_path)
    assert load_file(done.files[0]).manifest.gate.law == "squared"
    assert replace(done.adapter, source=eraser.source).manifest.gate.law == "squared"
