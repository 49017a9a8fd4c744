"""Formats there and back: the same effect in the denoiser, on the real lists of keys; and what other programs load."""

from __future__ import annotations

import json
import warnings
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
from spm_hub import conversion
from spm_hub.adapter import Adapter, load_file
from spm_hub.architectures import changeable, family_of
from spm_hub.conversion import BaseModel, Description
from spm_hub.errors import AdapterFileError, CompatibilityError, NotFoundError, UsageError
from spm_hub.formats import kohya, names, spm
from spm_hub.formats.container import MANIFEST_KEY, read_header
from spm_hub.increments import Dense, LowRank, Mask

CONFORMANCE = Path(__file__).resolve().parents[2] / "shared" / "conformance"
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


@pytest.mark.parametrize("model", EXACT)
def test_dots_are_put_back_and_kohyas_names_are_inverted(model: str) -> None:
    make, config, family, *_ = EXACT[model]
    with torch.device("meta"):
        paths = list(changeable(make(**config)))
    assert [names.dotted(spm.flat(path)) for path in paths] == paths
    if family == "sdxl":
        original = [kohya.diffusers_to_sgm(path) for path in paths]
        assert None not in original
        assert len(set(original)) == len(paths)
        assert [names.dotted(kohya.sgm_to_diffusers(str(name)) or "") for name in original] == paths
    elif family == "flux":
        for path in paths:
            out, width = (7, 2) if path.endswith("proj_mlp") else (2, 2)  # rows are counted in inputs
            renamed = kohya.renamed("flux", {path: LowRank(torch.ones(1, width), torch.ones(out, 1))})
            assert len(renamed) == 1
            assert path in map(names.dotted, kohya.canonical(renamed))


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
    adapter = random_eraser(denoiser, rank=2)
    bare, expected = predict(denoiser), output_with(denoiser, adapter)
    again = there_and_back(adapter, to, tmp_path)
    assert again.increments.keys() == adapter.increments.keys()
    assert again.manifest.base.family == family_of(denoiser).name
    assert (output_with(denoiser, again) - expected).abs().max() <= 1e-6
    assert (expected - bare).abs().max() > 1e-2


@pytest.mark.parametrize("kind", ["dense", "mask"])
@pytest.mark.parametrize("to", ["spm", "lycoris", "esd"])
def test_dense_changes_and_masks_come_back(kind: str, to: str, denoiser: nn.Module, tmp_path: Path) -> None:
    adapter, base = random_eraser(denoiser, kind), BaseModel(denoiser, "topology")
    expected = output_with(denoiser, adapter)
    again = there_and_back(adapter, to, tmp_path, base)
    assert again.manifest.increment.kind == ("mask" if (kind, to) == ("mask", "spm") else "dense")
    assert (output_with(denoiser, again) - expected).abs().max() <= 1e-6


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


def kohya_file(
    path: Path, names_of: dict[str, tuple[int, int]], *, spell: str = "{}.{}", **metadata: str
) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(0)
    tensors = {}
    for name, (out, width) in names_of.items():
        tensors[spell.format(name, "lora_down.weight")] = torch.randn(2, width, generator=random)
        tensors[spell.format(name, "lora_up.weight")] = torch.randn(out, 2, generator=random)
    save_file(tensors, path, metadata or None)
    return tensors


@pytest.mark.parametrize("spell", ["{}.{}", "{}_{}"])
@pytest.mark.parametrize("prefix", ["lora_unet_", "lora_unet_unet_"])
def test_leco_and_slider_files_without_metadata(spell: str, prefix: str, tmp_path: Path) -> None:
    if spell == "{}_{}" and prefix == "lora_unet_":
        spell = "{}.{}"
    module = f"{prefix}down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    tensors = kohya_file(tmp_path / "age slider.safetensors", {module: (320, 768)}, spell=spell)
    adapter, _ = conversion.read(tmp_path / "age slider.safetensors", Description(concept="age"))
    assert (adapter.name, adapter.manifest.concept.target, adapter.manifest.base.family) == ("age", "age", "sd1")
    (increment,) = adapter.increments.values()
    down, up = tensors.values()
    exact = up.double() @ down.double()  # no alpha: scale 1
    torch.testing.assert_close(increment.delta_for(torch.zeros(320, 768)).double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("module", "shape", "family"),
    [
        ("down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k", (320, 768), "sd1"),
        ("down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k", (320, 1024), "sd2"),
        ("input_blocks_4_1_transformer_blocks_0_attn2_to_k", (640, 2048), "sdxl"),
        ("input_blocks_4_1_transformer_blocks_1_attn1_to_q", (640, 640), "sdxl"),
        ("double_blocks_0_img_attn_proj", (3072, 3072), "flux"),
        ("single_blocks_0_linear2", (3072, 15360), "flux"),
    ],
)
@pytest.mark.parametrize(
    "lie", [{}, {"ss_base_model_version": "sd_v1"}, {"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}]
)
def test_tensors_tell_the_family_whatever_the_header_says(
    module: str, shape: tuple[int, int], family: str, lie: dict[str, str], tmp_path: Path
) -> None:
    kohya_file(tmp_path / "x.safetensors", {f"lora_unet_{module}": shape}, **lie)
    assert conversion.read(tmp_path / "x.safetensors", NOBODY)[0].manifest.base.family == family


def test_a_family_that_nothing_tells_has_to_be_said(tmp_path: Path) -> None:
    kohya_file(tmp_path / "x.safetensors", {"lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q": (8, 8)})
    with pytest.raises(UsageError, match="--base sd1, sd2"):
        conversion.read(tmp_path / "x.safetensors", NOBODY)
    assert conversion.read(tmp_path / "x.safetensors", Description(family="sd2"))[0].manifest.base.family == "sd2"
    assert (
        load_file(tmp_path / "x.safetensors").manifest.base.family == "unknown"
    )  # never SD1 for want of a better idea
    with pytest.raises(UsageError, match="no family"):
        conversion.read(tmp_path / "x.safetensors", Description(family="sd7"))


def test_a_family_against_the_tensors_is_refused(tmp_path: Path) -> None:
    kohya_file(
        tmp_path / "x.safetensors", {"lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k": (8, 768)}
    )
    with pytest.raises(UsageError, match="--base sdxl, but the file's tensors: sd1"):
        conversion.read(tmp_path / "x.safetensors", Description(family="sdxl"))


@pytest.mark.parametrize("component", ["unet", "transformer"])
def test_diffusers_metadata_scale_its_tensors(component: str, tmp_path: Path) -> None:
    prefix = "down_blocks.0.attentions.0.transformer_blocks.0" if component == "unet" else "transformer_blocks.0.attn"
    config = {"r": 2, "lora_alpha": 6, "alpha_pattern": {"to_k": 1.0}, "use_dora": False, "bias": "none"}
    metadata = {"lora_adapter_metadata": json.dumps({f"{component}.{key}": value for key, value in config.items()})}
    random = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in ("to_q", "to_k"):
        tensors[f"{component}.{prefix}.{layer}.lora_A.weight"] = torch.randn(2, 4, generator=random)
        tensors[f"{component}.{prefix}.{layer}.lora_B.weight"] = torch.randn(4, 2, generator=random)
    save_file(tensors, tmp_path / "x.safetensors", metadata)
    for adapter in (load_file(tmp_path / "x.safetensors"), load_file(tmp_path / "x.safetensors", lazy=True)):
        for layer, alpha in (("to_q", 6.0), ("to_k", 1.0)):
            stem = f"{component}.{prefix}.{layer}"
            exact = tensors[f"{stem}.lora_B.weight"].double() @ tensors[f"{stem}.lora_A.weight"].double() * alpha / 2
            found = adapter.increments[f"{prefix}.{layer}"].delta_for(torch.zeros(4, 4)).double()
            torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stabilised", [False, True])
def test_pefts_own_files_are_read_with_the_scale_of_their_config(stabilised: bool, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    denoiser = topology("sd1")
    config = LoraConfig(
        r=4, lora_alpha=2, target_modules=["attn2.to_k", "proj_in"], alpha_pattern={"proj_in": 3},
        use_rslora=stabilised, init_lora_weights=False,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = get_peft_model(denoiser, config)
    expected = predict(model.get_base_model())
    model.save_pretrained(tmp_path / "lora")
    base = topology("sd1")
    adapter, read_as = conversion.read(tmp_path / "lora", Description(family="sd1"))
    assert (read_as, adapter.name) == ("peft", "lora")
    assert (output_with(base, adapter) - expected).abs().max() <= 1e-5
    assert (predict(base) - expected).abs().max() > 1e-4
    (tmp_path / "lora" / "adapter_config.json").unlink()
    with pytest.raises(NotFoundError, match="adapter_config"):
        conversion.read(tmp_path / "lora", NOBODY)
    with pytest.raises(AdapterFileError, match="spmhub convert"):
        load_file(tmp_path / "lora" / "adapter_model.safetensors")


@pytest.mark.parametrize("change", [{"use_dora": True}, {"peft_type": "LOHA"}, {"bias": "all"}, {"lora_alpha": None}])
def test_pefts_other_kinds_are_refused(change: dict[str, Any], tmp_path: Path) -> None:
    conversion.write(random_eraser(topology("sd1")), conversion.writer_named("peft"), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | change))
    with pytest.raises(AdapterFileError, match=next(iter(change))):
        conversion.read(tmp_path, NOBODY)


@pytest.mark.parametrize("kind", ["loha", "lokr", "lokr factored", "lokr whole"])
def test_lycoris_products_are_the_dense_change_they_stand_for(kind: str, tmp_path: Path) -> None:
    random = torch.Generator().manual_seed(0)
    shapes = {
        "loha": {"hada_w1_a": (6, 2), "hada_w1_b": (2, 8), "hada_w2_a": (6, 2), "hada_w2_b": (2, 8)},
        "lokr": {"lokr_w1": (2, 4), "lokr_w2_a": (3, 2), "lokr_w2_b": (2, 2)},
        "lokr factored": {"lokr_w1_a": (2, 2), "lokr_w1_b": (2, 4), "lokr_w2_a": (3, 2), "lokr_w2_b": (2, 2)},
        "lokr whole": {"lokr_w1": (2, 4), "lokr_w2": (3, 2)},
    }[kind]
    parts = {part: torch.randn(shape, generator=random) for part, shape in shapes.items()}
    stem = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    save_file(
        {f"{stem}.{part}": one for part, one in parts.items()} | {f"{stem}.alpha": torch.tensor(1.0)},
        tmp_path / "x.safetensors",
    )
    adapter, read_as = conversion.read(tmp_path / "x.safetensors", Description(family="sd1"))
    p = {part: one.double() for part, one in parts.items()}
    if kind == "loha":
        exact = (p["hada_w1_a"] @ p["hada_w1_b"]) * (p["hada_w2_a"] @ p["hada_w2_b"]) / 2
    else:
        w1 = p["lokr_w1"] if "lokr_w1" in p else p["lokr_w1_a"] @ p["lokr_w1_b"]
        w2 = p["lokr_w2"] if "lokr_w2" in p else p["lokr_w2_a"] @ p["lokr_w2_b"]
        exact = torch.einsum("ab,cd->acbd", w1, w2).reshape(6, 8) * (1 if kind == "lokr whole" else 0.5)
    (increment,) = adapter.increments.values()
    assert (read_as, increment.kind) == ("lycoris", "dense")
    torch.testing.assert_close(increment.delta_for(torch.zeros(6, 8)).double(), exact, rtol=1e-6, atol=1e-6)


def test_thin_factors_of_an_absurd_product_are_refused(tmp_path: Path) -> None:
    stem = "lora_unet_mid_block_attentions_0_proj_in"
    parts = {
        f"hada_w{i}_{side}": torch.ones((20_000, 1) if side == "a" else (1, 20_000)) for i in (1, 2) for side in "ab"
    }
    save_file({f"{stem}.{part}": one for part, one in parts.items()}, tmp_path / "x.safetensors")
    with pytest.raises(AdapterFileError, match="400000000 numbers"):
        conversion.read(tmp_path / "x.safetensors", NOBODY)
    with pytest.raises(AdapterFileError, match="spmhub convert"):
        load_file(tmp_path / "x.safetensors")


def test_a_dense_eraser_is_approximated_with_the_error_that_it_has(tmp_path: Path) -> None:
    adapter = random_eraser(topology("sd2"), "dense")
    with pytest.raises(UsageError, match="--svd-rank 8") as refused:
        conversion.write(adapter, conversion.writer_named("diffusers"), tmp_path / "x.safetensors")
    assert "lycoris" in str(refused.value)
    assert not list(tmp_path.iterdir())
    reduction = conversion.reduce(adapter, 4)
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
    reduction = conversion.reduce(conversion.with_increments(lows, dense), 3)
    assert reduction.relative_error < 1e-6
    denoiser = topology("sd1")
    assert (output_with(denoiser, reduction.adapter) - output_with(denoiser, lows)).abs().max() <= 1e-5


class Evil:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("evil-was-run"),))


def cross_attention(model: nn.Module) -> dict[str, Tensor]:
    return {key: value for key, value in model.state_dict().items() if "attn2.to_k" in key or "attn2.to_v" in key}


@pytest.mark.parametrize("wrapped", ["unet", "state_dict", "compvis", "whole unet", "safetensors"])
def test_concept_ablation_and_uce_files(wrapped: str, tmp_path: Path) -> None:
    base, trained = topology("sd1"), topology("sd1")
    random = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for tensor in cross_attention(trained).values():
            tensor += 0.1 * torch.randn(tensor.shape, generator=random)
    tensors = cross_attention(trained)
    path = tmp_path / "delta.bin"
    match wrapped:
        case "unet":
            torch.save({"unet": tensors}, path)
        case "state_dict":
            torch.save({"state_dict": {f"unet.{key}": value for key, value in tensors.items()}}, path)
        case "compvis":
            original = {}
            for key, value in tensors.items():
                module = key.removesuffix(".weight")
                ldm = str(kohya.diffusers_to_sgm(module))  # SD1 numbers its blocks as SDXL does
                dots = ldm.replace("_transformer_blocks_0_attn2_to_", ".transformer_blocks.0.attn2.to_")
                head, tail = dots.split(".", 1)
                head = head.replace("blocks_", "blocks.").replace("block_", "block.")
                head = ".".join([head.split(".")[0], *head.split(".")[1].split("_")])
                original[f"model.diffusion_model.{head}.{tail}.weight"] = value
            torch.save({"state_dict": original}, path)
        case "whole unet":
            torch.save(trained.state_dict(), path)
        case "safetensors":
            path = tmp_path / "uce.safetensors"
            save_file({key: value.clone() for key, value in tensors.items()}, path)
    adapter, read_as = conversion.read(path, Description(concept="grumpy cat"), BaseModel(base, "here"))
    assert (read_as, len(adapter.increments)) == ("full-weights", 32)
    assert (output_with(base, adapter) - predict(trained)).abs().max() <= 1e-6


def test_full_tensors_that_are_no_erasers_are_refused(tmp_path: Path) -> None:
    base = BaseModel(topology("sd1"), "here")
    state = {key: value.clone() for key, value in topology("sd1").state_dict().items()}
    cases: list[tuple[dict[str, Tensor], str]] = [
        (state, "nothing is erased"),
        ({**state, "conv_norm_out.weight": state["conv_norm_out.weight"] + 1}, "conv_norm_out.weight was trained too"),
        ({"elsewhere.weight": torch.ones(2, 2)}, "no tensor 'elsewhere.weight'"),
        ({"conv_in.weight": torch.ones(2, 2)}, r"conv_in.weight is \(2, 2\), the model's is \(8, 4, 3, 3\)"),
    ]
    for tensors, complaint in cases:
        save_file(tensors, tmp_path / "x.safetensors")
        with pytest.raises(AdapterFileError, match=complaint):
            conversion.read(tmp_path / "x.safetensors", NOBODY, base)


def test_half_precision_tensors_are_compared_with_the_base_in_half_precision(tmp_path: Path) -> None:
    """Otherwise every untouched weight would differ by its rounding."""
    base = topology("sd1")
    state = {key: value.half() for key, value in base.state_dict().items()}
    key = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    before = state[key].clone()
    state[key] = state[key] + 0.25
    save_file(state, tmp_path / "x.safetensors")
    adapter, _ = conversion.read(tmp_path / "x.safetensors", NOBODY, BaseModel(base, "here"))
    assert list(adapter.increments) == [key.removesuffix(".weight")]
    found = adapter.increments[key.removesuffix(".weight")].delta_for(base.state_dict()[key])
    assert torch.equal(found, state[key].float() - before.float())


def test_pickles_are_read_as_tensors_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tensors = spm.to_tensors(random_eraser(topology("sd1")).increments)
    torch.save(tensors, tmp_path / "leco_last.pt")
    adapter, _ = conversion.read(tmp_path / "leco_last.pt", NOBODY)
    assert len(adapter.increments) == 192
    with pytest.raises(AdapterFileError, match="pickle"):
        load_file(tmp_path / "leco_last.pt")
    torch.save({"a": Evil(), **tensors}, tmp_path / "evil.pt")
    with pytest.raises(AdapterFileError, match="more than tensors"):
        conversion.read(tmp_path / "evil.pt", NOBODY)
    assert not (tmp_path / "evil-was-run").exists()
    torch.save({"unet": tensors, "text_encoder": {"a": torch.ones(2)}}, tmp_path / "both.pt")
    with pytest.raises(AdapterFileError, match="text_encoder"):
        conversion.read(tmp_path / "both.pt", NOBODY)
    data = (tmp_path / "leco_last.pt").read_bytes()
    for cut in (0, 10, len(data) // 2, len(data) - 30):
        (tmp_path / "cut.pt").write_bytes(data[:cut])
        with pytest.raises(AdapterFileError):
            conversion.read(tmp_path / "cut.pt", NOBODY)
    torch.save({"x.lora_down.weight": torch.ones(1, 1).expand(50_000, 50_000)}, tmp_path / "bomb.pt")
    with pytest.raises(AdapterFileError, match="claim"):
        conversion.read(tmp_path / "bomb.pt", NOBODY)


def test_text_encoder_parts_are_refused_plainly(tmp_path: Path) -> None:
    kohya_file(
        tmp_path / "x.safetensors",
        {"lora_unet_mid_block_attentions_0_proj_in": (4, 4), "lora_te_text_model_encoder_layers_0_mlp_fc1": (4, 4)},
    )
    with pytest.raises(AdapterFileError, match="text encoder"):
        conversion.read(tmp_path / "x.safetensors", NOBODY)


@needs_conformance
def test_the_real_lora_files_are_loaded_or_refused(tmp_path: Path) -> None:
    adapter, read_as = conversion.read(CONFORMANCE / "lora" / "catundchat.safetensors", NOBODY)
    assert (read_as, adapter.manifest.base.family, len(adapter.increments)) == ("diffusers", "sd1", 128)
    for name in ("cloneofsimo_analog_svd_rank4", "cloneofsimo_lora_disney"):
        with pytest.raises(AdapterFileError, match="numbers its layers"):
            conversion.read(CONFORMANCE / "lora" / f"{name}.safetensors", NOBODY)
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768)
    spm_hub.architectures.check(adapter, unet)
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
    assert metadata["modelspec.architecture"] == "flux-1/lora"
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
        conversion.reduce(adapter, 2)


def test_a_file_that_does_not_fit_the_model_is_refused(tmp_path: Path) -> None:
    conversion.write(random_eraser(topology("sd1")), conversion.writer_named("kohya"), tmp_path / "x.safetensors")
    tensors = load_tensors(tmp_path / "x.safetensors")
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(CompatibilityError):
        conversion.read(tmp_path / "x.safetensors", NOBODY, BaseModel(topology("sdxl"), "sdxl"))
