"""AdaptedLinear: a frozen layer and its adapter, run as one op."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..adapter import Adapter, Site, whole
from ..methods.base import Method
from ..ops import blas
from ..ops.autograd import as_rows, autocasts, draw_mask, exact_products, gives_way, lowrank_linear, settled_module
from .groups import Group, Result, families, lowrank_linears
from .quantized import kind_of, stand_in
from .tensor_parallel import cut_of

#: ``fl.drift`` looks at this many evenly spaced tokens of the last forward pass at most.
DRIFT_TOKENS = 32


def is_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D (GPT-2): weight (in_features, out_features). Told by its type, never by its shape."""
    cls = type(module)
    return cls.__name__ == "Conv1D" and cls.__module__.startswith("transformers.")


def form_groups(layers: dict[str, AdaptedLinear]) -> None:
    """Let siblings run together, where one scale and stored ``down`` factors allow it."""
    for names in families(list(layers)):
        members = [layers[name] for name in names if not layers[name].around and _holds_down(layers[name].adapter)]
        alike = {(m.weight.device, m.weight.dtype, m.adapter.scale, m.in_features) for m in members}
        if len(members) > 1 and len(alike) == 1:
            group = Group(members)
            for member in members:
                member.group = group


def _holds_down(adapter: Adapter) -> bool:
    """Whether ``adapter.down`` is the factor itself, not something it is made of."""
    down = getattr(adapter, "down", None)
    return isinstance(down, Tensor) and adapter.factors()[0] is down


def stored(base: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a layer, out of its table: a module's attribute costs a microsecond."""
    table = base._parameters
    weight = table.get("weight")
    if weight is None:  # parametrised, or packed
        return base.weight, base.bias
    return weight, table["bias"] if "bias" in table else base.bias


def site_of(name: str, base: nn.Module, values: bool = False) -> Site:
    """The layer as a method sees it; a weight that is packed or cut is a stand-in unless its ``values`` are wanted."""
    kind = kind_of(base)
    if kind is not None:
        return Site(name, kind.unpack(base) if values else stand_in(base, kind.dtype(base)))
    if cut_of(base) is not None:
        return Site(name, whole(base.weight).detach() if values else stand_in(base, base.weight.dtype))  # type: ignore[arg-type]
    transposed = is_conv1d(base)
    weight: Tensor = base.weight  # type: ignore[assignment]
    return Site(name, weight.detach().T if transposed else weight.detach(), transposed)


@dataclass
class Trace:
    """What the last forward pass left behind."""

    x: Tensor  # (tokens, K) every so many tokens of x, DRIFT_TOKENS at most, detached; shared by siblings
    hidden: Tensor | None  # (M, R) with its graph, only if a penalty needs it
    source: Callable[[], Tensor | None] | None  # weak reference to the x of the call


def _sample(x: Tensor) -> Tensor:  # (..., K) -> (tokens, K)
    """Every so many tokens of x, a copy."""
    K = x.shape[-1]
    M = x.numel() // max(K, 1)
    step = max(1, -(-M // DRIFT_TOKENS))
    if x.is_contiguous():
        return torch.as_strided_copy(x.detach(), (-(-M // step), K), (step * K, 1))
    return as_rows(x.detach())[::step].clone()


class AdaptedLinear(nn.Module):
    """y = base(x) + scale * (drop(x) @ down.T) @ up.T, as one op.

    ``weight`` and ``bias`` are the base layer's, for code that looks at them; the base is not changed until merged.
    x (..., K) has the dtype of the weight, or autocast sees to it; y (..., N) has it too. Made by ``fl.adapt``.

    Args:
        base: nn.Linear or transformers' Conv1D, frozen.
        adapter: of that layer's shape.
        method: that made the adapter.
        name: the layer's path in the model.
    """

    #: The base runs itself, and the update is added onto what it returns: see ``forgetless.layers.wrapped``.
    around: bool = False

    def __init__(self, base: nn.Module, adapter: Adapter, method: Method, name: str):
        super().__init__()
        self.base = base
        self.adapter = adapter
        self.method = method
        self.name = name
        self.transposed = is_conv1d(base)
        self.trace: Trace | None = None
        self.folded: list[tuple[Tensor, Tensor]] = []  # (down, up) of tasks that are in the weight already
        self.group: Group | None = None  # siblings that get the same x
        self.needs_hidden = any(state.needs_hidden for state in adapter.penalty_states())

    @property
    def weight(self) -> Tensor:
        return self.base.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias  # type: ignore[return-value]

    @property
    def in_features(self) -> int:
        return self.weight.shape[0 if self.transposed else 1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[1 if self.transposed else 0]

    def held(self) -> tuple[Tensor, Tensor | None]:
        """The base's weight as it stores it, and its bias."""
        return stored(self._modules["base"])

    def forward(self, x: Tensor) -> Tensor:  # (..., K) -> (..., N)
        # every lookup in a module costs a microsecond: take each thing once, out of its table
        adapter: Any = self.adapter
        group = self.group
        dropout = adapter.dropout if self.training else 0.0
        made, found = False, None
        if group is not None and not torch.compiler.is_compiling():
            made, found = group.take(self, x, dropout)
        if found is None:
            weight, bias = self.held()
            if self.transposed:
                weight = weight.T
            if type(weight) is not nn.Parameter and type(weight) is not Tensor:
                self._check_whole(weight)
            if torch._C._are_functorch_transforms_active():
                return self._transformed(x, weight, bias)
            found = adapter.shortcut(x, weight, bias, self.needs_hidden)
            if found is None and not made and self.group is not None:  # which may have changed
                found = self._with_siblings(x, weight, dropout)
            if found is None:
                down, up = adapter.factors()
                found = lowrank_linear(x, weight, down, up, bias, adapter.scale, dropout, None, self.needs_hidden)
                if not self.needs_hidden:
                    found = found, None
        y, h = found
        self.__dict__["trace"] = self._trace(x, h)  # not a module's attribute: setting one takes microseconds
        return y

    def _transformed(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The formula, which ``torch.func`` can differentiate, map and differentiate again; nothing is left behind."""
        self.__dict__["trace"] = None
        down, up = self.adapter.factors()
        y = F.linear(x, weight, bias)
        dropped = F.dropout(x, self.adapter.dropout, self.training).to(y.dtype)
        return y + self.adapter.scale * F.linear(F.linear(dropped, down.to(y.dtype)), up.to(y.dtype))

    def _check_whole(self, weight: Any) -> None:
        if hasattr(weight, "placements"):
            raise ValueError(
                f"the weight of {self.name} is distributed, {tuple(weight.placements)}: with tensor parallelism call "
                "parallelize_module first, then fl.adapt; with FSDP2 call the model that fully_shard was given"
            )

    def _with_siblings(self, x: Tensor, weight: Tensor, dropout: float) -> Result | None:
        """Compute for all of the group and leave the others' results there; None where this cannot be done together."""
        group = self.group
        assert group is not None
        members: list[AdaptedLinear] = group.members
        if len(members) < 2 or self not in members:
            return None
        if x.dim() < 2 or x.shape[-1] != weight.shape[1] or torch.compiler.is_compiling() or x.is_inference():
            return None  # nonsense is refused by the op; a change of an inference tensor could not be seen
        weights, biases, downs, ups = [], [], [], []
        wants_h = False
        for member in members:
            other, bias = member.held()
            if member.transposed:
                other = other.T
            adapter: Any = member.adapter
            if not member._joins(self, weight, dropout, adapter, other, bias):
                return None
            down, up = adapter.factors()
            weights.append(other)
            biases.append(bias)
            downs.append(down)
            ups.append(up)
            wants_h |= member.needs_hidden
        device, dtype = x.device, x.dtype
        if autocasts(device.type) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device.type)
            weights = [other.to(dtype) for other in weights]
            biases = [None if bias is None else bias.to(dtype) for bias in biases]
            rows = x.to(dtype)
        elif dtype != weight.dtype:
            return None
        else:
            rows = x
        run = settled_module(rows, weights[0], downs[0])
        if run is None:
            return None
        p, seed = draw_mask(dropout, device)
        scale = adapter.scale  # the same for all of a group
        try:
            results = lowrank_linears(rows, weights, downs, ups, biases, scale, p, seed, wants_h, run)
        except Exception as error:  # noqa: BLE001 - whatever a compiler or a launch can raise
            if not gives_way(run, "forward", rows, weights[0], downs[0], error):
                raise
            results = lowrank_linears(rows, weights, downs, ups, biases, scale, p, seed, wants_h, blas)
        return group.share(self, x, dropout, results)

    def _joins(
        self, first: AdaptedLinear, like: Tensor, dropout: float, adapter: Any, weight: Tensor, bias: Tensor | None
    ) -> bool:
        """Whether this layer (its adapter, weight and bias) can be computed in the call of ``first``, with ``like``."""
        if self is not first and not (
            weight.dtype == like.dtype
            and weight.device == like.device
            and type(weight) is type(like)
            and (adapter.dropout if self.training else 0.0) == dropout
        ):
            return False
        if type(weight) is not nn.Parameter and type(weight) is not Tensor:  # a shard, or packed
            return False
        if weight.requires_grad or weight.is_inference() or bias is not None and bias.requires_grad:
            return False
        return not any([p is not None and p.is_inference() for p in adapter._parameters.values()])

    def _trace(self, x: Tensor, h: Tensor | None) -> Trace:
        hidden = as_rows(h) if self.needs_hidden and h is not None else None
        if torch.compiler.is_compiling():  # no weak references there
            return Trace(_sample(x), hidden, None)
        first = None if self.group is None else self.group.members[0]
        if first is not None and first is not self:  # its own is of an earlier pass
            trace: Trace | None = first.__dict__["trace"]
            if trace is not None and trace.source is not None and trace.source() is x:
                return trace if hidden is None is trace.hidden else Trace(trace.x, hidden, trace.source)
        return Trace(_sample(x), hidden, weakref.ref(x))

    def drift(self) -> float | None:
        """Mean over tokens of ||delta x|| / ||x|| in the last forward pass, CLoRA's F (Eq. 3); None before one."""
        if self.trace is None or self.trace.x.shape[0] == 0:
            return None
        x = self.trace.x.float()
        with torch.no_grad(), exact_products(x.device.type):
            down, up = (factor.float() for factor in self.adapter.factors())
            h = self.adapter.scale * (x @ down.T)
            moved = ((h @ (up.T @ up)) * h).sum(1).clamp(min=0).sqrt()
            return (moved / x.norm(dim=1).clamp(min=torch.finfo(torch.float32).tiny)).mean().item()

    def delta(self) -> Tensor:  # (N, K) float32, or float64
        """scale * up @ down in at least float32, as ``fl.merge`` adds it."""
        with exact_products(self.weight.device.type):  # factors may be products too
            return self._delta(*self.adapter.factors())

    def _delta(self, down: Tensor, up: Tensor) -> Tensor:
        down, up = (t.detach().to(torch.promote_types(t.dtype, torch.float32)) for t in (down, up))
        return self.adapter.scale * (up @ down)

    @torch.no_grad()
    def fold(self, factors: tuple[Tensor, Tensor] | None = None) -> float:
        """Add the update (or that of earlier ``factors``) to the frozen weight, rounded once, and keep its factors.

        Returns:
            What rounding lost: ||W_new - (W_old + delta)|| / ||delta||, 0 for no update.
        """
        with exact_products(self.weight.device.type):
            down, up = (t.detach().clone() for t in factors or self.adapter.factors())
            weight, *parts = self._parts(down, up)
            delta = self._delta(*parts)
        exact = weight.to(delta.dtype) + delta
        weight.copy_(exact.to(weight.dtype))
        self.folded = [*self.folded, (down, up)]
        lost, size = self._of_all(torch.stack([(weight.to(delta.dtype) - exact).norm(), delta.norm()]))
        return (lost / size).item() if size > 0 else 0.0

    def _parts(self, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What ``fold`` adds to here, (N, K), and the factors of what it adds."""
        return self.weight.T if self.transposed else self.weight, down, up

    def _of_all(self, norms: Tensor) -> Tensor:
        """Frobenius norms of whole matrices from those of the parts here."""
        return norms

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "trace": None}  # a graph can be neither copied nor pickled

    def extra_repr(self) -> str:
        return f"method={self.method}"
