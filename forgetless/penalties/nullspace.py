"""NullSpace: CLoRA's penalty, ||A P||^2 + ||B^T Q||^2 with frozen random orthonormal P and Q."""

from __future__ import annotations

import functools
import hashlib
import math
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from .base import Item, Penalty, PenaltyState, register, wide
from .grouped import buckets, closed_form, like

if TYPE_CHECKING:
    from ..methods.base import Adapter, Site


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
            dtype), the paper's; "shared" draws them once for all layers of one width, so that each layer's basis has
            the paper's distribution but they are not independent: a fraction of the storage and of the time;
            "hadamard" takes k columns of a randomly signed block Hadamard matrix: exactly orthonormal, same mean
            k / dim * I, stored as dim signs and k indices. It is not the paper's distribution.
        seed: bases are a function of (seed, layer name) alone, so ranks and resumed runs agree; never saved.
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
            raise ValueError(f"NullSpace.basis is {self.basis!r}, wants one of {sorted(BASES)}")

    def attach(self, adapter: Adapter, site: Site) -> PenaltyState:
        return _NullSpace(self, site)


class _NullSpace(PenaltyState):
    def __init__(self, spec: NullSpace, site: Site):
        super().__init__(spec)
        N, K = site.weight.shape
        self.input = make_basis(spec, K, site.weight, f"{site.name}.P")
        self.output = make_basis(spec, N, site.weight, f"{site.name}.Q")

    def value(self, adapter: Adapter, hidden: Tensor | None) -> Tensor:
        down, up = adapter.factors()
        return 0.5 * self.spec.weight * (self.input(down) + self.output(up.T))

    @classmethod
    def total(cls, items: list[Item]) -> Tensor:
        bases = [basis for state, _, _ in items for basis in (state.input, state.output)]
        weights = [state.spec.weight for state, _, _ in items for _ in range(2)]
        factors = [factor for _, adapter, _ in items for factor in adapter.factors()]

        def compute(factors: list[Tensor], needs: list[bool]) -> tuple[Tensor, list[Tensor | None]]:
            grads: list[Tensor | None] = [None] * len(factors)
            value = wide(factors[0]).new_zeros(())
            # down (R, K) has the protected dimension last, up (N, R) first
            keys = [(i % 2, type(b), b.key(), weights[i], like(factors[i])) for i, b in enumerate(bases)]
            for group in buckets(keys):
                rows = torch.stack([factors[i] for i in group])
                rows = rows if group[0] % 2 == 0 else rows.transpose(1, 2)  # (L, R, dim)
                inside, grad = bases[group[0]].stacked([bases[i] for i in group], rows)
                value = value + 0.5 * weights[group[0]] * inside
                grad = grad.mul_(weights[group[0]]).to(rows.dtype)
                grad = grad if group[0] % 2 == 0 else grad.transpose(1, 2).contiguous()  # once for all layers
                for i, part in zip(group, grad.unbind(), strict=True):
                    grads[i] = part if needs[i] else None
            return value, grads

        return closed_form(compute, factors)


def make_basis(spec: NullSpace, dim: int, like: Tensor, name: str) -> nn.Module:
    """Module that maps rows (R, dim) to the squared norm of their projections on k orthonormal columns."""
    if spec.k >= dim:
        return _Everything()
    if spec.basis == "shared":
        name = f"{dim}.{name.rpartition('.')[2]}"
    digest = hashlib.sha256(f"{spec.seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return BASES[spec.basis](dim, spec.k, like, generator)


class _Basis(nn.Module):
    """Orthonormal columns P. ``stacked`` does many bases of one kind at once."""

    complement = False

    def key(self) -> Any:
        """Bases with equal keys can go through ``stacked`` together."""
        return ()

    @classmethod
    def stacked(cls, bases: list[Any], rows: Tensor) -> tuple[Tensor, Tensor]:
        """Sum over L bases of ||rows_l P_l||^2, and rows_l P_l P_l^T, for rows (L, R, dim), which it may keep."""
        raise NotImplementedError


def _complemented(complement: bool, rows: Tensor, inside: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """||rows P||^2 = ||rows||^2 - ||rows P'||^2 with P' the other columns."""
    return (rows.square().sum() - inside, rows - grad) if complement else (inside, grad)


class _Everything(_Basis):
    """All of the space: ||rows||^2."""

    @classmethod
    def stacked(cls, bases: list[Any], rows: Tensor) -> tuple[Tensor, Tensor]:
        rows = wide(rows)
        return rows.square().sum(), rows

    def forward(self, rows: Tensor) -> Tensor:
        return wide(rows).square().sum()


class _Orthogonal(_Basis):
    """k Haar-random orthonormal columns; the complement's columns where those are fewer."""

    basis: Tensor

    def __init__(self, dim: int, k: int, like: Tensor, generator: torch.Generator):
        super().__init__()
        # A complement of Haar columns is Haar as well, so the cost never exceeds min(k, dim - k).
        self.complement = 2 * k > dim
        columns = dim - k if self.complement else k
        wide_dtype = torch.promote_types(like.dtype, torch.float32)  # QR does not exist, and is not exact, in half
        gauss = torch.randn(dim, columns, generator=generator, dtype=wide_dtype)
        q, r = torch.linalg.qr(gauss)
        q = q * r.diagonal().sign()  # the sign that makes QR's Q Haar
        self.register_buffer("basis", q.to(device=like.device, dtype=like.dtype).contiguous(), persistent=False)

    def forward(self, rows: Tensor) -> Tensor:
        inside = wide(rows.to(self.basis.dtype) @ self.basis).square().sum()
        return wide(rows).square().sum() - inside if self.complement else inside

    def key(self) -> Any:
        return self.complement, like(self.basis)

    @classmethod
    def stacked(cls, bases: list[Any], rows: Tensor) -> tuple[Tensor, Tensor]:
        P = cls._one_storage(bases)  # (L, dim, k)
        z = rows.to(P.dtype) @ P
        grad = wide(z @ P.transpose(1, 2))
        return _complemented(bases[0].complement, wide(rows), wide(z).square().sum(), grad)

    @staticmethod
    def _one_storage(bases: list[Any]) -> Tensor:
        """The bases as one tensor, without a copy per step: after the first they are views of it."""
        first = bases[0].basis
        size = first.numel()
        together = all(
            b.basis.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
            and b.basis.storage_offset() == first.storage_offset() + i * size
            for i, b in enumerate(bases)
        )
        if not together or not first.is_contiguous():
            stack = torch.stack([b.basis for b in bases])
            for b, part in zip(bases, stack.unbind(), strict=True):
                b.basis = part
            return stack
        return first.as_strided((len(bases), *first.shape), (size, *first.stride()), first.storage_offset())


class _Hadamard(_Basis):
    """k columns of diag(signs) @ H, H block diagonal of orthonormal Hadamard matrices of power-of-two size."""

    signs: Tensor
    columns: Tensor

    def __init__(self, dim: int, k: int, like: Tensor, generator: torch.Generator):
        super().__init__()
        self.complement = 2 * k > dim
        count = dim - k if self.complement else k
        signs = torch.randint(0, 2, (dim,), generator=generator, dtype=torch.int8) * 2 - 1
        columns = torch.randperm(dim, generator=generator)[:count].sort().values
        self.register_buffer("signs", signs.to(like.device), persistent=False)
        self.register_buffer("columns", columns.to(like.device), persistent=False)

    def forward(self, rows: Tensor) -> Tensor:
        turned = hadamard_blocks(wide(rows) * self.signs)
        inside = turned[:, self.columns].square().sum()
        return wide(rows).square().sum() - inside if self.complement else inside

    def key(self) -> Any:
        return self.complement, like(self.signs), like(self.columns)

    @classmethod
    def stacked(cls, bases: list[Any], rows: Tensor) -> tuple[Tensor, Tensor]:
        L, R, dim = rows.shape
        signs = torch.stack([b.signs for b in bases])[:, None]
        columns = torch.stack([b.columns for b in bases])
        kept = torch.zeros(L, 1, dim, dtype=wide(rows).dtype, device=rows.device)
        kept.scatter_(2, columns[:, None], 1.0)
        turned = hadamard_blocks((wide(rows) * signs).reshape(L * R, dim)).view(L, R, dim) * kept
        inside = turned.square().sum()
        grad = hadamard_blocks(turned.reshape(L * R, dim)).view(L, R, dim) * signs  # H is its own transpose
        return _complemented(bases[0].complement, wide(rows), inside, grad)


def hadamard_blocks(rows: Tensor) -> Tensor:
    """rows (R, dim) times the orthonormal block Hadamard matrix whose blocks are the binary digits of dim."""
    done, parts = 0, []
    for bit in reversed(range(rows.shape[1].bit_length())):
        size = 1 << bit
        if rows.shape[1] & size:
            parts.append(_fwht(rows[:, done : done + size]))
            done += size
    return torch.cat(parts, dim=1)


def _fwht(rows: Tensor) -> Tensor:
    """Orthonormal Walsh-Hadamard transform of rows (R, 2**m): H = H_a x H_b (Kronecker), by two large products."""
    R, size = rows.shape
    b = 1 << (size.bit_length() // 2)
    a = size // b
    rows = rows.reshape(R * a, b) @ _hadamard(b, rows.dtype, rows.device)
    rows = rows.view(R, a, b).transpose(1, 2).reshape(R * b, a) @ _hadamard(a, rows.dtype, rows.device)
    return rows.view(R, b, a).transpose(1, 2).reshape(R, size)


@functools.lru_cache(maxsize=64)
def _hadamard(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The orthonormal Hadamard matrix of a power of two, symmetric."""
    H = torch.ones(1, 1, dtype=dtype)
    while H.shape[0] < size:
        H = torch.cat((torch.cat((H, H), 1), torch.cat((H, -H), 1)))
    return (H / math.sqrt(size)).to(device)


class _Shared(_Orthogonal):
    """An orthogonal basis that all layers of one width have in common, held once."""

    def __init__(self, dim: int, k: int, like: Tensor, generator: torch.Generator):
        self._key = (generator.initial_seed(), dim, k)
        held = _shared.get((*self._key, like.device, like.dtype))
        if held is None:
            super().__init__(dim, k, like, generator)
        else:
            _Basis.__init__(self)
            self.complement = 2 * k > dim
            self.register_buffer("basis", held, persistent=False)
        self._hold_once()

    def _hold_once(self) -> None:
        key = (*self._key, self.basis.device, self.basis.dtype)
        self.basis = _shared.setdefault(key, self.basis)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:  # .to(), .cuda(), .half(): one copy there as well
        result = super()._apply(*args, **kwargs)
        self._hold_once()
        return result

    @classmethod
    def stacked(cls, bases: list[Any], rows: Tensor) -> tuple[Tensor, Tensor]:
        P = bases[0].basis  # (dim, k)
        L, R, dim = rows.shape
        z = rows.reshape(L * R, dim).to(P.dtype) @ P
        grad = wide((z @ P.T).view(L, R, dim))
        return _complemented(bases[0].complement, wide(rows), wide(z).square().sum(), grad)

    def key(self) -> Any:
        return self._key, like(self.basis)


#: Shared bases in use, by (seed, dim, k, device, dtype).
_shared: weakref.WeakValueDictionary[Any, Tensor] = weakref.WeakValueDictionary()

BASES = {"orthogonal": _Orthogonal, "shared": _Shared, "hadamard": _Hadamard}
