"""Adapters on the experts of a mixture model, which are one 3-D parameter: E low-rank updates in two stacked factors.

``AdaptedExperts`` is what ``fl.adapters`` lists, one for each parameter. It sits inside the experts module, which stays
where it is and runs by ``experts_forward``: see ``forgetless.layers.stack``. Penalties and statistics see single
matrices: ``matrices`` gives one ``Expert`` for each.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter import Adapter, Site
from ..methods.base import Method
from ..ops.autograd import lowrank_linear
from ..ops.blas import grouped_sum
from ..ops.bodies import exact_products
from ..ops.dispatch import explain_path
from ..ops.grouped import Factors, Rows, experts_sweep, grouped_lowrank, sort_rows
from .expert_factors import expert_site, parts
from .frozen import hooked
from .linear import AdaptedLinear
from .stack import Stack, give_back, run_by, verify, verify_once
from .trace import DRIFT_TOKENS, Trace

#: What the experts do between their two products, row by row.
Inside = Callable[[Tensor], Tensor]


def check_experts(layers: dict[str, nn.Module], method: Method, all_linear: bool) -> dict[str, nn.Module]:
    """The layers that the method takes: where all were asked for, stacks are left out with a warning if it must.

    Raises:
        ValueError: stacks were asked for that it cannot take, or that compute something else than their flags say.
    """
    left = {name: layer for name, layer in layers.items() if isinstance(layer, Stack)}
    if method.adapts_experts or not left:
        for experts in dict.fromkeys(layer.experts for layer in left.values()):
            verify(experts, _plain_forward)
        return layers
    told = f"{next(iter(left))} is a stack of experts, which {method.name} does not adapt: LoRA, CLoRA and LaLoRA do"
    if not all_linear or len(left) == len(layers):
        raise ValueError(f"targets: {told}")
    warnings.warn(f"targets: {told}; {len(left)} stacks of experts are left out", stacklevel=3)
    return {name: layer for name, layer in layers.items() if name not in left}


@dataclass
class ExpertsTrace:
    """What the last forward pass left behind."""

    x: Tensor | None  # (n, K) some rows, detached; None if not recorded
    experts: Tensor | None  # (n,) int64, the expert of each
    hidden: Tensor | None  # (S, R) with its graph, only if a penalty needs it
    rows: Rows


class AdaptedExperts(AdaptedLinear):
    """The update of one stack: y_s = x_s W_e^T + scale * (drop(x_s) @ down_e.T) @ up_e.T.

    ``weight`` is the parameter as the module stores it.

    Args:
        base: the stack, frozen.
        adapter: with factors (E, R, K) and (E, N, R).
        method: that made the adapter.
        name: path of the parameter in the model.
    """

    base: Stack
    trace: Any
    lends_weight = False

    def __init__(self, base: Stack, adapter: Adapter, method: Method, name: str):
        super().__init__(base, adapter, method, name)
        self.transposed = base.transposed
        self.experts: list[Expert] = []

    @property
    def in_features(self) -> int:
        return self.base.matrices().shape[2]

    @property
    def out_features(self) -> int:
        return self.base.matrices().shape[1]

    def runs_base(self) -> bool:
        return False

    def path(self, rank: int) -> tuple[str, str]:
        weight, E = self.weight, self.base.weight.shape[0]
        sweep = experts_sweep("forward", E)
        plan, why = explain_path(weight.device, weight.dtype, self.out_features, self.in_features, rank, sweep)
        if plan in ("blas", "reference"):
            return "experts", f"{E} experts, one after another on the rows that are routed to them: {why}"
        return "experts", f"{E} experts, each product of all of them in one launch: {why}"

    def install(self) -> None:
        """Go into the experts module, and let it run by ``experts_forward``."""
        run_by(self.base.experts, experts_forward)
        self.base.experts.add_module(self.base.key + SUFFIX, self)

    def uninstall(self) -> None:
        """Leave the experts module, which runs as before once nothing of it is adapted."""
        module = self.base.experts
        delattr(module, self.base.key + SUFFIX)
        if not _adapted(module):
            give_back(module)

    def forward(  # type: ignore[override]
        self, x: Tensor, stack: Stack, rows: Rows, sums: Tensor | None, inside: Inside | None
    ) -> Tensor:
        self.called = True
        if any(hooked(expert) for expert in self.experts):
            return self._one_by_one(x, rows, sums, inside)
        adapter = self.adapter
        factors = Factors(*adapter.factors(), adapter.scale, adapter.dropout if self.training else 0.0)
        y, h = grouped_lowrank(x, stack.matrices(), stack.bias, factors, rows, sums, sums is None, inside)
        self._record_rows(x, h, rows, sums is None, inside)
        return y

    @torch.no_grad()
    def _sample(self, x: Tensor, rows: Rows, by_token: bool, inside: Inside | None) -> tuple[Tensor, Tensor]:
        """Some rows of what the experts are given, and the expert of each"""
        S = rows.tokens.shape[0]
        places = torch.arange(0, S, max(1, -(-S // DRIFT_TOKENS)), device=x.device)
        x = x[rows.tokens[places] if by_token else places]
        return x if inside is None else inside(x), torch.searchsorted(rows.ends, places, right=True)

    def _record_rows(self, x: Tensor, h: Tensor, rows: Rows, by_token: bool, inside: Inside | None) -> None:
        sampled = self.records_drift or not (self.training and torch.is_grad_enabled())
        seen, ids = self._sample(x, rows, by_token, inside) if sampled else (None, None)
        keeps = sampled or self.needs_hidden
        self.trace = ExpertsTrace(seen, ids, h if self.needs_hidden else None, rows) if keeps else None

    def _one_by_one(self, x: Tensor, rows: Rows, sums: Tensor | None, inside: Inside | None) -> Tensor:
        """The same, each expert called as a layer of its own on all tokens, the rest zero: for who watches it."""
        by_token, made = sums is None, []
        x = x if inside is None else inside(x)
        for e, part in rows.slices():
            expert, tokens = self.experts[e], rows.tokens[part]
            expert.tokens = tokens
            own = x[tokens] if by_token else x[part]
            made.append(expert(x.new_zeros(rows.size, x.shape[1]).index_copy(0, tokens, own))[tokens])
        y = torch.cat(made) if made else x.new_zeros(0, self.out_features)
        return y if sums is None else grouped_sum(y, rows, sums)

    def drift(self) -> float | None:
        trace = self.trace
        if trace is None or trace.x is None or trace.x.shape[0] == 0:
            return None
        x = trace.x.float()
        with torch.no_grad(), exact_products(x.device.type):
            down, up = (factor.float() for factor in self.adapter.factors())
            h = self.adapter.scale * torch.einsum("nk,nrk->nr", x, down[trace.experts])
            moved = torch.einsum("nr,nrs,ns->n", h, (up.mT @ up)[trace.experts], h).clamp(min=0).sqrt()
            return (moved / x.norm(dim=1).clamp(min=torch.finfo(torch.float32).tiny)).mean().item()

    @torch.no_grad()
    def fold(self, factors: tuple[Tensor, Tensor] | None = None) -> float:
        """As of AdaptedLinear, one expert after another."""
        downs, ups = (t.detach().clone() for t in factors or self.adapter.factors())
        squares = []
        with exact_products(self.weight.device.type):
            for weight, down, up in zip(self.base.matrices(), downs, ups, strict=True):
                delta = self._delta(down, up)
                exact = weight.to(delta.dtype) + delta
                weight.copy_(exact.to(weight.dtype))
                squares.append(torch.stack([(weight.to(delta.dtype) - exact).square().sum(), delta.square().sum()]))
        self.folded = [*self.folded, (downs, ups)]
        lost, size = torch.stack(squares).sum(0).sqrt()
        return (lost / size).item() if size > 0 else 0.0

    def matrices(self) -> list[Expert]:
        """One layer for each expert, with its slices of the factors as they are now."""
        made = parts(self.adapter)
        if not self.experts:
            self.experts = [Expert(self, e) for e in range(len(made))]
        for expert, part in zip(self.experts, made, strict=True):
            expert.__dict__["adapter"] = part
        return self.experts

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "experts": []}


class Expert(AdaptedLinear):
    """One expert of a stack, as the rest of the library sees an adapted layer. Not in the model."""

    lends_weight = False
    tokens: Tensor  # (n,) int64, those that are routed to it in the pass that runs

    def __init__(self, owner: AdaptedExperts, index: int):
        nn.Module.__init__(self)
        self.__dict__.update(owner=owner, index=index, method=owner.method, name=f"{owner.name}.{index}")
        self.transposed, self.folded, self.group = False, [], None
        self.needs_hidden = owner.needs_hidden

    owner: AdaptedExperts
    index: int

    @property
    def frozen(self) -> Tensor:
        return self.owner.base.matrices()[self.index]

    @property
    def bias(self) -> Tensor | None:
        bias = self.owner.bias
        return None if bias is None else bias[self.index]

    def site(self) -> Site:
        return expert_site(self.owner.site(), self.index)

    @property
    def trace(self) -> Trace | None:
        """h of every token, zero where it was routed elsewhere: means over tokens are those of the whole pass."""
        trace = self.owner.trace
        if trace is None or trace.hidden is None:
            return None
        rows, h = trace.rows, trace.hidden
        start = sum(rows.counts[: self.index])
        part = slice(start, start + rows.counts[self.index])
        return Trace(None, h.new_zeros(rows.size, h.shape[1]).index_copy(0, rows.tokens[part], h[part]))

    @trace.setter
    def trace(self, value: Trace | None) -> None:
        self.owner.trace = value and self.owner.trace  # who measures lets go of it

    def forward(self, x: Tensor) -> Tensor:  # (T, K) -> (T, N), zero where a token is routed elsewhere
        owner = self.owner
        dropout = owner.adapter.dropout if owner.training else 0.0
        down, up = self.adapter.factors()
        own = x[self.tokens].to(self.weight.dtype)
        y = lowrank_linear(own, self.weight, down, up, self.bias, owner.adapter.scale, dropout)
        return y.new_zeros(x.shape[0], y.shape[1]).index_copy(0, self.tokens, y)


#: What the name of an ``AdaptedExperts`` in its module has after that of the parameter.
SUFFIX = "_adapter"


def matrices(layers: Mapping[str, AdaptedLinear]) -> dict[str, AdaptedLinear]:
    """The same layers, each stack as its experts: "...experts.gate_up_proj.3"."""
    result: dict[str, AdaptedLinear] = {}
    for name, layer in layers.items():
        if isinstance(layer, AdaptedExperts):
            result.update((f"{name}.{e}", expert) for e, expert in enumerate(layer.matrices()))
        else:
            result[name] = layer
    return result


def _adapted(module: nn.Module) -> dict[str, AdaptedExperts]:
    """Stack -> its adapter here and now, in an experts module."""
    layers: Iterable[Any] = (child for child in module.children() if isinstance(child, AdaptedExperts))
    return {layer.base.key: layer for layer in layers}


@torch.compiler.disable
def experts_forward(experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """transformers' experts implementation "forgetless".

    Args:
        experts: the module, adapted or not.
        hidden_states: (T, K)
        top_k_index: (T, k) int, the experts of each token.
        top_k_weights: (T, k), what their results are weighed with.

    Returns:
        (T, K) in the dtype of ``hidden_states``.
    """
    verify_once(experts, _plain_forward)
    layers = _adapted(experts) | {view.base.key: view for view in _called.get()}
    for layer in layers.values():
        layer.enter()
    layers = {key: layer for key, layer in layers.items() if not layer.disabled}
    return _forward(experts, layers, hidden_states, top_k_index, top_k_weights)


@torch.compiler.disable
def call_with(view: AdaptedExperts, module: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a module that ends in the experts of ``view``, with its update: for adapters that are kept elsewhere."""
    token = _called.set((*_called.get(), view))
    try:
        return module(*args, **kwargs)
    finally:
        _called.reset(token)


#: The adapters that are set down for the call that runs.
_called: ContextVar[tuple[AdaptedExperts, ...]] = ContextVar("forgetless experts", default=())


def _plain_forward(experts: Any, *arguments: Tensor) -> Tensor:
    return _forward(experts, {}, *arguments)


def _forward(experts: Any, layers: dict[str, AdaptedExperts], x: Tensor, index: Tensor, shares: Tensor) -> Tensor:
    rows = sort_rows(index, experts.num_experts)
    sums = shares.reshape(-1)[rows.order]

    def product(key: str, x: Tensor, sums: Tensor | None, inside: Inside | None = None) -> Tensor:
        stack = Stack(experts, key)
        if key in layers:
            return layers[key](x, stack, rows, sums, inside)
        weight = stack.matrices()
        E, N, K = weight.shape
        none = Factors(weight.new_zeros(E, 0, K), weight.new_zeros(E, N, 0))
        return grouped_lowrank(x, weight, stack.bias, none, rows, sums, sums is None, inside)[0]

    made = product("gate_up_proj" if experts.has_gate else "up_proj", x, None)
    act = experts._apply_gate if experts.has_gate else experts.act_fn
    if _trains(experts):
        return product("down_proj", act(made), sums).to(x.dtype)
    return product("down_proj", made, sums, act).to(x.dtype)


def _trains(experts: Any) -> bool:
    """Whether anything between the two products may be trained: then autograd has to see it."""
    named = ((name, p) for name, p in experts.named_parameters() if SUFFIX not in name.partition(".")[0])
    own = {name for key in ("gate_up_proj", "up_proj", "down_proj") for name in (key, f"{key}_bias")}
    return any(p.requires_grad for name, p in named if name not in own)
