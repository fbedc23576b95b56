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
    H = rows.new_ones(1, 1)  # Sylvester's: its upper left corner of any smaller power of two is that size's
    while len(H) < 1 << (sizes[0].bit_length() // 2):
        H = torch.cat((torch.cat((H, H), 1), torch.cat((H, -H), 1)))
    parts: list[Tensor] = []
    for part, size in zip(rows.split(sizes, dim=-1), sizes, strict=True):
        b = 1 << (size.bit_length() // 2)
        a = size // b
        X = part.reshape(-1, b) @ (H[:b, :b] / math.sqrt(size))
        parts.append((H[:a, :a] @ X.view(-1, a, b)).view(part.shape))
    return torch.cat(parts, dim=-1)
