"""Single-file checkpoints: they draw what their folder draws, their header tells the family, and what is refused."""

import hashlib
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import test_cli
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from ldm import single_file
from loopback import NOWHERE, LoopbackHub, adopt_endpoint
from pico import pico_eraser, pico_pipeline, pico_text_encoder, pico_tokenizer
from safetensors.torch import load_file, save_file
from test_cli import PICO_TRAINING, Spmhub
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from spm_hub import train
from spm_hub.errors import ModelError, NetworkError, NotFoundError, UsageError
from spm_hub.models.loading import load_pipeline
from spm_hub.models.references import identity_of, parse_reference
from spm_hub.models.single_file import inspection
from spm_hub.models.single_file.inspection import inspect
from spm_hub.models.single_file.loading import CONFIGURATION
from spm_hub.registry.registry import Registry

UNET = "model.diffusion_model."
registry, spmhub = test_cli.registry, test_cli.spmhub


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base in diffusers' layout."""
    path = tmp_path_factory.mktemp("folder") / "pico"
    pico_pipeline().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def config(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small files of the base alone, as `hf download --include` fetches them."""
    path = tmp_path_factory.mktemp("config") / "pico"
    for pattern in CONFIGURATION:
        for file in folder.rglob(pattern):
            (path / file.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, path / file.relative_to(folder))
    return path


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same base as one file."""
    return single_file(pico_pipeline(), tmp_path_factory.mktemp("files") / "pico.safetensors")


def pico_xl(seed: int = 0) -> StableDiffusionXLPipeline:
    """Stable Diffusion XL's classes: two text encoders of different widths, pooled text and sizes as conditions."""
    tokenizer = pico_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        second = CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=24,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=tokenizer.model_max_length,
            projection_dim=24,
            hidden_act="gelu",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        pipe = StableDiffusionXLPipeline(
            vae=AutoencoderKL(
                block_out_channels=(8, 16),
                down_block_types=("DownEncoderBlock2D",) * 2,
                up_block_types=("UpDecoderBlock2D",) * 2,
                latent_channels=4,
                norm_num_groups=4,
                sample_size=16,
            ),
            text_encoder=pico_text_encoder(tokenizer),
            text_encoder_2=CLIPTextModelWithProjection(second),
            tokenizer=tokenizer,
            tokenizer_2=pico_tokenizer(),
            unet=UNet2DConditionModel(
                sample_size=8,
                block_out_channels=(16, 32),
                layers_per_block=2,
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
                transformer_layers_per_block=(1, 2),
                cross_attention_dim=40,
                attention_head_dim=2,
                norm_num_groups=4,
                use_linear_projection=True,
                addition_embed_type="text_time",
                addition_time_embed_dim=8,
                projection_class_embeddings_input_dim=24 + 6 * 8,
            ),
            scheduler=EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(pipe: Any) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    drawn: Tensor = pipe(
        "snoopy on the beach", num_inference_steps=3, generator=generator, output_type="pt", guidance_scale=5.0
    ).images
    return drawn


def with_key(path: Path, key: str, *shape: int, **metadata: str) -> Path:
    save_file({key: torch.zeros(shape or (1,))}, path, metadata)
    return path


def test_a_file_draws_what_its_folder_draws(folder: Path, config: Path, file: Path) -> None:
    expected = picture(load_pipeline(str(folder)))
    for source in (config, folder):
        pipe = load_pipeline(str(file), config=str(source))
        assert torch.equal(picture(pipe), expected)
        assert pipe.safety_checker is None
        assert not any(parameter.requires_grad for parameter in pipe.unet.parameters())


def test_an_xl_file_draws_what_its_folder_draws(tmp_path: Path) -> None:
    base = pico_xl()
    base.save_pretrained(tmp_path / "xl")
    path = single_file(base, tmp_path / "xl.safetensors")
    for model in (tmp_path / "xl").rglob("*.safetensors"):
        model.unlink()
    assert torch.equal(picture(load_pipeline(str(path), config=str(tmp_path / "xl"))), picture(base))


def test_precisions_are_those_of_a_folder(config: Path, file: Path, tmp_path: Path) -> None:
    half = single_file(pico_pipeline(dtype=torch.bfloat16), tmp_path / "half.safetensors")
    assert load_pipeline(str(half), config=str(config), dtype="stored").unet.dtype is torch.bfloat16
    assert load_pipeline(str(half), config=str(config), dtype="float32").vae.dtype is torch.float32
    assert load_pipeline(str(file), config=str(config), dtype=torch.float16).text_encoder.dtype is torch.float16
    eight = {key: tensor.to(torch.float8_e4m3fn) for key, tensor in load_file(file).items()}
    save_file(eight, tmp_path / "eight.safetensors")
    read = load_pipeline(str(tmp_path / "eight.safetensors"), config=str(config), dtype="stored").unet.conv_in.weight
    assert torch.equal(read, eight[f"{UNET}input_blocks.0.0.weight"].to(torch.bfloat16))


def test_parts_that_a_file_lacks_are_lent_by_its_base(folder: Path, config: Path, tmp_path: Path) -> None:
    other = pico_pipeline(seed=7)
    path = single_file(other, tmp_path / "bare.safetensors", without=("vae", "text_encoder"))
    pipe, base = load_pipeline(str(path), config=str(folder)), load_pipeline(str(folder))
    for ours, theirs in ((pipe.unet, other.unet), (pipe.vae, base.vae), (pipe.text_encoder, base.text_encoder)):
        assert all(torch.equal(tensor, ours.state_dict()[key]) for key, tensor in theirs.state_dict().items())
    remark = parse_reference(str(path), config=str(folder)).remark
    assert remark == "bare.safetensors has no text encoder and no VAE of its own; they are taken from its base"
    with pytest.raises(ModelError, match="holds no text_encoder and no vae, and its configuration") as caught:
        load_pipeline(str(path), config=str(config))
    assert "--config" in str(caught.value)


def test_a_text_encoder_in_an_unknown_layout_is_not_replaced_unasked(folder: Path, tmp_path: Path) -> None:
    path = single_file(
        pico_pipeline(), tmp_path / "old.safetensors", without=["text_encoder"],
        **{"cond_stage_model.transformer.positions.weight": torch.zeros(12, 16)},
    )  # fmt: skip
    with pytest.raises(ModelError, match=r"layout that is not known \(cond_stage_model"):
        load_pipeline(str(path), config=str(folder))


def test_marks_of_v_prediction_reach_the_scheduler(tmp_path: Path) -> None:
    base = pico_xl()
    base.save_pretrained(tmp_path / "xl")
    marked = single_file(base, tmp_path / "v.safetensors", v_pred=torch.tensor([]), ztsnr=torch.tensor([]))
    scheduler = load_pipeline(str(marked), config=str(tmp_path / "xl")).scheduler
    assert (scheduler.config.prediction_type, scheduler.config.rescale_betas_zero_snr) == ("v_prediction", True)
    said = single_file(base, tmp_path / "said.safetensors", metadata={"modelspec.prediction_type": "v"})
    assert load_pipeline(str(said), config=str(tmp_path / "xl")).scheduler.config.prediction_type == "v_prediction"
    plain = single_file(base, tmp_path / "plain.safetensors")
    assert load_pipeline(str(plain), config=str(tmp_path / "xl")).scheduler.config.prediction_type == "epsilon"


@pytest.mark.parametrize(
    ("shapes", "metadata", "about", "base"),
    [
        ({"input_blocks.0.0.weight": (320, 4, 3, 3), "attn2": (320, 768)}, {}, "Stable Diffusion 1", "sd-v1-5"),
        ({"input_blocks.0.0.weight": (320, 9, 3, 3), "attn2": (320, 768)}, {}, "Stable Diffusion 1 for inpai", "inpa"),
        ({"input_blocks.0.0.weight": (320, 4, 3, 3), "attn2": (320, 1024)}, {}, "Stable Diffusion 2, and", None),
        (
            {"input_blocks.0.0.weight": (320, 4, 3, 3), "attn2": (320, 1024)},
            {"modelspec.architecture": "stable-diffusion-v2-768-v"},
            "Stable Diffusion 2 predicting v",
            "sd-2-1",
        ),
        (
            {"input_blocks.0.0.weight": (320, 4, 3, 3), "attn2": (320, 1024)},
            {"modelspec.prediction_type": "epsilon"},
            "Stable Diffusion 2 predicting noise",
            "2-1-base",
        ),
        ({"input_blocks.0.0.weight": (320, 4, 3, 3), "attn2": (320, 2048)}, {}, "Stable Diffusion XL", "sdxl"),
        ({"joint_blocks.0.x_block.attn.qkv.weight": (12, 4)}, {}, "Stable Diffusion 3", "stable-diffusion-3-medium"),
        (
            {"joint_blocks.0.x_block.attn.qkv.weight": (12, 4), "joint_blocks.0.x_block.attn2.qkv.weight": (12, 4)},
            {},
            "Stable Diffusion 3.5 medium",
            "sd3.5-medium",
        ),
        (
            {"double_blocks.0.img_mod.lin.weight": (4, 4), "img_in.weight": (8, 64)},
            {},
            "FLUX.1 schnell",
            "flux-schnell",
        ),
        (
            {
                "double_blocks.0.img_mod.lin.weight": (4, 4),
                "img_in.weight": (8, 64),
                "guidance_in.in_layer.weight": (4, 4),
            },
            {},
            "FLUX.1 dev",
            "flux-dev",
        ),
    ],
)
def test_families_are_told_by_their_headers(
    shapes: dict[str, tuple[int, ...]], metadata: dict[str, str], about: str, base: str | None, tmp_path: Path
) -> None:
    attn2 = "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    for prefix in (UNET, "") if "attn2" not in shapes else (UNET,):
        tensors = {prefix + (attn2 if key == "attn2" else key): torch.zeros(shape) for key, shape in shapes.items()}
        save_file(tensors, tmp_path / "some.safetensors", metadata)
        kind = inspect(tmp_path / "some.safetensors").kind
        assert kind is not None
        assert kind.about.startswith(about)
        assert [base in one for one in kind.bases][:1] == ([] if base is None else [True])
        for one in kind.bases:
            assert parse_reference(one).hub_id


def test_a_file_that_does_not_say_enough_asks_for_a_configuration(tmp_path: Path, file: Path) -> None:
    tensors = {
        f"{UNET}input_blocks.0.0.weight": torch.zeros(320, 4, 3, 3),
        f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": torch.zeros(320, 1024),
    }
    save_file(tensors, tmp_path / "two.safetensors")
    with pytest.raises(ModelError, match=r"predicts noise \(512 pixels\) or v") as caught:
        load_pipeline(str(tmp_path / "two.safetensors"))
    assert "--config" in str(caught.value)
    with pytest.raises(ModelError, match="of no family known by its tensors"):
        load_pipeline(str(file))


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ("lora_unet_mid_block.lora_down.weight", "a LoRA or an eraser, not a model"),
        ("unet.mid_block.attn.to_q.lora_A.weight", "a LoRA or an eraser, not a model"),
        ("control_model.input_blocks.0.0.weight", "a ControlNet"),
        ("down_blocks.0.resnets.0.conv1.weight", "a denoiser alone"),
        ("first_stage_model.decoder.conv_in.weight", "a VAE alone"),
        ("decoder.conv_in.weight", "a VAE alone"),
        ("text_model.embeddings.position_embedding.weight", "a text encoder alone"),
        ("cond_stage_model.transformer.text_model.final_layer_norm.bias", "a text encoder alone"),
        ("emb_params", "a textual-inversion embedding"),
    ],
)
def test_what_is_no_model_says_what_it_is(key: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=says) as caught:
        parse_reference(str(with_key(tmp_path / "part.safetensors", key)))
    assert caught.value.mend


def test_an_eraser_is_no_model(tmp_path: Path) -> None:
    pico_eraser(pico_pipeline().unet).save(tmp_path / "snoopy.safetensors", tmp_path / "snoopy.json")
    with pytest.raises(ModelError, match="is an eraser, not a model") as caught:
        parse_reference(str(tmp_path / "snoopy.safetensors"))
    assert f"--adapters {tmp_path / 'snoopy.safetensors'}" in str(caught.value)


def test_a_part_of_a_folder_names_the_folder(folder: Path) -> None:
    with pytest.raises(ModelError) as caught:
        parse_reference(str(folder / "unet" / "diffusion_pytorch_model.safetensors"))
    assert caught.value.mend == f"--model {folder}"


class Bomb:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("name", ["bomb.ckpt", "bomb.PT", "bomb.safetensors"])
def test_pickles_are_never_opened(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(pickle.dumps(Bomb(tmp_path / "mark")))
    with pytest.raises(ModelError, match="pickle"):
        load_pipeline(str(tmp_path / name), config="sketchbook")
    assert not (tmp_path / "mark").exists()


def test_the_way_out_of_a_pickle_works(tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"state_dict": load_file(file), "epoch": 3}, tmp_path / "old.ckpt")
    with pytest.raises(ModelError) as caught:
        parse_reference(str(tmp_path / "old.ckpt"))
    command = str(caught.value.mend).partition('python -c "')[2].rstrip('"')
    monkeypatch.chdir(tmp_path)
    exec(command, {})
    converted = load_file(tmp_path / "old.safetensors")
    assert all(torch.equal(tensor, converted[key]) for key, tensor in load_file(file).items())


@pytest.mark.parametrize("damage", ["cut", "empty", "gguf", "quantised", "integers", "no tensors"])
def test_damaged_and_foreign_files(damage: str, file: Path, tmp_path: Path) -> None:
    path = tmp_path / f"model.{'gguf' if damage == 'gguf' else 'safetensors'}"
    if damage == "quantised":
        single_file(pico_pipeline(), path, **{f"{UNET}input_blocks.0.0.scale_weight": torch.ones(1)})
    elif damage == "integers":
        held = load_file(file)
        save_file({key: (99 * one).char() if key.startswith(UNET) else one for key, one in held.items()}, path)
    elif damage == "no tensors":
        save_file({}, path)
    else:
        path.write_bytes({"cut": file.read_bytes()[:-100], "empty": b"", "gguf": b"GGUF\3\0\0\0"}[damage])
    says = {
        "cut": "truncated",
        "empty": "an empty file",
        "gguf": "GGUF",
        "quantised": "scale",
        "integers": "kept as I8",
        "no tensors": "no te",
    }
    with pytest.raises(ModelError, match=says[damage]):
        parse_reference(str(path))


@pytest.mark.parametrize("other", ["wider", "deeper", "shallower", "xl"])
def test_a_configuration_that_does_not_fit_is_named(other: str, file: Path, config: Path, tmp_path: Path) -> None:
    strange = tmp_path / "strange"
    if other == "xl":
        pico_xl().save_pretrained(strange)
    else:
        shutil.copytree(config, strange)
        settings = json.loads((strange / "unet" / "config.json").read_text())
        settings |= {
            "wider": {"cross_attention_dim": 20},
            "deeper": {"transformer_layers_per_block": 2},
            "shallower": {"mid_block_type": None},
        }[other]
        (strange / "unet" / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match="does not fit the configuration") as caught:
        load_pipeline(str(file), config=str(strange))
    assert caught.value.mend


@pytest.mark.parametrize("lost", ["tokenizer", "unet/config.json", "scheduler/scheduler_config.json"])
def test_a_configuration_with_holes_is_named(lost: str, file: Path, config: Path, tmp_path: Path) -> None:
    holed = tmp_path / "holed"
    shutil.copytree(config, holed)
    shutil.rmtree(holed / lost) if lost == "tokenizer" else (holed / lost).unlink()
    with pytest.raises(ModelError, match=f"lacks {lost}"):
        load_pipeline(str(file), config=str(holed))


def test_references_to_files(file: Path, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotFoundError, match=r"did you mean .*pico\.safetensors"):
        parse_reference(str(file.with_name("pica.safetensors")))
    monkeypatch.chdir(tmp_path)
    for missing in ("models/none.safetensors", "none.ckpt"):
        with pytest.raises(NotFoundError, match="there is no file"):
            parse_reference(missing)
    with pytest.raises(UsageError, match="is an address"):
        parse_reference("https://civitai.com/api/download/models/1")
    with pytest.raises(UsageError, match="no revisions"):
        parse_reference(f"{file}@main")
    with pytest.raises(UsageError, match="holds no configuration"):
        parse_reference(str(file), config=str(file))
    with pytest.raises(UsageError, match="brings its own configuration"):
        parse_reference("sketchbook", config=str(config))


def test_a_manifest_names_the_file_and_its_hash_not_where_it_lies(file: Path, folder: Path, config: Path) -> None:
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert identity_of(str(file), object()) == ("pico.safetensors", f"sha256:{digest}")  # type: ignore[arg-type]
    assert identity_of(str(folder), load_pipeline(str(folder))) == ("pico", None)
    small = {"steps": 1, "batch_size": 2, "x_t": {"trajectories": 2, "steps": 2, "chunks": 1}}
    manifest = train("snoopy", model=str(file), config=str(config), **small).manifest
    assert (manifest.base.id, manifest.base.revision) == ("pico.safetensors", f"sha256:{digest}")
    assert str(file.parent) not in manifest.to_json()


def test_the_configuration_of_a_family_is_fetched_once_without_its_weights(
    folder: Path, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inspection, "_UNETS", {(16, 4): inspection.Kind("pico", ("some/pico",))})
    for offline in (False, True):
        adopt_endpoint(NOWHERE, monkeypatch, tmp_path)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
        with pytest.raises(NetworkError) as refused:
            load_pipeline(str(file))
        lost = str(refused.value)
        assert f"{file} is pico and holds no configuration and no vocabulary" in lost
        assert 'hf download some/pico --include "*.json"' in lost
    with LoopbackHub() as hub:
        files = (part for part in folder.rglob("*") if part.is_file())
        commit = hub.publish("some/pico", {part.relative_to(folder).as_posix(): part.read_bytes() for part in files})
        hub.adopt(monkeypatch, tmp_path)
        for offline in (False, True):
            monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
            assert load_pipeline(str(file)).unet.config.sample_size == 8
    assert not any(request.endswith(".safetensors") for request in hub.requests)
    assert (tmp_path / "hf" / "hub" / "models--some--pico" / "snapshots" / commit / "model_index.json").exists()


def test_every_command_takes_a_file(
    spmhub: Spmhub,
    registry: Registry,
    file: Path,
    config: Path,
    tmp_path: Path,
) -> None:
    model = ("--model", file, "--config", config)
    assert spmhub("check", "snoopy", *model).code == 0
    drawn = spmhub("apply", *model, "-a", "snoopy", "-p", "snoopy", "--steps", 2, "--out", tmp_path / "drawn", "-q")
    assert (drawn.code, len(list((tmp_path / "drawn").glob("*.png")))) == (0, 1)
    for png in (tmp_path / "drawn").glob("*.png"):
        assert str(file.parent).encode() not in png.read_bytes()
    made = spmhub("train", "church", *model, "--json", *PICO_TRAINING)
    assert made.code == 0
    assert f"--model {file} --config {config}" in made.err
    written = Path(json.loads(made.out)["manifest"]).read_text()
    assert str(file.parent) not in written
    assert json.loads(written)["base"]["id"] == "pico.safetensors"
    baked = spmhub("bake", *model, "-a", "church,snoopy", "--out", tmp_path / "baked", "--json")
    assert (baked.code, json.loads(baked.out)["base"]) == (0, "pico.safetensors")
    for found in (tmp_path / "baked").rglob("*.json"):
        assert str(file.parent) not in found.read_text()
    assert spmhub("recover", "snoopy", "--checkpoint", tmp_path / "baked").code == 0
    missing = spmhub("check", "snoopy", "--model", file)
    assert missing.code == 1
    assert "--config" in missing.err
    assert spmhub("check", "snoopy", "--model", "sketchbook", "--config", config).code == 2


def test_a_baked_folder_does_not_say_where_its_base_lay(
    spmhub: Spmhub,
    registry: Registry,
    folder: Path,
    tmp_path: Path,
) -> None:
    assert spmhub("bake", "--model", folder, "-a", "snoopy", "--out", tmp_path / "baked").code == 0
    for found in (tmp_path / "baked").rglob("*.json"):
        assert str(folder.parent) not in found.read_text(), found
