"""Erasers together with LoRAs, fusing, offloading, and pipelines that share their parts."""

from functools import cache

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from diffusers import (
    ControlNetModel,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPAGPipeline,
)
from peft import LoraConfig, get_peft_model_state_dict
from pico import pico_eraser, pico_pipeline, target_modules

from spm_hub.attachment.attachment import attach
from spm_hub.errors import UsageError

pytestmark = pytest.mark.slow


@pytest.fixture
def pipe():
    return pico_pipeline()


def erasers_for(pipe, **options):
    return [pico_eraser(pipe.unet, name, seed=seed, **options) for seed, name in ((1, "snoopy"), (2, "mickey"))]


def draw(pipe, prompt="snoopy", **options):
    count = (len(prompt) if isinstance(prompt, list) else 1) * options.get("num_images_per_prompt", 1)
    generators = [torch.Generator().manual_seed(seed) for seed in range(count)]
    pipe.set_progress_bar_config(disable=True)
    return pipe(prompt, generator=generators, num_inference_steps=2, output_type="latent", **options).images


def agrees(picture, expected):
    """Compare up to the order of float32 sums, which two steps of a random UNet magnify."""
    return (picture - expected).abs().max() <= 1e-4


# --- LoRAs ---


def a_lora(seed):
    twin = pico_pipeline()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v", "proj_in"], init_lora_weights=False)
        twin.unet.add_adapter(config, "drawn")
    state = get_peft_model_state_dict(twin.unet, adapter_name="drawn")
    return {f"unet.{key}": 3 * tensor for key, tensor in state.items()}


LORAS = {"one": a_lora(1), "two": a_lora(2)}


def load(pipe, *names):
    for name in names:
        pipe.load_lora_weights(dict(LORAS[name]), adapter_name=name)
    return pipe


def by_hand(*names):
    """Draw "snoopy" on a base that has these LoRAs in its weights, and then both erasers."""
    twin = load(pico_pipeline(), *names)
    if names:
        twin.set_adapters(list(names))
        twin.fuse_lora()
        twin.unload_lora_weights()
    with attach(twin, erasers_for(twin)):
        return draw(twin)


@pytest.mark.parametrize("mode", ["fold", "branch"])
def test_loras_come_and_go_while_erasers_are_attached(pipe, mode):
    bare, adapters = draw(pipe), erasers_for(pipe)
    load(pipe, "one")
    with attach(pipe, adapters, mode=mode):
        assert agrees(draw(pipe), by_hand("one"))
        load(pipe, "two").set_adapters(["one", "two"])
        assert agrees(draw(pipe), by_hand("one", "two"))
        pipe.delete_adapters("one")
        assert agrees(draw(pipe), by_hand("two"))
        pipe.unload_lora_weights()
        assert agrees(draw(pipe), by_hand())
        load(pipe, "one")
    assert agrees(draw(pipe), draw(load(pico_pipeline(), "one")))
    pipe.unload_lora_weights()
    assert torch.equal(draw(pipe), bare)


@pytest.mark.parametrize("mode", ["fold", "branch"])
def test_fusing_and_unfusing_change_the_checkpoints_own_weights(pipe, mode):
    adapters = erasers_for(pipe)
    twin = load(pico_pipeline(), "one")
    twin.fuse_lora()
    with attach(load(pipe, "one"), adapters, mode=mode) as erasers:
        draw(pipe)
        pipe.fuse_lora()
        assert agrees(draw(pipe), by_hand("one"))
        erasers.detach()
        assert torch.equal(draw(pipe), draw(twin))
    with attach(pipe, adapters, mode=mode):
        draw(pipe)
        for each in (pipe, twin):
            each.unfuse_lora()
            each.disable_lora()
        assert agrees(draw(pipe), by_hand())
    assert torch.equal(draw(pipe), draw(twin))


def test_fused_projections_are_refused(pipe):
    adapters = erasers_for(pipe)
    with attach(pipe, adapters):
        with pytest.raises(UsageError, match="fused query, key and value"):
            pipe.fuse_qkv_projections()
        erased = draw(pipe)
    pipe.fuse_qkv_projections()
    with pytest.raises(UsageError, match="fused query, key and value") as refused:
        attach(pipe, adapters)
    assert "unfuse_qkv_projections" in refused.value.mend
    assert not [key for key in (*vars(pipe), *vars(pipe.unet)) if "spm_hub" in key]
    pipe.unfuse_qkv_projections()
    with attach(pipe, adapters):
        assert torch.equal(draw(pipe), erased)


# --- pipelines that share their parts ---


def parts(pipe):
    return {**pipe.components, "requires_safety_checker": False}


def picture(seed):
    return torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def image_to_image(pipe):
    return StableDiffusionImg2ImgPipeline(**parts(pipe)), {"image": picture(1), "strength": 1.0}


def inpainting(pipe):
    mask = (picture(2)[:, :1] > 0.5).float()
    return StableDiffusionInpaintPipeline(**parts(pipe)), {
        "image": picture(1), "mask_image": mask, "height": 16, "width": 16, "strength": 1.0
    }  # fmt: skip


def controlled(pipe, **options):
    control = ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(8, 16))
    for block in control.controlnet_down_blocks:
        torch.nn.init.normal_(block.weight, std=0.1, generator=torch.Generator().manual_seed(3))
    return StableDiffusionControlNetPipeline(**parts(pipe), controlnet=control), {"image": picture(1), **options}


def perturbed(pipe):
    """A third of the rows goes past the attention: some layers see two thirds of the batch, others the last one."""
    return StableDiffusionPAGPipeline(**parts(pipe), pag_applied_layers=["mid", "up"]), {"pag_scale": 2.0}


def test_rows_keep_their_own_gammas_where_layers_receive_a_part_of_the_batch(pipe):
    adapters, (other, options) = erasers_for(pipe), perturbed(pipe)
    prompts = ["a dog", "snoopy", "a church"]
    with attach(other, adapters):
        together = draw(other, prompts, **options)
        noise = [torch.Generator().manual_seed(seed) for seed in range(3)]
        options |= {"num_inference_steps": 2, "output_type": "latent"}
        for row, prompt in enumerate(prompts):
            assert agrees(together[row], other(prompt, generator=noise[row], **options).images[0])


def test_the_unconditional_one_of_three_blocks_of_rows_is_recognised_by_its_states(pipe):
    """Perturbed attention guidance: the negative prompts' rows, the prompts', and the prompts' again."""
    path = "down_blocks.0.attentions.0.proj_in"
    seen = []
    module = pipe.unet.get_submodule(path)
    module.register_forward_hook(lambda layer, args, output: seen.append((args[0], output)))
    weight, bias = module.weight.clone(), module.bias
    other = StableDiffusionPAGPipeline(**parts(pipe), pag_applied_layers=["mid"])
    with attach(other, [pico_eraser(pipe.unet, paths=[path])], rows="conditional"):
        draw(other, ["snoopy", "a dog"], pag_scale=2.0)
    x, output = seen[0]
    assert len(x) == 6
    moved = (output - torch.nn.functional.conv2d(x, weight, bias)).flatten(1).abs().amax(dim=1)
    assert moved[:2].max() <= 1e-5 < 1e-3 < moved[2:].min()


def controlled_by_guess(pipe):
    return controlled(pipe, guess_mode=True)


@pytest.mark.parametrize("kind", [image_to_image, inpainting, controlled, controlled_by_guess])
def test_pipelines_that_start_from_a_picture(pipe, kind):
    adapters = erasers_for(pipe)
    other, options = kind(pipe)
    many = {**options, "image": options["image"].expand(2, -1, -1, -1)}
    if "mask_image" in many:
        many["mask_image"] = many["mask_image"].expand(2, -1, -1, -1)
    bare = draw(other, **options)
    with attach(other, adapters, mode="fold") as erasers:
        alone = draw(other, **options)
        gates = erasers.gates("snoopy")
    assert not agrees(alone, bare)
    with attach(other, adapters):
        both = draw(other, ["snoopy", "a dog"], **many)
        repeated = draw(other, ["snoopy", "a dog"], num_images_per_prompt=2, **many)
    assert agrees(both[:1], alone)
    assert agrees(repeated[:1], alone)
    # The gammas of the words, given as strengths.
    with attach(other, adapters, gate="always", strength=gates):
        assert agrees(draw(other, **options), alone)
    assert torch.equal(draw(other, **options), bare)


@pytest.mark.parametrize("prompt", ["snoopy", ["snoopy", "a dog"]])
def test_reading_or_loading_a_part_of_the_denoiser_uses_the_checkpoints_own_weights(pipe, prompt):
    twin, other, adapters = pico_pipeline(), pico_pipeline(seed=4), erasers_for(pipe)
    with attach(pipe, adapters):
        erased = draw(pipe, prompt)
        control = ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(8, 16))
        for part in ("down_blocks", "mid_block"):
            read, own = (getattr(unet, part).state_dict() for unet in (control, twin.unet))
            assert all(torch.equal(tensor, read[key]) for key, tensor in own.items())
        assert torch.equal(draw(pipe, prompt), erased)
        for each in (pipe, twin):
            each.unet.mid_block.load_state_dict(other.unet.mid_block.state_dict())
        with attach(twin, adapters):
            assert torch.equal(draw(pipe, prompt), draw(twin, prompt))
    assert torch.equal(draw(pipe, prompt), draw(twin, prompt))
    hooks = ("_state_dict_pre_hooks", "_load_state_dict_pre_hooks")
    assert not any(vars(module)[name] for module in pipe.unet.modules() for name in hooks)


@pytest.mark.parametrize(("gate", "there"), [("transport", "always"), (0.25, 0.25)])
def test_a_pipeline_made_from_an_attached_one_shares_its_denoiser_fully_erased(pipe, gate, there):
    """A gate that needs the prompt counts as gamma 1 there; a constant one holds."""
    adapters = erasers_for(pipe)
    other, options = image_to_image(pipe)
    bare = draw(other, **options)
    with attach(other, adapters, gate=there):
        erased = draw(other, **options)
    with attach(pipe, adapters, gate=gate):
        drawn = draw(pipe)
        made = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
        assert made.unet is pipe.unet
        # The prompts of this pipeline are unknown: an eraser is never silently off.
        assert torch.equal(draw(made, **options), erased)
        assert torch.equal(draw(pipe), drawn)
        with pytest.raises(UsageError, match="another pipeline that shares this denoiser already has erasers attached"):
            attach(made, adapters)
    assert torch.equal(draw(made, **options), bare)


# --- prompts ---


def test_embeddings_of_known_words_draw_the_picture_of_the_words(pipe):
    prompts = ["snoopy", "a dog"]
    embeds, negative = pipe.encode_prompt(prompts, "cpu", 1, True)
    with attach(pipe, erasers_for(pipe), gate="always", strength=0.5, rows="conditional"):
        by_words = draw(pipe, prompts)
        assert torch.equal(draw(pipe, prompts, negative_prompt_embeds=negative), by_words)
        generators = [torch.Generator().manual_seed(seed) for seed in (0, 0, 1, 1)]
        twice = pipe(
            prompt_embeds=embeds,
            negative_prompt_embeds=negative,
            num_images_per_prompt=2,
            generator=generators,
            num_inference_steps=2,
            output_type="latent",
        ).images
    assert agrees(twice[::2], by_words)


def test_guidance_that_ends_in_the_middle_of_a_picture(pipe):
    def end_guidance(pipeline, step, _, tensors):
        if step == 0:
            pipeline._guidance_scale = 0.0
            tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[1]
        return tensors

    options = {"callback_on_step_end": end_guidance, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    with attach(pipe, erasers_for(pipe), rows="conditional"):
        both = draw(pipe, ["snoopy", "a dog"], **options)
        assert agrees(both[:1], draw(pipe, "snoopy", **options))


def test_a_picture_within_a_picture(pipe):
    with attach(pipe, erasers_for(pipe)) as erasers:
        expected = draw(pipe)
        within = lambda pipeline, *_: draw(pipeline, "a dog") is None or {}  # noqa: E731
        assert torch.equal(draw(pipe, callback_on_step_end=within), expected)
        # A change by the thread that draws acts at once.
        detaching = lambda *_: erasers.detach() or {}  # noqa: E731
        draw(pipe, callback_on_step_end=detaching)
    assert not [key for key in (*vars(pipe), *vars(pipe.unet)) if "spm_hub" in key]
    assert torch.equal(draw(pipe), draw(pico_pipeline()))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_rows_of_a_batch_differ_from_single_calls_by_rounding_alone(pipe, dtype, bound):
    """The rounding of float64 is 2^-29 of float32's, and so is the difference: rows are independent."""
    prompts = ["snoopy", "a photo of a dog", "mickey by van gogh", "a church"]
    pipe.to(dtype)

    def noise(seeds):
        return torch.stack([torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in seeds])

    def apart():
        rows = range(len(prompts))
        # Guided rows too, but a random network's rounding is not blown up as by the pipeline's own 7.5.
        given = {"num_inference_steps": 2, "output_type": "latent", "guidance_scale": 2.0}
        together = pipe(prompts, latents=noise(rows).to(dtype), **given).images
        singles = (pipe(prompts[row], latents=noise([row]).to(dtype), **given).images[0] for row in rows)
        return max(float((row - one).abs().max()) for row, one in zip(together, singles, strict=True))

    assert apart() <= bound
    with attach(pipe, erasers_for(pipe)):
        assert apart() <= bound


# --- offloading ---


def one_by_one(pipe, _):
    cpu_offload(pipe.unet, torch.device("cpu"), offload_buffers=True)


def in_groups(pipe, _):
    cpu = torch.device("cpu")
    pipe.unet.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")


def in_groups_on_disk(pipe, folder):
    pipe.unet.enable_group_offload(
        onload_device=torch.device("cpu"),
        offload_device=torch.device("cpu"),
        offload_type="block_level",
        num_blocks_per_group=1,
        offload_to_disk_path=str(folder),
    )


def onto_disk(pipe, folder):
    disk_offload(pipe.unet, str(folder), torch.device("cpu"), offload_buffers=True)


def whole_models(pipe, _):
    pipe.enable_model_cpu_offload(device="cpu")


PROMPTS = ["snoopy", "a dog"]


@cache
def in_memory(kind):
    """What nothing is offloaded draws: bare, erased alone, erased beside another prompt."""
    twin = pico_pipeline()
    bare = draw(twin)
    with attach(twin, erasers_for(twin, kind=kind)):
        return bare, draw(twin), draw(twin, PROMPTS)


@pytest.mark.parametrize("kind", ["low_rank", "dense", "mask"])
@pytest.mark.parametrize("offload", [one_by_one, onto_disk, in_groups, in_groups_on_disk, whole_models])
@pytest.mark.parametrize("when", ["before", "while folded", "while branched"])
def test_offloaded_weights_are_erased_and_come_back(pipe, offload, when, kind, tmp_path):
    bare, alone, both = in_memory(kind)
    if when == "before":
        offload(pipe, tmp_path)
    with attach(pipe, erasers_for(pico_pipeline(), kind=kind)):
        if when != "before":
            draw(pipe, "snoopy" if when == "while folded" else PROMPTS)
            offload(pipe, tmp_path)
        assert agrees(draw(pipe), alone)
        assert agrees(draw(pipe, PROMPTS), both)
        assert agrees(draw(pipe), alone)
    assert torch.equal(draw(pipe), bare)
    assert {type(module) for module in target_modules(pipe.unet).values()} == {torch.nn.Linear, torch.nn.Conv2d}


def test_folding_offloaded_weights_is_refused(pipe):
    in_groups(pipe, None)
    with pytest.raises(UsageError, match="group offloading"):
        attach(pipe, erasers_for(pipe), mode="fold")
    one_by_one(other := pico_pipeline(), None)
    with pytest.raises(UsageError, match="not in memory"):
        attach(other, erasers_for(pipe), mode="fold")


def test_a_second_denoiser_causes_a_warning(pipe):
    pipe.unet_2 = pico_pipeline().unet
    with pytest.warns(UserWarning, match="second denoiser of StableDiffusionPipeline \\(unet_2\\) is not changed"):
        attach(pipe, erasers_for(pipe)).detach()
