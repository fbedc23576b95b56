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
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import compat
from . import blas, reference
from . import dispatch as plans
from .check import check, dtype_name, plainly_right

try:
    from forgetless_kernels import fused as _kernels
except ImportError as error:
    if error.name is None or not error.name.startswith("triton"):
        raise
    _kernels = None

#: Module that runs the op, by device type. All offer the functions of ``reference`` with one signature.
BACKENDS: dict[str, ModuleType] = {"cpu": blas}
if _kernels is not None:
    BACKENDS["cuda"] = _kernels

#: Dtypes that the fused kernels take; others run on BLAS.
KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def module_for(device: torch.device, dtype: torch.dtype) -> ModuleType:
    """The module that runs the op on that device in that dtype, before any plan is chosen."""
    module = BACKENDS.get(device.type, blas)
    return blas if module is _kernels and dtype not in KERNEL_DTYPES else module


def explain_path(device: torch.device, dtype: torch.dtype, N: int, K: int, R: int) -> tuple[str, str]:
    """The plan's name for a layer, and the reason in words; for 4096 tokens where it depends on them.

    Args:
        device: of the activations.
        dtype: of the activations.
        N: out_features.
        K: in_features.
        R: rank.

    Raises:
        ValueError: ``FORGETLESS_PLAN`` holds something else than a plan or "strict".
    """
    module = module_for(device, dtype)
    if module is not _kernels or _kernels is None:
        if BACKENDS.get(device.type) is _kernels and _kernels is not None:
            return "blas", f"the fused kernels do not take {dtype_name(dtype)}"
        if module is blas and device.type == "cuda":
            return "blas", "Triton is not installed"
        return module.__name__.rpartition(".")[2], f"in-place BLAS is the {device.type} path" if module is blas else ""
    choice = plans.choose(plans.problem(device, "forward", 4096, N, K, R, dtype))
    return choice.plan, choice.reason


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Run the op on one backend within the block: "reference", "blas" or "triton".

    For the whole process, whatever the device; to measure or to check, not to train with.

    Raises:
        ValueError: another name, or Triton is not installed.
    """
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


def quantised(dropout: float) -> float:
    """The nearest rate that the generator can give, below 1."""
    return min(reference.drop_threshold(dropout), reference.LEVELS - 1) / reference.LEVELS


def draw_seed(device: torch.device) -> Tensor:  # (2,) int32
    """A dropout seed from torch's generator of that device: follows manual_seed, checkpointing and graph capture."""
    return torch.randint(-(1 << 31), (1 << 31) - 1, (2,), dtype=torch.int32, device=device)


def draw_mask(dropout: float, device: torch.device) -> tuple[float, Tensor | None]:
    """The rate as the generator can give it, and a seed; 0 and None where nothing would be dropped."""
    p = quantised(dropout) if dropout else 0.0
    return p, draw_seed(device) if p else None


def autocasts(device: str) -> bool:
    """Whether autocast is on for that type of device; torch raises if asked about meta."""
    return device != "meta" and torch.is_autocast_enabled(device)


def exact_products(device: str) -> AbstractContextManager[Any]:
    """Products in the dtype they are written in: autocast has done its work at the door."""
    return torch.autocast(device, enabled=False) if autocasts(device) else nullcontext()


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
    if _plainly_blas(x):
        return blas.linear_lowrank(x, weight, down, up, bias, scale / (1.0 - p), p, seed)
    arguments = (x, weight, down, up, bias, scale / (1.0 - p), p, seed)
    device = x.device
    run = module_for(device, x.dtype)
    if run is not _kernels or _kernels is None:
        with exact_products(device.type):
            return run.linear_lowrank(*arguments)
    wanted = _problem("forward", x, weight, down)
    kernels = _kernels
    return _planned(
        wanted,
        x.device,
        lambda plan: kernels.linear_lowrank(*arguments, plan=plan),
        lambda: blas.linear_lowrank(*arguments),
    )


def _plainly_blas(t: Tensor) -> bool:
    """The usual case on a CPU, found out in the fewest lookups."""
    return t.is_cpu and BACKENDS["cpu"] is blas and not torch.is_autocast_enabled("cpu")


def _problem(sweep: str, like: Tensor, weight: Tensor, down: Tensor) -> plans.Problem:
    N, K = weight.shape
    return plans.problem(like.device, sweep, like.shape[0], N, K, down.shape[0], like.dtype)


def settled_module(x: Tensor, weight: Tensor, down: Tensor) -> ModuleType | None:
    """The module that the plan for this layer comes down to; None while a first use has yet to be checked."""
    run = module_for(x.device, x.dtype)
    if run is not _kernels or _kernels is None:
        return run
    wanted = _problem("forward", x, weight, down)
    if not weight.numel() or plans.dropped(_problem("backward", x, weight, down)):
        return blas
    if checkable(x.device) and plans.undecided(wanted):
        return None
    return blas if plans.choose(wanted).plan == "blas" else run


def gives_way(run: Any, sweep: str, like: Tensor, weight: Tensor, down: Tensor, error: Exception) -> bool:
    """Whether BLAS may take over from a backend that raised: one warning, or ``error`` itself where that is wanted."""
    if run is not _kernels or isinstance(error, torch.OutOfMemoryError):
        return False
    plans.fail(_problem(sweep, like, weight, down), plans.forced()[0] or plans.DEFAULT, error)
    return True


def _planned(wanted: plans.Problem, device: torch.device, fused: Any, trusted: Any) -> Any:
    """The result by the chosen plan; ``trusted`` (blas) where the fused one is out or fails."""
    if not wanted.N * wanted.K:  # no grid to launch
        return trusted()
    if checkable(device) and plans.undecided(wanted):
        plans.first_use(wanted, lambda: _given(fused(plans.DEFAULT)), lambda: _given(trusted()), device)
    choice = plans.choose(wanted)
    if choice.plan == "blas":
        return trusted()
    try:
        with tile_forced(choice.tile):
            return fused(choice.plan)
    except torch.OutOfMemoryError:  # blas needs more
        raise
    except Exception as error:  # noqa: BLE001 - whatever a compiler or a launch can raise
        plans.fail(wanted, choice.plan, error)
        return trusted()


@contextmanager
def tile_forced(tile: tuple[tuple[str, int], ...]) -> Iterator[None]:
    """Within the block the GEMM kernels run with these tile fields; none leaves them as they are."""
    if not tile:
        yield
        return
    from forgetless_kernels import tiles

    with tiles.forced("matmul_lowrank", **dict(tile)), tiles.forced("matmul_lowrank_t", **dict(tile)):
        yield


def checkable(device: torch.device) -> bool:
    """Whether a first use may be checked there now: launches can be timed and nothing is being recorded."""
    return device.type == "cuda" and not torch.cuda.is_current_stream_capturing()


def _given(results: Any) -> list[Tensor]:
    return [t for t in results if t is not None]


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
    if _plainly_blas(dy):
        return _gradients(
            blas, "split", dy, dh, x, weight, down, up, h, seed, scale / (1.0 - p), p, need, down_dtype, up_dtype
        )
    arguments = (dy, dh, x, weight, down, up, h, seed, scale / (1.0 - p), p, need, down_dtype, up_dtype)
    device = dy.device
    run = module_for(device, dy.dtype)
    if run is not _kernels or _kernels is None:
        with exact_products(device.type):
            return _gradients(run, "split", *arguments)
    return _planned(
        _problem("backward", dy, weight, down),
        dy.device,
        lambda plan: _gradients(_kernels, plan, *arguments),
        lambda: _gradients(blas, "split", *arguments),
    )


def _gradients(
    run: Any,
    plan: str,
    dy: Tensor,
    dh: Tensor | None,
    x: Tensor | None,
    weight: Tensor,
    down: Tensor,
    up: Tensor,
    h: Tensor | None,
    seed: Tensor | None,
    s: float,
    p: float,
    need: list[bool],
    down_dtype: torch.dtype,
    up_dtype: torch.dtype,
) -> list[Tensor | None]:
    """The gradients that are needed, by one backend: dy is read for g and dup at once, then for dx; x for ddown."""
    if run is blas:  # one function does it all, here for a layer that stands alone
        if down.dtype != dy.dtype or up.dtype != dy.dtype:
            down, up = down.to(dy.dtype), up.to(dy.dtype)
        need_x, need_weight, need_down, need_up, need_bias = need
        dx, ddown, (dup,) = blas.gradients(
            (dy,), dh, x, (weight,), down, (up,), h, seed, s, p, need_x, need_down, (need_up,), down_dtype, (up_dtype,)
        )
        dweight = dy.T @ x if need_weight else None  # type: ignore[operator]
        return [dx, dweight, ddown, dup, dy.sum(0) if need_bias else None]
    dx = dweight = ddown = dup = dbias = g = None
    if need[0] and dh is None and plan in ("full", "once"):  # g inside the kernel that makes dx
        dx, g = run.linear_lowrank(dy, weight.T, up.T, down.T, None, s, p, seed, True, plan)
    elif (need[0] or need[2]) and need[3]:
        assert h is not None
        g, out = run.project_outer(dy, up.T, h, s, up_dtype)
        dup = out.T
    elif need[0] or need[2]:
        g = run.project(dy, up.T, s)
    if dup is None and need[3]:
        assert h is not None
        dup = run.outer(h, dy, 0.0, None, up_dtype).T
    if g is not None and dh is not None:
        g = g.add_(dh, alpha=s)
    if need[0] and dx is None:
        assert g is not None
        dx = run.matmul_lowrank(dy, weight.T, g, down.T, None, p, seed)
    if need[2]:
        assert x is not None and g is not None
        ddown = run.outer(g, x, p, seed, down_dtype)
    if need[1]:
        assert x is not None
        dweight = dy.T @ x
    if need[4]:
        dbias = dy.sum(0)
    return [dx, dweight, ddown, dup, dbias]


def _save(
    ctx: Any, inputs: tuple[Any, ...], h: Tensor, dtypes: tuple[torch.dtype, torch.dtype], need: tuple[bool, ...]
) -> None:
    x, weight, down, up, _, seed, scale, p = inputs
    need_x, need_weight, need_down, need_up, need_bias = need
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


def refuse_second_derivative() -> None:
    """With create_graph the results would look differentiable and be constants."""
    if torch.is_grad_enabled():
        raise RuntimeError("forgetless has no second derivative: call backward without create_graph, once per forward")


# ---------------------------------------------------------------------------------------- eager


def applied(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """``function.apply``, without the microseconds that it takes to look for tensors left over from ``torch.func``.

    Within ``torch.func`` transforms ``function.apply`` itself, which says that it cannot be.
    """
    bare = super(torch.autograd.Function, function).apply  # type: ignore[misc]

    def apply(*arguments: Any) -> Any:
        transformed = compat.transforms_active()
        return function.apply(*arguments) if transformed else bare(*arguments)

    return apply


def as_rows(x: Tensor) -> Tensor:  # (..., K) -> (M, K)
    dims = x.dim()
    return x if dims == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def shaped(rows: Tensor, like: torch.Size) -> Tensor:  # (M, N) -> (*like[:-1], N)
    """No view to autograd, so that the result may be changed in place: nobody else holds ``rows``."""
    return rows if len(like) == 2 else rows.view(*like[:-1], rows.shape[1]).data


class _LowrankLinear(torch.autograd.Function):
    """y, and h if it is wanted: an output less is microseconds less."""

    @staticmethod
    def forward(ctx: Any, want_h: bool, *inputs: Any) -> Any:
        x, weight, down, up, bias, seed, scale, p = inputs
        dtypes = down.dtype, up.dtype
        need = ctx.needs_input_grad[1:6]
        shape = ctx.shape = x.shape
        x = as_rows(x)
        if x.is_cpu:  # BLAS wants one dtype: cast the factors once for both passes
            down, up = blas.as_dtype(down, x.dtype), blas.as_dtype(up, x.dtype)
        y, h = _forward(x, weight, down, up, bias, seed, scale, p)
        _save(ctx, (x, weight, down, up, bias, seed, scale, p), h, dtypes, need)
        y = shaped(y, shape)
        if not want_h:
            return y
        ctx.set_materialize_grads(False)
        return y, shaped(h, shape)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dh: Tensor | None = None) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        x, weight, down, up, h, seed = ctx.saved_tensors
        if dy is None:
            if dh is None:
                return (None,) * 9
            dy = dh.new_zeros(*dh.shape[:-1], weight.shape[0])
        dy, dh = as_rows(dy), None if dh is None else as_rows(dh)
        grads = _backward(dy, dh, x, weight, down, up, h, seed, *ctx.rest)
        if grads[0] is not None:
            grads[0] = grads[0].view(ctx.shape)
        return (None, *grads, None, None, None)


_lowrank_linear = applied(_LowrankLinear)


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
    _save(ctx, inputs, output[1], (inputs[2].dtype, inputs[3].dtype), ctx.needs_input_grad[:5])


def _autograd(ctx: Any, dy: Tensor | None, dh: Tensor | None) -> tuple[Tensor | None, ...]:
    x, weight, down, up, h, seed = ctx.saved_tensors
    if dy is None:
        if dh is None:
            return (None,) * 8
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
    device = "cpu" if x.is_cpu else x.device.type
    if autocasts(device):
        dtype = torch.get_autocast_dtype(device)
        if x.dtype != torch.float64:
            x, weight = x.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
    if not plainly_right(x, weight, down, up, bias, scale, dropout, seed):
        check(x, weight, down, up, bias, scale, dropout, seed)
        if dropout != 0.0:
            dropout = quantised(dropout)
            if dropout != 0.0 and seed is None:
                seed = draw_seed(x.device)
        if dropout == 0.0:
            seed = None
    if x.dtype == torch.float16 and scale != 1.0:  # scale * x @ down.T may overflow where the result does not
        y = lowrank_linear(x, weight, down, scale * up.float(), bias, 1.0, dropout, seed, return_h)
        return (y[0], scale * y[1]) if return_h else y
    if not torch.compiler.is_compiling():
        return _lowrank_linear(return_h, x, weight, down, up, bias, seed, scale, dropout)
    rows, lead = as_rows(x), x.shape[:-1]
    y, h = torch.ops.forgetless.lowrank_linear(rows, weight, down, up, bias, seed, float(scale), float(dropout))
    y = y.view(*lead, y.shape[-1])
    return (y, h.view(*lead, h.shape[-1])) if return_h else y
