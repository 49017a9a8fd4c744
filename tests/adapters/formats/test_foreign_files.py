"""Files of other programs, as they write them: read to what they mean, or refused in plain words."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file as load_tensors
from safetensors.torch import save_file
from topologies import output_with, predict, random_eraser, topology
from torch import Tensor, nn

from spm_hub.adapters import conversion
from spm_hub.adapters.adapter import load_file
from spm_hub.adapters.conversion import BaseModel, Description
from spm_hub.adapters.formats import original_names, spm
from spm_hub.errors import AdapterFileError, CompatibilityError, NotFoundError, SpmHubError, UsageError

NOBODY = Description()


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


@pytest.mark.parametrize(
    "change", [{"use_dora": True}, {"peft_type": "VERA"}, {"use_qalora": True}, {"lora_alpha": None}]
)
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
                ldm = str(original_names.diffusers_to_sgm(module))  # SD1 numbers its blocks as SDXL does
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


def test_a_file_that_does_not_fit_the_model_is_refused(tmp_path: Path) -> None:
    conversion.write(random_eraser(topology("sd1")), conversion.writer_named("kohya"), tmp_path / "x.safetensors")
    tensors = load_tensors(tmp_path / "x.safetensors")
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(CompatibilityError):
        conversion.read(tmp_path / "x.safetensors", NOBODY, BaseModel(topology("sdxl"), "sdxl"))


def test_damaged_pickles_are_a_sentence(tmp_path: Path) -> None:
    """Bytes changed, cut out or doubled anywhere: read, or refused in our own words; quickly either way."""
    module = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    torch.save(kohya_file(tmp_path / "x.safetensors", {module: (6, 768)}), tmp_path / "good.pt")
    good = (tmp_path / "good.pt").read_bytes()
    refused = 0
    for seed in range(120):
        rng = random.Random(seed)
        data = bytearray(good)
        for _ in range(rng.randint(1, 6)):
            place = rng.randrange(len(data))
            match seed % 3:
                case 0:
                    data[place] ^= 1 << rng.randrange(8)
                case 1:
                    del data[place : place + rng.randint(1, 40)]
                case _:
                    data[place:place] = data[place : place + rng.randint(1, 40)]
        (tmp_path / "x.pt").write_bytes(data)
        started = time.process_time()
        try:
            conversion.read(tmp_path / "x.pt", NOBODY)
        except SpmHubError:
            refused += 1
        assert time.process_time() - started < 2.0, seed
    assert refused > 40
