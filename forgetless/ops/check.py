"""What ``lowrank_linear`` is given, looked at before anything is done: errors name the argument, got and wanted."""

from __future__ import annotations

import torch
from torch import Tensor

#: Dtypes of the op.
FLOATS = frozenset((torch.bfloat16, torch.float16, torch.float32, torch.float64))


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_call(x: Tensor, scale: float, dropout: float, seed: Tensor | None) -> None:
    """ValueError for an x that no layer takes, or a number out of range."""
    if x.is_nested:
        raise ValueError("x is a nested tensor, wants a dense one: call the layer on its values, or pad it")
    if x.dtype not in FLOATS:
        wants = "bfloat16, float16, float32 or float64" if x.is_floating_point() else "a floating-point dtype"
        raise ValueError(f"x has dtype {dtype_name(x.dtype)}, wants {wants}")
    if scale - scale != 0.0:  # NaN or Inf; math.isfinite cannot be traced
        raise ValueError(f"scale is {scale}, wants a finite number")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout is {dropout}, wants a probability in [0, 1)")
    if seed is not None and (seed.shape != (2,) or seed.dtype != torch.int32 or seed.device != x.device):
        raise ValueError(
            f"seed has shape {tuple(seed.shape)}, dtype {dtype_name(seed.dtype)} on {seed.device}, "
            f"wants (2,) int32 on {x.device}"
        )


def check_layer(x: Tensor, weight: Tensor | None, down: Tensor, up: Tensor, bias: Tensor | None) -> None:
    """ValueError for the first thing that does not fit; ``weight`` is None where the layer makes its product itself."""
    dtype, rows, columns, shape = x.dtype, down.shape, up.shape, x.shape
    matrix = columns[:1] + rows[1:] if weight is None else weight.shape
    if weight is not None and len(matrix) != 2:
        raise ValueError(f"weight has shape {tuple(matrix)}, wants (out_features, in_features)")
    N, K = matrix if len(matrix) == 2 else (0, 0)
    if not shape or shape[-1] != K:
        raise ValueError(f"x has shape {tuple(shape)}, weight ({N}, {K}) wants (..., {K})")
    if len(rows) != 2 or rows[1] != K or rows[0] < 1:
        raise ValueError(f"down has shape {tuple(rows)}, weight ({N}, {K}) wants (rank, {K})")
    if columns != (N, rows[0]):
        raise ValueError(f"up has shape {tuple(columns)}, weight and down want ({N}, {rows[0]})")
    if bias is not None and bias.shape != (N,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}, weight ({N}, {K}) wants ({N},)")
    if weight is not None and weight.dtype != dtype:
        raise ValueError(f"weight has dtype {dtype_name(weight.dtype)}, x wants {dtype_name(dtype)}")
    if bias is not None and weight is not None and bias.dtype != dtype:
        raise ValueError(f"bias has dtype {dtype_name(bias.dtype)}, x wants {dtype_name(dtype)}")
    if down.dtype not in FLOATS or up.dtype not in FLOATS:
        name, t = ("up", up) if down.dtype in FLOATS else ("down", down)
        raise ValueError(f"{name} has dtype {dtype_name(t.dtype)}, wants a floating-point dtype")
    cpu = x.is_cpu and down.is_cpu and up.is_cpu and (weight is None or weight.is_cpu) and (bias is None or bias.is_cpu)
    for name, other in () if cpu else (("weight", weight), ("bias", bias), ("down", down), ("up", up)):
        if other is not None and other.device != x.device:
            raise ValueError(f"{name} is on {other.device}, x on {x.device}: they must be on one device")
