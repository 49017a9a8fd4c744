"""Intervals for shares, means and differences of pairs, and the difference that n pairs detect."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from spm_hub.evaluation.attacks.outcome import Z95

RESAMPLES = 2000
"""Resamples of a bootstrap."""

POWER_80 = 0.8416212335729143
"""The 80 % quantile of the standard normal distribution."""

_SEED = 2024

Interval = tuple[float, float]


def paired_share_difference(before: Sequence[bool], after: Sequence[bool]) -> Interval:
    """Return the 95 % interval of share(after) - share(before) for pictures from the same noise.

    The interval of Agresti and Min (Statistics in Medicine 24, 2005): Wald's after adding 1/2 to each of the four
    counts of pairs. A bootstrap of few or no changed pairs would be too narrow. Needs one pair or more.
    """
    lost = sum(old and not new for old, new in zip(before, after, strict=True)) + 0.5
    gained = sum(new and not old for old, new in zip(before, after, strict=True)) + 0.5
    pairs = len(before) + 2
    middle = (gained - lost) / pairs
    reach = Z95 * math.sqrt(gained + lost - (gained - lost) ** 2 / pairs) / pairs
    return max(-1.0, middle - reach), min(1.0, middle + reach)


def bootstrap_mean(values: Sequence[float], *, resamples: int = RESAMPLES) -> Interval:
    """Return the 95 % interval of the mean of `values` by the expanded percentile bootstrap.

    For differences of pairs this is the paired bootstrap. Plain percentiles cover too little for few values; these are
    taken further out, by Student's t and the factor n / (n - 1) of the variance (Hesterberg, The American Statistician
    69, 2015, section 5.3). Resamples are drawn from a fixed seed: the same values have the same interval.
    (-inf, inf) for one value.
    """
    data = torch.tensor(list(values), dtype=torch.float64)
    count = len(data)
    if count < 2:
        return -math.inf, math.inf
    if bool((data == data[0]).all()):
        return float(data[0]), float(data[0])
    outside = _normal_share(-math.sqrt(count / (count - 1)) * _student_975(count - 1))
    generator = torch.Generator().manual_seed(_SEED)
    # In parts: 2,000 resamples of 30,000 pictures would take half a gigabyte at once.
    rows = max(1, 2**22 // count)
    means = torch.cat([
        data[torch.randint(count, (min(rows, resamples - start), count), generator=generator)].mean(1)
        for start in range(0, resamples, rows)
    ])  # fmt: skip
    low, high = torch.quantile(means, torch.tensor([outside, 1 - outside], dtype=torch.float64)).tolist()
    return low, high


def jackknife(statistic: Callable[[Tensor], float], count: int, *, groups: int = 10) -> Interval:
    """Return the 95 % interval of a statistic of `count` pairs of pictures, by leaving groups out.

    statistic: a function from the places of the pictures to use, (m,), to the number. For smooth statistics that a
    bootstrap distorts, such as a Fréchet distance, which counts a repeated picture as less variety.
    Student's t gives its width, as there are few groups. (-inf, inf) for fewer than four pictures.
    """
    if count < 4:
        return -math.inf, math.inf
    parts = min(groups, count // 2)
    places = torch.arange(count)
    without = torch.tensor([statistic(places[places % parts != part]) for part in range(parts)], dtype=torch.float64)
    error = math.sqrt((parts - 1) / parts * float((without - without.mean()).pow(2).sum()))
    value = statistic(places)
    reach = _student_975(parts - 1) * error
    return value - reach, value + reach


def detectable_difference(differences: Sequence[float]) -> float:
    """Return the smallest mean difference that so many pairs show with 80 % power at 5 % error.

    (z_0.975 + z_0.8) times the standard error of the mean. Where no pair differs, it is computed as if one did by 1.
    """
    data = torch.tensor(list(differences), dtype=torch.float64)
    spread = float(data.std(correction=0)) if len(data) else 0.0
    return (Z95 + POWER_80) * max(spread, 1 / math.sqrt(max(len(data), 1))) / math.sqrt(max(len(data), 1))


def _normal_share(z: float) -> float:
    """Return the share of the standard normal distribution below z."""
    return 0.5 * math.erfc(-z / math.sqrt(2))


def _student_975(freedom: int) -> float:
    """Return the 97.5 % quantile of Student's t, by its expansion (Abramowitz and Stegun 26.7.5)."""
    if freedom < 4:
        return (12.70620, 4.30265, 3.18245)[freedom - 1]
    z, v = Z95, freedom
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    fourth = (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160
    return z + first / v + second / v**2 + third / v**3 + fourth / v**4
