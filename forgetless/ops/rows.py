"""Products of a layer's factors with other rows than those of x: what penalties are made of.

A penalty wants V @ down.T or V @ up of some rows V: a basis, the factor's own rows (its Gram matrix), or the rows of a
Hadamard matrix; or h.T @ h. Those are the products of the low-rank path, on more rows, so the passes that make h, dup
and ddown anyway take them along. This is the description that autograd and the backends share, and its plain form.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """Rows V (k, dim), and the factor F (R, dim) that they are multiplied with: V @ F.T (k, R).

    Attributes:
        of: "down" (dim = K), "up" (F = up.T, dim = N), or "hidden": then the product is h.T @ h (R, R).
        basis: V.T (dim, k), any strides; None for the rows of F itself, or of a Hadamard matrix.
        weight: (dim,) factors of V's columns; None for ones.
        columns: (k,) int64: V has these rows of the block Hadamard matrix of ``dim``, before ``weight``.
    """

    of: str
    basis: Tensor | None = None
    weight: Tensor | None = None
    columns: Tensor | None = None

    @property
    def own(self) -> bool:
        """Whether V is F itself: the product is symmetric, and F has its gradient from both sides."""
        return self.basis is None and self.columns is None

    def length(self, R: int) -> int:
        """k"""
        given = self.basis if self.columns is None else self.columns
        return R if given is None else given.shape[-1]

    def values(self, factor: Tensor) -> Tensor:  # (R, dim) -> (k, dim)
        """V in the dtype of F."""
        if self.columns is not None:
            rows = hadamard_rows(self.columns, factor.shape[1]).to(factor.dtype)
        else:
            rows = factor if self.basis is None else self.basis.t().to(factor.dtype)
        return rows if self.weight is None else rows * self.weight.to(factor.dtype)


class Term(NamedTuple):
    """What one penalty wants of one layer: the products of its rows, one below the other, (sum of k, R) float32."""

    layer: int  # its place among the layers of the call
    rows: tuple[Rows, ...]
    joins: bool = False  # they go below those of the term before it, of the same R, in one tensor


class Products(NamedTuple):
    """The rows of one or more layers, and their products one below the other."""

    rows: list[tuple[Rows, ...]]
    z: Tensor  # (sum of all k, R), at least float32


@dataclass(eq=False)
class Terms:
    """What penalties want of one call of the op, and what has become of it."""

    items: tuple[Term, ...]
    anywhere: bool = False  # also on BLAS: once the pass is over the factors are shards
    spent: bool = False  # a backward pass has gone through the call: its products have no graph any more
    users: list[weakref.ref[Any]] = field(default_factory=list)  # who keeps products: ``release`` lets go of them

    def spend(self) -> None:
        """A backward pass goes through the call: what keeps its products would keep the rest of the graph, too."""
        self.spent = True
        for one in self.users:
            user = one()
            if user is not None:
                user.release()

    @cached_property
    def tensors(self) -> list[Tensor]:
        """The tensors of the rows."""
        return [t for term in self.items for rows in term.rows for t in rows[1:] if t is not None]

    def replaced(self, tensors: Sequence[Tensor]) -> Sequence[Term]:
        """The terms with other tensors in the places of ``tensors``."""
        if all(map(is_, tensors, self.tensors)):
            return self.items
        some = iter(tensors)
        return [
            term._replace(
                rows=tuple(Rows(r.of, *[None if t is None else next(some) for t in r[1:]]) for r in term.rows)
            )
            for term in self.items
        ]


class More(NamedTuple):
    """What a sum over rows takes along: d.T @ V (R_i, dim), added to its rows from ``first`` on.

    d (k, R_i), the gradient of V @ F.T, are the rows of ``dz`` from ``at`` on.
    """

    rows: Rows
    factor: Tensor  # down (R_i, dim), or up (dim, R_i), as ``rows.of`` says
    dz: Tensor  # (at least at + k, R_i), contiguous
    at: int = 0
    first: int = 0


class Extra(NamedTuple):
    """The gradients of a call's terms, by where they go."""

    ups: list[list[More]]  # of each layer
    downs: list[More]
    starts: list[Tensor | None]  # of each layer: (R, R), the gradient of h.T @ h


def hadamard_rows(columns: Tensor, dim: int) -> Tensor:  # (k,) -> (k, dim) float64
    """Rows of the orthonormal block Hadamard matrix whose blocks are the binary digits of ``dim``, largest first."""
    size = torch.zeros_like(columns)
    start = 0
    for bit in reversed(range(dim.bit_length())):
        if dim >> bit & 1:
            inside = (columns >= start) & (columns < start + (1 << bit))
            size = torch.where(inside, torch.full_like(size, 1 << bit), size)
            start += 1 << bit
    c, size = columns[:, None], size[:, None]
    k = torch.arange(dim, device=columns.device)
    parity = c & k & (size - 1)
    for shift in (16, 8, 4, 2, 1):
        parity = parity ^ (parity >> shift)
    same_block = ((c ^ k) & -size) == 0
    return torch.where(same_block, 1 - 2 * (parity & 1), 0) / size.double().sqrt()


def products(
    terms: Sequence[Term], hs: Sequence[Tensor], downs: Sequence[Tensor], ups: Sequence[Tensor]
) -> list[Tensor]:
    """What the terms want, from each layer's h (M, R), down (R, K) and up (N, R), at least float32."""
    zs: list[list[Tensor]] = []
    for i, rows_of_term, joins in terms:
        wide = torch.promote_types(torch.promote_types(downs[i].dtype, ups[i].dtype), torch.float32)
        h = hs[i].to(wide)
        factors = {"down": downs[i].to(wide), "up": ups[i].to(wide).t()}
        zs = zs if joins else [*zs, []]
        for r in rows_of_term:
            zs[-1].append(h.t() @ h if r.of == "hidden" else r.values(factors[r.of]) @ factors[r.of].t())
    return [torch.cat(parts) for parts in zs]


def extra_of(
    terms: Sequence[Term], dzs: Sequence[Tensor | None], downs: Sequence[Tensor], ups: Sequence[Tensor]
) -> Extra:
    """Where the gradients of the terms' products go; ``dzs`` are of the tensors that the terms are in."""
    of_ups: list[list[More]] = [[] for _ in ups]
    of_downs: list[More] = []
    starts: list[Tensor | None] = [None] * len(ups)
    ranks = [up.shape[1] for up in ups]
    some, dz, at = iter(dzs), None, 0
    for i, rows_of_term, joins in terms:
        if not joins:
            dz, at = next(some), 0
            dz = None if dz is None else dz.contiguous()
        if dz is None:
            continue
        for rows in rows_of_term:
            k = rows.length(ranks[i])
            if rows.of == "up":
                of_ups[i].append(More(rows, ups[i], dz, at))
            elif rows.of == "down":
                of_downs.append(More(rows, downs[i], dz, at, sum(ranks[:i])))
            else:
                before, d = starts[i], dz.narrow(0, at, k)
                starts[i] = d if before is None else before + d
            at += k
    return Extra(of_ups, of_downs, starts)


def pulled(more: More) -> Tensor:  # (R_i, dim), at least float32
    """d.T @ V, the factor's gradient."""
    factor = more.factor if more.rows.of == "down" else more.factor.t()
    wide = torch.promote_types(factor.dtype, torch.float32)
    d = more.dz.narrow(0, more.at, more.rows.length(factor.shape[0])).to(wide)
    return (d + d.t() if more.rows.own else d).t() @ more.rows.values(factor.to(wide))


def add_pulled(out: Tensor, more: Sequence[More]) -> Tensor:  # (R, dim)
    """``out`` with each of them added, in place."""
    for one in more:
        part = pulled(one)
        out.narrow(0, one.first, part.shape[0]).add_(part)
    return out


def started(h: Tensor, d: Tensor) -> Tensor:  # (M, R), (R, R) -> (M, R)
    """The gradient of h from that of h.T @ h."""
    return h.to(d.dtype) @ (d + d.t())
