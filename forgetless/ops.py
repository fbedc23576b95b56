"""The functional op: a frozen linear layer plus a low-rank update, with its gradients.

    h  = s * drop(x) @ down.T          s = scale / (1 - dropout)
    y  = x @ weight.T + bias + h @ up.T
    g  = s * (dy @ up + dh)
    dx = dy @ weight + drop(g @ down),   ddown = g.T @ drop(x),   dup = dy.T @ h

Saved for backward: x (only if ``down`` or ``weight`` is trained), h, and eight bytes of dropout seed.
This is the only module that names the kernels. In eager mode the op is an autograd function, under torch.compile a
custom op over the same two bodies, because a custom op's dispatch costs more than a small layer's arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import blas, reference

try:
    from forgetless_kernels import lowrank as _kernels
except ImportError as error:
    if error.name is None or not error.name.startswith("triton"):
        raise
    _kernels = None

#: Module that runs the op, by device type. Each offers project, matmul_lowrank and outer with one signature.
BACKENDS: dict[str, ModuleType] = {"cpu": blas}
if _kernels is not None:
    BACKENDS["cuda"] = _kernels

#: Dtypes that the fused kernels take; others run on BLAS.
KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def plan_for(device: torch.device, dtype: torch.dtype) -> tuple[ModuleType, str, str]:
    """The module that runs the op there, the plan's name, and the reason in words."""
    module = BACKENDS.get(device.type, blas)
    if module is _kernels and _kernels is not None:
        if dtype not in KERNEL_DTYPES:
            return blas, "blas", f"the fused kernels do not take {_name(dtype)}"
        return module, "split", "fused kernels are the default on this device"
    name = module.__name__.rpartition(".")[2]
    if device.type == "cuda":
        return module, name, "Triton is not installed"
    return module, name, f"in-place BLAS is the {device.type} path" if module is blas else "chosen"


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Run the op on one backend within the block: "reference", "blas" or "triton"."""
    known = {"reference": reference, "blas": blas, "triton": _kernels}
    if known.get(name) is None:
        have = [key for key, module in known.items() if module is not None]
        raise ValueError(f"backend is {name!r}, wants one of {have}")
    before = dict(BACKENDS)
    BACKENDS.update(dict.fromkeys([*before, "cuda"], known[name]))
    try:
        yield
    finally:
        BACKENDS.clear()
        BACKENDS.update(before)


def draw_seed(device: torch.device) -> Tensor:  # (2,) int32
    """A dropout seed from torch's generator of that device: follows manual_seed, checkpointing and graph capture."""
    return torch.randint(-(1 << 31), (1 << 31) - 1, (2,), dtype=torch.int32, device=device)


# ---------------------------------------------------------------------------------------- bodies


def _forward(
    x: Tensor,  # (M, K)
    weight: Tensor,  # (N, K)
    down: Tensor,  # (R, K)
    up: Tensor,  # (N, R)
    bias: Tensor | None,  # (N,)
    seed: Tensor | None,  # (2,) int32
    scale: float,
    p: float,
) -> tuple[Tensor, Tensor]:  # y (M, N), h (M, R)
    run = plan_for(x.device, x.dtype)[0]
    h = run.project(x, down, scale / (1.0 - p), p, seed)
    return run.matmul_lowrank(x, weight, h, up, bias), h


def _backward(
    dy: Tensor,  # (M, N)
    dh: Tensor | None,  # (M, R)
    x: Tensor | None,  # (M, K)
    weight: Tensor,  # (N, K)
    down: Tensor,  # (R, K)
    up: Tensor,  # (N, R)
    h: Tensor | None,  # (M, R)
    seed: Tensor | None,
    scale: float,
    p: float,
    need: list[bool],  # of x, weight, down, up, bias
    down_dtype: torch.dtype,  # of the gradients; the factors themselves may have been cast
    up_dtype: torch.dtype,
) -> list[Tensor | None]:
    run = plan_for(dy.device, dy.dtype)[0]
    dx = dweight = ddown = dup = dbias = None
    if need[0] or need[2]:
        s = scale / (1.0 - p)
        g = run.project(dy, up.T, s)
        if dh is not None:
            g = g.add_(dh, alpha=s)
        if need[0]:
            dx = run.matmul_lowrank(dy, weight.T, g, down.T, None, p, seed)
        if need[2]:
            assert x is not None
            ddown = run.outer(g, x, p, seed, down_dtype)
    if need[3]:
        assert h is not None
        dup = run.outer(dy, h, 0.0, None, up_dtype)
    if need[1]:
        assert x is not None
        dweight = dy.T @ x
    if need[4]:
        dbias = dy.sum(0)
    return [dx, dweight, ddown, dup, dbias]


def _save(ctx: Any, inputs: tuple[Any, ...], h: Tensor, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    x, weight, down, up, _, seed, scale, p = inputs
    need_x, need_weight, need_down, need_up, need_bias = ctx.needs_input_grad[:5]
    ctx.save_for_backward(
        x if need_down or need_weight else None,
        weight,
        down,
        up,
        h if need_up else None,
        seed,
    )
    ctx.need = [need_x, need_weight, need_down, need_up, need_bias]
    ctx.rest = scale, p, ctx.need, *dtypes


# ---------------------------------------------------------------------------------------- eager


class _LowrankLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:  # inputs as of _forward
        x, weight, down, up, *rest = inputs
        dtypes = down.dtype, up.dtype
        if x.device.type == "cpu":  # BLAS wants one dtype: cast the factors once for both passes
            inputs = x, weight, down.to(x.dtype), up.to(x.dtype), *rest
        y, h = _forward(*inputs)
        ctx.set_materialize_grads(False)
        _save(ctx, inputs, h, dtypes)
        return y, h

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dh: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, down, up, h, seed = ctx.saved_tensors
        if dy is None:
            if dh is None:
                return (None,) * 8
            dy = dh.new_zeros(dh.shape[0], weight.shape[0])
        grads = _backward(dy, dh, x, weight, down, up, h, seed, *ctx.rest)
        return (*grads, None, None, None)


# -------------------------------------------------------------------------------------- compiled


@torch.library.custom_op("forgetless::lowrank_linear", mutates_args=())
def _op(
    x: Tensor,  # (M, K)
    weight: Tensor,  # (N, K)
    down: Tensor,  # (R, K)
    up: Tensor,  # (N, R)
    bias: Tensor | None,  # (N,)
    seed: Tensor | None,  # (2,) int32
    scale: float,
    p: float,
) -> tuple[Tensor, Tensor]:  # y (M, N), h (M, R)
    return _forward(x, weight, down, up, bias, seed, scale, p)


@_op.register_fake
def _(x, weight, down, up, bias, seed, scale, p):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], weight.shape[0]), x.new_empty(x.shape[0], down.shape[0])


@torch.library.custom_op("forgetless::lowrank_linear_backward", mutates_args=())
def _op_backward(
    dy: Tensor,
    dh: Tensor | None,
    x: Tensor | None,
    weight: Tensor,
    down: Tensor,
    up: Tensor,
    h: Tensor | None,
    seed: Tensor | None,
    scale: float,
    p: float,
    need: list[bool],
    down_dtype: torch.dtype,
    up_dtype: torch.dtype,
) -> list[Tensor]:  # an empty tensor stands for a gradient nobody asked for
    grads = _backward(dy, dh, x, weight, down, up, h, seed, scale, p, need, down_dtype, up_dtype)
    return [dy.new_empty(0) if grad is None else grad.contiguous() for grad in grads]


@_op_backward.register_fake
def _(dy, dh, x, weight, down, up, h, seed, scale, p, need, down_dtype, up_dtype):  # type: ignore[no-untyped-def]
    dx, dbias = (dy.shape[0], weight.shape[1]), (weight.shape[0],)
    shapes = [dx, weight.shape, down.shape, up.shape, dbias]
    dtypes = [dy.dtype, dy.dtype, down_dtype, up_dtype, dy.dtype]
    return [
        dy.new_empty(shape, dtype=dtype) if wanted else dy.new_empty(0)
        for shape, dtype, wanted in zip(shapes, dtypes, need, strict=True)
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    _save(ctx, inputs, output[1], (inputs[2].dtype, inputs[3].dtype))


def _autograd(ctx: Any, dy: Tensor | None, dh: Tensor | None) -> tuple[Tensor | None, ...]:
    x, weight, down, up, h, seed = ctx.saved_tensors
    if dy is None:
        assert dh is not None
        dy = dh.new_zeros(dh.shape[0], weight.shape[0])
    grads = torch.ops.forgetless.lowrank_linear_backward(dy, dh, x, weight, down, up, h, seed, *ctx.rest)
    wanted = [grad if need else None for grad, need in zip(grads, ctx.need, strict=True)]
    return (*wanted, None, None, None)


_op.register_autograd(_autograd, setup_context=_setup_context)


# ---------------------------------------------------------------------------------------- public


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
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        if x.dtype != torch.float64:
            x, weight = x.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
    _check(x, weight, down, up, bias, scale, dropout, seed)
    dropout = reference.drop_threshold(dropout) / reference.LEVELS
    if dropout == 0.0:
        seed = None
    elif seed is None:
        seed = draw_seed(x.device)
    run = torch.ops.forgetless.lowrank_linear if torch.compiler.is_compiling() else _LowrankLinear.apply
    lead = x.shape[:-1]
    if x.dim() != 2:
        x = x.reshape(math.prod(lead), x.shape[-1])  # not -1: an empty x has no unique answer
    y, h = run(x, weight, down, up, bias, seed, float(scale), float(dropout))
    if len(lead) != 1:
        y = y.view(*lead, y.shape[-1])
        h = h.view(*lead, h.shape[-1]) if return_h else h
    return (y, h) if return_h else y


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check(
    x: Tensor,
    weight: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None,
    scale: float,
    dropout: float,
    seed: Tensor | None,
) -> None:
    def shape(t: Tensor) -> tuple[int, ...]:
        return tuple(t.shape)

    if not x.is_floating_point():
        raise ValueError(f"x has dtype {_name(x.dtype)}, wants a floating-point dtype")
    if weight.dim() != 2:
        raise ValueError(f"weight has shape {shape(weight)}, wants (out_features, in_features)")
    N, K = weight.shape
    if x.dim() == 0 or x.shape[-1] != K:
        raise ValueError(f"x has shape {shape(x)}, weight {shape(weight)} wants (..., {K})")
    if down.dim() != 2 or down.shape[1] != K or down.shape[0] < 1:
        raise ValueError(f"down has shape {shape(down)}, weight {shape(weight)} wants (rank, {K})")
    R = down.shape[0]
    if up.shape != (N, R):
        raise ValueError(f"up has shape {shape(up)}, weight and down want ({N}, {R})")
    if bias is not None and bias.shape != (N,):
        raise ValueError(f"bias has shape {shape(bias)}, weight {shape(weight)} wants ({N},)")
    if weight.dtype != x.dtype:
        raise ValueError(f"weight has dtype {_name(weight.dtype)}, x wants {_name(x.dtype)}")
    if bias is not None and bias.dtype != x.dtype:
        raise ValueError(f"bias has dtype {_name(bias.dtype)}, x wants {_name(x.dtype)}")
    for name, t in (("down", down), ("up", up)):
        if not t.is_floating_point():
            raise ValueError(f"{name} has dtype {_name(t.dtype)}, wants a floating-point dtype")
    device = x.device
    if weight.device != device or down.device != device or up.device != device:
        for name, t in (("weight", weight), ("down", down), ("up", up)):
            if t.device != device:
                raise ValueError(f"{name} is on {t.device}, x on {device}: they must be on one device")
    if bias is not None and bias.device != device:
        raise ValueError(f"bias is on {bias.device}, x on {device}: they must be on one device")
    if not math.isfinite(scale):
        raise ValueError(f"scale is {scale}, wants a finite number")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout is {dropout}, wants a probability in [0, 1)")
    if seed is not None and (seed.shape != (2,) or seed.dtype != torch.int32 or seed.device != device):
        raise ValueError(
            f"seed has shape {shape(seed)}, dtype {_name(seed.dtype)} on {seed.device}, wants (2,) int32 on {device}"
        )
