"""AdaptedLinear: a frozen layer and its adapter, run as one op."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import compat
from ..adapter import Adapter, Site, whole
from ..methods.base import Method
from ..ops.add_lowrank import Term, add_terms
from ..ops.autograd import as_rows, autocasts, exact_products, lowrank_linear, quantised, settled_module
from .groups import Group, Result, families, lowrank_linears
from .quantized import kind_of, stand_in
from .tensor_parallel import cut_of

#: ``fl.drift`` looks at this many evenly spaced tokens of the last forward pass at most.
DRIFT_TOKENS = 32


def is_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D (GPT-2): weight (in_features, out_features). Told by its type, never by its shape."""
    cls = type(module)
    return cls.__name__ == "Conv1D" and cls.__module__.startswith("transformers.")


def form_groups(model: nn.Module, layers: dict[str, AdaptedLinear]) -> None:
    """Let siblings run together inside a call of their parent, where stored ``down`` factors allow it."""
    for names in families(list(layers)):
        members = [layers[name] for name in names if not layers[name].around and _holds_down(layers[name].adapter)]
        if len(members) > 1 and len({m.in_features for m in members}) == 1:
            group = Group(model.get_submodule(names[0].rpartition(".")[0]), members)
            for member in members:
                member.group = group


def hooked(module: nn.Module) -> bool:
    """Whether calling the module does more than its forward."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def runs_by(base: Any) -> tuple[Callable[[Tensor], Tensor], bool]:
    """What computes a base that runs itself, and whether its result may be written in place.

    Then it is the forward alone, without the module's call: no hook of all modules may see that memory.
    """
    kind = kind_of(base)
    fresh = kind is not None and kind.fresh and not hooked(base)
    return (base.forward if fresh else base), fresh


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

    x: Tensor  # (tokens, K) every so many tokens of x, DRIFT_TOKENS at most, detached
    hidden: Tensor | None  # (M, R) with its graph, only if a penalty needs it


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
    #: Why the base runs itself, where it does.
    reason = "the frozen layer has hooks and runs itself"
    #: Its dropout mask may be that of its siblings.
    shares_dropout = True
    cut: Any = None  # tensor parallelism: this rank's part

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

    def stored(self) -> tuple[Tensor, Tensor | None]:
        """The base's weight as it stores it, and its bias."""
        return stored(self._modules["base"])

    def runs_base(self) -> bool:
        """Whether the base runs itself in the next call: it has hooks, or is not a plain linear layer any more."""
        base: Any = self._modules["base"]
        return hooked(base) or not (type(base) is nn.Linear or is_conv1d(base))

    def forward(self, x: Tensor) -> Tensor:  # (..., K) -> (..., N)
        adapter, group = self.adapter, self.group
        if compat.transforms_active() or torch.jit.is_tracing():
            return self._transformed(x)
        if self.runs_base():
            if self.cut is None:
                self._check_whole(getattr(self.base, "weight", None))
            return self._around(x)
        dropout = adapter.dropout if self.training else 0.0
        inside = group is not None and not torch.compiler.is_compiling() and group.scope is not None
        made, result = group.take(self, x, dropout) if inside else (False, None)  # type: ignore[union-attr]
        if result is None:
            weight, bias = self.stored()
            if self.transposed:
                weight = weight.T
            if type(weight) is not nn.Parameter and type(weight) is not Tensor:
                self._check_whole(weight)
            if inside and not made:
                result = self._with_siblings(x, weight, dropout)
            if result is None:
                result = adapter.shortcut(x, weight, bias, self.needs_hidden)
            if result is None:
                down, up = adapter.factors()
                seed = group.seed(x) if inside and dropout and self.shares_dropout else None  # type: ignore[union-attr]
                found = lowrank_linear(x, weight, down, up, bias, adapter.scale, dropout, seed, self.needs_hidden)
                result = found if self.needs_hidden else (found, None)
        y, h = result
        self.trace = self._trace(x, h)
        return y

    def _around(self, x: Tensor) -> Tensor:
        """By the base's own forward, the low-rank product added to what it returns."""
        adapter, cut = self.adapter, self.cut
        down, up = adapter.factors()
        if cut is not None:
            down, up = cut.local(down, up)
        term = Term(down, up, adapter.scale, adapter.dropout if self.training else 0.0)
        base, fresh = runs_by(self.base)
        y, (h,) = add_terms(base, x, [term], cut, fresh)
        self.trace = None if compat.transforms_active() else self._trace(x, h)
        return y

    def _transformed(self, x: Tensor) -> Tensor:
        """The formula, which ``torch.func`` and ``torch.jit.trace`` can follow; nothing is left behind."""
        self.trace = None
        if self.around:
            return self._around(x)
        down, up = self.adapter.factors()
        y = self.base(x)
        dropped = F.dropout(x, self.adapter.dropout, self.training).to(y.dtype)
        return y + self.adapter.scale * F.linear(F.linear(dropped, down.to(y.dtype)), up.to(y.dtype))

    def _check_whole(self, weight: Any) -> None:
        if hasattr(weight, "placements"):
            raise ValueError(
                f"the weight of {self.name} is distributed, {tuple(weight.placements)}: with tensor parallelism call "
                "parallelize_module first, then fl.adapt; with FSDP2 call the model that fully_shard was given"
            )

    def _with_siblings(self, x: Tensor, weight: Tensor, dropout: float) -> Result | None:
        """Compute for all partners and leave their results in the scope; None where this cannot be done together."""
        group = self.group
        assert group is not None
        members: list[AdaptedLinear] = group.partners(self)
        if len(members) < 2 or x.dim() < 2 or x.shape[-1] != weight.shape[1] or x.is_inference() or x.is_nested:
            return None  # nonsense is refused by the op; a change of an inference tensor could not be seen
        if not all(member._joins(self, weight, dropout) for member in members):
            return None
        pairs = [member.stored() for member in members]
        weights = [w.T if member.transposed else w for member, (w, _) in zip(members, pairs, strict=True)]
        biases = [bias for _, bias in pairs]
        factors = [member.adapter.factors() for member in members]
        device, dtype = x.device, x.dtype
        if autocasts(device.type) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device.type)
            weights = [other.to(dtype) for other in weights]
            biases = [None if bias is None else bias.to(dtype) for bias in biases]
            rows = x.to(dtype)
        elif dtype != weight.dtype or any(bias is not None and bias.dtype != dtype for bias in biases):
            return None
        else:
            rows = x
        scale = self.adapter.scale
        if dtype == torch.float16 and scale != 1.0:
            return None  # alone, the op keeps the scale out of h
        downs, ups = [down for down, _ in factors], [up for _, up in factors]
        run = settled_module(rows, weights[0], downs[0])
        if run is None:
            return None
        p = quantised(dropout) if dropout else 0.0
        seed = group.seed(x) if p else None
        wants_h = any(member.needs_hidden for member in members)
        results = lowrank_linears(rows, weights, downs, ups, biases, scale, p, seed, wants_h, run)
        return group.share(self, x, dropout, results)

    def _joins(self, first: AdaptedLinear, like: Tensor, dropout: float) -> bool:
        """Whether this layer, as it is now, can be computed in the call of ``first``, whose weight is ``like``."""
        if self.runs_base() or hooked(self):
            return False  # a hook may change what comes after it
        weight, bias = self.stored()
        adapter = self.adapter
        return (
            type(weight) in (nn.Parameter, Tensor)  # neither a shard nor packed
            and weight.dtype == like.dtype
            and weight.device == like.device
            and weight.shape[0 if self.transposed else 1] == like.shape[1]
            and (adapter.dropout if self.training else 0.0) == dropout
            and adapter.scale == first.adapter.scale
            and not weight.requires_grad
            and not weight.is_inference()
            and (bias is None or not bias.requires_grad and bias.device == like.device)
            and all(
                type(t) in (nn.Parameter, Tensor) and not t.is_inference() and t.device == like.device
                for t in adapter.factors()
            )
        )

    def _trace(self, x: Tensor, h: Tensor | None) -> Trace:
        hidden = as_rows(h) if self.needs_hidden and h is not None else None
        return Trace(_sample(x), hidden)

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
