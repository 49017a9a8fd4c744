"""The algebra of increments against float64 references written from the definitions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spm_hub.adapters.folding import effective
from spm_hub.adapters.increments import Dense, Increment, LowRank, Mask
from spm_hub.errors import CompatibilityError

SHAPES = st.sampled_from([(3, 5), (6, 4), (1, 1), (4, 3, 1, 1), (3, 2, 3, 3)])
DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])
GAMMAS = st.floats(-3, 3)


def draw(kind: str, shape: tuple[int, ...], dtype: torch.dtype, random: torch.Generator) -> Increment:
    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=random).to(dtype)

    if kind == "low_rank":
        rank = int(torch.randint(1, 4, (), generator=random))
        return LowRank(normal(rank, *shape[1:]), normal(shape[0], rank, *[1] * (len(shape) - 2)))
    if kind == "dense":
        return Dense(normal(*shape), normal(shape[0]))
    dim = int(torch.randint(0, 2, (), generator=random))
    return Mask(torch.rand(shape[dim], generator=random) < 0.5, 0 if dim == 0 else 1)


def reference(increment: Increment, weight: Tensor) -> Tensor:
    """Delta of the weight in float64, entry by entry where that is the definition."""
    if isinstance(increment, LowRank):
        up, down = increment.up.double().reshape(weight.shape[0], -1), increment.down.double()
        return torch.einsum("or,r...->o...", up, down).reshape(weight.shape)
    if isinstance(increment, Dense):
        return increment.delta.double()
    delta = torch.zeros(weight.shape, dtype=torch.float64)
    for index, kept in enumerate(increment.keep.tolist()):
        if not kept:
            delta.select(increment.dim, index).copy_(-weight.double().select(increment.dim, index))
    return delta


def reference_bias(increment: Increment, bias: Tensor) -> Tensor:
    if isinstance(increment, Dense) and increment.delta_bias is not None:
        return increment.delta_bias.double()
    if isinstance(increment, Mask) and increment.dim == 0:
        return torch.tensor([0.0 if keep else -float(b) for keep, b in zip(increment.keep, bias, strict=True)]).double()
    return torch.zeros_like(bias, dtype=torch.float64)


@settings(max_examples=60, deadline=None)
@given(SHAPES, DTYPES, st.sampled_from(["low_rank", "dense", "mask"]), GAMMAS, st.integers(0, 99))
def test_an_increment_adds_its_delta_and_only_reads_the_weight(
    shape: tuple[int, ...], dtype: torch.dtype, kind: str, gamma: float, seed: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=random).to(dtype)
    bias = torch.randn(shape[0], generator=random).to(dtype)
    before, before_bias = weight.clone(), bias.clone()
    increment = draw(kind, shape, dtype, random)
    increment.check_fits("module", weight, bias)
    delta = increment.delta_for(weight)
    assert delta.dtype == torch.float32
    torch.testing.assert_close(delta.double(), reference(increment, weight), rtol=1e-5, atol=1e-4)
    # In float64, where the kernel rounds nothing.
    wide, wide_bias = effective(weight.double(), bias.double(), [(increment, gamma)])
    assert wide_bias is not None
    expected = weight.double() + gamma * reference(increment, weight)
    torch.testing.assert_close(wide, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(wide_bias, bias.double() + gamma * reference_bias(increment, bias), rtol=1e-9, atol=1e-9)
    assert torch.equal(weight, before)
    assert torch.equal(bias, before_bias)


@settings(max_examples=20, deadline=None)
@given(SHAPES, st.integers(0, 99))
def test_a_channels_last_weight_gets_the_same(shape: tuple[int, ...], seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=random)
    layout = torch.channels_last if weight.dim() == 4 else torch.contiguous_format
    for kind in ("low_rank", "dense", "mask"):
        increment = draw(kind, shape, torch.float32, random)
        plain, _ = effective(weight, None, [(increment, 0.7)])
        strided, _ = effective(weight.to(memory_format=layout), None, [(increment, 0.7)])
        assert torch.equal(plain, strided)


def test_a_mask_at_gamma_one_leaves_exact_zeros() -> None:
    weight = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)) * 1e20
    total, _ = effective(weight, None, [(Mask(torch.tensor([True, False, True]), 1), 1.0)])
    assert torch.equal(total, weight * torch.tensor([1.0, 0.0, 1.0]))


def test_a_unit_kernel_and_a_linear_are_one_thing() -> None:
    random = torch.Generator().manual_seed(0)
    down, up = torch.randn(2, 5, generator=random), torch.randn(3, 2, generator=random)
    linear, conv = torch.zeros(3, 5), torch.zeros(3, 5, 1, 1)
    for increment in (LowRank(down, up), LowRank(down[..., None, None], up[..., None, None]), Dense(up @ down)):
        for weight in (linear, conv):
            increment.check_fits("proj_in", weight)
            torch.testing.assert_close(increment.delta_for(weight), (up @ down).reshape(weight.shape))


@pytest.mark.parametrize(
    ("increment", "shape"),
    [
        (LowRank(torch.ones(1, 4), torch.ones(3, 1)), (3, 5)),
        (LowRank(torch.ones(1, 4), torch.ones(3, 1)), (3, 4, 3, 3)),
        (LowRank(torch.ones(1, 4, 3, 3), torch.ones(3, 1, 1, 1)), (3, 4)),
        (Dense(torch.ones(3, 4)), (4, 3)),
        (Mask(torch.ones(3, dtype=torch.bool), 1), (3, 4)),
    ],
)
def test_a_misfit_names_the_module_and_both_shapes(increment: Increment, shape: tuple[int, ...]) -> None:
    with pytest.raises(CompatibilityError) as caught:
        increment.check_fits("down_blocks.0.proj_in", torch.zeros(shape))
    ours = "3 entries" if isinstance(increment, Mask) else str(increment.weight_shape)
    assert all(part in str(caught.value) for part in ("down_blocks.0.proj_in", ours, str(shape)))


def test_a_change_of_a_bias_needs_a_bias() -> None:
    with pytest.raises(CompatibilityError, match="bias"):
        Dense(torch.zeros(3, 4), torch.zeros(3)).check_fits("to_k", torch.zeros(3, 4), None)


@pytest.mark.parametrize(
    "make",
    [
        lambda: LowRank(torch.ones(2, 4), torch.ones(3, 1)),
        lambda: LowRank(torch.ones(0, 4), torch.ones(3, 0)),
        lambda: LowRank(torch.ones(4), torch.ones(3, 1)),
        lambda: LowRank(torch.ones(1, 4), torch.ones(3, 1, 3, 3)),
        lambda: Dense(torch.ones(3, 4, 5)),
        lambda: Dense(torch.ones(3, 4), torch.ones(4)),
        lambda: Mask(torch.ones(3), 0),
        lambda: Mask(torch.ones(3, 3, dtype=torch.bool), 0),
    ],
)
def test_parts_that_make_no_increment(make: object) -> None:
    with pytest.raises(CompatibilityError):
        make()  # type: ignore[operator]


def test_moving_keeps_what_it_is() -> None:
    for kind in ("low_rank", "dense", "mask"):
        increment = draw(kind, (4, 3), torch.float32, torch.Generator().manual_seed(0))
        moved = increment.to(dtype=torch.float16, device="cpu")
        assert moved.kind == kind
        assert moved.dtype == (torch.bool if kind == "mask" else torch.float16)
        assert moved.nbytes == sum(tensor.nbytes for tensor in moved.tensors().values())
