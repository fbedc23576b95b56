"""Small-sample statistics: means with t-intervals, correlation, and where a curve reaches a value."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from scipy.stats import spearmanr
from scipy.stats import t as student


def mean(values: Iterable[float | None]) -> float | None:
    """Mean of what is known; None where nothing is."""
    known = [v for v in values if v is not None]
    return statistics.fmean(known) if known else None


def minus(a: float | None, b: float | None) -> float | None:
    """The difference; None where one of both is not known."""
    return None if a is None or b is None else a - b


def interval(values: Iterable[float | None]) -> dict[str, Any] | None:
    """Mean with its 95 % t-interval over what is known; None where nothing is, no interval from one value."""
    known = [v for v in values if v is not None and math.isfinite(v)]
    if not known:
        return None
    middle, n = statistics.fmean(known), len(known)
    if n == 1:
        return {"mean": middle, "low": None, "high": None, "n": 1}
    half = float(student.ppf(0.975, n - 1)) * statistics.stdev(known) / math.sqrt(n)
    return {"mean": middle, "low": middle - half, "high": middle + half, "n": n}


def half_of(figures: dict[str, Any]) -> float | None:
    """Half the width of an ``interval``; None for that of one value."""
    return None if figures["high"] is None else figures["high"] - figures["mean"]


def pearson(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Correlation coefficient; None from fewer than three pairs or without any spread."""
    if len(x) < 3 or len(set(x)) < 2 or len(set(y)) < 2:
        return None
    return statistics.correlation(x, y)


def spearman(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Rank correlation; None where ``pearson`` is None."""
    return None if pearson(x, y) is None else float(spearmanr(x, y).statistic)


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
    return [not any(b[0] >= a[0] and b[1] <= a[1] and b != a for b in points) for a in points]
