"""The op: n frozen linear layers of one x, each with a low-rank update, as one autograd function.

    h   = scale * drop(x) @ [down_1 .. down_n].T                     one pass over x
    y_i = x @ weight_i.T + bias_i + h_i @ up_i.T
    g_i = scale * (dy_i @ up_i + dh_i),    dup_i = dy_i.T @ h_i
    dx  = sum_i dy_i @ weight_i + drop([g_1 .. g_n] @ [down_1 .. down_n])
    [ddown_1 .. ddown_n] = [g_1 .. g_n].T @ drop(x)                  one pass over x

The single layer is n = 1. In place of the weight a layer may give ``base``, what it made of x itself; then y = base +
bias + h @ up.T, and the layer's own part of dx is its own affair. Saved for backward: x (only if ``down`` or ``weight``
is trained), h, and eight bytes of dropout seed. ``forward`` and ``gradients`` are the only bodies; torch.compile sees
them as a custom op, because it cannot look into kernels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import compat
from . import dispatch, reference
from .blas import as_dtype
from .check import check_call, check_layer
from .dispatch import LaunchError, Route
from .rows import Extra, Term, Terms, extra_of


@dataclass(frozen=True)
class Onto:
    """A layer that makes its product itself.

    Attributes:
        in_place: the memory of its result may be written.
        sum_h, sum_g: process groups to sum h and g over (tensor parallelism).
    """

    in_place: bool = False
    sum_h: Any = None
    sum_g: Any = None


@dataclass(frozen=True)
class Call:
    """One call of the op: all that is not a tensor.

    Attributes:
        count: layers.
        scale: factor of h, 1 / (1 - p) included.
        up_scale: factor of up. float16 has the whole scale here: scale * h may overflow where y does not.
        p: dropout, a multiple of 2**-15.
        return_h: also return h.
        onto: set where ``weights`` holds what the layer made of x itself.
        module: of the backend that was asked for, if any; the backward pass runs on it, too.
        terms: products that penalties want, too.
    """

    count: int = 1
    scale: float = 1.0
    up_scale: float = 1.0
    p: float = 0.0
    return_h: bool = False
    onto: Onto | None = None
    module: Any = None
    terms: Terms | None = None


class Operands(NamedTuple):
    """The tensors of the layers, a list each."""

    weights: Sequence[Tensor]  # (N_i, K); or with ``onto`` base (..., N_i)
    biases: Sequence[Tensor | None]  # (N_i,)
    downs: Sequence[Tensor]  # (R_i, K)
    ups: Sequence[Tensor]  # (N_i, R_i)


def quantized_rate(dropout: float) -> float:
    """The nearest rate that the generator can give, below 1."""
    return min(reference.drop_threshold(dropout), reference.LEVELS - 1) / reference.LEVELS


def draw_seed(device: torch.device) -> Tensor:  # (2,) int32
    """A dropout seed from torch's generator of that device: follows manual_seed, checkpointing and graph capture."""
    return torch.randint(-(1 << 31), (1 << 31) - 1, (2,), dtype=torch.int32, device=device)


def device_type(t: Tensor) -> str:
    """``t.device.type``, which takes microseconds on the usual way."""
    return "cpu" if t.is_cpu else t.device.type


def autocasts(device: str) -> bool:
    """Whether autocast is on for that type of device; torch raises if asked about meta."""
    return device != "meta" and torch.is_autocast_enabled(device)


def exact_products(device: str) -> AbstractContextManager[Any]:
    """Products in the dtype they are written in: the op has cast its arguments already."""
    return torch.autocast(device, enabled=False) if autocasts(device) else _AS_IT_IS


_AS_IT_IS = nullcontext()


def as_rows(x: Tensor) -> Tensor:  # (..., K) -> (M, K)
    return x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


# ---------------------------------------------------------------------------------------- bodies


def forward(
    call: Call,
    x: Tensor,  # (M, K)
    seed: Tensor | None,  # (2,) int32
    layers: Operands,
    route: Route | None = None,
    terms: Sequence[Term] = (),
) -> tuple[list[Tensor], Tensor, list[Tensor]]:  # y_i (M, N_i), h (M, sum of R_i), the products of each term
    """y of each layer and h of all, by the backend and plan that dispatch chooses, or by BLAS where a kernel fails."""
    downs, ups = layers.downs, layers.ups
    if route is None:
        route = dispatch.choose_route("forward", x, ups[0], downs[0], call.module)
        if route.unchecked and not call.onto:  # which may write in place and wait for other processes
            route = dispatch.first_use(route, lambda r: _flat(forward(call, x, seed, layers, r, terms)), x.device)
    if call.up_scale != 1.0:
        ups = [call.up_scale * up.float() for up in ups]
    run, s, p = route.module, call.scale, call.p
    try:
        with route.tiles():
            if route.plan != "split" and call.count == 1 and not call.onto and not terms:
                y, h = run.linear_lowrank(
                    x, layers.weights[0], downs[0], ups[0], layers.biases[0], s, p, seed, plan=route.plan
                )
                return [y], h, []
            zs: list[Tensor] = []
            if terms:
                h, zs = run.project_terms(x, downs, ups, terms, s, p, seed)
            else:
                h = run.project(x, downs[0] if call.count == 1 else torch.cat(list(downs)), s, p, seed)
            if call.onto:
                return [_add(call.onto, layers.weights[0], h, ups[0], layers.biases[0])], h, zs
            if call.count == 1:
                return [run.matmul_lowrank(x, layers.weights[0], h, ups[0], layers.biases[0])], h, zs
            parts = h.split_with_sizes([up.shape[1] for up in ups], 1)
            each = zip(layers.weights, parts, ups, layers.biases, strict=True)
            return [run.matmul_lowrank(x, *layer) for layer in each], h, zs
    except LaunchError as error:
        return forward(call, x, seed, layers, dispatch.failed(route, error), terms)


def _add(onto: Onto, base: Tensor, h: Tensor, up: Tensor, bias: Tensor | None) -> Tensor:
    """base + h @ up.T + bias, in the memory of base where that is allowed"""
    if onto.sum_h is not None:
        torch.distributed.all_reduce(h, group=onto.sum_h)
    y = base if onto.in_place else base.clone(memory_format=torch.contiguous_format)
    rows = y.view(h.shape[0], y.shape[-1])
    torch.addmm(rows, h.to(y.dtype), up.to(y.dtype).t(), out=rows)
    return y if bias is None else y.add_(bias)


class Saved(NamedTuple):
    """What the backward pass reads."""

    x: Tensor | None  # (M, K), only for ddown and dweight
    h: Tensor | None  # (M, sum of R_i), only for dup
    seed: Tensor | None
    weights: Sequence[Tensor | None]  # (N_i, K); None with ``onto``
    downs: Sequence[Tensor]  # (R_i, K)
    ups: Sequence[Tensor]  # (N_i, R_i)
    dtypes: Sequence[torch.dtype]  # of the gradients of downs, then of ups


def gradients(
    call: Call,
    saved: Saved,
    need: Sequence[bool],  # of x, then of all weights, biases, downs, ups
    dys: Sequence[Tensor | None],  # (M, N_i) each, at least one
    dh: Tensor | None,  # (M, sum of R_i)
    route: Route | None = None,
    extra: Extra | None = None,
) -> list[Tensor | None]:  # as ``need``
    """The gradients that are needed: each dy_i is read for g_i and dup_i at once, then for dx; x for ddown."""
    n, s, p = call.count, call.scale, call.p
    x, h, seed, weights, downs, ups, dtypes = saved
    like: Any = dys[0] if n == 1 else next(dy for dy in dys if dy is not None)
    if route is None:
        route = dispatch.choose_route("backward", like, ups[0], downs[0], call.module)
        if route.unchecked and not call.onto:
            route = dispatch.first_use(
                route, lambda r: _given(gradients(call, saved, need, dys, dh, r, extra)), like.device
            )
    if call.up_scale != 1.0:
        ups = [call.up_scale * up.float() for up in ups]
    run, ranks = route.module, [up.shape[1] for up in ups]
    need_x, need_downs, need_ups = need[0], need[1 + 2 * n : 1 + 3 * n], need[1 + 3 * n :]
    need_down = any(need_downs)
    need_g = need_x or need_down
    hs: Any = [h] if n == 1 or h is None else h.split_with_sizes(ranks, 1)
    more_ups, more_downs, starts = extra or Extra([[]] * n, [], [None] * n)
    dx = ddown = None
    gs: list[Tensor] = []
    dups: list[Tensor | None] = [None] * n
    try:
        with route.tiles():
            if route.plan != "split" and n == 1 and need_x and dh is starts[0] is None and not call.onto:
                frozen: Any = weights[0]  # g inside the kernel that makes dx
                options = {"drop_output": True, "plan": route.plan}
                dx, g = run.linear_lowrank(like, frozen.T, ups[0].T, downs[0].T, None, s, p, seed, **options)
                gs, need_g = [g], False
            for i, dy in enumerate(dys):
                if dy is None:
                    gs.append(like.new_zeros(like.shape[0], ranks[i]))
                elif need_g and need_ups[i]:
                    g, dup = run.project_outer(dy, ups[i].t(), hs[i], s, dtypes[n + i], more_ups[i], starts[i])
                    gs.append(g)
                    dups[i] = dup.t()
                elif need_ups[i]:
                    dups[i] = run.outer(hs[i], dy, 0.0, None, dtypes[n + i], more_ups[i]).t()
                elif need_g:
                    start = None if starts[i] is None else (hs[i], starts[i])
                    gs.append(run.project(dy, ups[i].t(), s, start=start))
            if need_x or need_down:
                g = gs[0] if len(gs) == 1 else torch.cat(gs, 1)
                if call.onto and call.onto.sum_g is not None:
                    torch.distributed.all_reduce(g, group=call.onto.sum_g)
                if dh is not None:
                    g.add_(dh, alpha=s)
                options = {"need_dx": need_x and dx is None, "dtype": dtypes[0], "more": more_downs}
                results = run.dx_and_ddown(
                    [None] if call.onto else dys, weights, g, downs, x if need_down else None, p, seed, **options
                )
                dx, ddown = results[0] if dx is None else dx, results[1]
    except LaunchError as error:
        return gradients(call, saved, need, dys, dh, dispatch.failed(route, error), extra)
    if call.up_scale != 1.0:
        dups = [None if dup is None else dup.mul_(call.up_scale) for dup in dups]
    ddowns: Any = [ddown] if n == 1 or ddown is None else ddown.split_with_sizes(ranks)
    others: list[Tensor | None] = [None] * (2 * n)
    for i, dy in enumerate(dys):
        if need[1 + i] and dy is not None and x is not None:
            others[i] = dy.t() @ x
        if need[1 + n + i] and dy is not None:
            others[n + i] = dy.sum(0)
    if n > 1:
        ddowns = [ddowns[i] if need_down and need_downs[i] else None for i in range(n)]
    return [dx, *others, *ddowns, *dups]


def _flat(result: tuple[list[Tensor], Tensor, list[Tensor]]) -> list[Tensor]:
    return [*result[0], result[1], *result[2]]


def _given(grads: list[Tensor | None]) -> list[Tensor]:
    return [grad for grad in grads if grad is not None]


# ---------------------------------------------------------------------------------------- eager


class LowrankLinear(torch.autograd.Function):
    """y_i of each layer, then h if it is wanted, then the products of all terms or of none.

    x is (M, K); the tensors those of ``Operands``, list after list.
    """

    @staticmethod
    def forward(ctx: Any, call: Call, x: Tensor, seed: Tensor | None, *tensors: Any) -> Any:
        n = call.count
        weights, biases = tensors[:n], tensors[n : 2 * n]
        downs: Sequence[Tensor] = tensors[2 * n : 3 * n]
        ups: Sequence[Tensor] = tensors[3 * n :]
        dtypes = [t.dtype for t in tensors[2 * n :]]
        # a checkpoint that recomputes the call saves the same tensors, but nobody sees its products
        terms = call.terms.wanted if call.terms and not compat.in_backward() else ()
        if terms and not dispatch.in_pass(x, ups[0], downs[0], call.module):
            terms = ()
        if x.is_cpu and call.up_scale == 1.0 and not terms:  # BLAS wants one dtype: cast once for both passes
            downs, ups = [as_dtype(t, x.dtype) for t in downs], [as_dtype(t, x.dtype) for t in ups]
        with exact_products(device_type(x)):
            ys, h, zs = forward(call, x, seed, Operands(weights, biases, downs, ups), terms=terms)
        if call.onto:
            weights = (None,)
            if call.onto.in_place:
                ctx.mark_dirty(tensors[0])
        need = ctx.needs_input_grad
        if any(need):
            ctx.call, ctx.dtype, ctx.dtypes = call, x.dtype, dtypes
            ctx.pending, ctx.kept, ctx.rows = set(range(n)), None, x.shape[0]
            rows = call.terms.tensors() if call.terms else ()
            need_x = any(need[3 + 2 * n : 3 + 3 * n]) or any(need[3 : 3 + n]) and not call.onto
            need_h = any(need[3 + 3 * n :]) or bool(rows)
            ctx.save_for_backward(x if need_x else None, h if need_h else None, seed, *weights, *downs, *ups, *rows)
            ctx.set_materialize_grads(False)
        if call.return_h or zs:
            return (*ys, *([h] if call.return_h else []), *zs)
        return ys[0] if n == 1 else tuple(ys)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        call, dtype = ctx.call, ctx.dtype
        n = call.count
        x, h, seed, *rest = _saved(ctx, grads)
        saved = Saved(x, h, seed, rest[:n], rest[n : 2 * n], rest[2 * n : 3 * n], ctx.dtypes)
        dys = [None if dy is None else as_dtype(as_rows(dy), dtype) for dy in grads[:n]]
        dh, dzs = grads[n] if call.return_h else None, grads[n + call.return_h :]
        extra = None
        if call.terms:
            call.terms.spent = True
            if any(dz is not None for dz in dzs):
                extra = extra_of(call.terms.replaced(rest[3 * n :]), dzs, saved.downs, saved.ups)
        wanted = [bool(extra and (extra.ups[i] or extra.starts[i] is not None)) for i in range(n)]
        if not any(wanted) and all(dy is None for dy in dys):
            if dh is None and extra is None:
                return (None,) * (3 + 4 * n)
            wanted[0] = True
        for i, up in enumerate(saved.ups):
            if dys[i] is None and wanted[i]:
                dys[i] = up.new_zeros(ctx.rows, up.shape[0], dtype=dtype)
        _, need_x, _, *need = ctx.needs_input_grad
        if call.onto:
            need[0] = False  # base takes its gradient as it comes
        with exact_products(device_type(saved.downs[0])):
            dx, *others = gradients(call, saved, [need_x, *need], dys, dh, extra=extra)
        if call.onto:
            others[0] = grads[0]
        return (None, dx, None, *others)


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


# -------------------------------------------------------------------------------------- compiled


@torch.library.custom_op("forgetless::lowrank_linear", mutates_args=())
def _op(
    x: Tensor,  # (M, K)
    weight: Tensor,  # (N, K)
    down: Tensor,  # (R, K)
    up: Tensor,  # (N, R)
    bias: Tensor | None,  # (N,)
    seed: Tensor | None,  # (2,) int32
    factors: list[float],  # scale, up_scale, p of ``Call``
) -> tuple[Tensor, Tensor]:  # y (M, N), h (M, R)
    with exact_products(device_type(x)):
        (y,), h, _ = forward(_call(factors), x, seed, Operands([weight], [bias], [down], [up]))
    return y, h


def _call(factors: list[float]) -> Call:
    scale, up_scale, p = factors
    return Call(1, scale, up_scale, p, module=dispatch.asked_module())


@_op.register_fake
def _(x, weight, down, up, bias, seed, factors):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], weight.shape[0]), x.new_empty(x.shape[0], down.shape[0])


@torch.library.custom_op("forgetless::lowrank_linear_backward", mutates_args=())
def _op_backward(
    dy: Tensor,
    dh: Tensor | None,
    saved: list[Tensor | None],  # x, h, seed, weight, down, up
    factors: list[float],
    need: list[bool],  # of x, weight, bias, down, up
) -> list[Tensor]:  # an empty tensor stands for a gradient nobody asked for
    x, h, seed, weight, down, up = saved
    assert down is not None and up is not None
    with exact_products(device_type(dy)):
        values = Saved(x, h, seed, [weight], [down], [up], [down.dtype, up.dtype])
        grads = gradients(_call(factors), values, need, [dy], dh)
    return [dy.new_empty(0) if grad is None else grad.contiguous() for grad in grads]


@_op_backward.register_fake
def _(dy, dh, saved, factors, need):  # type: ignore[no-untyped-def]
    weight, down, up = saved[3:]
    shapes = [(dy.shape[0], weight.shape[1]), weight.shape, (weight.shape[0],), down.shape, up.shape]
    dtypes = [dy.dtype, dy.dtype, dy.dtype, down.dtype, up.dtype]
    return [
        dy.new_empty(shape, dtype=dtype) if expected else dy.new_empty(0)
        for shape, dtype, expected in zip(shapes, dtypes, need, strict=True)
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, down, up, _, seed, factors = inputs
    need_x, need_weight, need_down, need_up, need_bias = ctx.needs_input_grad[:5]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(
        x if need_down or need_weight else None, output[1] if need_up else None, seed, weight, down, up
    )
    ctx.need = [need_x, need_weight, need_bias, need_down, need_up]
    ctx.rest = factors, ctx.need


def _autograd(ctx: Any, dy: Tensor | None, dh: Tensor | None) -> tuple[Tensor | None, ...]:
    saved = list(ctx.saved_tensors)
    if dy is None:
        if dh is None:
            return (None,) * 7
        dy = dh.new_zeros(dh.shape[0], saved[3].shape[0])
    grads = torch.ops.forgetless.lowrank_linear_backward(dy, dh, saved, *ctx.rest)
    dx, dweight, dbias, ddown, dup = (grad if need else None for grad, need in zip(grads, ctx.need, strict=True))
    return dx, dweight, ddown, dup, dbias, None, None


_op.register_autograd(_autograd, setup_context=_setup_context)


# ---------------------------------------------------------------------------------------- public


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
    weights, biases, downs, ups = layers
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
    p = 0.0
    if dropout:
        p = quantized_rate(dropout)
        seed = draw_seed(x.device) if seed is None else seed
    s = scale / (1.0 - p)
    factors = (1.0, s) if x.dtype == torch.float16 else (s, 1.0)
    asked = None if torch.compiler.is_compiling() else dispatch.asked_module()
    if terms and (x.dtype == torch.float16 or dispatch.module_for(x.is_cuda, x.dtype, asked) is dispatch.blas):
        terms = None  # of float16 h is not scaled
    made = Call(len(weights), *factors, p, return_h, onto, asked, terms)
    return made, as_rows(x), seed if p else None, *weights, *biases, *downs, *ups


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


def compiled(call: Call, x: Tensor, seed: Tensor | None, *tensors: Any) -> Any:
    """``LowrankLinear`` of one layer, for torch.compile to trace."""
    weight, bias, down, up = tensors
    factors = [call.scale, call.up_scale, call.p]
    y, h = torch.ops.forgetless.lowrank_linear(x, weight, down, up, bias, seed, factors)
    return (y, h) if call.return_h else y


def hidden(call: Call, h: Tensor) -> Tensor:
    """The h that users see, scale * drop(x) @ down.T, from that of ``LowrankLinear``."""
    return h if call.up_scale == 1.0 else h * call.up_scale
