"""Products with orthonormal Hadamard matrices, of any width."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def hadamard_blocks(rows: Tensor) -> Tensor:
    """rows (.., dim) times the orthonormal block Hadamard matrix, its blocks the binary digits of dim, largest first.

    A block H of size a b is H_a x H_b (Kronecker): for a row seen as X (a, b), X H is H_a X H_b.
    """
    dim = rows.shape[-1]
    sizes = [1 << bit for bit in reversed(range(dim.bit_length())) if dim >> bit & 1]
    H = _hadamard(1 << (sizes[0].bit_length() // 2), rows)
    parts: list[Tensor] = []
    for part, size in zip(rows.split(sizes, dim=-1), sizes, strict=True):
        b = 1 << (size.bit_length() // 2)
        a = size // b
        X = part.reshape(-1, b) @ (H[:b, :b] / math.sqrt(size))
        parts.append((H[:a, :a] @ X.view(-1, a, b)).view(part.shape))
    return torch.cat(parts, dim=-1)


def _hadamard(size: int, like: Tensor) -> Tensor:
    """Sylvester's +-1 matrix of a power of two: entry (i, j) is -1 where i and j have an odd number of bits in common.

    Its upper left corner of any smaller power of two is that size's.
    """
    index = torch.arange(size, device=like.device)
    parity = index[:, None] & index
    for shift in (16, 8, 4, 2, 1):
        if size >> shift:
            parity = parity ^ (parity >> shift)
    return (1 - 2 * (parity & 1)).to(like.dtype)
