"""Every family: its erasers' targets on the exact architecture, and pictures of a small pipeline."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    QwenImageTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from diffusers.utils import logging
from pico_families import FAMILY_PIPELINES, family_pipeline
from topologies import Bare, predict, random_eraser, topology
from torch import nn

import spm_hub
from spm_hub.adapters.adapter import Adapter, increment_info
from spm_hub.adapters.increments import LowRank
from spm_hub.adapters.manifest import Base, Concept, GateDefaults, Manifest, slug
from spm_hub.models.aliases import ALIASES
from spm_hub.models.architectures import FAMILIES, attention_blocks, denoiser_of, family_of, matrices, targets

SDXL: dict[str, Any] = {
    "sample_size": 128, "block_out_channels": (320, 640, 1280), "cross_attention_dim": 2048,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10), "attention_head_dim": (5, 10, 20), "use_linear_projection": True,
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
SD35_MEDIUM: dict[str, Any] = {
    "sample_size": 128, "num_layers": 24, "attention_head_dim": 64, "num_attention_heads": 24, "qk_norm": "rms_norm",
    "joint_attention_dim": 4096, "caption_projection_dim": 1536, "pooled_projection_dim": 2048, "out_channels": 16,
    "pos_embed_max_size": 384, "dual_attention_layers": tuple(range(13)),
}  # fmt: skip
# class, configuration, family, number of targets, parameters of a rank-1 eraser. The U-Nets' are SPM's official ones.
# SD3.5: 24 blocks of 12, the last without to_add_out and ff_context, 13 with a second attention of 4; FLUX: 19 x 12
# and 38 x 5. A rank-1 pair has inputs + outputs parameters.
EXACT: dict[str, tuple[type[nn.Module], dict[str, Any], str, int, int]] = {
    "SD 1.5": (UNet2DConditionModel, {"cross_attention_dim": 768}, "sd1", 192, 423_936),
    "SD 2.1": (
        UNet2DConditionModel, {"cross_attention_dim": 1024, "use_linear_projection": True}, "sd2", 192, 432_128,
    ),
    "SDXL": (UNet2DConditionModel, SDXL, "sdxl", 722, 2_659_840),
    "SD 3.5 medium": (
        SD3Transformer2DModel, SD35_MEDIUM, "sd3", 24 * 12 - 3 + 13 * 4,
        24 * (8 * 3072 + 4 * 7680) - 3072 - 2 * 7680 + 13 * 4 * 3072,
    ),
    "FLUX.1 dev": (
        FluxTransformer2DModel, {"guidance_embeds": True}, "flux", 19 * 12 + 38 * 5,
        19 * (8 * 6144 + 4 * 15360) + 38 * (3 * 6144 + 15360 + 18432),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", EXACT)
def test_targets_of_the_exact_architecture(name: str) -> None:
    make, config, family, count, parameters = EXACT[name]
    with torch.device("meta"):
        denoiser = make(**config)
    found = targets(denoiser)
    assert family_of(denoiser).name == family
    assert len(found) == count
    assert sum(len(module.weight) + module.weight[0].numel() for module in found.values()) == parameters
    assert not any("norm" in path or "embed" in path or "time" in path for path in found)


@pytest.mark.parametrize(
    ("make", "lists", "left"),
    [
        (QwenImageTransformer2DModel, ["transformer_blocks"], {"img_mod.1", "txt_mod.1"}),
        (Flux2Transformer2DModel, ["single_transformer_blocks", "transformer_blocks"], set()),
        (SanaTransformer2DModel, ["transformer_blocks"], {"ff.conv_depth"}),
    ],
)
def test_targets_of_unknown_denoisers_follow_from_their_structure(
    make: type[nn.Module], lists: list[str], left: set[str]
) -> None:
    with torch.device("meta"):
        denoiser = make(num_layers=2, **({"num_single_layers": 2} if len(lists) > 1 else {}))
    blocks = [f"{name}.{index}" for name in lists for index in range(2)]
    assert family_of(denoiser).name == "generic"
    assert sorted(attention_blocks(denoiser)) == blocks
    inside = {path for path in matrices(denoiser) if path.startswith(tuple(f"{block}." for block in blocks))}
    assert {path.split(".", 2)[2] for path in inside - targets(denoiser).keys()} == left
    assert targets(denoiser).keys() <= inside


def test_the_structure_of_a_known_transformer_gives_the_same_blocks() -> None:
    for make, config in (EXACT["SD 3.5 medium"][:2], EXACT["FLUX.1 dev"][:2]):
        with torch.device("meta"):
            denoiser = make(**config)
        generic = next(family for family in FAMILIES if family.name == "generic")
        assert targets(denoiser, generic).keys() == targets(denoiser).keys()


def test_aliases_name_families_that_are_known_and_commits() -> None:
    wanted = {"sd-v1-4", "sd-v1-5", "dreamshaper-8", "realistic-vision", "chilloutmix", "sd-2-1", "sdxl"}
    assert wanted | {"sd3.5-medium", "flux-dev", "flux-schnell"} <= ALIASES.keys()
    assert {alias.family for alias in ALIASES.values()} <= {family.name for family in FAMILIES}
    revisions = [alias.revision for alias in ALIASES.values() if alias.revision is not None]
    assert all(len(revision) == 40 and int(revision, 16) for revision in revisions)


def eraser(pipe: DiffusionPipeline, target: str, seed: int, size: float = 0.3, rank: int = 1) -> Adapter:
    """A random eraser on every target, in relation to the widths so that every family changes alike.

    Its gate is transport, which acts on every prompt.
    """
    generator = torch.Generator().manual_seed(seed)
    increments = {}
    for path, module in targets(denoiser_of(pipe)).items():
        out, width, *kernel = module.weight.shape
        down = torch.randn(rank, width, *kernel, generator=generator) / width**0.5
        increments[path] = LowRank(down, size * torch.randn(out, rank, *[1] * len(kernel), generator=generator))
    manifest = Manifest(
        name=slug(target),
        concept=Concept(target=target),
        increment=increment_info(increments),
        base=Base(family=family_of(pipe).name, id="pico", fingerprint="0" * 64),
        recipe={},
        gate=GateDefaults(kind="transport"),
    )
    return Adapter(manifest, increments)


def draw(pipe: Any, prompts: list[str], **options: Any) -> torch.Tensor:
    """Latents of 2 steps, the same noise for every prompt."""
    given: dict[str, Any] = {
        "prompt": prompts,
        "height": 16,
        "width": 16,
        "num_inference_steps": 2,
        "output_type": "latent",
    }
    given["guidance_scale"] = 2.0  # guided rows, without blowing rounding up as a random network's 7.5 would
    given["generator"] = [torch.Generator().manual_seed(7) for _ in prompts]
    known = inspect.signature(type(pipe).__call__).parameters
    own = {"max_sequence_length": 16, "use_resolution_binning": False, "clean_caption": False}
    given |= {name: value for name, value in own.items() if name in known}
    latents: torch.Tensor = pipe(**(given | options)).images
    return latents


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """The greatest difference, for latents of order one; a random network's may be of order hundreds."""
    return float((one - other).abs().max() / other.abs().max().clamp_min(1))


@pytest.fixture(scope="module", params=list(FAMILY_PIPELINES))
def pipe(request: pytest.FixtureRequest) -> Iterator[DiffusionPipeline]:
    logging.set_verbosity_error()
    yield family_pipeline(request.param)
    logging.set_verbosity_warning()


def weights(pipe: DiffusionPipeline) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in denoiser_of(pipe).state_dict().items()}


@pytest.mark.slow
def test_attach_gate_per_prompt_and_detach(pipe: DiffusionPipeline, request: pytest.FixtureRequest) -> None:
    before, bare = weights(pipe), draw(pipe, ["a dog"])
    kinds = {path: type(module) for path, module in denoiser_of(pipe).named_modules()}
    erasers = spm_hub.attach(pipe, [eraser(pipe, "snoopy", 1), eraser(pipe, "van gogh", 2)])
    request.addfinalizer(erasers.detach)  # the pipeline is shared with the next tests, whatever fails in this one
    assert erasers.gates("snoopy")["snoopy"] == pytest.approx(1, abs=1e-6)
    assert erasers.gates("a dog")["snoopy"] < 1
    prompts = ["snoopy", "a painting by van gogh", "a dog on the beach"]
    single = [draw(pipe, [prompt]) for prompt in prompts]
    mixed = draw(pipe, prompts)
    assert apart(mixed, torch.cat(single)) <= 1e-5
    assert not torch.allclose(draw(pipe, ["a dog"]), bare, atol=1e-3)
    erasers.recover("snoopy")
    only = draw(pipe, ["snoopy"])
    erasers.detach()
    with spm_hub.attach(pipe, [eraser(pipe, "van gogh", 2)]):
        assert torch.equal(draw(pipe, ["snoopy"]), only)
    assert torch.equal(draw(pipe, ["a dog"]), bare)
    after = denoiser_of(pipe).state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert kinds == {path: type(module) for path, module in denoiser_of(pipe).named_modules()}


def test_two_pictures_a_prompt_are_two_single_ones(pipe: DiffusionPipeline) -> None:
    with spm_hub.attach(pipe, [eraser(pipe, "snoopy", 1)]):
        noise = [torch.Generator().manual_seed(seed) for seed in (7, 7, 7, 7)]
        mixed = draw(pipe, ["snoopy", "a dog"], num_images_per_prompt=2, generator=noise)
        single = [draw(pipe, [prompt]) for prompt in ("snoopy", "a dog")]
    for row, expected in zip(mixed, (single[0], single[0], single[1], single[1]), strict=True):
        assert apart(row, expected[0]) <= 1e-5


@pytest.mark.parametrize("name", ["sd2", "sdxl", "sd3", "flux-dev"])
def test_a_file_loads_in_plain_diffusers_and_does_the_same(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pipe: Any = family_pipeline(name)
    adapter = eraser(pipe, "snoopy", 1, rank=2)
    adapter.save(tmp_path / "pytorch_lora_weights.safetensors")
    with spm_hub.attach(pipe, [spm_hub.load(str(tmp_path / "pytorch_lora_weights.safetensors"))], gate="always"):
        ours = draw(pipe, ["a dog", "snoopy"])
    bare = draw(pipe, ["a dog", "snoopy"])
    logging.set_verbosity_warning()
    logging.enable_propagation()
    caplog.clear()
    with caplog.at_level("WARNING"), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        pipe.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    logging.disable_propagation()
    # The message for every file without text-encoder parts; unknown keys have another message.
    assert not [record for record in caplog.messages if not record.startswith("No LoRA keys associated to CLIPText")]
    theirs = draw(pipe, ["a dog", "snoopy"])
    assert apart(ours, theirs) <= 1e-5
    assert apart(ours, bare) > 1e-2


@pytest.mark.parametrize("mode", ["fold", "branch"])
def test_a_constant_gate_holds_for_a_transformer_called_by_hand(mode: Any) -> None:
    transformer, twin = topology("flux"), topology("flux")
    adapter, bare = random_eraser(transformer), predict(transformer)
    for path, increment in adapter.increments.items():
        weight = twin.get_submodule(path).weight
        product = increment.up.double().flatten(1) @ increment.down.double().flatten(1)
        weight.data = (weight.double() + 0.4 * 0.5 * product.reshape(weight.shape)).float()
    with spm_hub.attach(Bare(transformer), [adapter], gate=0.4, strength=0.5, mode=mode):
        drawn = predict(transformer)
    moved = (predict(twin) - bare).abs().max()
    assert (drawn - predict(twin)).abs().max() <= 1e-4 * moved
    assert torch.equal(predict(transformer), bare)
    pristine = topology("flux").state_dict()
    assert all(torch.equal(tensor, pristine[key]) for key, tensor in transformer.state_dict().items())
