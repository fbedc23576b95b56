"""AdaptedLinear: a frozen layer and its adapter, run as one op."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import compat
from ..adapter import Adapter, Site
from ..methods.base import Method
from ..offload import check_here
from ..ops import explain_path
from ..ops.add_lowrank import Term, add_terms
from ..ops.autograd import LowrankLinear, hidden, like_x, prepare
from ..ops.bodies import Operands, as_rows, exact_products
from ..ops.compiled import compiled
from ..ops.dispatch import runs_kernels
from ..ops.rows import Terms
from .frozen import hooked, is_conv1d, is_plain, runs_by, site_of, stored
from .groups import Group
from .made import Made, Shards, made_of, request_of, shards_of
from .passes import Passes
from .seen import seen
from .states import Standing
from .trace import Trace, sample


class AdaptedLinear(Standing):
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
    #: ``fl.drift`` may be asked after training passes, too.
    records_drift = False
    #: Its dropout mask may be that of its siblings.
    shares_dropout = True
    cut: Any = None  # tensor parallelism: this rank's part
    passes: Passes | None = None  # of the model
    called = False  # whether any pass has called it
    read = False  # whether a parent has computed with its weight
    lends_weight = True  # to a parent that computes with it
    disabled = False  # the frozen layer runs alone: see ``fl.disabled``
    shards: Shards | None = None  # its parameters, where they were shards when the pass began
    makes_products = True  # what penalties want is made in its forward pass: see ``fl.fuse_penalty``

    def __init__(self, base: nn.Module, adapter: Adapter, method: Method, name: str):
        super().__init__()
        self.base = base
        self.adapter = adapter
        adapter.__dict__["beside"] = base
        self.method = method
        self.name = name
        self.transposed = is_conv1d(base)
        self.trace: Trace | None = None
        self.folded: list[tuple[Tensor, Tensor]] = []  # (down, up) of tasks that are in the weight already
        self.group: Group | None = None  # siblings that get the same x
        self.needs_hidden = any(state.needs_hidden for state in adapter.penalty_states())

    @property
    def frozen(self) -> Tensor:
        """The base's weight."""
        return self.base.weight

    @property
    def weight(self) -> Tensor:
        """The frozen weight; for a parent that computes with it during a pass, what the layer applies."""
        if self.passes is None or self.passes.level is None or self.disabled or not self.lends_weight:
            return self.frozen
        return self.applied() if torch.compiler.is_compiling() else seen(self)

    def site(self) -> Site:
        """The layer as a penalty sees it when it is attached."""
        return site_of(self.name, self.base)

    def applied(self) -> Tensor:
        """The frozen weight with the update, as it is stored, rounded once; differentiable in the update.

        Raises:
            ValueError: a penalty needs what the layer is given, which nobody sees.
        """
        if self.needs_hidden:
            raise ValueError(
                f"OutputDeviation cannot see what {self.name} does: its parent reads its weight instead of calling it; "
                "leave it out with fl.adapt(model, method, exclude=[..])"
            )
        self.__dict__.update(called=True, read=True)
        with exact_products(self.frozen.device.type):
            wide = torch.promote_types(self.frozen.dtype, torch.float32)
            down, up = (factor.to(wide) for factor in self.adapter.factors())
            delta = self.adapter.scale * (up @ down)
            return (self.frozen.to(wide) + (delta.T if self.transposed else delta)).to(self.frozen.dtype)

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    @property
    def in_features(self) -> int:
        return self.frozen.shape[0 if self.transposed else 1]

    @property
    def out_features(self) -> int:
        return self.frozen.shape[1 if self.transposed else 0]

    def stored(self) -> tuple[Tensor, Tensor | None]:
        """The base's weight as it stores it, and its bias."""
        return stored(self._modules["base"])

    def path(self, rank: int) -> tuple[str, str]:
        """How the op runs here, and why: see ``fl.explain``."""
        if self.runs_base():
            return "onto", f"{self.reason}, the low-rank product is added to its result"
        return explain_path(self.weight.device, self.weight.dtype, self.out_features, self.in_features, rank)

    @property
    def reason(self) -> str:
        """Why the base runs itself, where it does."""
        if hooked(self.base):
            return "the frozen layer has hooks and runs itself"
        return f"{type(self.base).__name__} makes x W^T itself"

    def runs_base(self) -> bool:
        """Whether the base runs itself in the next call: it has hooks, or is not a plain linear layer any more."""
        base: Any = self._modules["base"]
        return hooked(base) or not is_plain(base)

    def forward(self, x: Tensor) -> Tensor:  # (..., K) -> (..., N)
        compiling = torch.compiler.is_compiling()
        if not compiling:
            self.enter()
        if self.disabled:
            return self.base(x)
        if compat.transforms_active() or torch.jit.is_tracing():
            return self._transformed(x)
        if self.runs_base():
            if self.cut is None:
                self._check_whole(getattr(self.base, "weight", None))
            return self._around(x)
        adapter: Any = self._modules["adapter"]  # a module's attribute costs a microsecond
        dropout = adapter.dropout if self.training else 0.0
        group: Any = self.group
        members, seed = [self], None
        if group is not None and not compiling and group.scope is not None:
            waiting, result = group.take(self, x, dropout)
            if result is not None:
                self._record(x, *result[1:])
                return like_x(result[0], x)
            if not waiting:
                members = self._members(group, x, dropout)
            seed = group.seed(x) if dropout and self.shares_dropout else None
        return_h, layers, request, terms = self.needs_hidden, self.operands(), None, None
        if len(members) > 1:
            layers = Operands(*[tuple(chain(*parts)) for parts in zip(*[m.operands() for m in members], strict=True)])
            return_h = any(member.needs_hidden for member in members)
        if self.training and not compiling and (self.shards is not None or runs_kernels(x)) and torch.is_grad_enabled():
            request = request_of(members, layers)
            terms = request and Terms(request.items, all(member.shards is not None for member in members))
        arguments = prepare(x, layers, adapter.scale, dropout, seed, return_h, terms=terms)
        y: Any = compiled(*arguments) if compiling else LowrankLinear.apply(*arguments)
        h = made = None
        if isinstance(y, tuple):
            count = len(members)
            ys, zs = y[:count], y[count + return_h :]
            h = hidden(arguments[0], y[count]) if return_h else None
            made = made_of(request, terms, zs) if request and terms and zs else None
            y = ys[0]
            if count > 1:
                hs = [None] * count if h is None else h.split([up.shape[1] for up in layers.ups], dim=1)
                y, h, made = group.share(self, x, dropout, list(zip(ys, hs, [made] * count, strict=True)))
        self._record(x, h, made)
        return like_x(y, x)

    def operands(self) -> Operands:
        """The weight as (N, K), bias, down and up, as they are now."""
        weight, bias = self.stored()
        if type(weight) is not nn.Parameter and type(weight) is not Tensor:
            self._check_whole(weight)
        adapter: Any = self._modules["adapter"]
        down, up, core = adapter.parts()
        cores = () if core is None else (core,)
        return Operands((weight.T if self.transposed else weight,), (bias,), (down,), (up,), cores)

    def _members(self, group: Group, x: Tensor, dropout: float) -> list[AdaptedLinear]:
        """The siblings to compute with this layer, itself included; it alone where one of them differs."""
        members: list[AdaptedLinear] = group.partners(self)
        weight, _ = self.stored()
        if len(members) < 2 or x.is_nested or x.is_inference():  # a change of an inference tensor could not be seen
            return [self]
        return members if all(member._joins(self, weight, dropout) for member in members) else [self]

    def _around(self, x: Tensor) -> Tensor:
        """By the base's own forward, the low-rank product added to what it returns."""
        adapter, cut = self.adapter, self.cut
        check_here(self, adapter)
        core = None
        if cut is None:
            down, up, core = adapter.parts()
        else:
            down, up = cut.local(*adapter.factors())
        term = Term(down, up, adapter.scale, adapter.dropout if self.training else 0.0, None, core)
        base, fresh = runs_by(self.base)
        y, (h,) = add_terms(base, x, [term], cut, fresh)
        if not compat.transforms_active():
            self._record(x, h)
        return y

    def _transformed(self, x: Tensor) -> Tensor:
        """The formula, which ``torch.func`` and ``torch.jit.trace`` can follow; nothing is left behind."""
        self.trace, self.called = None, True
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

    def _joins(self, first: AdaptedLinear, like: Tensor, dropout: float) -> bool:
        """Whether this layer, as it is now, can be computed in the call of ``first``, whose weight is ``like``."""
        if self.runs_base() or hooked(self) or self.disabled:
            return False  # a hook may change what comes after it
        weight, bias = self.stored()
        adapter: Any = self._modules["adapter"]
        others: Any = first._modules["adapter"]
        return (
            type(weight) in (nn.Parameter, Tensor)  # neither a shard nor packed
            and weight.dtype == like.dtype
            and weight.device == like.device
            and weight.shape[0 if self.transposed else 1] == like.shape[0 if first.transposed else 1]
            and (adapter.dropout if self.training else 0.0) == dropout
            and adapter.scale == others.scale
            and not weight.requires_grad
            and not weight.is_inference()
            and (bias is None or not bias.requires_grad and bias.device == like.device and bias.dtype == like.dtype)
            and adapter.has_core == others.has_core
            and all(
                type(t) in (nn.Parameter, Tensor) and t.is_leaf and not t.is_inference() and t.device == like.device
                for t in adapter.parts()
                if t is not None
            )
        )

    def _record(self, x: Tensor, h: Tensor | None, made: dict[Any, Made] | None = None) -> None:
        """Keep what penalties need of this pass, and some of x for ``drift``: in training only if that is asked for."""
        sampled = self.records_drift or not (self.training and torch.is_grad_enabled())
        seen = as_rows(h) if self.needs_hidden and h is not None else None
        # past nn.Module.__setattr__, which takes longer than the rest of this
        kept = sampled or seen is not None or made
        trace = Trace(sample(x) if sampled else None, seen, made) if kept else None
        if trace is not None and self.trace is not None and self.passes is not None and self.passes.level is not None:
            trace = trace.after(self.trace)  # the layer is used more than once
        state = self.__dict__
        state["trace"], state["called"] = trace, True

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self.__dict__.pop("request", None)  # which would keep the memory of tensors that are moved away
        return super()._apply(*args, **kwargs)

    def enter(self) -> None:
        """It is called, eagerly; RuntimeError if a checkpoint recomputes it in another scale: see ``Passes.enter``."""
        if self.passes is not None:
            self.passes.enter()

    def forget(self) -> None:
        """A pass begins: what the last one left behind is no more; a disabled one leaves it where it is."""
        if not self.disabled:
            self.__dict__["trace"] = None
            self.__dict__["shards"] = shards_of(self._modules["adapter"])

    def drift(self) -> float | None:
        """Mean over tokens of ||delta x|| / ||x|| in the last forward pass, CLoRA's F (Eq. 3); None if not recorded."""
        if self.trace is None or self.trace.x is None or self.trace.x.shape[0] == 0:
            return None
        x = self.trace.x.float()
        with torch.no_grad(), exact_products(x.device.type):
            down, up = (factor.float() for factor in self.adapter.factors())
            h = self.adapter.scale * (x @ down.T)
            moved = ((h @ (up.T @ up)) * h).sum(1).clamp(min=0).sqrt()
            return (moved / x.norm(dim=1).clamp(min=torch.finfo(torch.float32).tiny)).mean().item()

    def delta(self) -> Tensor:  # (N, K) float32, or float64
        """scale * up @ down in at least float32, as ``fl.merge`` adds it."""
        with exact_products(self.device.type):  # factors may be products too
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
        return {**self.__dict__, "trace": None, "shards": None}  # a graph can be neither copied nor pickled

    def extra_repr(self) -> str:
        return f"method={self.method}"
