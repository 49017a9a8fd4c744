"""Formats there and back: the same effect in the denoiser, on the real lists of keys; and what other programs load."""

from __future__ import annotations

import json
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from diffusers.utils import logging
from peft import PeftModel
from pico_families import family_pipeline
from safetensors.torch import load_file as load_tensors
from safetensors.torch import save_file
from test_families import EXACT
from topologies import Bare, output_with, predict, random_eraser, topology
from torch import Tensor, nn

import spm_hub
from spm_hub.adapters import conversion
from spm_hub.adapters.adapter import Adapter, load_file
from spm_hub.adapters.conversion import BaseModel, Description
from spm_hub.adapters.formats import module_names as names
from spm_hub.adapters.formats import original_names, spm
from spm_hub.adapters.formats.module_names import flat
from spm_hub.adapters.increments import Dense, LowRank, Mask
from spm_hub.adapters.low_rank_approximation import truncate
from spm_hub.errors import AdapterFileError, NotFoundError, UsageError
from spm_hub.io.safetensors_file import MANIFEST_KEY, read_header
from spm_hub.models.architectures import changeable, family_of

pytestmark = pytest.mark.slow

CONFORMANCE = Path(__file__).resolve().parents[3] / "shared" / "conformance"
needs_conformance = pytest.mark.skipif(not CONFORMANCE.is_dir(), reason="no conformance files beside this checkout")
LOW_RANK = ["spm", "kohya", "lycoris", "diffusers", "peft"]
NOBODY = Description()


def there_and_back(adapter: Adapter, to: str, folder: Path, base: BaseModel | None = None) -> Adapter:
    out = folder / (f"{to}" if to == "peft" else f"{to}.safetensors")
    written = conversion.write(adapter, conversion.writer_named(to), out, base)
    assert all(path.is_file() for path in written)
    again, read_as = conversion.read(out, NOBODY, base)
    assert read_as in (to, "spm")  # our header names the eraser, whatever the keys are
    return again


@pytest.fixture(scope="module", params=["sd1", "sd2", "sdxl", "flux"])
def denoiser(request: pytest.FixtureRequest) -> nn.Module:
    return topology(request.param)


@cache
def erased(denoiser: nn.Module, kind: str) -> tuple[Adapter, torch.Tensor]:
    """An eraser of that kind and what the denoiser predicts with it, which is not what it predicts without."""
    adapter = random_eraser(denoiser, kind, rank=2)
    expected = output_with(denoiser, adapter)
    assert (expected - predict(denoiser)).abs().max() > 1e-2
    return adapter, expected


@pytest.mark.parametrize("model", EXACT)
def test_dots_are_put_back_and_kohyas_names_are_inverted(model: str) -> None:
    make, config, family, *_ = EXACT[model]
    with torch.device("meta"):
        paths = list(changeable(make(**config)))
    assert [names.dotted(flat(path)) for path in paths] == paths
    if family == "sdxl":
        original = [original_names.diffusers_to_sgm(path) for path in paths]
        assert None not in original
        assert len(set(original)) == len(paths)
        assert [names.dotted(original_names.sgm_to_diffusers(str(name)) or "") for name in original] == paths
    elif family == "flux":
        for path in paths:
            out, width = (7, 2) if path.endswith("proj_mlp") else (2, 2)  # rows are counted in inputs
            renamed = original_names.to_original("flux", {path: LowRank(torch.ones(1, width), torch.ones(out, 1))})
            assert len(renamed) == 1
            assert path in map(names.dotted, original_names.to_diffusers(renamed))


@needs_conformance
def test_the_topologies_have_the_official_key_lists() -> None:
    official = set(json.loads((CONFORMANCE / "spm_sd14_keys.json").read_text()))
    assert set(spm.to_tensors(random_eraser(topology("sd1")).increments)) == official
    for name, model in (("sd14", "sd1"), ("sdxl", "sdxl"), ("flux_dev", "flux"), ("flux_schnell", "flux-schnell")):
        known = set(topology(model).state_dict())
        for listed in (CONFORMANCE / "esd_keys").glob(f"{name}_*.txt"):
            keys = {line.split("\t")[0] for line in listed.read_text().splitlines()}
            assert keys
            assert keys <= known, listed


@pytest.mark.parametrize("to", LOW_RANK)
def test_a_low_rank_eraser_comes_back_from_every_format(to: str, denoiser: nn.Module, tmp_path: Path) -> None:
    adapter, expected = erased(denoiser, "low_rank")
    again = there_and_back(adapter, to, tmp_path)
    assert again.increments.keys() == adapter.increments.keys()
    assert again.manifest.base.family == family_of(denoiser).name
    assert (output_with(denoiser, again) - expected).abs().max() <= 1e-6


@pytest.mark.parametrize("kind", ["dense", "mask"])
@pytest.mark.parametrize("to", ["spm", "lycoris", "esd"])
def test_dense_changes_and_masks_come_back(kind: str, to: str, denoiser: nn.Module, tmp_path: Path) -> None:
    adapter, expected = erased(denoiser, kind)
    again = there_and_back(adapter, to, tmp_path, BaseModel(denoiser, "topology"))
    assert again.manifest.increment.kind == ("mask" if (kind, to) == ("mask", "spm") else "dense")
    assert (output_with(denoiser, again) - expected).abs().max() <= 1e-6


@pytest.mark.parametrize("named", ["a/base; rm -rf ~", "x" * 200_000, "", "-h"])
def test_a_file_does_not_write_the_command_that_its_reader_is_told_to_type(named: str, tmp_path: Path) -> None:
    whole = {"mid_block.attentions.0.proj_in.weight": torch.ones(4, 4)}
    save_file(whole, tmp_path / "whole.safetensors", {"base_model_id": named})
    with pytest.raises(UsageError, match="whole weights") as error:
        conversion.read(tmp_path / "whole.safetensors", NOBODY)
    assert error.value.mend == f"spmhub convert {tmp_path / 'whole.safetensors'} --model M, that base"


@needs_conformance
@pytest.mark.parametrize(
    "listed", sorted(path.name for path in (CONFORMANCE / "esd_keys").glob("*_*.txt")) if CONFORMANCE.is_dir() else []
)
def test_esd_files_of_the_official_key_lists_act_as_the_model_they_were_saved_from(listed: str, tmp_path: Path) -> None:
    model = {"sd14": "sd1", "sdxl": "sdxl", "flux_dev": "flux", "flux_schnell": "flux-schnell"}[
        listed.rsplit("_", 1)[0] if listed.startswith("flux") else listed.split("_")[0]
    ]
    keys = [line.split("\t")[0] for line in (CONFORMANCE / "esd_keys" / listed).read_text().splitlines()]
    base, trained = topology(model), topology(model)
    state = trained.state_dict()
    random = torch.Generator().manual_seed(2)
    for key in keys:
        state[key] += (
            0.1 * state[key].std(correction=0).clamp_min(0.1) * torch.randn(state[key].shape, generator=random)
        )
    metadata = {
        "format": "erasing-esd-v2", "family": "sd", "base_model_id": "some/base", "train_method": "esd-x",
        "erase_concept": "van gogh",
    }  # fmt: skip
    save_file({key: state[key].clone() for key in keys}, tmp_path / "esd.safetensors", metadata)
    with pytest.raises(UsageError, match="some/base"):
        conversion.read(tmp_path / "esd.safetensors", NOBODY)
    adapter, read_as = conversion.read(tmp_path / "esd.safetensors", NOBODY, BaseModel(base, "here"))
    assert (read_as, adapter.manifest.concept.target, adapter.manifest.recipe["method"]) == ("esd", "van gogh", "esd-x")
    assert len(adapter.increments) == len({key.rpartition(".")[0] for key in keys})
    expected = predict(trained)
    assert (output_with(base, adapter) - expected).abs().max() <= 1e-6
    assert (predict(base) - expected).abs().max() > 1e-4


def pipeline(name: str) -> Any:
    """A pico pipeline whose denoiser has the real key list."""
    pipe = family_pipeline({"flux": "flux-dev"}.get(name, name))
    part = "transformer" if name == "flux" else "unet"
    pipe.register_modules(**{part: topology(name)})
    return pipe


def load_without_complaint(pipe: Any, file: Path, caplog: pytest.LogCaptureFixture) -> None:
    logging.set_verbosity_warning()
    logging.enable_propagation()
    caplog.clear()
    with caplog.at_level("WARNING"), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        pipe.load_lora_weights(file.parent, weight_name=file.name)
    logging.disable_propagation()
    # What it says of every file without text-encoder parts; of keys that it cannot place it says otherwise.
    assert not [record for record in caplog.messages if not record.startswith("No LoRA keys associated to CLIPText")]


# FLUX.1's linear1 is split by diffusers at FLUX's own widths only: see the test of one whole block below.
@pytest.mark.parametrize(
    ("name", "to"),
    [(name, to) for name in ("sd1", "sd2", "sdxl") for to in ("kohya", "diffusers")]
    + [("sd1", "spm"), ("sd1", "lycoris"), ("flux", "diffusers")],
)
def test_plain_diffusers_loads_what_is_written(
    name: str, to: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pipe = pipeline(name)
    denoiser = pipe.transformer if name == "flux" else pipe.unet
    adapter = random_eraser(denoiser, rank=3)
    bare, expected = predict(denoiser), output_with(denoiser, adapter)
    (file,) = conversion.write(adapter, conversion.writer_named(to), tmp_path / "lora.safetensors")
    load_without_complaint(pipe, file, caplog)
    assert (predict(denoiser) - expected).abs().max() <= 1e-5
    assert (expected - bare).abs().max() > 1e-2


def test_a_whole_flux_block_in_kohyas_layout_loads_in_plain_diffusers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pipe: Any = family_pipeline("flux-dev")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = FluxTransformer2DModel(
            in_channels=8, num_layers=0, num_single_layers=1, joint_attention_dim=24, pooled_projection_dim=24,
            axes_dims_rope=(16, 56, 56),
        ).eval()  # fmt: skip
    pipe.register_modules(transformer=transformer.requires_grad_(False))
    adapter = random_eraser(transformer, rank=1)
    assert "single_transformer_blocks.0.proj_mlp" in adapter.increments
    bare, expected = predict(transformer), output_with(transformer, adapter)
    (file,) = conversion.write(adapter, conversion.writer_named("kohya"), tmp_path / "lora.safetensors")
    header = read_header(file)
    assert "lora_unet_single_blocks_0_linear1.lora_up.weight" in header.entries
    assert header.metadata["ss_base_model_version"] == "flux1"
    load_without_complaint(pipe, file, caplog)
    assert (predict(transformer) - expected).abs().max() <= 1e-5
    assert (expected - bare).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["sd1", "sdxl", "flux"])
def test_peft_loads_the_folder(name: str, tmp_path: Path) -> None:
    denoiser: Any = topology(name)
    adapter = random_eraser(denoiser, rank=2)
    expected = output_with(denoiser, adapter)
    conversion.write(adapter, conversion.writer_named("peft"), tmp_path / "lora")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loaded = PeftModel.from_pretrained(denoiser, tmp_path / "lora")
    assert (predict(loaded.get_base_model()) - expected).abs().max() <= 1e-5


def test_kohyas_flux_is_split_row_by_row_and_joined_again(tmp_path: Path) -> None:
    """A fused file as kohya trains it: one pair for q, k and v together, alpha half the rank."""
    denoiser = topology("flux")
    random = torch.Generator().manual_seed(4)
    width, rank, alpha = 16, 4, 2.0
    fused = {
        "double_blocks_3_img_attn_qkv": 3 * width, "double_blocks_3_txt_attn_qkv": 3 * width,
        "double_blocks_3_txt_mlp_0": 4 * width, "single_blocks_37_linear1": 7 * width,
        "double_blocks_0_img_mod_lin": 6 * width, "final_layer_adaLN_modulation_1": 2 * width,
    }  # fmt: skip
    pairs = {
        name: (torch.randn(rank, width, generator=random), torch.randn(out, rank, generator=random))
        for name, out in fused.items()
    }
    tensors = {}
    for name, (down, up) in pairs.items():
        tensors |= {
            f"lora_unet_{name}.lora_down.weight": down, f"lora_unet_{name}.lora_up.weight": up,
            f"lora_unet_{name}.alpha": torch.tensor(alpha),
        }  # fmt: skip
    save_file(tensors, tmp_path / "flux.safetensors")
    adapter, read_as = conversion.read(tmp_path / "flux.safetensors", NOBODY, BaseModel(denoiser, "flux"))
    assert (read_as, adapter.manifest.base.family) == ("kohya", "flux")
    whole = {name: (up.double() @ down.double()) * alpha / rank for name, (down, up) in pairs.items()}
    found = {
        path: adapter.increments[path].delta_for(torch.zeros(one.weight_shape)).double()
        for path, one in adapter.increments.items()
    }
    block = "transformer_blocks.3.attn"
    for fused_name, paths in {
        "double_blocks_3_img_attn_qkv": [f"{block}.to_q", f"{block}.to_k", f"{block}.to_v"],
        "double_blocks_3_txt_attn_qkv": [f"{block}.add_q_proj", f"{block}.add_k_proj", f"{block}.add_v_proj"],
        "single_blocks_37_linear1": [
            *(f"single_transformer_blocks.37.attn.to_{letter}" for letter in "qkv"),
            "single_transformer_blocks.37.proj_mlp",
        ],
        "double_blocks_3_txt_mlp_0": ["transformer_blocks.3.ff_context.net.0.proj"],
        "double_blocks_0_img_mod_lin": ["transformer_blocks.0.norm1.linear"],
    }.items():
        torch.testing.assert_close(torch.cat([found[path] for path in paths]), whole[fused_name], rtol=1e-6, atol=1e-6)
    shift, scale = whole["final_layer_adaLN_modulation_1"].chunk(2)
    torch.testing.assert_close(found["norm_out.linear"], torch.cat([scale, shift]), rtol=1e-6, atol=1e-6)
    again = there_and_back(adapter, "kohya", tmp_path)
    keys = load_tensors(tmp_path / "kohya.safetensors")
    assert {key.removeprefix("lora_unet_").split(".")[0] for key in keys} == fused.keys()
    assert max(tensor.shape[0] for key, tensor in keys.items() if "lora_down" in key) == rank  # one pair stays one pair
    for path, increment in adapter.increments.items():
        shape = torch.zeros(increment.weight_shape)
        assert torch.equal(again.increments[path].delta_for(shape), increment.delta_for(shape))


def test_a_dense_eraser_is_approximated_with_the_error_that_it_has(tmp_path: Path) -> None:
    adapter = random_eraser(topology("sd2"), "dense")
    with pytest.raises(UsageError, match="--svd-rank 8") as refused:
        conversion.write(adapter, conversion.writer_named("diffusers"), tmp_path / "x.safetensors")
    assert "lycoris" in str(refused.value)
    assert not list(tmp_path.iterdir())
    reduction = truncate(adapter, 4)
    missed = whole = 0.0
    for path, increment in adapter.increments.items():
        assert isinstance(increment, Dense)
        matrix = increment.delta.double().flatten(1)
        whole += float(matrix.square().sum())
        missed += float(torch.linalg.svdvals(matrix)[4:].square().sum())  # Eckart and Young: none is nearer
        if increment.delta_bias is not None:
            whole += float(increment.delta_bias.double().square().sum())
            missed += float(increment.delta_bias.double().square().sum())
        near = reduction.adapter.increments[path]
        assert isinstance(near, LowRank)
        assert near.rank <= 4
    assert reduction.relative_error == pytest.approx((missed / whole) ** 0.5, rel=1e-5)
    assert reduction.biases_left_out == sum(one.delta_bias is not None for one in adapter.increments.values())
    assert reduction.adapter.manifest.recipe["svd"]["relative_error"] == reduction.relative_error
    conversion.write(reduction.adapter, conversion.writer_named("diffusers"), tmp_path / "x.safetensors")


def test_what_has_low_rank_is_reduced_to_it_exactly() -> None:
    """UCE edits few prompts: its full tensors are a product of that rank."""
    lows = random_eraser(topology("sd1"), rank=3)
    dense = {path: Dense(one.delta_for(torch.zeros(one.weight_shape))) for path, one in lows.increments.items()}
    reduction = truncate(lows.with_increments(dense), 3)
    assert reduction.relative_error < 1e-6
    denoiser = topology("sd1")
    assert (output_with(denoiser, reduction.adapter) - output_with(denoiser, lows)).abs().max() <= 1e-5


@needs_conformance
def test_the_real_lora_files_are_loaded_or_refused(tmp_path: Path) -> None:
    adapter, read_as = conversion.read(CONFORMANCE / "lora" / "catundchat.safetensors", NOBODY)
    assert (read_as, adapter.manifest.base.family, len(adapter.increments)) == ("diffusers", "sd1", 128)
    for name in ("cloneofsimo_analog_svd_rank4", "cloneofsimo_lora_disney"):
        with pytest.raises(AdapterFileError, match="of a text encoder"):
            conversion.read(CONFORMANCE / "lora" / f"{name}.safetensors", NOBODY)
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768)
    spm_hub.adapters.compatibility.check(adapter, unet)
    for to in LOW_RANK:
        again = there_and_back(adapter, to, tmp_path)
        for path, increment in adapter.increments.items():
            weight = torch.zeros(increment.weight_shape)
            assert torch.equal(again.increments[path].delta_for(weight), increment.delta_for(weight)), (to, path)


@needs_conformance
def test_the_official_masks_come_back_bit_for_bit(tmp_path: Path) -> None:
    adapter, read_as = conversion.read(CONFORMANCE, Description("flux-nudity", "nudity"))
    assert (read_as, adapter.manifest.base.family, adapter.manifest.increment.kind) == ("minimalist", "flux", "mask")
    off = {path: int((~one.keep).sum()) for path, one in adapter.increments.items() if isinstance(one, Mask)}
    assert sum(count for path, count in off.items() if ".net.2" in path) == 293_859
    assert sum(count for path, count in off.items() if ".norm1_context." in path) == 62_143
    again = there_and_back(adapter, "spm", tmp_path)
    assert again.increments.keys() == adapter.increments.keys()
    for path, one in adapter.increments.items():
        assert isinstance(one, Mask)
        back = again.increments[path]
        assert isinstance(back, Mask)
        assert back.dim == one.dim
        assert torch.equal(back.keep, one.keep)
    assert read_header(tmp_path / "spm.safetensors").metadata["ss_base_model_version"] == "flux1"


@needs_conformance
@pytest.mark.parametrize("name", ["snoopy", "nudity"])
def test_the_official_spm_files_in_every_format(name: str, tmp_path: Path) -> None:
    adapter, _ = conversion.read(CONFORMANCE / "spm_official" / f"{name}.safetensors", NOBODY)
    unet: Any = UNet2DConditionModel.from_pretrained(CONFORMANCE / "spm_official" / "unet")
    golden = load_tensors(CONFORMANCE / "spm_official" / "golden.safetensors")

    def output(adapter: Adapter) -> Tensor:
        with spm_hub.attach(Bare(unet), [adapter], gate="always"), torch.no_grad():
            return unet(
                golden["sample"], golden["timestep"], encoder_hidden_states=golden["encoder_hidden_states"]
            ).sample.clone()  # fmt: skip

    expected = output(adapter)
    assert (expected - golden[f"output_{name}_multiplier_1"]).abs().max() <= 1e-5
    for to in LOW_RANK:
        assert (output(there_and_back(adapter, to, tmp_path)) - expected).abs().max() <= 1e-6


def test_a_written_file_explains_itself_and_is_not_overwritten(tmp_path: Path) -> None:
    adapter = random_eraser(topology("flux"))
    out = tmp_path / "x.safetensors"
    conversion.write(adapter, conversion.writer_named("kohya"), out)
    before = out.read_bytes()
    metadata = read_header(out).metadata
    assert metadata["ss_base_model_version"] == "flux1"
    assert metadata["modelspec.architecture"] == "flux-1-dev/lora"
    assert json.loads(metadata[MANIFEST_KEY])["concept"]["target"] == "snoopy"
    assert "lora_adapter_metadata" not in metadata
    with pytest.raises(UsageError, match="--force"):
        conversion.write(adapter, conversion.writer_named("kohya"), out)
    assert out.read_bytes() == before
    conversion.write(adapter, conversion.writer_named("diffusers"), out, replace=True)
    assert load_file(out).manifest.concept == adapter.manifest.concept
    with pytest.raises(NotFoundError, match="did you mean diffusers"):
        conversion.writer_named("difusers")


def test_a_mask_needs_its_base_for_other_programs(tmp_path: Path) -> None:
    adapter = random_eraser(topology("sd1"), "mask")
    assert isinstance(next(iter(adapter.increments.values())), Mask)
    with pytest.raises(UsageError, match="--model M"):
        conversion.write(adapter, conversion.writer_named("lycoris"), tmp_path / "x.safetensors")
    with pytest.raises(UsageError, match="--model M"):
        truncate(adapter, 2)
