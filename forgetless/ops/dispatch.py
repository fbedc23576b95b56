"""Where a layer runs, and why: the backend, the plan and the tile. The one module that names the kernels.

A call of the op runs on the fused kernels if its tensors are on a CUDA device, Triton is installed and the dtype is
one of theirs; on ``blas`` otherwise; on what ``backend`` says within its block. The kernels have these plans:

    blas    in-place BLAS: two skinny products beside the vendor's GEMM
    hybrid  the skinny products by the kernels, beside the vendor's GEMM
    split   h first, in one skinny pass; then one GEMM whose accumulator takes h @ up.T
    full    x @ down.T inside the GEMM's own loop: for narrow outputs and small ranks
    once    one persistent grid: the first column of tiles makes h, the others pick it up

Which one: ``forgetless.ops.plans``.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import compat
from . import blas, first_use, plans, reference
from .check import dtype_name
from .hybrid import Hybrid
from .plans import Choice, Route

kernels: Any = None
#: Why there are none.
NO_KERNELS = "Triton is not installed"
try:
    from forgetless_kernels import fused, launcher, tiles
    from forgetless_kernels.tl_utils import LaunchError

    kernels = fused
except ImportError as error:
    if error.name is None or not error.name.startswith("triton"):
        raise
    if not isinstance(error, ModuleNotFoundError):  # another version than they take
        NO_KERNELS = str(error)
        warnings.warn(f"forgetless: everything runs on BLAS: {error}", stacklevel=2)

    class LaunchError(RuntimeError):  # type: ignore[no-redef]
        """A kernel could not be compiled or launched."""


#: Dtypes that the fused kernels take; others run on BLAS.
KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

BLAS = Route(blas, "blas")
REFERENCE = Route(reference)
#: The plan ``hybrid`` as a backend.
hybrid: Any = None if kernels is None else Hybrid(kernels)

_asked: ContextVar[ModuleType | None] = ContextVar("forgetless backend", default=None)


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Run the op on one backend within the block: "reference", "blas" or "triton".

    In this thread, whatever the device; a call's backward pass runs where its forward pass did. To measure or to
    check, not to train with.

    Raises:
        ValueError: another name, or Triton is not installed.
    """
    known = {"reference": reference, "blas": blas, "triton": kernels}
    if known.get(name) is None:
        have = [key for key, module in known.items() if module is not None]
        raise ValueError(f"backend is {name!r}, wants one of {have}")
    token = _asked.set(known[name])
    try:
        yield
    finally:
        _asked.reset(token)


def asked_module() -> ModuleType | None:
    """The module of the ``backend`` block that runs now; None outside of one."""
    return _asked.get()


def module_for(on_cuda: bool, dtype: torch.dtype, asked: Any) -> Any:
    """The module that runs the op there in that dtype, before any plan is chosen."""
    module = asked or (kernels if on_cuda and kernels is not None else blas)
    return blas if module is kernels and dtype not in KERNEL_DTYPES else module


def makes_products(x: Tensor, asked: Any, anywhere: bool = False) -> bool:
    """Whether what runs x makes products for penalties beside h.

    Args:
        x: what the op is given.
        asked: the module of a ``backend`` block.
        anywhere: on BLAS too.
    """
    module = module_for(x.is_cuda, x.dtype, asked)
    return launcher.TAKES_ROWS if module is kernels else anywhere or module is not blas


def choose_route(
    sweep: str, like: Tensor, ups: Sequence[Tensor], down: Tensor, dropout: bool = False, asked: Any = None
) -> Route:
    """Backend, plan and tile for one call.

    Args:
        sweep: "forward" or "backward".
        like: (M, ..) x, or dy: device, dtype and rows.
        ups: (N, R) of each layer.
        down: (R, K) of one.
        dropout: whether x is dropped.
        asked: the module of a ``backend`` block.
    """
    if compat.is_batched(like):  # torch.autograd.grad(is_grads_batched=True): only what torch can vectorise
        return REFERENCE
    module = module_for(like.is_cuda, like.dtype, asked)
    if module is not kernels:
        return REFERENCE if module is reference else BLAS
    layers, K = tuple([up.shape for up in ups]), down.shape[1]
    if not K or not all([N for N, _ in layers]):  # no grid to launch
        return BLAS
    M = plans.bucket(like.shape[0])
    key = like.device, sweep, M, layers, K, like.dtype, dropout, os.environ.get("FORGETLESS_PLAN", "")
    routes = plans.routes.get(key)
    if routes is None:
        sizes = tuple([(N, R) for N, R in layers])
        problem = plans.problem_of(like.device, sweep, M, sizes, K, like.dtype, dropout)
        route = route_of(plans.choose(problem), problem)
        routes = route, replace(route, unchecked=route.module is kernels and plans.undecided(problem))
        plans.routes[key] = routes
    return routes[routes[1].unchecked and first_use.checkable(like.device)]


def route_of(choice: Choice, problem: plans.Problem | None = None) -> Route:
    """The route of a plan."""
    module = {"blas": blas, "hybrid": hybrid}.get(choice.plan, kernels)
    return Route(module, choice.plan, choice.tile if module is kernels else (), problem)


def measured_route(
    route: Route, run: Callable[[Route], Sequence[Tensor]], device: torch.device, others: Sequence[str] = ("hybrid",)
) -> Route:
    """The route to take from the first use of a problem, this one, another plan or BLAS: see ``first_use``."""
    tried = [route_of(Choice(plan, ""), route.problem) for plan in others]
    return first_use.first_use([route, *tried, BLAS], run, device)


def tiles_of(route: Route, device: torch.device) -> AbstractContextManager[Any]:
    """The block in which the kernels run with the route's tile."""
    return tile_forced(route.tile, device) if route.tile else _NO_TILE


_NO_TILE = nullcontext()


def runs_kernels(x: Tensor) -> bool:
    """Whether a call with this x may run somewhere else than on BLAS."""
    return x.is_cuda or asked_module() is not None


def failed(route: Route, error: Exception) -> Route:
    """The route to take after ``error``: BLAS, with one warning; raises ``error`` where that is asked for."""
    if route.problem is None:
        raise error
    plans.fail(route.problem, route.plan, error)
    return BLAS


def explain_path(
    device: torch.device, dtype: torch.dtype, N: int, K: int, R: int, sweep: str = "forward"
) -> tuple[str, str]:
    """The plan's name for a layer, and the reason in words; for 4096 tokens where it depends on them.

    Args:
        device: of the activations.
        dtype: of the activations.
        N: out_features.
        K: in_features.
        R: rank.
        sweep: "forward", or that of a stack of experts.

    Raises:
        ValueError: ``FORGETLESS_PLAN`` holds something else than a plan or "strict".
    """
    asked = asked_module()
    module = module_for(device.type == "cuda", dtype, asked)
    if module is kernels and kernels is not None:
        choice = plans.choose(plans.problem_of(device, sweep, 4096, ((N, R),), K, dtype))
        return choice.plan, choice.reason
    if module is reference:
        return "reference", ""
    if asked is kernels is not None or device.type == "cuda" and kernels is not None and asked is None:
        return "blas", f"the fused kernels do not take {dtype_name(dtype)}"
    if device.type == "cuda" and kernels is None:
        return "blas", NO_KERNELS
    return "blas", f"in-place BLAS is the {device.type} path"


@contextmanager
def tile_forced(tile: tuple[tuple[str, int], ...], device: torch.device) -> Iterator[None]:
    """Within the block the GEMM kernels that the device runs have these tile fields."""
    with ExitStack() as stack:
        for kernel in ("matmul_lowrank", "matmul_lowrank_t"):
            for row in (kernel, f"{kernel}_descriptor"):
                if row == kernel or tiles.has_row(row, device):
                    stack.enter_context(tiles.forced(row, **dict(tile)))
        yield


def keep_bits(seed: Tensor, p: float, M: int, K: int) -> Tensor:  # (M, K) int16, -1 keep, 0 drop
    """``blas.keep_bits`` in one launch; where the kernel fails, once with a warning and from then on by torch."""
    try:
        return kernels.keep_bits(seed, p, M, K)
    except LaunchError as error:
        if plans.forced()[1]:
            raise
        blas.MASK_MAKERS.clear()
        warnings.warn(f"forgetless: the kernel of dropout masks is not used any more: {error}", stacklevel=2)
        return blas.keep_bits(seed, p, M, K)


if kernels is not None:
    blas.MASK_MAKERS["cuda"] = keep_bits
