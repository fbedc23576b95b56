"""Second moments of a stream of vectors: exact, diagonal, or an eigenbasis of q columns beside a diagonal rest.

S = sum_t x_t x_t^T in one of three forms:

    "full"   the (K, K) matrix
    "diag"   its diagonal, K numbers
    q        V diag(l) V^T + diag(rest), V (K, q) orthonormal; rest makes the diagonal exact, so nothing of the trace is
             lost. q >= K is the full matrix, q = 0 the diagonal, and data of rank q or less loses nothing.

The eigenbasis is kept up blockwise (subspace merging, Halko et al., arXiv 0909.4061, and Brand 2006 for the update): a
block of rows X is compressed together with the present V diag(l) V^T by a randomised range finder, then a Rayleigh-Ritz
step in that range; K x K is never made. A margin of further columns is kept until the end, so that directions that only
become strong later are not lost early.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import torch
from torch import Tensor

from ..adapter import Stays

#: Columns kept beyond q while data streams in.
MARGIN = 16
#: Rows that are gathered before they are merged, at least; merging costs the same for one row as for many.
BLOCK = 512


class Covariance(Stays):
    """S of vectors of length K, filled by ``add``. Siblings that see the same x share one of these.

    Args:
        form: "diag", "full" or the number of columns q of the eigenbasis.
        K: length of the vectors.
        like: a tensor whose device it lives on; its dtype, if wider than float32, is that of the sums.

    Buffers: ``matrix`` (K, K) for "full"; else ``rest`` (K,), and with an eigenbasis ``basis`` (K, q), ``spectrum``
    (q,); ``tokens``, the vectors seen.
    """

    matrix: Tensor
    rest: Tensor
    basis: Tensor
    spectrum: Tensor
    tokens: Tensor

    def __init__(self, form: str | int, K: int, like: Tensor):
        super().__init__()
        self.columns = 0 if isinstance(form, str) else min(form, K)
        dtype = torch.promote_types(like.dtype, torch.float32)
        shapes: dict[str, tuple[int, ...]] = {"matrix": (K, K)} if form == "full" else {"rest": (K,)}
        if self.columns:
            shapes |= {"basis": (K, self.columns), "spectrum": (self.columns,)}
        self.full = form == "full"
        for name, shape in shapes.items():
            self.register_buffer(name, torch.zeros(shape, dtype=dtype, device=like.device))
        self.register_buffer("tokens", torch.zeros((), dtype=torch.int64, device=like.device))
        self.stream: _Stream | None = None

    @torch.no_grad()
    def add(self, x: Tensor) -> None:
        """Take in rows x (T, K)."""
        if x.shape[0] == 0:
            return
        self.tokens += x.shape[0]
        if self.full:
            x = x.to(self.matrix.dtype)
            self.matrix.addmm_(x.T, x)
            return
        if not self.columns:
            self.rest += x.to(self.rest.dtype).square().sum(0)
            return
        if self.stream is None:
            self.stream = _Stream(self.rest, self.columns)
        self.stream.add(x)

    @torch.no_grad()
    def finish(self, count: Tensor | None = None) -> None:
        """Divide the sums by ``count``, the vectors seen if not given; at most once after ``add``."""
        if self.stream is not None:
            values, basis = self.stream.finish(self.columns)
            self._set(values, basis, self.rest)
            self.stream = None
        count = (self.tokens if count is None else count).clamp(min=1)
        for name in ("matrix", "rest", "spectrum"):
            if name in self._buffers:
                getattr(self, name).div_(count)

    def _set(self, values: Tensor, basis: Tensor, diagonal: Tensor) -> None:
        """Eigenvalues and eigenvectors, at most ``columns`` of them, and the diagonal of all of S."""
        self.basis.zero_()
        self.spectrum.zero_()
        self.spectrum[: values.numel()] = values
        self.basis[:, : values.numel()] = basis
        self.rest.copy_((diagonal - basis.square() @ values).clamp_(min=0))

    def length(self) -> int:
        return (self.matrix if self.full else self.rest).shape[0]

    def diagonal(self) -> Tensor:  # (K,)
        if self.full:
            return self.matrix.diagonal()
        return self.rest + self.basis.square() @ self.spectrum if self.columns else self.rest

    def dense(self) -> Tensor:  # (K, K), not to be written to
        if self.full:
            return self.matrix
        return apply_stacked([self], torch.eye(self.length()).to(self.diagonal())[None])[0]

    @torch.no_grad()
    def merge(self, other: dict[str, Tensor]) -> None:
        """Add another S of the same form, given by its buffers."""
        if self.columns:
            total = self.diagonal() + other["rest"] + other["basis"].square() @ other["spectrum"]
            rows = (other["basis"] * other["spectrum"].sqrt()).T
            values, basis = merged(self.spectrum, self.basis, rows, self.columns, None)
            self._set(values, basis, total)
        for name in ("matrix", "rest"):
            if name in self._buffers and not self.columns:
                getattr(self, name).add_(other[name])
        self.tokens += other["tokens"]

    def form(self) -> Hashable:
        """What must agree, beside the length, for ``apply_stacked``."""
        return self.full, self.columns, self.tokens.device

    def same_as(self, other: Covariance) -> bool:
        """Whether the buffers hold the same numbers."""
        mine, theirs = dict(self.named_buffers()), dict(other.named_buffers())
        return mine.keys() == theirs.keys() and all(
            a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
            for a, b in ((mine[name], theirs[name]) for name in mine)
        )

    def extra_repr(self) -> str:
        return ", ".join(f"{name} {tuple(buffer.shape)}" for name, buffer in self.named_buffers() if buffer.dim())


def named_under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names start with the prefix, by what follows it."""
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def largest(covariances: Sequence[Covariance | None]) -> Tensor | None:
    """The largest tensor of one layer's that ``apply_stacked`` copies, for ``buckets``; None if it copies none."""
    bases = [cov.basis for cov in covariances if cov is not None and cov.columns]
    return max(bases, key=Tensor.numel, default=None)


def apply_stacked(covariances: Sequence[Covariance | None], rows: Tensor) -> Tensor:
    """rows_i S_i for rows (L, R, K) and S of one form, None for the identity; what is returned may be ``rows``."""
    first = covariances[0]
    if first is None:
        return rows
    if first.full:  # (K, K) each: copying them into a stack would cost more than one product after another
        parts = zip(rows.unbind(), covariances, strict=True)
        return torch.stack([row @ cov.matrix.to(row.dtype) for row, cov in parts if cov is not None])

    def stacked(name: str) -> Tensor:
        return torch.stack([getattr(cov, name) for cov in covariances]).to(rows.dtype)

    seen = rows * stacked("rest")[:, None]
    if first.columns:
        basis = stacked("basis")
        seen.baddbmm_((rows @ basis).mul_(stacked("spectrum")[:, None]), basis.mT)
    return seen


class _Stream:
    """The eigenbasis while data comes in: ``diagonal`` is added to as it goes."""

    def __init__(self, diagonal: Tensor, columns: int):
        K = diagonal.numel()
        self.diagonal = diagonal
        self.width = min(K, columns + MARGIN)
        self.values = diagonal.new_zeros(0)
        self.basis = diagonal.new_zeros(K, 0)
        self.waiting: list[Tensor] = []
        self.block = max(BLOCK, 4 * self.width)
        self.merges = 0

    def add(self, x: Tensor) -> None:
        self.waiting.append(x.detach().to(self.diagonal.dtype, copy=True))  # the model may overwrite its own x
        if sum(rows.shape[0] for rows in self.waiting) >= self.block:
            self._merge()

    def _merge(self) -> None:
        rows = torch.cat(self.waiting)
        self.waiting = []
        self.diagonal += rows.square().sum(0)
        if not torch.isfinite(self.diagonal).all():
            raise ValueError("a layer's inputs or gradients hold NaN or Inf: nothing can be measured on them")
        generator = torch.Generator().manual_seed(self.merges)  # results are a function of the data alone
        self.values, self.basis = merged(self.values, self.basis, rows, self.width, generator)
        self.merges += 1

    def finish(self, columns: int) -> tuple[Tensor, Tensor]:
        if self.waiting:
            self._merge()
        return self.values[:columns], self.basis[:, :columns]


def merged(
    values: Tensor,  # (p,)
    basis: Tensor,  # (K, p), orthonormal
    rows: Tensor,  # (T, K)
    width: int,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor]:  # (w,) descending, (K, w) with w <= width
    """The ``width`` strongest eigenpairs of basis diag(values) basis^T + rows^T rows.

    Exact for few rows or a small K; else within a random range of 2 ``width`` columns that holds whatever has rank up
    to ``width``. The seeded ``generator`` draws on the CPU, so that every device finds the same range.
    """
    T, K = rows.shape
    if generator is None or T + values.numel() <= 3 * width or K <= 2 * width:
        spanning = torch.cat((basis * values.sqrt(), rows.T), dim=1)
    else:
        probe = torch.randn(K, width, generator=generator, dtype=torch.float64).to(rows)
        probe = torch.cat((basis, probe), dim=1)
        spanning = rows.T @ (rows @ probe) + (basis * values) @ (basis.T @ probe)
    Q = torch.linalg.qr(spanning).Q  # (K, m)
    old, new = basis.T @ Q, rows @ Q
    spectrum, vectors = torch.linalg.eigh(new.T @ new + old.T @ (values[:, None] * old))
    return spectrum.flip(0)[:width].clamp(min=0), Q @ vectors.flip(1)[:, :width]
