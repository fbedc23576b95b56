"""What ``lowrank_linear`` is given, looked at before anything is done: errors name the argument, got and wanted."""

from __future__ import annotations

import torch
from torch import Tensor

#: Dtypes of the op.
FLOATS = frozenset((torch.bfloat16, torch.float16, torch.float32, torch.float64))


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def plainly_right(
    x: Tensor,
    weight: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None,
    scale: float,
    dropout: float,
    seed: Tensor | None,
) -> bool:
    """Whether the usual case is plainly right, in the fewest lookups; ``check`` says what is wrong with the others."""
    if bias is not None or seed is not None or dropout != 0.0 or x.is_nested or not x.dim():
        return False
    if not weight.dim() == down.dim() == up.dim() == 2:
        return False
    (N, K), (R, width), (height, rank), dtype = weight.shape, down.shape, up.shape, x.dtype
    return (
        x.shape[-1] == K == width
        and scale - scale == 0.0  # finite; math.isfinite cannot be traced
        and height == N
        and rank == R > 0
        and weight.dtype == dtype
        and dtype in FLOATS
        and down.dtype in FLOATS
        and up.dtype in FLOATS
        and (
            x.is_cpu
            and weight.is_cpu
            and down.is_cpu
            and up.is_cpu
            or x.device == weight.device == down.device == up.device
        )
    )


def check(
    x: Tensor,
    weight: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None,
    scale: float,
    dropout: float,
    seed: Tensor | None,
) -> None:
    """ValueError for the first thing that does not fit."""

    def shape(t: Tensor) -> tuple[int, ...]:
        return tuple(t.shape)

    if x.is_nested:
        raise ValueError("x is a nested tensor, wants a dense one: call the layer on its values, or pad it")
    if x.is_floating_point() and x.dtype not in FLOATS:
        raise ValueError(f"x has dtype {dtype_name(x.dtype)}, wants bfloat16, float16, float32 or float64")
    if not x.is_floating_point():
        raise ValueError(f"x has dtype {dtype_name(x.dtype)}, wants a floating-point dtype")
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
        raise ValueError(f"weight has dtype {dtype_name(weight.dtype)}, x wants {dtype_name(x.dtype)}")
    if bias is not None and bias.dtype != x.dtype:
        raise ValueError(f"bias has dtype {dtype_name(bias.dtype)}, x wants {dtype_name(x.dtype)}")
    for name, t in (("down", down), ("up", up)):
        if not t.is_floating_point():
            raise ValueError(f"{name} has dtype {dtype_name(t.dtype)}, wants a floating-point dtype")
    device = x.device
    if weight.device != device or down.device != device or up.device != device:
        for name, t in (("weight", weight), ("down", down), ("up", up)):
            if t.device != device:
                raise ValueError(f"{name} is on {t.device}, x on {device}: they must be on one device")
    if bias is not None and bias.device != device:
        raise ValueError(f"bias is on {bias.device}, x on {device}: they must be on one device")
    if scale - scale != 0.0:  # NaN or Inf; math.isfinite cannot be traced
        raise ValueError(f"scale is {scale}, wants a finite number")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout is {dropout}, wants a probability in [0, 1)")
    if seed is not None and (seed.shape != (2,) or seed.dtype != torch.int32 or seed.device != device):
        raise ValueError(
            f"seed has shape {shape(seed)}, dtype {dtype_name(seed.dtype)} on {seed.device}, "
            f"wants (2,) int32 on {device}"
        )
