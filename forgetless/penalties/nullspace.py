"""NullSpace: CLoRA's penalty, ||A P||^2 + ||B^T Q||^2 with frozen random orthonormal P and Q."""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import is_
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..adapter import Adapter, Site, Stays, generator_of, wide
from ..ops.rows import Products, Rows
from .base import Item, Penalty, PenaltyState, register
from .batched import grouped, joined
from .hadamard import hadamard_blocks

BASES = ("hadamard", "orthogonal", "shared")


@register
@dataclass(frozen=True)
class NullSpace(Penalty):
    """weight / 2 * (||down @ P||_F^2 + ||up.T @ Q||_F^2), P (K, k) and Q (N, k) frozen with orthonormal columns.

    CLoRA, Lu et al., ACL 2025 (arXiv 2410.16801), conventions of the authors' code: the halves, the sum (not mean)
    over layers, weight 1, the raw factors without the adapter's scale, centred at zero, added before clipping.
    k >= dim is legal and is plain decay of that factor, as there.

    Args:
        weight: factor, 1 in the paper.
        k: columns of P and of Q, the width of the protected subspace. The paper uses 128 to 2048.
        basis: "orthogonal" draws Haar-random columns for every layer (QR in float32, then cast to the weight's
            dtype), the paper's; "shared" draws them once for all layers of one width and flips the signs of their
            rows anew for each layer, so that each layer's basis has exactly the paper's distribution, and only the
            joint one differs: hardly any storage and a fraction of the time. Layers of all models of a process hold
            one tensor while it is equal: replace it rather than write to it;
            "hadamard" takes k columns of a randomly signed block Hadamard matrix: exactly orthonormal, same mean
            k / dim * I, stored as dim signs and k indices. It is not the paper's distribution.
        seed: bases are a function of (seed, layer name) alone, so ranks and resumed runs agree; never saved.

    Raises:
        ValueError: a field is of another type or out of range.
    """

    weight: float = 1.0
    k: int = 256
    basis: str = "orthogonal"
    seed: int = 0

    name: ClassVar[str] = "null-space"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.k, int) or self.k < 1:
            raise ValueError(f"NullSpace.k is {self.k!r}, wants an integer >= 1")
        if self.basis not in BASES:
            raise ValueError(f"NullSpace.basis is {self.basis!r}, wants one of {list(BASES)}")

    def attach(self, adapter: Adapter, site: Site) -> PenaltyState:
        return _NullSpace(self, site)


class _NullSpace(PenaltyState):
    input: _Basis
    output: _Basis

    def __init__(self, spec: NullSpace, site: Site):
        super().__init__(spec)
        N, K = site.weight.shape
        self.input = make_basis(spec, K, site.weight, f"{site.name}.P")
        self.output = make_basis(spec, N, site.weight, f"{site.name}.Q")

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self.__dict__.pop("_rows", None)  # which would keep the memory of tensors that are moved away
        return super()._apply(*args, **kwargs)

    @classmethod
    def total(cls, items: list[Item]) -> Tensor:
        bases = [basis for state, _, _ in items for basis in (state.input, state.output)]
        weights = [state.spec.weight for state, _, _ in items for _ in range(2)]
        factors = [(factor,) for _, adapter, _ in items for factor in adapter.factors()]  # down (R, K), up (N, R)

        def form(group: list[int], stack: Tensor) -> tuple[Tensor, Tensor]:
            first, tall = group[0], group[0] % 2 == 1
            inside, grad = bases[first].stacked([bases[i] for i in group], stack.mT if tall else stack)
            grad = (grad.mT if tall else grad).contiguous()  # before it is made wide: half of the bytes
            return 0.5 * weights[first] * inside, wide(grad).mul_(weights[first])

        keys = [(i % 2, b.key(), w) for i, (b, w) in enumerate(zip(bases, weights, strict=True))]
        return grouped(factors, keys, form, [b.largest() for b in bases])

    def rows(self) -> tuple[Rows, ...]:
        bases: Any = self._modules  # a module's attribute costs a microsecond
        P, Q = bases["input"], bases["output"]
        now = P, Q, *P._buffers.values(), *Q._buffers.values()  # all that the rows are made of
        parts, rows = self.__dict__.get("_rows", ((), ()))
        if len(parts) != len(now) or not all(map(is_, parts, now)):
            rows = P.rows("down") + Q.rows("up")
            self.__dict__["_rows"] = now, rows
        return rows

    @classmethod
    def total_made(cls, items: list[Item], made: list[Products]) -> Tensor:
        layouts = []
        rows_of = [(rows, z.shape[1]) for of_layers, z in made for rows in of_layers]
        for (state, _, _), (rows, R) in zip(items, rows_of, strict=True):
            bases: Any = state._modules
            of = {"down": bases["input"], "up": bases["output"]}
            sizes = [(one.own, one.length(R), -1 if of[one.of].complement and not one.own else 1) for one in rows]
            layouts.append((state.spec.weight, *sizes))

        def form(group: Sequence[int], z: Tensor) -> tuple[Tensor, Tensor]:
            weight, *rows = layouts[group[0]]
            if not any(own for own, _, _ in rows):
                return 0.5 * weight * _square(z), z.mul_(weight)
            value, grads = z.new_zeros(()), []
            parts = z.split_with_sizes([k for _, k, _ in rows], 1)
            for part, (own, _, sign) in zip(parts, rows, strict=True):
                if own:  # the trace of F F^T is ||F||^2
                    value = value + part.diagonal(dim1=1, dim2=2).sum()
                    grads.append(torch.eye(part.shape[1]).to(part).expand_as(part))
                else:
                    value = value + sign * _square(part)
                    grads.append(2 * sign * part)
            return 0.5 * weight * value, torch.cat(grads, 1).mul_(0.5 * weight)

        return joined(made, layouts, form)


def make_basis(spec: NullSpace, dim: int, like: Tensor, name: str) -> _Basis:
    """k orthonormal columns, or all of the space."""
    if spec.k >= dim:
        return _Everything()
    if spec.basis == "shared":
        return _Shared(dim, spec.k, like, spec.seed, name)
    kind = {"orthogonal": _Orthogonal, "hadamard": _Hadamard}[spec.basis]
    return kind(dim, spec.k, like, generator_of(spec.seed, name))


def _signs(dim: int, generator: torch.Generator) -> Tensor:  # (dim,) int8
    return torch.randint(0, 2, (dim,), generator=generator, dtype=torch.int8) * 2 - 1


def _square(t: Tensor) -> Tensor:
    flat = wide(t).reshape(-1)
    return torch.dot(flat, flat)


class _Basis(Stays):
    """Orthonormal columns P (dim, k), or with ``complement`` all those that are orthogonal to the stored columns."""

    complement = False

    def key(self) -> Hashable:
        """Bases with equal keys can go through ``stacked`` together."""
        return type(self), self.complement, tuple((b.shape, b.dtype, b.device) for b in self.buffers())

    def largest(self) -> Tensor | None:
        """The largest tensor that ``stacked`` copies of each basis, for ``buckets``."""
        return None

    def rows(self, of: str) -> tuple[Rows, ...]:
        """What a forward pass multiplies with: with ``complement`` the factor itself, and the stored columns."""
        stored = self.stored_columns(of)
        return (Rows(of), stored) if self.complement else (stored,)

    def stored_columns(self, of: str) -> Rows:
        """The stored columns, as rows."""
        return Rows(of)

    def stacked(self, bases: Sequence[Any], rows: Tensor) -> tuple[Tensor, Tensor]:
        """Sum of ||F_l P_l||^2, and F_l P_l P_l^T (L, R, dim), which may be ``rows`` itself.

        Args:
            bases: L bases of one key, of which this is the first.
            rows: F_l (L, R, dim), at least float32.
        """
        inside, grad = self.projected(bases, rows)
        # ||F P||^2 = ||F||^2 - ||F P'||^2 with P' the other columns
        return (_square(rows) - inside, rows - grad) if self.complement else (inside, grad)

    def projected(self, bases: Sequence[Any], rows: Tensor) -> tuple[Tensor, Tensor]:
        """``stacked`` on the stored columns."""
        raise NotImplementedError


class _Everything(_Basis):
    """All of the space: ||rows||^2."""

    def projected(self, bases: Sequence[Any], rows: Tensor) -> tuple[Tensor, Tensor]:
        return _square(rows), rows


def haar(dim: int, k: int, generator: torch.Generator, dtype: torch.dtype) -> Tensor:  # (dim, k)
    """k Haar-random orthonormal columns."""
    q, r = torch.linalg.qr(torch.randn(dim, k, generator=generator, dtype=dtype))
    return (q * r.diagonal().sign()).contiguous()  # the sign that makes QR's Q Haar


class _Orthogonal(_Basis):
    """k Haar-random orthonormal columns; the complement's columns where those are fewer."""

    basis: Tensor

    def __init__(self, dim: int, k: int, like: Tensor, generator: torch.Generator):
        super().__init__()
        # A complement of Haar columns is Haar as well, so the cost never exceeds min(k, dim - k).
        self.complement = 2 * k > dim
        wide_dtype = torch.promote_types(like.dtype, torch.float32)  # QR does not exist, and is not exact, in half
        columns = haar(dim, min(k, dim - k), generator, wide_dtype)
        self.register_buffer("basis", columns.to(device=like.device, dtype=like.dtype), persistent=False)

    def largest(self) -> Tensor:
        return self.basis

    def stored_columns(self, of: str) -> Rows:
        return Rows(of, self._buffers["basis"])

    def projected(self, bases: Sequence[Any], rows: Tensor) -> tuple[Tensor, Tensor]:
        P = torch.stack([b.basis for b in bases])
        z = rows.to(P.dtype) @ P
        return _square(z), z @ P.mT


class _Shared(_Basis):
    """diag(signs) P with P an orthogonal basis that all layers of one width have in common, in one tensor."""

    basis: Tensor
    signs: Tensor

    def __init__(self, dim: int, k: int, like: Tensor, seed: int, name: str):
        super().__init__()
        self.complement = 2 * k > dim
        side = name.rpartition(".")[2]
        dtype = torch.promote_types(like.dtype, torch.float32)
        self.common = _common(seed, f"{dim}.{side}", dim, min(k, dim - k), dtype)
        basis = self.common.columns.to(device=like.device, dtype=like.dtype, copy=True)
        self.register_buffer("basis", self.common.one(basis), persistent=False)
        self.register_buffer("signs", _signs(dim, generator_of(seed, name)).to(like.device), persistent=False)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:  # .to(), .cuda(), .half(): in one tensor there as well
        result = super()._apply(*args, **kwargs)
        self.basis = self.common.one(self.basis)
        return result

    def key(self) -> Hashable:
        return super().key(), id(self.basis)  # unique while the basis lives; the key does not outlive the call

    def stored_columns(self, of: str) -> Rows:
        return Rows(of, self.basis, self.signs)

    def projected(self, bases: Sequence[Any], rows: Tensor) -> tuple[Tensor, Tensor]:
        signs = torch.stack([b.signs for b in bases])[:, None].to(self.basis.dtype)  # exact in any dtype
        turned = rows.to(self.basis.dtype).contiguous() * signs  # contiguous: one product for all layers
        z = turned @ self.basis
        return _square(z), (z @ self.basis.T).mul_(signs)


class _Common:
    """What the layers' shared bases of one (seed, side, width) start from, and the tensors that they hold."""

    def __init__(self, *key: Any):
        self.key = key  # seed, name, dim, columns, dtype
        self._tensors: weakref.WeakValueDictionary[Any, Tensor] = weakref.WeakValueDictionary()

    @cached_property
    def columns(self) -> Tensor:
        """As they are drawn, on the CPU; nobody is handed it but as a copy."""
        seed, name, dim, k, dtype = self.key
        return haar(dim, k, generator_of(seed, name), dtype)

    def one(self, basis: Tensor) -> Tensor:
        """The tensor that is held already, if it is the same bit for bit; else ``basis``, for others to hold.

        By value, since a user may have changed what is held. Tensors of a mode (inference, fake, meta) are not shared.
        """
        if type(basis) is not Tensor or basis.is_inference() or basis.is_meta:
            return basis
        key = basis.device, basis.dtype
        earlier = self._tensors.get(key)
        if earlier is not None and torch.equal(earlier, basis):
            return earlier
        self._tensors[key] = basis
        return basis

    def __reduce__(self) -> Any:
        return _common, self.key


def _common(*key: Any) -> _Common:
    """The one of that key, if a layer has it; a new one under fake tensors."""
    if type(torch.empty(0)) is not Tensor:
        return _Common(*key)
    return _commons.setdefault(key, _Common(*key))


#: By what its columns are a function of.
_commons: weakref.WeakValueDictionary[Any, _Common] = weakref.WeakValueDictionary()


class _Hadamard(_Basis):
    """k columns of diag(signs) @ H, H block diagonal of orthonormal Hadamard matrices of power-of-two size."""

    signs: Tensor
    columns: Tensor

    def __init__(self, dim: int, k: int, like: Tensor, generator: torch.Generator):
        super().__init__()
        self.complement = 2 * k > dim
        signs = _signs(dim, generator)
        columns = torch.randperm(dim, generator=generator)[: min(k, dim - k)].sort().values
        self.register_buffer("signs", signs.to(like.device), persistent=False)
        self.register_buffer("columns", columns.to(like.device), persistent=False)

    def stored_columns(self, of: str) -> Rows:
        return Rows(of, None, self.signs, self.columns)

    def projected(self, bases: Sequence[Any], rows: Tensor) -> tuple[Tensor, Tensor]:
        signs = torch.stack([b.signs for b in bases])  # (L, dim)
        chosen = torch.zeros_like(signs).scatter_(1, torch.stack([b.columns for b in bases]), 1)[:, None]
        signs = signs[:, None]
        z = hadamard_blocks(rows * signs).mul_(chosen)
        return _square(z), hadamard_blocks(z).mul_(signs)  # H is its own transpose
