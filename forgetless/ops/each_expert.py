"""The products of a stack of experts where no kernel makes them: from those of a single layer, expert by expert."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def grouped_of(
    project: Callable[..., Tensor],
    matmul_lowrank: Callable[..., Tensor],
    outer: Callable[..., Tensor],
    dx_and_ddown: Callable[..., Any],
) -> tuple[Callable[..., Any], ...]:
    """The products of a stack of experts from a backend's own, one expert after another.

    Row s belongs to one expert e, and rows are sorted by expert: see ``forgetless.ops.grouped.Rows``. With ``by_token``
    the first matrix has one row for each token, and row s reads that of its token.
    """

    def mask(seeds: Tensor | None, e: int, p: float) -> tuple[float, Tensor | None]:
        return p, None if seeds is None else seeds[e]

    def grouped_rows(
        x: Tensor,  # (S, K), or (T, K) by token
        rows: Any,  # ``Rows`` of forgetless.ops.grouped
        by_token: bool = False,
    ) -> tuple[Tensor, bool]:
        """x as the other products read it fastest, and ``by_token`` of that: here with one row for each of ``rows``"""
        return (x.index_select(0, rows.tokens) if by_token else x), False

    def grouped_project(
        x: Tensor,  # (S, K), or (T, K) by token
        down: Tensor,  # (E, R, K)
        rows: Any,  # ``Rows`` of forgetless.ops.grouped
        scale: float = 1.0,
        p: float = 0.0,
        seeds: Tensor | None = None,  # (E, 2) int32
        by_token: bool = False,
    ) -> Tensor:  # (S, R), dtype of x
        """h_s = scale * drop(x_s) @ down_e.T"""
        x, down = grouped_rows(x, rows, by_token)[0], down.to(x.dtype)
        h = x.new_empty(x.shape[0], down.shape[1])
        for e, part in rows.slices():
            h[part] = project(x[part], down[e], scale, *mask(seeds, e, p))
        return h

    def grouped_matmul_lowrank(
        x: Tensor,  # (S, K), or (T, K) by token; K may be 0
        weight: Tensor,  # (E, N, K), used in the dtype of x
        h: Tensor,  # (S, R), dtype of x
        up: Tensor,  # (E, N, R)
        rows: Any,  # ``Rows`` of forgetless.ops.grouped
        bias: Tensor | None = None,  # (E, N), likewise
        p: float = 0.0,
        seeds: Tensor | None = None,  # (E, 2) int32
        by_token: bool = False,
    ) -> Tensor:  # (S, N), dtype of x
        """y_s = x_s @ weight_e.T + bias_e + drop(h_s @ up_e.T)"""
        x, up = grouped_rows(x, rows, by_token)[0], up.to(x.dtype)
        y = x.new_empty(x.shape[0], weight.shape[1])
        for e, part in rows.slices():
            more = None if bias is None else bias[e].to(x.dtype)
            y[part] = matmul_lowrank(x[part], weight[e].to(x.dtype), h[part], up[e], more, *mask(seeds, e, p))
        return y

    def grouped_outer(
        g: Tensor,  # (S, R)
        x: Tensor,  # (S, K), or (T, K) by token; dtype of g
        rows: Any,  # ``Rows`` of forgetless.ops.grouped
        p: float = 0.0,
        seeds: Tensor | None = None,  # (E, 2) int32
        dtype: torch.dtype | None = None,
        by_token: bool = False,
    ) -> Tensor:  # (E, R, K), dtype given or that of x
        """g.T @ drop(x) over the rows of each expert; zero for an expert without rows"""
        x = grouped_rows(x, rows, by_token)[0]
        out = x.new_zeros(rows.ends.shape[0], g.shape[1], x.shape[1], dtype=dtype or x.dtype)
        for e, part in rows.slices():
            out[e] = outer(g[part], x[part], *mask(seeds, e, p), dtype)
        return out

    def grouped_dx_and_ddown(
        dy: Tensor | None,  # (S, N); None adds no product with the weight
        weight: Tensor,  # (E, N, K), used in the dtype of g
        g: Tensor,  # (S, R)
        down: Tensor,  # (E, R, K)
        x: Tensor | None,  # (S, K), or (T, K) by token; None if ddown is not needed
        rows: Any,  # ``Rows`` of forgetless.ops.grouped
        p: float = 0.0,
        seeds: Tensor | None = None,  # (E, 2) int32
        *,
        need_dx: bool = True,
        dtype: torch.dtype | None = None,
        by_token: bool = False,
    ) -> tuple[Tensor | None, Tensor | None]:  # dx (S, K), dtype of g; ddown (E, R, K), dtype given or that of x
        """dx_s = dy_s @ weight_e + drop(g_s @ down_e) and ddown as of ``grouped_outer``, with one mask"""
        x, wide = x if x is None else grouped_rows(x, rows, by_token)[0], down.to(g.dtype)
        dx = g.new_empty(len(g), down.shape[2]) if need_dx else None
        ddown = None if x is None else torch.zeros_like(down, dtype=dtype or x.dtype)
        for e, part in rows.slices():
            products = [None if dy is None else dy[part]], [None if dy is None else weight[e].to(g.dtype)]
            own = None if x is None else x[part]
            made = dx_and_ddown(*products, g[part], [wide[e]], own, *mask(seeds, e, p), need_dx=need_dx, dtype=dtype)
            if dx is not None:
                dx[part] = made[0]
            if ddown is not None:
                ddown[e] = made[1]
        return dx, ddown

    def grouped_sum(
        y: Tensor,  # (S, N)
        rows: Any,  # ``Rows`` of forgetless.ops.grouped
        weights: Tensor | None = None,  # (S,), any floating dtype
    ) -> Tensor:  # (T, N), dtype of y
        """out_t = sum of weights_s * y_s over the rows s of token t, in at least float32, rounded once"""
        out = y.new_zeros(rows.size, y.shape[1], dtype=torch.promote_types(y.dtype, torch.float32))
        for _, part in rows.slices():
            own = y[part].to(out.dtype)
            out.index_add_(0, rows.tokens[part], own if weights is None else own * weights[part, None].to(out.dtype))
        return out.to(y.dtype)

    return grouped_rows, grouped_project, grouped_matmul_lowrank, grouped_outer, grouped_dx_and_ddown, grouped_sum
