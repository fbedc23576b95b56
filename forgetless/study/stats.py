"""Small-sample statistics: means with t-intervals, correlation, and where a curve reaches a value."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

#: 97.5 % quantiles of Student's t for 1 to 30 degrees of freedom.
T_975 = (
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281,
    2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860,
    2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423,
)  # fmt: skip
Z_975 = 1.959964


def t_quantile(freedom: int) -> float:
    """The 97.5 % quantile of Student's t: from the table, beyond it by Cornish and Fisher's expansion."""
    if freedom < 1:
        raise ValueError(f"freedom is {freedom}, wanted 1 or more")
    if freedom <= len(T_975):
        return T_975[freedom - 1]
    z = Z_975
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def interval(values: Iterable[float | None]) -> dict[str, Any] | None:
    """Mean with its 95 % t-interval over what is known; None where nothing is, no interval from one value."""
    known = [v for v in values if v is not None and math.isfinite(v)]
    if not known:
        return None
    mean, n = statistics.fmean(known), len(known)
    if n == 1:
        return {"mean": mean, "low": None, "high": None, "n": 1}
    half = t_quantile(n - 1) * statistics.stdev(known) / math.sqrt(n)
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": n}


def half_width(values: Iterable[float | None]) -> float | None:
    """Half the 95 % t-interval; None from fewer than two values."""
    found = interval(values)
    return None if found is None or found["high"] is None else found["high"] - found["mean"]


def pearson(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Correlation coefficient; None from fewer than three pairs or without any spread."""
    if len(x) < 3 or len(set(x)) < 2 or len(set(y)) < 2:
        return None
    return statistics.correlation(x, y)


def ranks(values: Sequence[float]) -> list[float]:
    """Ranks from 1; equal values share the mean of theirs."""
    ordered = sorted(values)
    first: dict[float, int] = {}
    for i, value in enumerate(ordered):
        first.setdefault(value, i)
    return [first[v] + (ordered.count(v) + 1) / 2 for v in values]


def spearman(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Rank correlation."""
    return pearson(ranks(x), ranks(y))


def explained_by_groups(groups: Sequence[str], y: Sequence[float]) -> float | None:
    """Adjusted share of the variance of ``y`` that group means explain; None where no freedom is left."""
    n, k = len(y), len(set(groups))
    centre = statistics.fmean(y) if y else 0.0
    total = sum((v - centre) ** 2 for v in y)
    if n <= k or k < 2 or total == 0:
        return None
    means = {g: statistics.fmean([v for v, h in zip(y, groups, strict=True) if h == g]) for g in set(groups)}
    rest = sum((v - means[g]) ** 2 for v, g in zip(y, groups, strict=True))
    return 1 - (rest / (n - k)) / (total / (n - 1))


def explained_by_line(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Adjusted share of the variance of ``y`` that a straight line in ``x`` explains."""
    r = pearson(x, y)
    return None if r is None else 1 - (1 - r * r) * (len(y) - 1) / (len(y) - 2)


def reached(xs: Sequence[float], ys: Sequence[float], x: float) -> float | None:
    """``y`` where a curve first reaches ``x`` from below, linear between its points; None if it never does."""
    for i, here in enumerate(xs):
        if here >= x:
            if i == 0 or here == x:
                return ys[i]
            before = xs[i - 1]
            return ys[i - 1] + (ys[i] - ys[i - 1]) * (x - before) / (here - before)
    return None


def pareto(points: Sequence[tuple[float, float]]) -> list[bool]:
    """For (learnt, forgotten) points, whether no other one learns at least as much and forgets at most as much."""

    def beaten(a: tuple[float, float]) -> bool:
        return any(b[0] >= a[0] and b[1] <= a[1] and b != a for b in points)

    return [not beaten(p) for p in points]
