"""Erasers branched next to quantised weights have the effect that they have on the plain weights."""

import pytest
import torch
import torch.nn.functional as F
from pico import pico_eraser, pico_pipeline
from torch import nn

from spm_hub.attachment.attachment import attach
from spm_hub.errors import UsageError
from spm_hub.models.architectures import fingerprint_of


class Packed(nn.Linear):
    """Two weights a byte, as 4-bit kernels keep them: the stored shape says nothing of the layer's."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.scale = linear.weight.abs().max() / 7
        levels = (linear.weight / self.scale).round().to(torch.int8).flatten() + 8
        packed = (levels[::2] * 16 + levels[1::2]).to(torch.uint8)
        self.weight = nn.Parameter(packed[:, None], requires_grad=False)
        self.bias = linear.bias

    def forward(self, x):
        levels = torch.stack([self.weight[:, 0] // 16, self.weight[:, 0] % 16], dim=1).to(x)
        weight = (levels.flatten() - 8).view(self.out_features, self.in_features) * self.scale.to(x)
        return F.linear(x, weight, None if self.bias is None else self.bias.to(x))


def replaced(unet, make):
    for path, module in list(unet.named_modules()):
        if type(module) is nn.Linear:
            parent, _, name = path.rpartition(".")
            setattr(unet.get_submodule(parent), name, make(module))


def packed(unet):
    replaced(unet, Packed)


def torchao_int8(unet):
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(unet, quantization.Int8WeightOnlyConfig())


def quanto(bits):
    def quantise(unet):
        library = pytest.importorskip("optimum.quanto")
        library.quantize(unet, weights=getattr(library, bits))
        library.freeze(unet)

    return quantise


def bitsandbytes_int8(unet):
    bnb = pytest.importorskip("bitsandbytes").nn

    def make(linear):
        new = bnb.Linear8bitLt(linear.in_features, linear.out_features, linear.bias is not None, has_fp16_weights=False)
        new.weight = bnb.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
        new.bias = linear.bias
        return new.to("cpu")

    replaced(unet, make)


def bitsandbytes_nf4(unet):
    bnb = pytest.importorskip("bitsandbytes").nn

    def make(linear):
        new = bnb.Linear4bit(
            linear.in_features, linear.out_features, linear.bias is not None, torch.float32, quant_type="nf4"
        )
        new.weight = bnb.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
        new.bias = linear.bias
        return new.to("cpu")

    replaced(unet, make)


def float8_storage(unet):
    unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


QUANTISED = pytest.mark.parametrize(
    "quantise",
    [packed, torchao_int8, quanto("qint8"), quanto("qint4"), bitsandbytes_int8, bitsandbytes_nf4, float8_storage],
    ids=["packed", "torchao", "quanto-int8", "quanto-int4", "bnb-int8", "bnb-nf4", "float8"],
)


def draw(pipe, prompt="snoopy"):
    count = len(prompt) if isinstance(prompt, list) else 1
    generators = [torch.Generator().manual_seed(seed) for seed in range(count)]
    return pipe(prompt, generator=generators, num_inference_steps=1, output_type="latent").images


@QUANTISED
@pytest.mark.parametrize("kind", ["low_rank", "dense", "mask"])
def test_erasers_branch_next_to_quantised_weights_and_do_not_change_them(quantise, kind):
    pipe = pico_pipeline()
    adapter, known = pico_eraser(pipe.unet, kind=kind), fingerprint_of(pipe.unet)
    plain = draw(pipe)
    with attach(pipe, [adapter], gate="always", mode="branch"):
        erased = draw(pipe)
    quantise(pipe.unet)
    assert fingerprint_of(pipe.unet) == known
    classes = [type(module) for module in pipe.unet.modules()]
    bare = draw(pipe)
    with attach(pipe, [adapter], gate="always"):
        # The eraser has the effect that it has on the plain weights, up to the error of quantising.
        error = (bare - plain).abs().max()
        assert (draw(pipe) - erased).abs().max() <= 2 * error + 1e-5 < (erased - plain).abs().max()
    with attach(pipe, [adapter]):
        both = draw(pipe, ["snoopy", "a church"])
        assert (both[:1] - draw(pipe)).abs().max() <= max(1e-5, 0.1 * error)
    assert torch.equal(draw(pipe), bare)
    assert [type(module) for module in pipe.unet.modules()] == classes


@QUANTISED
def test_folding_into_quantised_weights_is_refused(quantise):
    pipe = pico_pipeline()
    adapter = pico_eraser(pipe.unet)
    quantise(pipe.unet)
    with pytest.raises(UsageError, match="quantised"):
        attach(pipe, [adapter], mode="fold")


def test_a_branch_follows_its_input_to_half_precision():
    pipe = pico_pipeline()
    adapter = pico_eraser(pipe.unet)
    with attach(pipe, [adapter], gate="always"):
        expected = draw(pipe)
    packed(pipe.unet)
    pipe.to(torch.bfloat16)
    with attach(pipe, [adapter], gate="always"):
        drawn = draw(pipe).float()
    assert (drawn - expected).abs().max() <= 0.1 * expected.abs().max()
