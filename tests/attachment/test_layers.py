"""Folding and branching against float64 sums, for every kind of increment and mixtures of them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import spm_hub.adapters.folding
import spm_hub.attachment.layers
from spm_hub.adapters.folding import effective
from spm_hub.adapters.increments import Dense, LowRank, Mask
from spm_hub.attachment.branch import remove
from spm_hub.attachment.layers import Layers, foldable, kept_bytes

KINDS = ("low_rank", "dense", "mask_out", "mask_in")


def noise(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_module(layer, dtype=torch.float32):
    if layer == "linear":
        module = nn.Linear(6, 5)
    elif layer == "linear_without_bias":
        module = nn.Linear(6, 5, bias=False)
    elif layer == "conv1":
        module = nn.Conv2d(6, 5, 1)
    elif layer == "conv3":
        module = nn.Conv2d(6, 5, 3, stride=2, padding=1, padding_mode="reflect")
    else:
        module = nn.Conv2d(6, 4, 3, padding=1, groups=2)
    module.requires_grad_(False)
    for index, parameter in enumerate(module.parameters()):
        parameter.copy_(noise(index, *parameter.shape))
    return module.to(dtype)


LAYERS = ("linear", "linear_without_bias", "conv1", "conv3", "grouped")


def make_increment(kind, module, seed, rank=2):
    weight = module.weight
    out, width, *kernel = weight.shape
    if kind == "low_rank":
        return LowRank(noise(seed, rank, width, *kernel), noise(seed + 1, out, rank, *[1] * len(kernel)))
    if kind == "dense":
        return Dense(noise(seed, *weight.shape), None if module.bias is None else noise(seed + 1, out))
    dim = 0 if kind == "mask_out" else 1
    return Mask(noise(seed, weight.shape[dim]) > 0, dim)


def reference(module, parts):
    """Compute W' and b' in float64, element by element from the definition."""
    weight = module.weight.double().clone()
    bias = None if module.bias is None else module.bias.double().clone()
    total, total_bias = weight.clone(), None if bias is None else bias.clone()
    for increment, factor in parts:
        if isinstance(increment, Mask):
            for index, kept in enumerate(increment.keep.tolist()):
                if not kept and increment.dim == 0:
                    total[index] *= 1 - factor
                    if bias is not None:
                        total_bias[index] *= 1 - factor
                elif not kept:
                    total[:, index] *= 1 - factor
    for increment, factor in parts:
        if isinstance(increment, LowRank):
            down, up = increment.down.double(), increment.up.double()
            for r in range(increment.rank):
                outer = torch.einsum("o,i->oi", up[:, r].flatten(), down[r].flatten())
                total += factor * outer.reshape(weight.shape)
        elif isinstance(increment, Dense):
            total += factor * increment.delta.double()
            if increment.delta_bias is not None:
                total_bias += factor * increment.delta_bias.double()
    return total, total_bias


def run_reference(module, x, parts):
    weight, bias = reference(module, parts)
    twin = make_module_like(module)
    twin.weight.copy_(weight)
    if bias is not None:
        twin.bias.copy_(bias)
    return twin(x.double())


def make_module_like(module):
    import copy

    twin = copy.deepcopy(module).double()
    remove(twin)
    return twin


def input_for(module, rows, seed=50):
    return noise(seed, rows, 6, 4, 4) if isinstance(module, nn.Conv2d) else noise(seed, rows, 3, 6)


def installed(module, increments):
    layers = Layers()
    for name, increment in increments.items():
        layers.install(name, {"m": module}, {"m": increment})
    return layers


mixture = st.lists(st.tuples(st.sampled_from(KINDS), st.integers(1, 3)), min_size=1, max_size=5)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(LAYERS), mixture, st.integers(0, 1000), st.data())
def test_fold_and_branch_are_the_float64_sum_for_every_row(layer, kinds, seed, data):
    module = make_module(layer)
    increments = {f"e{i}": make_increment(kind, module, seed + 10 * i, rank) for i, (kind, rank) in enumerate(kinds)}
    factor = st.one_of(st.just(0.0), st.just(1.0), st.floats(-1, 2, width=32))
    factors = {name: data.draw(st.lists(factor, min_size=3, max_size=3)) for name in increments}
    x = input_for(module, 3)
    layers = installed(module, increments)
    expected = torch.cat(
        [
            run_reference(module, x[row : row + 1], [(increments[name], factors[name][row]) for name in increments])
            for row in range(3)
        ]
    )
    bare = module(x)
    layers.branch(factors)
    scale = expected.abs().max().clamp_min(1)
    assert ((module(x) - expected).abs().max() / scale).item() <= 2e-6
    for row in range(3):
        layers.fold({name: each[row] for name, each in factors.items()})
        assert ((module(x)[row] - expected[row]).abs().max() / scale).item() <= 2e-6
    layers.restore()
    assert torch.equal(module(x), bare)
    assert type(module) in (nn.Linear, nn.Conv2d)


@pytest.mark.parametrize("kinds", [("dense",), ("mask_out",), ("mask_in", "low_rank", "mask_out", "dense")])
@pytest.mark.parametrize("layer", ["linear", "conv3"])
def test_weights_too_large_for_the_cache_are_the_same_sum_row_group_by_row_group(layer, kinds, monkeypatch):
    module = make_module(layer)
    parts = [(make_increment(kind, module, seed), 0.7 - 0.3 * seed) for seed, kind in enumerate(kinds)]
    monkeypatch.setattr(spm_hub.adapters.folding, "_CACHED_ELEMENTS", 2 * module.weight[0].numel())
    weight, bias = effective(module.weight, module.bias, parts)
    expected, expected_bias = reference(module, parts)
    torch.testing.assert_close(weight.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(bias.double(), expected_bias, rtol=1e-6, atol=1e-6)


def test_two_masks_on_one_neuron_switch_it_off_and_do_not_negate_it():
    module = make_module("linear")
    off = torch.tensor([True, False, True, True, False])
    weight, bias = effective(module.weight, module.bias, [(Mask(off, 0), 1.0), (Mask(off.clone(), 0), 1.0)])
    assert torch.equal(weight[off], module.weight[off])
    assert not weight[~off].any()
    assert not bias[~off].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_fold_rounds_once(dtype):
    module = make_module("linear", dtype)
    parts = [(make_increment("low_rank", module, seed, 1), 0.3) for seed in range(0, 100, 2)]
    once = reference(module, parts)[0]
    weight, bias = effective(module.weight, module.bias, parts)
    # float32 accumulation may fall on the other side of a rounding boundary, never further.
    spacing = torch.finfo(dtype).eps * once.abs().clamp_min(torch.finfo(dtype).tiny)
    assert ((weight.double() - once).abs() <= 0.5001 * spacing + 1e-5).all()
    assert bias is module.bias
    step_by_step = module.weight.clone()
    for increment, factor in parts:
        step_by_step += (factor * increment.delta_for(step_by_step)).to(dtype)
    assert (weight.double() - once).abs().max() < (step_by_step.double() - once).abs().max()


def test_float64_weights_are_summed_in_float64():
    module = make_module("linear", torch.float64)
    parts = [(make_increment("low_rank", module, 3), 1 / 3), (make_increment("dense", module, 5), 0.1)]
    weight, bias = effective(module.weight, module.bias, parts)
    expected_weight, expected_bias = reference(module, parts)
    torch.testing.assert_close(weight, expected_weight, rtol=0, atol=1e-14)
    torch.testing.assert_close(bias, expected_bias, rtol=0, atol=1e-14)


def test_channels_last_weights_keep_their_layout():
    module = make_module("conv3").to(memory_format=torch.channels_last)
    increment = make_increment("low_rank", module, 1)
    before = module.weight.clone(), module.weight.stride()
    expected = reference(module, [(increment, 0.5)])[0]
    layers = installed(module, {"e": increment})
    layers.fold({"e": 0.5})
    assert module.weight.stride() == before[1]
    torch.testing.assert_close(module.weight.double(), expected, rtol=1e-5, atol=1e-6)
    layers.restore()
    assert torch.equal(module.weight, before[0])


def test_four_dimensional_increments_fit_a_linear_and_the_other_way_round():
    linear, conv = make_module("linear"), make_module("conv1")
    flat = LowRank(noise(1, 2, 6), noise(2, 5, 2))
    tall = LowRank(flat.down[..., None, None], flat.up[..., None, None])
    for module, increment in ((linear, tall), (conv, flat)):
        layers, x = installed(module, {"e": increment}), input_for(module, 2)
        layers.fold({"e": 0.7})
        folded = module(x)
        layers.branch({"e": [0.7, 0.7]})
        torch.testing.assert_close(module(x), folded, rtol=1e-5, atol=1e-5)
        layers.restore()


def test_unchanged_factors_write_nothing_and_only_affected_modules_are_written(monkeypatch):
    written = []
    fill = spm_hub.adapters.folding.fill
    monkeypatch.setattr(
        spm_hub.attachment.layers, "fill", lambda out, *rest: (written.append(tuple(out.shape)), fill(out, *rest))
    )
    one, other = make_module("linear"), make_module("conv1")
    layers = Layers()
    layers.install("a", {"one": one}, {"one": make_increment("low_rank", one, 1)})
    layers.install("b", {"other": other}, {"other": make_increment("low_rank", other, 2)})
    layers.fold({"a": 0.5, "b": 0.5})
    assert written == [tuple(one.weight.shape), tuple(other.weight.shape)]
    pointers = one.weight.data_ptr(), other.weight.data_ptr()
    layers.fold({"a": 0.5, "b": 0.5})
    assert len(written) == 2
    layers.fold({"a": 0.5, "b": 0.25})
    assert written[2:] == [tuple(other.weight.shape)]
    assert (one.weight.data_ptr(), other.weight.data_ptr()) == pointers


def test_a_branch_is_one_stacked_pair_without_the_zeros(monkeypatch):
    module = make_module("linear")
    layers = installed(module, {f"e{i}": make_increment("low_rank", module, 10 * i, 1) for i in range(20)})
    calls = []
    linear = torch.nn.functional.linear
    monkeypatch.setattr(
        torch.nn.functional, "linear", lambda x, w, b=None: (calls.append(tuple(w.shape)), linear(x, w, b))[1]
    )
    layers.branch({f"e{i}": [0.0, 0.0] if i % 2 else [0.5, float(i)] for i in range(20)})
    module(input_for(module, 2))
    assert calls == [(5, 6), (10, 6)]  # the second product of the pair is added in place
    calls.clear()
    layers.branch({f"e{i}": [0.0, 0.0] for i in range(20)})
    module(input_for(module, 2))
    assert calls == [(5, 6)]
    assert type(module) in (nn.Linear, nn.Conv2d)


def test_the_result_does_not_depend_on_the_order_of_installation():
    forwards, backwards = make_module("linear"), make_module("linear")
    increments = {f"e{i}": make_increment("low_rank", forwards, 10 * i, 1) for i in range(7)}
    factors = {name: 0.1 + index for index, name in enumerate(increments)}
    installed(forwards, increments).fold(factors)
    installed(backwards, dict(reversed(increments.items()))).fold(factors)
    assert torch.equal(forwards.weight, backwards.weight)


def test_rows_shared_by_a_batch_and_rows_split_into_frames():
    module = make_module("linear")
    increment = make_increment("low_rank", module, 1)
    layers = installed(module, {"e": increment})
    layers.branch({"e": [0.25, 0.75]})
    shared, frames = input_for(module, 1), input_for(module, 6)
    torch.testing.assert_close(
        module(shared).double(), run_reference(module, shared, [(increment, 0.75)]), rtol=1e-5, atol=1e-5
    )
    out = module(frames)
    for rows, factor in ((slice(0, 3), 0.25), (slice(3, 6), 0.75)):
        expected = run_reference(module, frames[rows], [(increment, factor)])
        torch.testing.assert_close(out[rows].double(), expected, rtol=1e-5, atol=1e-5)


def test_a_part_of_a_batch_gets_the_factors_of_its_rows():
    module = make_module("linear")
    increment = make_increment("low_rank", module, 1)
    layers = installed(module, {"e": increment})

    def check(factors, rows, expected):
        layers.branch({"e": factors})
        x = input_for(module, rows)
        out = module(x)
        for row, factor in enumerate(expected):
            wanted = run_reference(module, x[row : row + 1], [(increment, factor)])
            torch.testing.assert_close(out[row : row + 1].double(), wanted, rtol=1e-5, atol=1e-5)

    # The guided half of two prompts alone; without guidance of their own, and of three thirds (PAG) two.
    check([0.25, 0.75, 0.25, 0.75], 2, [0.25, 0.75])
    check([0.0, 0.0, 0.25, 0.75], 2, [0.25, 0.75])
    check([0.25, 0.75] * 3, 4, [0.25, 0.75, 0.25, 0.75])
    # Some rows at a time, and which is unknown: at least the factor of each of them.
    check([0.25, 0.0, 0.75, 0.5], 2, [0.75, 0.5])


def test_a_later_eraser_of_the_same_name_replaces_the_earlier_one():
    module = make_module("linear")
    staying, going, coming = (make_increment("low_rank", module, seed) for seed in (1, 2, 3))
    layers = installed(module, {"a": staying, "b": going})
    factors = {"a": [0.25, 0.75], "b": [0.5, 1.0]}
    layers.branch(factors)
    layers.uninstall("b")
    layers.install("b", {"m": module}, {"m": coming})
    layers.branch(factors)
    x = input_for(module, 2)
    expected = torch.cat(
        [run_reference(module, x[row : row + 1], [(staying, one), (coming, two)])
         for row, (one, two) in enumerate(zip(*factors.values(), strict=True))]
    )  # fmt: skip
    torch.testing.assert_close(module(x).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["low_rank", "dense", "mask_out"])
def test_restoring_a_module_that_was_cast_alone_gives_its_weight_in_the_new_dtype(kind):
    module = make_module("linear")
    original = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    layers = installed(module, {"e": make_increment(kind, module, 1)})
    layers.fold({"e": 0.5})
    module.double()
    layers.restore()
    assert all(torch.equal(tensor, original[key].double()) for key, tensor in module.state_dict().items())
    assert {tensor.dtype for tensor in module.state_dict().values()} == {torch.float64}


def test_a_module_that_is_cast_by_itself_stays_as_it_was_cast():
    module = make_module("linear")
    increment = make_increment("low_rank", module, 1)
    original = module.weight.detach().clone()
    layers = installed(module, {"e": increment})
    layers.fold({"e": 0.5})
    module.double()
    layers.fold({"e": 0.75})
    assert module.weight.dtype is torch.float64
    torch.testing.assert_close(module.weight.data, original.double() + 0.75 * increment.delta_for(original).double())
    layers.restore()
    assert torch.equal(module.weight, original.double())


def test_bytes_of_originals_and_weights_that_cannot_be_folded():
    module = make_module("linear")
    assert kept_bytes([module]) == 5 * 6 * 4
    assert foldable(module)
    assert not foldable(nn.Linear(6, 5, device="meta"))
    quantised = nn.Linear(6, 5)
    quantised.weight = nn.Parameter(torch.zeros(5, 6, dtype=torch.int8), requires_grad=False)
    assert not foldable(quantised)


def test_gradients_reach_the_input_through_a_branch():
    module = make_module("linear")
    layers = installed(module, {"e": make_increment("low_rank", module, 1)})
    layers.branch({"e": [0.5, 1.0]})
    x = input_for(module, 2).requires_grad_()
    module(x).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
