"""A frozen layer by its own forward, and low-rank updates added to what it returns.

For layers whose weight cannot be read as a matrix: quantised ones, those cut over processes, and whatever else computes
x @ W.T in its own way. The update is the op of ``forgetless.ops.autograd`` with ``onto``: y + h @ up.T. Nothing of the
weight's size is made here. Memory is written in place only where the caller says that the base returns fresh memory
that nothing else holds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import compat
from .autograd import LowrankLinear, hidden, prepare
from .bodies import Onto, Operands, as_rows, autocasts, draw_seed


class Term(NamedTuple):
    """One low-rank update: scale * (drop(x) @ down.T) @ up.T + bias, or with up @ core for up."""

    down: Tensor  # (R, K)
    up: Tensor  # (N, R)
    scale: float
    dropout: float = 0.0
    bias: Tensor | None = None  # (N,)
    core: Tensor | None = None  # (R, R)


def add_terms(
    base: Callable[[Tensor], Tensor], x: Tensor, terms: list[Term], cut: Any = None, fresh: bool = False
) -> tuple[Tensor, list[Tensor]]:
    """base(x) + sum over terms of scale * (drop(x) @ down.T) @ up.T + bias, differentiable in everything.

    Args:
        base: the frozen layer's forward, (..., K) -> (..., N), linear in the sense that it does not write to x.
        x: (..., K), floating point. Under autocast the low-rank products are taken in autocast's dtype, otherwise in
            that of ``x``; the result has the dtype of ``base(x)``.
        terms: each with a dropout mask of its own, as in ``ops.lowrank_linear``.
        cut: tensor parallelism: x or base(x) are this rank's columns, and so are the factors.
        fresh: base returns memory of its own that nothing else holds: it is then written in place. Autograd still
            refuses this where it saved that memory.

    Returns:
        y (..., N) and for each term h = scale * drop(x) @ down.T as (M, R), differentiable in x and down.

    Under torch.compile and torch.func transforms the formula itself is taken: they fuse and differentiate it.

    Raises:
        ValueError: base returned something that is not (..., N).
        RuntimeError: base returned something without a gradient for an x that wants one.
    """
    traced = torch.compiler.is_compiling() or compat.transforms_active()
    y = base(x)
    N = terms[0].up.shape[0]
    if not isinstance(y, Tensor) or y.shape != (*x.shape[:-1], N):
        got = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
        raise ValueError(f"the frozen layer returned {got}, its adapter wants {(*x.shape[:-1], N)}")
    if x.requires_grad and not y.requires_grad and torch.is_grad_enabled() and not traced:
        raise RuntimeError(
            f"the frozen layer, a {type(base).__name__}, returned a result without a gradient for its input: what lies "
            "before it could not learn; train with more tokens in a call, or with another kind of quantisation"
        )
    hs = []
    for term in terms:
        if traced:
            y, h = _formula(x, y, term)
            hs.append(h)
            continue
        seed = draw_seed(x.device) if term.dropout else None
        groups = {} if cut is None else {"sum_h" if cut.dim else "sum_g": cut.group}
        onto = Onto(fresh and y.is_contiguous() and not compat.is_view(y), **groups)
        layers = Operands((y,), (term.bias,), (term.down,), (term.up,), () if term.core is None else (term.core,))
        seed = seed if cut is None else cut.seed(seed)
        arguments = prepare(x, layers, term.scale, term.dropout, seed, return_h=True, onto=onto)
        y, h = LowrankLinear.apply(*arguments)
        hs.append(hidden(arguments[0], h))
        fresh = True  # what the op returns is its own
    return y, hs


def _formula(x: Tensor, y: Tensor, term: Term) -> tuple[Tensor, Tensor]:
    """y + scale * (drop(x) @ down.T) @ up.T + bias, and h, in plain torch."""
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if autocasts(device) and x.dtype != torch.float64 else x.dtype
    dropped = torch.dropout(x.to(dtype), term.dropout, True) if term.dropout else x.to(dtype)
    h = as_rows(dropped) @ term.down.to(dtype).T * term.scale
    t = h if term.core is None else h @ term.core.to(dtype).T
    more = (t.to(y.dtype) @ term.up.to(y.dtype).T).view(y.shape)
    return y + (more if term.bias is None else more + term.bias.to(y.dtype)), h
