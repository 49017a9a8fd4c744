"""Layouts of other programs, by inputs of our own: names of wrappers, eight bits, rotations, dotted LyCORIS, XLabs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders import lora_conversion_utils
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from topologies import output_with, predict, topology
from torch import Tensor

from spm_hub.adapters import conversion
from spm_hub.adapters.adapter import Adapter, load_file
from spm_hub.adapters.conversion import BaseModel, Description
from spm_hub.adapters.formats.module_names import flat
from spm_hub.errors import AdapterFileError

NOBODY = Description()
SD1 = Description(family="sd1")
BLOCK = "mid_block.attentions.0.transformer_blocks.0"
TO_K, TO_Q = f"{BLOCK}.attn2.to_k", f"{BLOCK}.attn1.to_q"
AB = ("lora_A.weight", "lora_B.weight")


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pair(prefix: str, ends: tuple[str, str] = AB, out: int = 64, width: int = 768) -> dict[str, Tensor]:
    return {f"{prefix}.{ends[0]}": noise(1, 2, width), f"{prefix}.{ends[1]}": noise(2, out, 2)}


def read(tensors: dict[str, Tensor], folder: Path, said: Description = NOBODY, base: Any = None) -> Adapter:
    file = folder / "style.safetensors"
    save_file({key: value.contiguous() for key, value in tensors.items()}, file)
    return conversion.read(file, said, None if base is None else BaseModel(base, "here"))[0]


def delta_of(adapter: Adapter, path: str, like: Tensor) -> Tensor:
    return adapter.increments[path].delta_for(like).double()


@pytest.mark.parametrize(
    "prefix",
    [
        "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "unet._orig_mod.", "module.unet.",
        "unet.module._orig_mod.", "_fsdp_wrapped_module.unet.", "module.module.", "model.module.unet.", "model.unet.",
    ],
)  # fmt: skip
@pytest.mark.parametrize("inner", ["", "_orig_mod."])
def test_wrappers_are_no_part_of_a_name(prefix: str, inner: str, tmp_path: Path) -> None:
    """PEFT pairs, pairs of attention processors, and whole weights."""
    root, _, end = TO_K.partition("transformer_blocks.0.")
    wrapped = f"{prefix}{root}transformer_blocks.0.{inner}{end}"
    tensors = pair(wrapped)
    adapter = read(tensors, tmp_path)
    down, up = tensors.values()
    assert list(adapter.increments) == [TO_K]
    exact = up.double() @ down.double()
    torch.testing.assert_close(delta_of(adapter, TO_K, torch.zeros(64, 768)), exact, rtol=1e-5, atol=1e-5)
    attention = wrapped.removesuffix(".to_k")
    older = read(pair(f"{attention}.processor.to_k_lora", ("down.weight", "up.weight")), tmp_path)
    assert torch.equal(older.increments[TO_K].tensors()["up"], up)
    base = topology("sd1")
    weight = base.state_dict()[f"{TO_K}.weight"]
    whole = read({f"{wrapped}.weight": weight + 1}, tmp_path, NOBODY, base)
    torch.testing.assert_close(delta_of(whole, TO_K, weight), torch.ones_like(weight).double())


@pytest.mark.parametrize(
    "prefix",
    [
        "model.diffusion_model._orig_mod.", "_orig_mod.model.diffusion_model.", "module.diffusion_model.",
        "model.module.diffusion_model.",
    ],
)  # fmt: skip
def test_wrappers_around_original_names(prefix: str, tmp_path: Path) -> None:
    name = "middle_block.1.transformer_blocks.0.attn2.to_k"
    assert list(read(pair(prefix + name), tmp_path, SD1).increments) == [TO_K.replace(".", ".")]
    base = topology("sd1")
    weight = base.state_dict()[f"{TO_K}.weight"]
    assert list(read({f"{prefix}{name}.weight": 2 * weight}, tmp_path, SD1, base).increments) == [TO_K]
    flat_names = pair(f"lora_unet__orig_mod_{flat(TO_K)}", ("lora_down.weight", "lora_up.weight"))
    assert list(read(flat_names, tmp_path, SD1).increments) == [TO_K]


@pytest.mark.parametrize("name", ["default", "default_0", "my-style"])
@pytest.mark.parametrize("module", [f"unet.{TO_K}", TO_K, "transformer.transformer_blocks.0.attn.to_q"])
def test_names_of_pefts_adapters_are_no_part_of_a_name(name: str, module: str, tmp_path: Path) -> None:
    named = pair(module, (f"lora_A.{name}.weight", f"lora_B.{name}.weight"))
    plain = pair(module)
    said = Description(family="sd3") if "transformer.trans" in module else SD1
    found, expected = read(named, tmp_path, said).increments, read(plain, tmp_path, said).increments
    assert found.keys() == expected.keys()
    for path, increment in expected.items():
        assert torch.equal(increment.tensors()["up"], found[path].tensors()["up"])
    load_file(tmp_path / "style.safetensors")
    save_file(named | pair(module, ("lora_A.other.weight", "lora_B.other.weight")), tmp_path / "two.safetensors")
    with pytest.raises(AdapterFileError, match="of two adapters or two copies"):
        conversion.read(tmp_path / "two.safetensors", said)


@pytest.mark.parametrize("module", [f"unet.{TO_K}", TO_K, f"lora_unet_{flat(TO_K)}"])
def test_the_name_of_an_adapter_in_other_kinds_of_files(module: str, tmp_path: Path) -> None:
    delta = torch.randn(64, 768, generator=torch.Generator().manual_seed(3))
    (one,) = read({f"{module}.default.diff": delta}, tmp_path, SD1).increments.values()
    assert torch.equal(one.tensors()["delta"], delta)
    first, second = delta[:, :2].contiguous(), delta[:2].contiguous()
    factors = {"hada_w1_a": first, "hada_w1_b": second, "hada_w2_a": 2 * first, "hada_w2_b": second.clone()}
    (one,) = read(
        {f"{module}.{part}.default": each for part, each in factors.items()}, tmp_path, SD1
    ).increments.values()
    torch.testing.assert_close(one.tensors()["delta"], 2 * (first @ second) ** 2, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_eight_bit_pairs_are_widened_exactly(dtype: torch.dtype, tmp_path: Path) -> None:
    stem = f"lora_unet_{flat(TO_K)}"
    tensors = {key: value.to(dtype) for key, value in pair(stem, ("lora_down.weight", "lora_up.weight")).items()}
    down, up = (value.double() for value in tensors.values())
    adapter = read(tensors | {f"{stem}.alpha": torch.tensor(2.0)}, tmp_path, SD1)
    torch.testing.assert_close(delta_of(adapter, TO_K, torch.zeros(64, 768)), up @ down, rtol=1e-6, atol=1e-6)
    for lazy in (False, True):
        loaded = load_file(tmp_path / "style.safetensors", lazy=lazy)
        (one,) = loaded.increments.values()
        assert torch.equal(one.tensors()["up"].double(), up)
    scale = {
        f"{stem}.lora_down.weight_scale": torch.tensor(0.25),
        f"{stem}.lora_up.weight_scale": torch.full((64,), 3.0),
    }
    scaled = read(tensors | scale, tmp_path, SD1)
    torch.testing.assert_close(delta_of(scaled, TO_K, torch.zeros(64, 768)), 0.75 * (up @ down), rtol=1e-6, atol=1e-5)
    bad = tensors[f"{stem}.lora_up.weight"].clone().view(torch.uint8)
    bad[3, 1] = 0x7F
    save_file(tensors | {f"{stem}.lora_up.weight": bad.view(dtype)}, tmp_path / "style.safetensors")
    with pytest.raises(AdapterFileError, match="NaN") as refused:
        conversion.read(tmp_path / "style.safetensors", SD1)
    assert "OWNER/NAME" not in str(refused.value)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("spelling", [None, "scale_weight", "weight_scale"])
def test_whole_weights_in_eight_bits(dtype: torch.dtype, spelling: str | None, tmp_path: Path) -> None:
    """What only eight bits changed is no training; what was trained is the product of number and scale."""
    base = topology("sd1")
    state = {key: value.clone() for key, value in base.state_dict().items() if key.endswith("weight")}
    trained = state[f"{TO_K}.weight"] + 0.5
    tensors: dict[str, Tensor] = {"scaled_fp8": torch.zeros(2).to(dtype)} if spelling else {}
    scales: dict[str, float] = {}
    for key, value in (state | {f"{TO_K}.weight": trained}).items():
        scales[key] = float(value.abs().max()) / torch.finfo(dtype).max if spelling and value.dim() > 1 else 1.0
        tensors[key] = (value / scales[key]).to(dtype)
        if spelling and value.dim() > 1:
            tensors[f"{key.removesuffix('.weight')}.{spelling}"] = torch.tensor(scales[key])
            tensors[f"{key.removesuffix('.weight')}.scale_input"] = torch.tensor(1.0)
    adapter = read(tensors, tmp_path, NOBODY, base)
    key = f"{TO_K}.weight"
    if spelling is None:
        assert list(adapter.increments) == [TO_K]
    # Under a scale of its own the base is rounded otherwise than under the trained weight's.
    before = (state[key] / scales[key]).to(dtype).double() * torch.tensor(scales[key]).double()
    after = tensors[key].double() * torch.tensor(scales[key]).double()
    torch.testing.assert_close(delta_of(adapter, TO_K, trained), after - before, rtol=1e-5, atol=1e-6)
    assert set(adapter.increments) == {TO_K}


def test_alpha_zero_switches_a_module_off_and_no_other(tmp_path: Path) -> None:
    ends = ("lora_down.weight", "lora_up.weight")
    stems = {path: f"lora_unet_{flat(path)}" for path in (TO_K, TO_K.replace("to_k", "to_v"))}
    tensors = {key: value for stem in stems.values() for key, value in pair(stem, ends).items()}
    first, second = stems
    adapter = read(tensors | {f"{stems[second]}.alpha": torch.tensor(0.0)}, tmp_path, SD1)
    assert not adapter.increments[second].delta_for(torch.zeros(64, 768)).any()
    expected = tensors[f"{stems[first]}.lora_up.weight"] @ tensors[f"{stems[first]}.lora_down.weight"]
    torch.testing.assert_close(adapter.increments[first].delta_for(torch.zeros(64, 768)), expected)
    factors = {f"{stems[first]}.{part}": torch.ones(2, 2) for part in ("lokr_w1", "lokr_w2_a", "lokr_w2_b")}
    other = {f"{stems[second]}.diff": torch.ones(4, 4)}
    off = read(factors | other | {f"{stems[first]}.alpha": torch.zeros(1)}, tmp_path, SD1)
    assert not off.increments[first].delta_for(torch.zeros(4, 4)).any()
    save_file(tensors | {f"{stems[first]}.alpha": torch.ones(2)}, tmp_path / "x.safetensors")
    with pytest.raises(AdapterFileError, match="alpha must be one finite number"):
        conversion.read(tmp_path / "x.safetensors", SD1)


def cayley(block: Tensor, limit: float = 0.0) -> Tensor:
    """(I + Q)(I - Q)^-1 by solving, in float64; all blocks together are at most `limit` long."""
    skew = block.double() - block.double().transpose(-1, -2)
    if limit and skew.norm() > limit:
        skew = skew * limit / skew.norm()
    unit = torch.eye(skew.shape[-1], dtype=torch.float64)
    return torch.linalg.solve((unit - skew).transpose(-1, -2), (unit + skew).transpose(-1, -2)).transpose(-1, -2)


def rotated_by_blocks(weight: Tensor, rotations: Tensor) -> Tensor:
    return torch.block_diag(*[rotation.T for rotation in rotations]) @ weight.double().flatten(1)


@pytest.mark.parametrize("kind", ["oft", "oft limited", "oft rescaled", "oft of old", "boft", "boft rescaled"])
@pytest.mark.parametrize("path", [TO_Q, "down_blocks.1.resnets.0.conv1"])
def test_rotations_of_the_weight(kind: str, path: str, tmp_path: Path) -> None:
    base = topology("sd1")
    weight = base.state_dict()[f"{path}.weight"]
    out, size = len(weight), 2 if kind.startswith("boft") else 4
    matrix = weight.double().flatten(1)
    stem = f"lora_unet_{flat(path)}"
    blocks = 0.3 * noise(3, out // size, size, size)
    tensors = {f"{stem}.oft_blocks": blocks, f"{stem}.alpha": torch.tensor(0.0)}
    match kind:
        case "oft limited":
            tensors[f"{stem}.alpha"] = torch.tensor(1e-2)
            exact = rotated_by_blocks(weight, cayley(blocks, 1e-2 * out))
            assert blocks.norm() > 1e-2 * out
        case "oft of old":
            tensors = {f"{stem}.oft_diag": blocks}
            exact = rotated_by_blocks(weight, blocks.double())
        case "boft" | "boft rescaled":
            blocks = 0.3 * noise(4, 2, out // size, size, size)
            tensors[f"{stem}.oft_blocks"] = blocks
            exact = matrix
            for step, rotations in enumerate(cayley(blocks)):
                # Rows that are 2^step * size / 2 apart stand next to each other while they are rotated.
                apart = 2**step * size // 2
                order = [
                    start + half * apart + k
                    for start in range(0, out, 2 * apart)
                    for k in range(apart)
                    for half in (0, 1)
                ]
                mixed = torch.block_diag(*rotations) @ exact[order]
                exact = torch.empty_like(exact)
                exact[order] = mixed
        case _:
            exact = rotated_by_blocks(weight, cayley(blocks))
    if kind.endswith("rescaled"):
        lengths = 1 + 0.1 * noise(5, out)
        tensors[f"{stem}.rescale"] = lengths.reshape(-1, *[1] * (weight.dim() - 1))
        exact = lengths.double()[:, None] * exact
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(AdapterFileError, match="OFT, which rotates") as refused:
        conversion.read(tmp_path / "x.safetensors", SD1)
    assert "--model M" in str(refused.value)
    found = delta_of(read(tensors, tmp_path, NOBODY, base), path, weight)
    torch.testing.assert_close(found.flatten(1), exact - matrix, rtol=1e-5, atol=1e-6)
    assert found.abs().max() > 1e-3


def test_kohyas_rotations_of_fused_rows(tmp_path: Path) -> None:
    """Each of q, k and v has blocks and a limit of its own, under the file's one name."""
    base = topology("flux")
    state = base.state_dict()
    stem = "oft_unet_double_blocks_3_img_attn_qkv"
    parts = [0.2 * noise(seed, 2, 8, 8) for seed in range(3)]
    tensors = {f"{stem}.oft_blocks.{place}": part for place, part in enumerate(parts)}
    adapter = read(tensors | {f"{stem}.alpha": torch.tensor(0.05)}, tmp_path, NOBODY, base)
    assert len(adapter.increments) == 3
    for layer, blocks in zip(("to_q", "to_k", "to_v"), parts, strict=True):
        path = f"transformer_blocks.3.attn.{layer}"
        weight = state[f"{path}.weight"]
        exact = rotated_by_blocks(weight, cayley(blocks, 0.05 * len(weight))) - weight.double()
        torch.testing.assert_close(delta_of(adapter, path, weight), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("path", [TO_Q, "down_blocks.1.resnets.0.conv1"])
@pytest.mark.parametrize("on_input", [False, True])
def test_scaled_rows_and_columns(path: str, on_input: bool, tmp_path: Path) -> None:
    base = topology("sd1")
    weight = base.state_dict()[f"{path}.weight"]
    count = weight.shape[1] if on_input else weight.shape[0]
    scales = 0.1 * noise(7, count)
    kept = scales if weight.dim() == 2 else scales.reshape(1, -1, 1, 1)
    tensors = {f"lora_unet_{flat(path)}.weight": kept, f"lora_unet_{flat(path)}.on_input": torch.tensor(int(on_input))}
    shape = (1, -1) if on_input else (-1, 1)
    exact = weight.double() * scales.double().reshape(*shape, *[1] * (weight.dim() - 2))
    found = delta_of(read(tensors, tmp_path, NOBODY, base), path, weight)
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-7)
    with pytest.raises(AdapterFileError, match="IA3"):
        read(tensors, tmp_path, SD1)
    tensors[f"lora_unet_{flat(path)}.weight"] = noise(7, 5)
    with pytest.raises(AdapterFileError, match="do not fit the model's weight"):
        read(tensors, tmp_path, NOBODY, base)


@pytest.mark.parametrize("old", [False, True])
def test_products_with_the_weight(old: bool, tmp_path: Path) -> None:
    base = topology("sd1")
    path = TO_K
    weight = base.state_dict()[f"{path}.weight"]
    out, width = weight.shape
    a1, a2, b1, b2 = noise(1, width, 2), noise(2, 2, width), noise(3, out, 2), noise(4, 2, width)
    exact = (weight.double() @ a1.double() @ a2.double() + b1.double() @ b2.double()) / 2
    if old:
        a1, a2, b1, b2 = a2, a1, b2, b1
    stem = f"lora_unet_{flat(path)}"
    tensors = {
        f"{stem}.{name}.weight": one for name, one in zip(("a1", "a2", "b1", "b2"), (a1, a2, b1, b2), strict=True)
    }
    adapter = read(tensors | {f"{stem}.alpha": torch.tensor(1.0)}, tmp_path, NOBODY, base)
    torch.testing.assert_close(delta_of(adapter, path, weight), exact, rtol=1e-5, atol=1e-5)


def test_the_change_of_a_bias_alone(tmp_path: Path) -> None:
    base = topology("sd1")
    bias = base.state_dict()["conv_out.bias"]
    adapter = read({"lora_unet_conv_out.diff_b": torch.ones_like(bias)}, tmp_path, NOBODY, base)
    (one,) = adapter.increments.values()
    assert (one.tensors()["delta"].any(), one.tensors()["delta_bias"].tolist()) == (False, [1.0] * len(bias))
    with pytest.raises(AdapterFileError, match="a bias alone"):
        read({"lora_unet_conv_out.diff_b": torch.ones_like(bias)}, tmp_path, SD1)


def test_entries_next_to_a_product(tmp_path: Path) -> None:
    stem = f"lora_unet_{flat(TO_K)}"
    factors = pair(stem, ("lora_down.weight", "lora_up.weight"))
    down, up = factors.values()
    sparse = {
        f"{stem}.bias_indices": torch.tensor([[0, 63, 0], [5, 767, 5]], dtype=torch.int16),
        f"{stem}.bias_values": torch.tensor([1.0, 2.0, 0.5]).half(),
        f"{stem}.bias_size": torch.tensor([64, 768], dtype=torch.int16),
    }
    exact = up.double() @ down.double()
    exact[0, 5] += 1.5
    exact[63, 767] += 2
    adapter = read(factors | sparse, tmp_path, SD1)
    torch.testing.assert_close(delta_of(adapter, TO_K, exact), exact, rtol=1e-5, atol=1e-5)
    for part, wrong in (
        ("bias_indices", torch.tensor([[64, 0, 0], [0, 0, 0]])), ("bias_size", torch.tensor([65, 768])),
        ("bias_values", torch.ones(2)),
    ):  # fmt: skip
        with pytest.raises(AdapterFileError, match="sparse change"):
            read(factors | sparse | {f"{stem}.{part}": wrong}, tmp_path, SD1)


@pytest.mark.parametrize("kind", ["lokr", "loha", "full", "dora"])
@pytest.mark.parametrize(
    ("prefix", "original"), [("transformer.", False), ("diffusion_model.", True), ("lycoris.", False), ("", False)]
)
def test_lycoris_under_dotted_names(kind: str, prefix: str, original: bool, tmp_path: Path) -> None:
    """The same tensors as under flat names, whose meaning other tests check."""
    name = "double_blocks.0.img_attn.proj" if original else "transformer_blocks.0.attn.to_out.0"
    parts = {
        "lokr": {"lokr_w1": noise(1, 2, 2), "lokr_w2_a": noise(2, 8, 3), "lokr_w2_b": noise(3, 3, 8)},
        "loha": {f"hada_w{i}_{s}": noise(i, *((16, 3) if s == "a" else (3, 16))) for i in (1, 2) for s in "ab"},
        "full": {"diff": noise(1, 16, 16), "diff_b": noise(2, 16)},
        "dora": {"lokr_w1": noise(1, 2, 2), "lokr_w2": noise(2, 8, 8), "dora_scale": 1 + noise(3, 16, 1).abs()},
    }[kind]
    if kind in ("lokr", "loha"):
        parts["alpha"] = torch.tensor(1.5)
    if prefix == "":
        parts.pop("alpha", None)
    base = topology("flux")
    flat_name = "lora_unet_double_blocks_0_img_attn_proj"
    expected = read({f"{flat_name}.{part}": value for part, value in parts.items()}, tmp_path, NOBODY, base)
    found = read({f"{prefix}{name}.{part}": value for part, value in parts.items()}, tmp_path, NOBODY, base)
    assert found.increments.keys() == expected.increments.keys() == {"transformer_blocks.0.attn.to_out.0"}
    for path, increment in expected.increments.items():
        for part, tensor in increment.tensors().items():
            assert torch.equal(tensor, found.increments[path].tensors()[part])


@pytest.mark.parametrize("axis", [0, 1])
def test_magnitudes_of_fused_rows(axis: int, tmp_path: Path) -> None:
    """Of rows each part has its own; a column's length is that of q, k and v together, which no part can say."""
    base = topology("flux")
    state = base.state_dict()
    paths = [f"transformer_blocks.1.attn.{layer}" for layer in ("to_q", "to_k", "to_v")]
    whole = torch.cat([state[f"{path}.weight"] for path in paths]).double()
    stem = "lora_unet_double_blocks_1_img_attn_qkv"
    down, up = noise(1, 2, 16), noise(2, 48, 2)
    lengths = 1 + torch.rand(48, 1) if axis == 0 else 1 + torch.rand(1, 16)
    tensors = {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.dora_scale": lengths}
    if axis == 1:
        with pytest.raises(AdapterFileError, match="one of several parts of a weight"):
            read(tensors, tmp_path, NOBODY, base)
        return
    adapter = read(tensors, tmp_path, NOBODY, base)
    moved = whole + up.double() @ down.double()
    exact = moved / moved.norm(dim=1, keepdim=True) * lengths.double() - whole
    found = torch.cat([delta_of(adapter, path, state[f"{path}.weight"]) for path in paths])
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-5)


def test_xlabs_processors_as_diffusers_reads_them(tmp_path: Path) -> None:
    width, mlp = 64, 256
    tensors: dict[str, Tensor] = {}
    for block in (0, 7):
        for layer, (out, inputs) in {
            "double qkv_lora1": (3 * width, width), "double qkv_lora2": (3 * width, width),
            "double proj_lora1": (width, width), "double proj_lora2": (width, width),
            "single qkv_lora": (3 * width, width), "single proj_lora": (width, width + mlp),
        }.items():  # fmt: skip
            kind, name = layer.split()
            stem = f"{kind}_blocks.{block}.processor.{name}"
            tensors[f"{stem}.down.weight"] = noise(len(tensors), 2, inputs)
            tensors[f"{stem}.up.weight"] = noise(len(tensors), out, 2)
    theirs = lora_conversion_utils._convert_xlabs_flux_lora_to_diffusers(dict(tensors))
    adapter = read(tensors, tmp_path, Description(family="flux"))
    stems = {key.removeprefix("transformer.").rsplit(".lora_", 1)[0] for key in theirs}
    assert adapter.increments.keys() == stems
    for path, increment in adapter.increments.items():
        up, down = (theirs[f"transformer.{path}.lora_{part}.weight"].double() for part in "BA")
        found = increment.delta_for(torch.zeros(len(up), down.shape[1])).double()
        torch.testing.assert_close(found, up @ down, rtol=1e-5, atol=1e-5)
    adding = {"double_blocks.0.processor.ip_adapter_double_stream_k_proj.weight": torch.ones(4, 4), **tensors}
    with pytest.raises(AdapterFileError, match="IP-Adapter"):
        read(adding, tmp_path, Description(family="flux"))


@pytest.mark.parametrize("spelling", ["peft", "diffusers"])
def test_biases_of_the_second_factor_as_peft_adds_them(spelling: str, tmp_path: Path) -> None:
    denoiser, base = topology("sd1"), topology("sd1")
    config = LoraConfig(
        r=4, lora_alpha=2, target_modules=["attn2.to_out.0", "proj_in"], lora_bias=True, init_lora_weights=False
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = get_peft_model(denoiser, config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name and name.endswith("bias"):
                    parameter.normal_(std=0.3)
    expected = predict(model.get_base_model())
    model.save_pretrained(tmp_path / "lora")
    if spelling == "peft":
        adapter, _ = conversion.read(tmp_path / "lora", SD1)
        file = tmp_path / "lora" / "adapter_model.safetensors"
    else:
        state = {key.replace("base_model.model.", "unet."): value for key, value in model.state_dict().items()}
        tensors = {key: value for key, value in state.items() if "lora_" in key}
        header = {"lora_adapter_metadata": '{"unet.lora_alpha": 2, "unet.lora_bias": true}'}
        file = tmp_path / "x.safetensors"
        save_file(tensors, file, header)
        adapter, _ = conversion.read(file, SD1)
    assert adapter.manifest.increment.kind == "dense"
    assert (output_with(base, adapter) - expected).abs().max() <= 1e-5
    assert (predict(base) - expected).abs().max() > 1e-3
    with pytest.raises(AdapterFileError, match="spmhub convert"):
        load_file(file)


SCALED = "diffusion_model"
NORMS = [
    ("sd1", "lora_unet_mid_block_attentions_0_norm", "mid_block.attentions.0.norm"),
    ("sd1", "diffusion_model.middle_block.1.transformer_blocks.0.norm1", f"{BLOCK}.norm1"),
    ("sdxl", "lora_unet_input_blocks_4_0_in_layers_0", "down_blocks.1.resnets.0.norm1"),
    ("sdxl", "lora_unet_out_0", "conv_norm_out"),
    ("sd3", "lora_unet_joint_blocks_2_x_block_attn_ln_q", "transformer_blocks.2.attn.norm_q"),
    ("sd3", "diffusion_model.joint_blocks.0.context_block.attn.ln_k", "transformer_blocks.0.attn.norm_added_k"),
    ("sd3", "lora_unet_joint_blocks_0_x_block_attn2_ln_k", "transformer_blocks.0.attn2.norm_k"),
    ("flux", f"{SCALED}.double_blocks.1.txt_attn.norm.query_norm.scale", "transformer_blocks.1.attn.norm_added_q"),
    ("flux", "lora_unet_double_blocks_1_img_attn_norm_key_norm", "transformer_blocks.1.attn.norm_k"),
    ("flux", "diffusion_model.single_blocks.4.norm.key_norm.scale", "single_transformer_blocks.4.attn.norm_k"),
    ("flux", "transformer.transformer_blocks.1.attn.norm_q", "transformer_blocks.1.attn.norm_q"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "name", "path"), NORMS)
@pytest.mark.parametrize("ends", [("diff", "diff_b"), ("w_norm", "b_norm")])
def test_norms_next_to_pairs(family: str, name: str, path: str, ends: tuple[str, str], tmp_path: Path) -> None:
    """As LyCORIS and ComfyUI write them; the pair is then dense too."""
    layer = {
        "sd1": TO_K,
        "sdxl": TO_K,
        "sd3": "transformer_blocks.2.attn.to_q",
        "flux": "transformer_blocks.1.attn.to_q",
    }
    stem = f"{'unet' if family in ('sd1', 'sdxl') else 'transformer'}.{layer[family]}"
    width = {"sd1": 768, "sdxl": 2048, "sd3": 1536, "flux": 3072}[family]
    has_bias = "norm_" not in path
    norm = {f"{name}.{ends[0]}": noise(8, 24)} | ({f"{name}.{ends[1]}": noise(9, 24)} if has_bias else {})
    pairs = pair(stem, out=width if family in ("sd3", "flux") else 48, width=width)
    adapter = read(pairs | norm, tmp_path, Description(family=family))
    assert set(adapter.increments) == {layer[family], path}
    assert adapter.manifest.increment.kind == "dense"
    assert torch.equal(adapter.increments[path].tensors()["delta"], noise(8, 24))
    assert ("delta_bias" in adapter.increments[path].tensors()) == has_bias
    adapter.save(tmp_path / "kept.safetensors")
    again = load_file(tmp_path / "kept.safetensors", lazy=True)
    assert torch.equal(again.increments[path].tensors()["delta"], noise(8, 24))
