"""The op and its launchers against float64, over sizes, dtypes, strides and dropout, for ``forgetless doctor``."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from forgetless.ops import autograd as ops
from forgetless.ops import reference
from forgetless_bench.harness import short

#: (M, N, K, R, dropout): aligned, ragged, one token, none.
CHECKS = ((256, 512, 256, 16, 0.0), (257, 515, 131, 9, 0.1), (1, 64, 96, 8, 0.0), (0, 64, 64, 8, 0.1))
NAMES = ("y", "dx", "ddown", "dup")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LAYOUTS = ("contiguous", "transposed", "sliced")
FUNCTIONS = ("project", "matmul_lowrank", "outer", "project_outer", "linear_lowrank")
#: (M, N, K, R): ragged, aligned, a single row, many ranks, no row.
SIZES = ((33, 50, 65, 24), (64, 64, 64, 16), (1, 17, 33, 1), (18, 24, 40, 130), (0, 20, 33, 8))
SCALE, P = 0.5, 0.25
SEED = (-1234567, 89)
AVOID = "set FORGETLESS_PLAN=blas to train without the fused kernels, and report this with the output of --json"


class Trouble(Exception):
    """A check that does not hold, and what to do about it."""

    def __init__(self, detail: str, advice: str):
        super().__init__(detail)
        self.advice = advice


#: What looks: returns a line for the report, or raises. And what to do if it raises anything but Trouble.
Check = tuple[str, Callable[[], str], str]


def within(rows: Iterable[tuple[str, float, float]], advice: str = AVOID) -> str:
    count, worst = 0, 0.0
    for title, error, limit in rows:
        count += 1
        if not error <= limit:  # NaN is not
            raise Trouble(f"{title}: error {error:.3e} against float64, limit {limit:.3e}", advice)
        worst = max(worst, error / limit if limit else 0.0)
    return f"{count} comparisons with float64, the worst at {worst:.2f} of its limit"


def draw(*shape: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
    gen = torch.Generator().manual_seed(seed + sum(i * n for i, n in enumerate(shape, 1)))
    return torch.randn(shape, generator=gen).to(device, dtype)


def draw_layer(M: int, N: int, K: int, R: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """x, weight, down, up; the factors in float32 beside a half type"""
    factors = torch.promote_types(dtype, torch.float32)
    x, weight = draw(M, K, dtype=dtype, device=device), draw(N, K, dtype=dtype, device=device, seed=1)
    down, up = (draw(*s, dtype=factors, device=device, seed=2) for s in ((R, K), (N, R)))
    return [t.requires_grad_(t is not weight) for t in (x, weight.div_(max(K, 1) ** 0.5), down, up)]


def one_step(tensors: list[Tensor], dropout: float) -> list[Tensor]:
    """y and the gradients of x, down and up."""
    x, weight, down, up = tensors
    seed = torch.tensor(SEED, dtype=torch.int32, device=x.device)
    y = ops.lowrank_linear(x, weight, down, up, None, SCALE, dropout, seed)
    return [y.detach(), *torch.autograd.grad(y.float().square().sum(), [x, down, up])]


def same_bits(device: torch.device, M: int = 130, dtypes: Sequence[torch.dtype] = DTYPES) -> str:
    """Two runs, dropout and several blocks of rows included."""
    for dtype in dtypes:
        tensors = draw_layer(M, 50, 66, 8, dtype, device)
        for name, a, b in zip(NAMES, one_step(tensors, P), one_step(tensors, P), strict=True):
            if not torch.equal(a, b):
                raise Trouble(f"{name} in {short(dtype)} differs from run to run", AVOID)
    return f"{len(NAMES) * len(dtypes)} results, twice the same"


def arrange(t: Tensor, layout: str, around: float) -> Tensor:
    """The same values with other strides; ``around`` lies between and beside them"""
    if layout == "contiguous":
        return t
    if layout == "transposed":
        return t.t().contiguous().t()
    grid = [(2 * n + 3, slice(2, 2 + 2 * n, 2)) for n in t.shape]
    wide = torch.full([size for size, _ in grid], around, dtype=t.dtype, device=t.device)
    view = wide[tuple(part for _, part in grid)]
    view.copy_(t)
    return view


def operands(function: str, M: int, N: int, K: int, R: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    def tensor(*shape: int, seed: int, of: torch.dtype = dtype) -> Tensor:
        return draw(*shape, dtype=of, device=device, seed=seed)

    wide = torch.promote_types(dtype, torch.float32)
    x, h, up = tensor(M, K, seed=0), tensor(M, R, seed=2), tensor(N, R, seed=3, of=wide)
    down = tensor(R, K, seed=5, of=wide) / max(K, 1) ** 0.5
    weight, bias = tensor(N, K, seed=1), tensor(N, seed=4)
    return {
        "project": [x, down],
        "matmul_lowrank": [x, weight, h, up, bias],
        "outer": [h, x],
        "project_outer": [x, down, h],
        "linear_lowrank": [x, weight, down, up, bias],
    }[function]


def formula(function: str, tensors: list[Tensor], keep: Tensor | None) -> list[Tensor]:
    """What people write, in the dtype of the first tensor: eager PyTorch, or the truth if that is float64"""
    t = [each.to(tensors[0].dtype) for each in tensors]

    def dropped(x: Tensor) -> Tensor:
        return x if keep is None else x * keep

    if function == "project":
        return [SCALE * (dropped(t[0]) @ t[1].T)]
    if function == "matmul_lowrank":
        return [nn.functional.linear(t[0], t[1], t[4]) + dropped(t[2] @ t[3].T)]
    if function == "outer":
        return [t[0].T @ dropped(t[1])]
    if function == "project_outer":
        return [SCALE * (t[0] @ t[1].T), t[2].T @ t[0]]
    h = SCALE * (dropped(t[0]) @ t[2].T)
    return [nn.functional.linear(t[0], t[1], t[4]) + h @ t[3].T, h]


def call(
    module: Any, function: str, tensors: list[Tensor], p: float, seed: Tensor, plan: str = "split"
) -> list[Tensor]:
    drop = {"p": p, "seed": seed if p else None} if function != "project_outer" else {}
    scale = {"scale": SCALE} if function in ("project", "project_outer", "linear_lowrank") else {}
    by = {"plan": plan} if function == "linear_lowrank" else {}
    found = getattr(module, function)(*tensors, **drop, **scale, **by)
    return list(found) if isinstance(found, tuple) else [found]


def launchers(
    module: Any, functions: Sequence[str], device: torch.device, dtypes: Sequence[torch.dtype] = DTYPES
) -> str:
    """Launchers of one backend over sizes, dtypes, strides and dropout, against float64."""
    advice = AVOID if module is ops._kernels else "reinstall torch: its matrix products are wrong here"
    return within((row for function in functions for row in _launched(module, function, device, dtypes)), advice)


def _launched(
    module: Any, function: str, device: torch.device, dtypes: Sequence[torch.dtype]
) -> Iterator[tuple[str, float, float]]:
    seed = torch.tensor(SEED, dtype=torch.int32, device=device)
    around = math.nan if module is ops._kernels else 7.0  # a vendor's GEMM may multiply its padding by zero
    whole = function == "linear_lowrank"
    with one_sweep():
        for turn, (size, dtype) in enumerate(itertools.product(SIZES, dtypes)):
            plainly = operands(function, *size, dtype, device)
            for index, layout in enumerate(LAYOUTS):
                if whole and index != (turn + turn // 3) % 3:
                    continue  # made of the same loads as the others: each size and dtype in one layout
                p = P if index % 2 == 0 and function != "project_outer" else 0.0
                like = plainly[1 if function == "outer" else 0]
                shape = (like.shape[0], plainly[1].shape[0]) if function == "matmul_lowrank" else tuple(like.shape)
                keep = reference.keep_mask(seed, p, *shape) if p and shape[0] else None
                eager = formula(function, plainly, keep)
                truth = formula(function, [t.double() for t in plainly], keep)
                given = [arrange(t, layout, around) if t.dim() == 2 else t for t in plainly]
                for plan in ("full", "once") if whole else ("split",):
                    ours = call(module, function, given, p, seed, plan)
                    title = f"{function} {plan} {short(dtype)} M,N,K,R={size} {layout} dropout={p}"
                    yield from ((title, *errors(*row)) for row in zip(ours, eager, truth, strict=True))


def errors(ours: Tensor, eager: Tensor, truth: Tensor) -> tuple[float, float]:
    """Our worst error, and what is allowed: twice eager's, and what rounding the truth once can cost."""
    if ours.shape != truth.shape:
        return math.inf, 0.0
    if not truth.numel():
        return 0.0, 0.0
    mine, theirs = ((t.double() - truth).abs().max().item() for t in (ours, eager))
    eps = torch.finfo(ours.dtype).eps
    # the truth in float64 is not exact either
    once = 16 * eps if ours.dtype == torch.float64 else eps / 2 + 4 * torch.finfo(torch.float32).eps
    return mine, 2 * theirs + once * truth.abs().max().item()


@contextlib.contextmanager
def one_sweep() -> Iterator[None]:
    """project_outer in one pass over x wherever it can, not only where that pays"""
    if ops._kernels is None:
        yield
        return

    from forgetless_kernels import project

    with mock.patch.object(project, "sweep_pays", lambda *sizes: True):
        yield


def comparisons(
    device: torch.device, cases: Sequence[tuple[int, int, int, int, float]] = CHECKS
) -> Iterator[tuple[str, float, float]]:
    """Title, our worst error against float64 and twice that of eager PyTorch, for y and every gradient of the op."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for M, N, K, R, p in cases:
            ours, eager, truth = outcomes(M, N, K, R, p, dtype, device)
            for name, a, b, t in zip(NAMES, ours, eager, truth, strict=True):
                title = f"{name} {short(dtype)} M={M} N={N} K={K} R={R} dropout={p}"
                if not a.numel():
                    yield title, 0.0, 0.0
                    continue
                mine, theirs = ((x.double() - t).abs().max().item() for x in (a, b))
                yield title, mine, 2 * theirs + 4 * torch.finfo(torch.float32).eps * t.abs().max().item()


def outcomes(
    M: int, N: int, K: int, R: int, p: float, dtype: torch.dtype, device: torch.device
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """y, dx, ddown and dup by the op, by eager PyTorch in ``dtype``, and in float64."""
    gen = torch.Generator().manual_seed(M + N + K + R)
    seed = torch.tensor([12, -34], dtype=torch.int32, device=device)
    sizes = ((M, K), (N, K), (R, K), (N, R), (M, N))
    tensors = [(torch.randn(size, generator=gen) / size[-1] ** 0.5).to(device, dtype) for size in sizes]
    keep = torch.ones(M, K, dtype=torch.bool, device=device)
    if p and M:
        keep = reference.keep_mask(seed, p, M, K)
    rate = reference.drop_threshold(p) / reference.LEVELS
    scale = 0.5

    def eager(dtype: torch.dtype) -> list[Tensor]:
        x, weight, down, up, dy = (t.to(dtype) for t in tensors)
        leaves = [t.detach().requires_grad_(True) for t in (x, down, up)]
        dropped = leaves[0] * keep * (1.0 / (1.0 - rate))
        y = leaves[0] @ weight.T + scale * ((dropped @ leaves[1].T) @ leaves[2].T)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy)]

    x, weight, down, up, dy = tensors
    leaves = [t.detach().requires_grad_(True) for t in (x, down, up)]
    y = ops.lowrank_linear(leaves[0], weight, leaves[1], leaves[2], None, scale, p, seed)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)], eager(dtype), eager(torch.float64)
