"""The op of one layer as torch.compile sees it: a custom op, because it cannot look into kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import dispatch
from .bodies import Call, Operands, Saved, device_type, exact_products, forward, gradients


@torch.library.custom_op("forgetless::lowrank_linear", mutates_args=())
def _op(
    x: Tensor,  # (M, K)
    weight: Tensor,  # (N, K)
    down: Tensor,  # (R, K)
    up: Tensor,  # (N, R)
    bias: Tensor | None,  # (N,)
    seed: Tensor | None,  # (2,) int32
    factors: list[float],  # scale, up_scale, p of ``Call``
    core: Tensor | None = None,  # (R, R)
) -> tuple[Tensor, Tensor]:  # y (M, N), h (M, R)
    with exact_products(device_type(x)):
        (y,), h, _ = forward(_call(factors), x, seed, Operands([weight], [bias], [down], [up], _present(core)))
    return y, h


def _present(core: Tensor | None) -> list[Tensor]:
    return [] if core is None else [core]


def _call(factors: list[float]) -> Call:
    scale, up_scale, p = factors
    return Call(1, scale, up_scale, p, module=dispatch.asked_module())


@_op.register_fake
def _(x, weight, down, up, bias, seed, factors, core=None):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], weight.shape[0]), x.new_empty(x.shape[0], down.shape[0])


@torch.library.custom_op("forgetless::lowrank_linear_backward", mutates_args=())
def _op_backward(
    dy: Tensor,
    dh: Tensor | None,
    saved: list[Tensor | None],  # x, h, seed, weight, down, up, core
    factors: list[float],
    need: list[bool],  # of x, weight, bias, down, up, core
) -> list[Tensor]:  # an empty tensor stands for a gradient nobody asked for
    x, h, seed, weight, down, up, core = saved
    assert down is not None and up is not None
    cores = _present(core)
    with exact_products(device_type(dy)):
        values = Saved(x, h, seed, [weight], [down], [up], [t.dtype for t in (down, up, *cores)], cores)
        grads = gradients(_call(factors), values, need[: 5 + len(cores)], [dy], dh)
    return [dy.new_empty(0) if grad is None else grad.contiguous() for grad in grads]


@_op_backward.register_fake
def _(dy, dh, saved, factors, need):  # type: ignore[no-untyped-def]
    weight, down, up, *cores = saved[3:] if saved[6] is not None else saved[3:6]
    others = (down, up, *cores)
    shapes = [(dy.shape[0], weight.shape[1]), weight.shape, (weight.shape[0],), *[t.shape for t in others]]
    dtypes = [dy.dtype, dy.dtype, dy.dtype, *[t.dtype for t in others]]
    need = need[: len(shapes)]
    return [
        dy.new_empty(shape, dtype=dtype) if expected else dy.new_empty(0)
        for shape, dtype, expected in zip(shapes, dtypes, need, strict=True)
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, down, up, _, seed, factors, core = inputs
    need_x, need_weight, need_down, need_up, need_bias = ctx.needs_input_grad[:5]
    need_core = ctx.needs_input_grad[7]
    ctx.set_materialize_grads(False)
    kept = x if need_down or need_weight else None, output[1] if need_up or need_core else None
    ctx.save_for_backward(*kept, seed, weight, down, up, core)
    ctx.need = [need_x, need_weight, need_bias, need_down, need_up, need_core]
    ctx.rest = factors, ctx.need


def _autograd(ctx: Any, dy: Tensor | None, dh: Tensor | None) -> tuple[Tensor | None, ...]:
    saved = list(ctx.saved_tensors)
    if dy is None:
        if dh is None:
            return (None,) * 8
        dy = dh.new_zeros(dh.shape[0], saved[3].shape[0])
    grads = torch.ops.forgetless.lowrank_linear_backward(dy, dh, saved, *ctx.rest)
    dx, dweight, dbias, ddown, dup, *dcore = (grad if need else None for grad, need in zip(grads, ctx.need))  # noqa: B905
    return dx, dweight, ddown, dup, dbias, None, None, *(dcore or [None])


_op.register_autograd(_autograd, setup_context=_setup_context)


def compiled(call: Call, x: Tensor, seed: Tensor | None, *tensors: Any) -> Any:
    """``LowrankLinear`` of one layer, for torch.compile to trace."""
    weight, bias, down, up, *core = tensors
    factors = [call.scale, call.up_scale, call.p]
    y, h = torch.ops.forgetless.lowrank_linear(x, weight, down, up, bias, seed, factors, *core)
    return (y, h) if call.return_h else y
