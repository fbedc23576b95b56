"""The plan hybrid: the skinny products by the kernels, beside the vendor's GEMM, which adds onto the low-rank product.

For cards and shapes where the vendor's GEMM is so much faster than Triton's that writing h @ up.T once costs less.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import blas

#: What the kernels do; all that experts need, for whom no vendor's GEMM adds onto what is there.
KERNELS = (
    "project", "project_terms", "project_core", "project_outer", "project_core_outer", "outer",
    "grouped_rows", "grouped_project", "grouped_matmul_lowrank", "grouped_outer", "grouped_dx_and_ddown", "grouped_sum",
)  # fmt: skip


class Hybrid:
    """A backend made of the kernels' module and ``blas``: names, signatures and results are the reference's."""

    matmul_lowrank = staticmethod(blas.matmul_lowrank)

    def __init__(self, kernels: Any):
        self.kernels = kernels

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name not in KERNELS:
            raise AttributeError(name)
        launcher: Callable[..., Any] = getattr(self.kernels, name)
        return launcher

    def dx_and_ddown(
        self,
        dys: Sequence[Tensor | None],  # (M, N_i) each; None adds no product with the weight
        weights: Sequence[Tensor | None],  # (N_i, K)
        g: Tensor,  # (M, sum of R_i)
        downs: Sequence[Tensor],  # (R_i, K)
        x: Tensor | None,  # (M, K); None if ddown is not needed
        p: float = 0.0,
        seed: Tensor | None = None,  # (2,) int32
        *,
        need_dx: bool = True,
        dtype: torch.dtype | None = None,
        more: Sequence[Any] = (),  # ``More``s of forgetless.ops.rows
    ) -> tuple[Tensor | None, Tensor | None]:  # dx (M, K), dtype of g; ddown (sum of R_i, K), dtype given or that of x
        """dx by the vendor's GEMM, ddown as of ``outer``"""
        dx, _ = blas.dx_and_ddown(dys, weights, g, downs, None, p, seed, need_dx=need_dx)
        return dx, None if x is None else self.kernels.outer(g, x, p, seed, dtype, more)
