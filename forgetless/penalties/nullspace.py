"""NullSpace: CLoRA's penalty, ||A P||^2 + ||B^T Q||^2 with frozen random orthonormal P and Q."""

from __future__ import annotations

import functools
import hashlib
import math
import weakref
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..adapter import Adapter, Site, wide
from .base import Item, Penalty, PenaltyState, register
from .batched import Scratch, buckets, closed_form, like, one_storage, scatter


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
            joint one differs: hardly any storage and a fraction of the time;
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
        bases = [basis for state, _, _ in items for basis in state._modules.values()]  # input, output
        weights = [state.spec.weight for state, _, _ in items for _ in range(2)]
        factors = [factor for _, adapter, _ in items for factor in adapter.factors()]

        def compute(factors: list[Tensor], needs: list[bool]) -> tuple[Tensor, list[Tensor | None]]:
            grads: list[Tensor | None] = [None] * len(factors)
            value = wide(factors[0]).new_zeros(())
            # down (R, K) has the protected dimension last, up (N, R) first
            keys = [(i % 2, type(b), b.key(), weights[i], like(factors[i])) for i, b in enumerate(bases)]
            scratch = Scratch.of(items[0][0])
            for group in buckets(keys):
                alike = [factors[i] for i in group]
                inside, grad = bases[group[0]].stacked([bases[i] for i in group], alike, group[0] % 2 == 1, scratch)
                value = value + 0.5 * weights[group[0]] * inside
                grad = grad if weights[group[0]] == 1.0 else grad.mul_(weights[group[0]])
                scatter(grads, group, grad, needs, factors[group[0]])
            return value, grads

        return closed_form(compute, factors)


def make_basis(spec: NullSpace, dim: int, like: Tensor, name: str) -> nn.Module:
    """Module that maps rows (R, dim) to the squared norm of their projections on k orthonormal columns."""
    if spec.k >= dim:
        return _Everything()
    if spec.basis == "shared":
        common = _generator(spec.seed, f"{dim}.{name.rpartition('.')[2]}")
        return _Shared(dim, spec.k, like, _generator(spec.seed, name), common)
    return BASES[spec.basis](dim, spec.k, like, _generator(spec.seed, name))


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


class _Basis(nn.Module):
    """Orthonormal columns P. ``stacked`` does many bases of one kind at once."""

    complement = False

    def key(self) -> Any:
        """Bases with equal keys can go through ``stacked`` together."""
        return ()

    @classmethod
    def stacked(cls, bases: list[Any], factors: list[Tensor], tall: bool, scratch: Scratch) -> tuple[Tensor, Tensor]:
        """Sum over L bases of ||F_l P_l||^2, and F_l P_l P_l^T stacked, laid out as the factors are, at least float32.

        Args:
            factors: F_l (R, dim), or (dim, R) if ``tall``.
        """
        raise NotImplementedError


def _square(t: Tensor) -> Tensor:
    flat = t.reshape(-1)
    return torch.dot(flat, flat)


def _stack(factors: list[Tensor], scratch: Scratch, dtype: torch.dtype | None = None) -> Tensor:
    """The factors (L, ..), in their dtype or cast on the way."""
    first = factors[0]
    out = scratch.like(first, "stack", (len(factors), *first.shape), dtype)
    if out.dtype == first.dtype:
        return torch.stack(factors, out=out)
    torch._foreach_copy_(list(out.unbind()), factors)
    return out


def _turned(t: Tensor, dtype: torch.dtype, scratch: Scratch, name: str) -> Tensor:
    """t.transpose(1, 2) in that dtype, contiguous; transposed in the narrower of both, it is the slower copy."""
    L, a, b = t.shape
    if t.element_size() > dtype.itemsize:
        t = scratch.like(t, "narrow", t.shape, dtype).copy_(t)
    return scratch.like(t, name, (L, b, a), t.dtype).copy_(t.transpose(1, 2))


def _laid_out(grad: Tensor, turn: bool, factor: Tensor, scratch: Scratch) -> Tensor:
    """The gradient of factors like this one in memory of its own, at least float32: it becomes .grad as it is."""
    if turn:
        grad = _turned(grad, grad.dtype, scratch, "narrow")
    return torch.empty((grad.shape[0], *factor.shape), dtype=wide(factor[:0]).dtype, device=factor.device).copy_(grad)


def _complemented(rows: Tensor, inside: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """||rows P||^2 = ||rows||^2 - ||rows P'||^2 with P' the other columns."""
    return _square(rows) - inside, torch.sub(rows, grad, out=grad)


class _Everything(_Basis):
    """All of the space: ||rows||^2."""

    @classmethod
    def stacked(cls, bases: list[Any], factors: list[Tensor], tall: bool, scratch: Scratch) -> tuple[Tensor, Tensor]:
        stack = wide(torch.stack(factors))
        return _square(stack), stack

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
    def stacked(cls, bases: list[Any], factors: list[Tensor], tall: bool, scratch: Scratch) -> tuple[Tensor, Tensor]:
        P = one_storage(bases, "basis")  # (L, dim, k)
        L, dim, k = P.shape
        rows = _stack(factors, scratch, P.dtype)
        R = rows.shape[2 if tall else 1]
        # P from the left, P as it lies: the order that BLAS streams P through fastest
        if tall:
            z = torch.bmm(P.transpose(1, 2), rows, out=scratch.like(P, "z", (L, k, R)))
        else:
            z = _turned(torch.bmm(rows, P, out=scratch.like(P, "z", (L, R, k))), P.dtype, scratch, "turned")
        grad = torch.bmm(P, z, out=scratch.like(P, "grad", (L, dim, R)))
        grad = _laid_out(grad, not tall, factors[0], scratch)
        inside = _square(wide(z))
        return _complemented(wide(_stack(factors, scratch)), inside, grad) if bases[0].complement else (inside, grad)


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
    def stacked(cls, bases: list[Any], factors: list[Tensor], tall: bool, scratch: Scratch) -> tuple[Tensor, Tensor]:
        stack = wide(_stack(factors, scratch))
        signs = one_storage(bases, "signs").to(stack.dtype)  # (L, dim)
        kept = torch.zeros_like(signs).scatter_(1, one_storage(bases, "columns"), 1.0)
        signs, kept = (t[:, :, None] if tall else t[:, None] for t in (signs, kept))
        axis = 1 if tall else 2
        inside = stack.new_zeros(())
        grad = torch.empty_like(stack)
        for start, size in _blocks(stack.shape[axis]):
            part, sign, keep = (t.narrow(axis, start, size) for t in (stack, signs, kept))
            one, other = (scratch.like(stack, name, part.shape) for name in ("one", "other"))
            turned = _fwht_(torch.mul(part, sign, out=one), other, tall).mul_(keep)
            inside = inside + _square(turned)
            torch.mul(_fwht_(turned, other, tall), sign, out=grad.narrow(axis, start, size))  # H is its own transpose
        return _complemented(stack, inside, grad) if bases[0].complement else (inside, grad)


def _blocks(dim: int) -> list[tuple[int, int]]:
    """(start, size) of the blocks: the binary digits of dim, the largest first."""
    found, start = [], 0
    for bit in reversed(range(dim.bit_length())):
        if dim >> bit & 1:
            found.append((start, 1 << bit))
            start += 1 << bit
    return found


def hadamard_blocks(rows: Tensor) -> Tensor:
    """rows (R, dim) times the orthonormal block Hadamard matrix whose blocks are the binary digits of dim."""
    parts = []
    for at, size in _blocks(rows.shape[1]):
        H_a, H_b = _halves(size, rows)
        part = rows[:, at : at + size].reshape(-1, H_a.shape[0], H_b.shape[0])
        parts.append((H_a @ part @ H_b).flatten(1))
    return torch.cat(parts, dim=1)


def _fwht_(x: Tensor, passing: Tensor, tall: bool) -> Tensor:
    """Overwrite x (L, R, 2**m), or (L, 2**m, R) if ``tall``, with its transform along that dimension and return it.

    Nothing is transposed; ``passing`` is memory like x, both contiguous.
    """
    L = x.shape[0]
    H_a, H_b = _halves(x.shape[1 if tall else 2], x)
    a, b = H_a.shape[0], H_b.shape[0]
    if tall:
        half, out = passing.view(L, a, -1), x.view(L * a, b, -1)
        torch.bmm(H_a.expand(L, a, a), x.view(half.shape), out=half)
        torch.bmm(H_b.expand(L * a, b, b), half.view(out.shape), out=out)
    else:
        half, out = passing.view(-1, b), x.view(-1, a, b)
        torch.mm(x.view(half.shape), H_b, out=half)
        torch.bmm(H_a.expand(out.shape[0], a, a), half.view(out.shape), out=out)
    return x


def _halves(size: int, t: Tensor) -> tuple[Tensor, Tensor]:
    """H_a and H_b, a b = size, of the orthonormal Walsh-Hadamard H = H_a x H_b (Kronecker): x H is H_a x H_b there."""
    b = 1 << (size.bit_length() // 2)
    return _hadamard(size // b, t.dtype, t.device), _hadamard(b, t.dtype, t.device)


@functools.lru_cache(maxsize=64)
def _hadamard(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The orthonormal Hadamard matrix of a power of two, symmetric."""
    H = torch.ones(1, 1, dtype=dtype)
    while H.shape[0] < size:
        H = torch.cat((torch.cat((H, H), 1), torch.cat((H, -H), 1)))
    return (H / math.sqrt(size)).to(device)


class _Shared(_Orthogonal):
    """diag(signs) P with P an orthogonal basis that all layers of one width have in common, held once."""

    signs: Tensor

    def __init__(self, dim: int, k: int, like: Tensor, generator: torch.Generator, common: torch.Generator):
        self._key = (common.initial_seed(), dim, k)
        held = _shared.get((*self._key, like.device, like.dtype))
        if held is None:
            super().__init__(dim, k, like, common)
        else:
            _Basis.__init__(self)
            self.complement = 2 * k > dim
            self.register_buffer("basis", held, persistent=False)
        signs = torch.randint(0, 2, (dim,), generator=generator, dtype=torch.int8) * 2 - 1
        self.register_buffer("signs", signs.to(like.device), persistent=False)
        self._hold_once()

    def forward(self, rows: Tensor) -> Tensor:
        return super().forward(rows * self.signs)

    def _hold_once(self) -> None:
        key = (*self._key, self.basis.device, self.basis.dtype)
        self.basis = _shared.setdefault(key, self.basis)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:  # .to(), .cuda(), .half(): one copy there as well
        result = super()._apply(*args, **kwargs)
        self._hold_once()
        return result

    @classmethod
    def stacked(cls, bases: list[Any], factors: list[Tensor], tall: bool, scratch: Scratch) -> tuple[Tensor, Tensor]:
        P = bases[0].basis
        dim, k = P.shape
        rows = _stack(factors, scratch, P.dtype)
        if tall:
            rows = _turned(rows, P.dtype, scratch, "turned")  # (L, R, dim)
        signs = one_storage(bases, "signs").to(P.dtype)[:, None]  # exact in any dtype
        flat = rows.mul_(signs).view(-1, dim)
        z = torch.mm(flat, P, out=scratch.like(P, "z", (flat.shape[0], k)))
        grad = torch.mm(z, P.T, out=scratch.like(P, "grad", flat.shape)).view(rows.shape).mul_(signs)
        grad = _laid_out(grad, tall, factors[0], scratch)
        inside = _square(wide(z))
        return _complemented(wide(_stack(factors, scratch)), inside, grad) if bases[0].complement else (inside, grad)

    def key(self) -> Any:
        return self._key, like(self.basis)


#: Shared bases in use, by (seed, dim, k, device, dtype).
_shared: weakref.WeakValueDictionary[Any, Tensor] = weakref.WeakValueDictionary()

BASES: dict[str, Any] = {"orthogonal": _Orthogonal, "shared": _Shared, "hadamard": _Hadamard}
