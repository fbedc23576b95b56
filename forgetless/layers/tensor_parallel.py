"""Tensor parallelism: the low-rank path beside a frozen layer whose weight is a DTensor, cut along one dimension.

The layer makes its part of x @ W.T by its own forward, with its own communication. The factors are whole and alike on
every rank, r (N + K) numbers a layer; each rank takes its slice of them, and what crosses ranks for an update is of the
size (tokens, rank):

    column-wise, W cut along N    h = s * drop(x) @ down.T on every rank,  y_i = .. + h @ up_i.T
                                  backward dh = sum_i dy_i @ up_i          (all-reduce)
    row-wise, W cut along K       h = sum_i s * drop(x_i) @ down_i.T       (all-reduce),  y = .. + h @ up.T

Megatron-LM's f and g (Shoeybi et al., arXiv 1909.08053), on h instead of on x and y.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Cut:
    """This rank's part of a weight (N, K): along ``dim``, ``size`` from ``start`` on."""

    dim: int
    start: int
    size: int
    mesh: Any

    @property
    def group(self) -> Any:
        return self.mesh.get_group()

    def own(self, factor: Tensor) -> Tensor:
        """The rank's rows of up (N, R), or its columns of down (R, K); every rank's gradient arrives at the whole."""
        return _Own.apply(factor, self)

    def local(self, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        """The factors as this rank multiplies them."""
        return (down, self.own(up)) if self.dim == 0 else (self.own(down), up)

    def seed(self, seed: Tensor | None) -> Tensor | None:
        """One dropout mask where ranks have the same x, another on each where they have different columns of it."""
        if seed is None:
            return None
        seed = seed.clone()
        torch.distributed.broadcast(seed, group=self.group, group_src=0)
        return seed if self.dim == 0 else seed + torch.tensor([0, self.start], dtype=seed.dtype, device=seed.device)


def cut_of(module: nn.Module) -> Cut | None:
    """How a linear layer's weight is cut over a one-dimensional mesh; None if it is whole."""
    weight: Any = module._parameters.get("weight")
    if type(module) is not nn.Linear or not hasattr(weight, "placements"):
        return None
    mesh, (placement,) = weight.device_mesh, weight.placements
    dim = placement.dim % 2
    each = -(-weight.shape[dim] // mesh.size())  # as torch.chunk
    start = min(mesh.get_local_rank() * each, weight.shape[dim])
    return Cut(dim, start, weight.to_local().shape[dim], mesh)


def refusal(module: nn.Module) -> str | None:
    """Why a layer with a distributed weight cannot be adapted; None if it can."""
    weight: Any = module._parameters.get("weight")
    if not hasattr(weight, "placements"):
        return None
    placed = weight.placements
    if len(placed) == 1 and type(placed[0]).__name__ == "Shard":
        return None
    return f"its weight is placed {tuple(placed)}: wants one mesh dimension, column-wise or row-wise"


def broadcast_parameters(module: nn.Module, cut: Cut) -> None:
    """Give every rank the first one's parameters: their random starts may differ."""
    for parameter in module.parameters():
        torch.distributed.broadcast(parameter.data, group=cut.group, group_src=0)


def gathered_columns(x: Tensor, cut: Cut, K: int) -> Tensor:  # (M, K_i) of this rank -> (M, K)
    """x of all ranks side by side; a collective call."""
    whole = x.new_zeros(x.shape[0], K)
    whole[:, cut.start : cut.start + cut.size] = x
    torch.distributed.all_reduce(whole, group=cut.group)
    return whole


class _Own(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, factor: Tensor, cut: Cut) -> Tensor:
        ctx.cut, ctx.shape = cut, factor.shape
        return factor.narrow(cut.dim, cut.start, cut.size).clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        cut = ctx.cut
        whole = grad.new_zeros(ctx.shape)
        whole.narrow(cut.dim, cut.start, cut.size).copy_(grad)
        torch.distributed.all_reduce(whole, group=cut.group)
        return whole, None
