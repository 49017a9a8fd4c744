"""torch.compile: other factors need no other graph, and a graph made without erasers is never used with them."""

import logging

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from pico import TEXT_WIDTH, pico_eraser, pico_pipeline, target_modules
from torch._dynamo.utils import counters

from spm_hub.attachment.attachment import attach
from spm_hub.models.architectures import body_of

pytestmark = pytest.mark.slow

PROMPTS = ("a dog", "snoopy", "mickey mouse", "a cat on the beach", "van gogh", "snoopy by picasso")


@pytest.fixture(autouse=True)
def nothing_compiled_yet(monkeypatch):
    # Pytest would keep tens of thousands of its records for every graph.
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "disabled", True)
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def tiny():
    """One attention block going down, one going up: what is compiled here takes a second or two."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8,),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",),
        mid_block_type=None,
        up_block_types=("CrossAttnUpBlock2D",),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    return pico_pipeline(unet=unet)


@pytest.fixture
def pipe():
    return tiny()


def compiled(pipe, how, **options):
    options["backend"] = "eager"
    if how == "wrapped":
        pipe.unet = torch.compile(pipe.unet, **options)
    elif how == "in place":
        pipe.unet.compile(**options)
    else:
        pipe.unet.compile_repeated_blocks(**options)


HOW = pytest.mark.parametrize("how", ["wrapped", "in place", "blocks"])


def graphs():
    return counters["stats"]["unique_graphs"]


def draw(pipe, prompt):
    count = len(prompt) if isinstance(prompt, list) else 1
    generators = [torch.Generator().manual_seed(seed) for seed in range(count)]
    return pipe(prompt, generator=generators, num_inference_steps=2, output_type="latent").images


def erasers_for(pipe, **options):
    unet = body_of(pipe.unet)
    options["paths"] = [path for path in target_modules(unet) if path.endswith(("attn2.to_k", "ff.net.2"))]
    return [pico_eraser(unet, name, seed=seed, **options) for seed, name in ((1, "snoopy"), (2, "mickey"))]


def agrees(pipe, twin, prompt):
    return (draw(pipe, prompt) - draw(twin, prompt)).abs().max() <= 1e-5


@HOW
def test_folding_other_factors_compiles_nothing(pipe, how):
    twin = tiny()
    bare = draw(twin, "a dog")
    compiled(pipe, how)
    assert torch.equal(draw(pipe, "a dog"), bare)
    with attach(pipe, erasers_for(pipe)) as erasers, attach(twin, erasers_for(twin)) as expected:
        assert agrees(pipe, twin, PROMPTS[0])
        before = graphs()
        assert all(agrees(pipe, twin, prompt) for prompt in PROMPTS)
        for each in (erasers, expected):
            each.strength["snoopy"] = 0.3
            each.recover("mickey")
        assert agrees(pipe, twin, PROMPTS[1])
        assert graphs() == before
    assert torch.equal(draw(pipe, "a dog"), bare)
    assert not counters["graph_break"]


def test_attaching_to_what_is_compiled_compiles_nothing(pipe):
    compiled(pipe, "wrapped")
    draw(pipe, "a dog")
    with attach(pipe, erasers_for(pipe)):
        draw(pipe, "snoopy")
    draw(pipe, "a dog")
    assert graphs() == 1


@pytest.mark.parametrize("how", ["wrapped", "blocks"])
def test_compiling_after_attaching(pipe, how):
    twin = tiny()
    with attach(pipe, erasers_for(pipe)) as erasers, attach(twin, erasers_for(twin)):
        original = pipe.unet
        compiled(pipe, how, fullgraph=True)
        assert agrees(pipe, twin, PROMPTS[0])
        before = graphs()
        assert all(agrees(pipe, twin, prompt) for prompt in PROMPTS)
        assert graphs() == before
        erasers.detach()
        assert not [key for key in vars(original) if "spm_hub" in key]
    assert agrees(pipe, twin, "snoopy")


def test_saving_what_is_compiled_saves_the_checkpoint_itself(pipe, tmp_path):
    before = {key: tensor.clone() for key, tensor in pipe.unet.state_dict().items()}
    body = pipe.unet
    compiled(pipe, "wrapped")
    attributes = set(vars(body))
    with attach(pipe, erasers_for(pipe)):
        draw(pipe, "snoopy")
        pipe.save_pretrained(tmp_path)
        assert all(torch.equal(tensor, before[key]) for key, tensor in body.state_dict().items())
    saved = StableDiffusionPipeline.from_pretrained(tmp_path)
    assert all(torch.equal(tensor, before[key]) for key, tensor in saved.unet.state_dict().items())
    assert set(vars(body)) == attributes


@pytest.mark.parametrize(("how", "kind"), [("wrapped", "low_rank"), ("blocks", "low_rank"), ("blocks", "mask")])
def test_a_batch_of_different_prompts_never_meets_a_graph_without_erasers(pipe, how, kind):
    twin = tiny()
    compiled(pipe, how)
    draw(pipe, ["a dog", "a cat"])
    with attach(pipe, erasers_for(pipe, kind=kind)) as erasers, attach(twin, erasers_for(twin, kind=kind)) as expected:
        assert agrees(pipe, twin, ["snoopy", "a dog"])
        before = graphs()
        # Other factors for as many rows and erasers, and back from factors that all rows share.
        assert all(agrees(pipe, twin, [prompt, "a church"]) for prompt in PROMPTS)
        assert graphs() == before
        assert agrees(pipe, twin, ["a dog", "a dog"])
        assert agrees(pipe, twin, ["mickey", "a dog"])
        for each in (erasers, expected):
            each.recover("mickey")
        assert agrees(pipe, twin, ["mickey", "snoopy"])
    assert agrees(pipe, twin, ["a dog", "a cat"])
