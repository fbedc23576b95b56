"""The op as one autograd function, and as users call it; what it computes is in ``forgetless.ops.bodies``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import compat
from . import dispatch
from .blas import as_dtype
from .bodies import (
    Call,
    Onto,
    Operands,
    Saved,
    as_rows,
    autocasts,
    device_type,
    draw_seed,
    exact_products,
    forward,
    gradients,
    quantized_rate,
)  # fmt: skip
from .check import check_call, check_layer
from .compiled import compiled
from .rows import Terms, extra_of


class LowrankLinear(torch.autograd.Function):
    """y_i of each layer, then h if it is wanted, then the products of all terms or of none.

    x is (M, K); the tensors those of ``Operands``, list after list.
    """

    @staticmethod
    def forward(ctx: Any, call: Call, x: Tensor, seed: Tensor | None, *tensors: Any) -> Any:
        n = call.count
        weights, biases = tensors[:n], tensors[n : 2 * n]
        factors: Sequence[Tensor] = tensors[2 * n :]
        dtypes = [t.dtype for t in factors]
        # a checkpoint that recomputes the call saves the same tensors, but nobody sees its products
        terms = call.terms.items if call.terms and not compat.in_backward() else ()
        if x.is_cpu and call.up_scale == 1.0 and not terms:  # BLAS wants one dtype: cast once for both passes
            factors = [as_dtype(t, x.dtype) for t in factors]
        layers = Operands(weights, biases, factors[:n], factors[n : 2 * n], factors[2 * n :])
        with exact_products(device_type(x)):
            ys, h, zs = forward(call, x, seed, layers, terms=terms)
        if call.onto:
            weights = (None,)
            if call.onto.in_place:
                ctx.mark_dirty(tensors[0])
        need = ctx.needs_input_grad
        if any(need):
            ctx.call, ctx.dtype, ctx.dtypes = call, x.dtype, dtypes
            ctx.pending, ctx.kept, ctx.rows = set(range(n)), None, x.shape[0]
            rows = call.terms.tensors if call.terms else ()
            need_x = any(need[3 + 2 * n : 3 + 3 * n]) or any(need[3 : 3 + n]) and not call.onto
            need_h = any(need[3 + 3 * n :]) or bool(rows)
            ctx.cores, kept = len(layers.cores), (*weights, *factors, *rows)
            ctx.save_for_backward(x if need_x else None, h if need_h else None, seed, *kept)
            ctx.set_materialize_grads(False)
        if call.return_h or zs:
            return (*ys, *([h] if call.return_h else []), *zs)
        return ys[0] if n == 1 else tuple(ys)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        call, dtype = ctx.call, ctx.dtype
        n, end = call.count, 3 * call.count + ctx.cores
        x, h, seed, *rest = _saved(ctx, grads)
        saved = Saved(x, h, seed, rest[:n], rest[n : 2 * n], rest[2 * n : 3 * n], ctx.dtypes, rest[3 * n : end])
        dys = [None if dy is None else as_dtype(as_rows(dy), dtype) for dy in grads[:n]]
        dh, dzs = grads[n] if call.return_h else None, grads[n + call.return_h :]
        extra = None
        if call.terms:
            call.terms.spend()
            if any(dz is not None for dz in dzs):
                if call.terms.anywhere and all(dy is None for dy in dys):
                    _check_there(saved.downs)
                extra = extra_of(call.terms.replaced(rest[end:]), dzs, saved.downs, saved.ups)
        needs_dy = [] if extra is None else [i for i in range(n) if extra.ups[i] or extra.starts[i] is not None]
        if not needs_dy and all(dy is None for dy in dys):
            if dh is None and extra is None:
                return (None,) * (3 + n + end)
            needs_dy = [0]
        for i in needs_dy:
            if dys[i] is None:
                dys[i] = saved.ups[i].new_zeros(ctx.rows, saved.ups[i].shape[0], dtype=dtype)
        _, need_x, _, *need = ctx.needs_input_grad
        if call.onto:
            need[0] = False  # base takes its gradient as it comes
        with exact_products(device_type(saved.downs[0])):
            dx, *others = gradients(call, saved, [need_x, *need], dys, dh, extra=extra)
        if call.onto:
            others[0] = grads[0]
        return (None, dx, None, *others)


def _check_there(factors: Sequence[Tensor]) -> None:
    """RuntimeError if they were gathered for the forward pass and freed: only a gradient of y brings them back."""
    if any(t.numel() and not t.untyped_storage().nbytes() for t in factors):
        raise RuntimeError(
            "the factors were gathered for the forward pass and are gone: add fl.penalty to the loss and call backward "
            "once, or call fl.fuse_penalty(model, False) before the pass"
        )


def _saved(ctx: Any, grads: Sequence[Tensor | None]) -> Sequence[Any]:
    """The saved tensors; kept here while siblings have had no gradient, so that each may run backward by itself.

    Autograd frees what was saved after the first pass, and looks at changes in place only then: so does this.
    """
    if ctx.kept is None:
        saved = ctx.saved_tensors
        if len(ctx.pending) < 2:
            return saved
        versions = [None if t is None else t._version for t in saved]
    else:
        saved, versions = ctx.kept
        if versions != [None if t is None else t._version for t in saved]:
            raise RuntimeError(
                "a variable needed for gradient computation was modified by an in-place operation after a sibling of "
                "the layer ran backward"
            )
    ctx.pending -= {i for i, grad in enumerate(grads) if grad is not None}
    ctx.kept = (saved, versions) if ctx.pending else None
    return saved


def refuse_second_derivative() -> None:
    """With create_graph the results would look differentiable and be constants."""
    if torch.is_grad_enabled():
        raise RuntimeError("forgetless has no second derivative: call backward without create_graph, once per forward")


def prepare(
    x: Tensor,  # (..., K)
    layers: Operands,
    scale: float,
    dropout: float,
    seed: Tensor | None,
    return_h: bool = False,
    onto: Onto | None = None,
    terms: Terms | None = None,
) -> tuple[Any, ...]:
    """The arguments of ``LowrankLinear``, checked, cast by autocast, with a seed where something will be dropped.

    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    weights, biases, downs, ups, cores = layers
    device = device_type(x)
    if autocasts(device) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        x = x.to(dtype)
        if not onto:
            weights = [weight.to(dtype) for weight in weights]
            biases = [None if bias is None else bias.to(dtype) for bias in biases]
    check_call(x, scale, dropout, seed)
    for weight, bias, down, up in zip(weights, biases, downs, ups, strict=True):
        check_layer(x, None if onto else weight, down, up, bias)
    if cores and any(up.requires_grad for up in ups):
        raise ValueError("up requires a gradient, wants none beside a core")
    p = 0.0
    if dropout:
        p = quantized_rate(dropout)
        seed = draw_seed(x.device) if seed is None else seed
    s = scale / (1.0 - p)
    factors = (1.0, s) if x.dtype == torch.float16 else (s, 1.0)
    asked = None if torch.compiler.is_compiling() else dispatch.asked_module()
    if terms and (x.dtype == torch.float16 or not dispatch.makes_products(x, asked, terms.anywhere)):
        terms = None  # of float16 h is not scaled
    made = Call(len(weights), *factors, p, return_h, onto, asked, terms)
    return made, as_rows(x), seed if p else None, *weights, *biases, *downs, *ups, *cores


def lowrank_linear(
    x: Tensor,  # (..., K)
    weight: Tensor,  # (N, K)
    down: Tensor,  # (R, K)
    up: Tensor,  # (N, R)
    bias: Tensor | None = None,  # (N,)
    scale: float = 1.0,
    dropout: float = 0.0,
    seed: Tensor | None = None,  # (2,) int32
    return_h: bool = False,
) -> Any:
    """y = x @ weight.T + bias + scale * (drop(x) @ down.T) @ up.T, differentiable in all five tensors.

    Args:
        x: (..., K), any strides, any leading shape, empty ones included. bfloat16, float16, float32 or float64.
        weight: (N, K), dtype of ``x`` (under autocast both are cast first). A transposed view is fine and costs
            nothing: pass ``conv1d.weight.T`` for a GPT-2 style layer. Its gradient is computed only if it wants one.
        down: (R, K), any floating dtype; used in the dtype of ``x``, its gradient has its own dtype. R >= 1.
        up: (N, R), likewise.
        bias: (N,), dtype of ``x``.
        scale: factor of the low-rank term, alpha / R for LoRA.
        dropout: probability in [0, 1) that an element of ``x`` is dropped on the low-rank path, quantised to 2**-15.
            The survivors are scaled by 1 / (1 - dropout). No mask is stored: it is rebuilt from ``seed``.
        seed: two int32 numbers on the device of ``x``; drawn from torch's generator if not given.
        return_h: also return h = scale * drop(x) @ down.T of shape (..., R), differentiable in ``x`` and ``down``.

    Returns:
        y (..., N) in the dtype of ``x``, or (y, h).

    Raises:
        ValueError: a shape, dtype or device does not fit; names the argument, what it got and what it wants.
    """
    layers = Operands((weight,), (bias,), (down,), (up,))
    arguments = prepare(x, layers, scale, dropout, seed, return_h)
    result = compiled(*arguments) if torch.compiler.is_compiling() else LowrankLinear.apply(*arguments)
    if not return_h:
        return like_x(result, x)
    y, h = result
    return like_x(y, x), like_x(hidden(arguments[0], h), x)


def like_x(rows: Tensor, x: Tensor) -> Tensor:  # (M, N) -> (..., N)
    return rows if x.dim() == 2 else rows.view(*x.shape[:-1], rows.shape[1])


def hidden(call: Call, h: Tensor) -> Tensor:
    """The h that users see, scale * drop(x) @ down.T, from that of ``LowrankLinear``."""
    return h if call.up_scale == 1.0 else h * call.up_scale
