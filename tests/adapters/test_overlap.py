"""Products and cosines of erasers' changes, against whole float64 weights."""

import numpy as np
import torch

from spm_hub.adapters.increments import Dense, Increment, LowRank, Mask
from spm_hub.adapters.overlap import inner_products, squared_norms, undoings


def low_rank(seed: int, rank: int, out: int, width: tuple[int, ...]) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    up = torch.randn(out, rank, *[1] * (len(width) - 1), generator=generator)
    return LowRank(torch.randn(rank, *width, generator=generator), up)


def whole(increment: Increment) -> np.ndarray:
    if isinstance(increment, LowRank):
        up, down = increment.up.double().flatten(1).numpy(), increment.down.double().flatten(1).numpy()
        return np.asarray(up @ down)
    assert isinstance(increment, Dense)
    return increment.delta.double().flatten(1).numpy()


def biases(one: Increment, other: Increment) -> float:
    pair = [each.delta_bias for each in (one, other) if isinstance(each, Dense) and each.delta_bias is not None]
    return float(pair[0] @ pair[1]) if len(pair) == 2 else 0.0


def test_inner_products_are_those_of_the_whole_weights() -> None:
    generator = torch.Generator().manual_seed(7)
    erasers: list[dict[str, Increment]] = [
        {"a.to_k": low_rank(0, 1, 5, (6,)), "a.conv": low_rank(1, 2, 4, (3, 2, 2))},
        {"a_to_k": low_rank(2, 3, 5, (6,)), "b.to_v": low_rank(3, 1, 5, (6,))},
        {"a.to_k": Dense(torch.randn(5, 6, generator=generator)), "a.conv": low_rank(4, 1, 4, (3, 2, 2))},
        {"a.to_k": Dense(torch.randn(5, 6, generator=generator), torch.ones(5)), "b.to_v": low_rank(5, 4, 5, (6,))},
        {"a.to_k": Mask(torch.tensor([True, False, True, True, False]), 0)},
    ]
    named = [{path.replace(".", "_"): one for path, one in each.items()} for each in erasers]
    expected = [
        [
            sum(
                (whole(one[path]) * whole(other[path])).sum() + biases(one[path], other[path])
                for path in one.keys() & other.keys()
                if not isinstance(one[path], Mask) and not isinstance(other[path], Mask)
            )
            for other in named
        ]
        for one in named
    ]
    np.testing.assert_allclose(inner_products(erasers), expected, rtol=1e-6, atol=1e-6)


def test_who_undoes_whom_depends_on_signs_of_strengths_and_on_how_much_is_taken_back() -> None:
    one = low_rank(0, 1, 5, (6,))
    against = LowRank(one.down, -one.up)
    unlike = low_rank(9, 1, 5, (6,))
    products = inner_products([{"m": one}, {"m": against}, {"m": unlike}])
    assert {(each.by, each.of) for each in undoings(products, [1.0, 1.0, 1.0])} == {(0, 1), (1, 0)}
    assert undoings(products, [1.0, -1.0, 1.0]) == []
    assert {(each.by, each.of) for each in undoings(inner_products([{"m": one}] * 2), [1.0, -0.4])} == {(0, 1), (1, 0)}
    # Half of the change is taken back, hidden in a greater change that has nothing to do with it.
    taken, rest = whole(one), whole(unlike)
    rest -= (rest * taken).sum() / (taken**2).sum() * taken
    rest *= 1.1 * np.linalg.norm(taken) / np.linalg.norm(rest)
    hidden = Dense(torch.tensor(rest - 0.5 * taken))
    (found,) = undoings(inner_products([{"m": one}, {"m": hidden}]), [1.0, 1.0])
    assert (found.by, found.of) == (1, 0)
    assert -0.5 < found.cosine <= -0.3


def test_who_takes_another_back_in_few_modules_is_found_and_who_shares_none_is_not() -> None:
    one = {name: low_rank(seed, 1, 5, (6,)) for seed, name in enumerate("abcdefgh")}
    against = {"a": LowRank(one["a"].down, -one["a"].up)}
    beside = {"z": LowRank(one["a"].down, -one["a"].up)}
    unlike = {"a": low_rank(77, 1, 5, (6,))}
    erasers: list[dict[str, Increment]] = [dict(one), dict(against), dict(beside), dict(unlike)]
    products, norms = inner_products(erasers), [squared_norms(each) for each in erasers]
    whole_cosine = products[0, 1] / (products[0, 0] * products[1, 1]).sqrt()
    assert -0.5 < whole_cosine < -0.1
    assert (1, 0) not in {(each.by, each.of) for each in undoings(products, [1.0] * 4)}
    assert (1, 0) in {(each.by, each.of) for each in undoings(products, [1.0] * 4, norms)}
    assert {each.by for each in undoings(products, [1.0] * 4, norms)} <= {0, 1}
    assert undoings(products, [1.0, -1.0, 1.0, 1.0], norms) == []
