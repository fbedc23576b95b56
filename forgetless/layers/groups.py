"""Layers fed by the same x (q/k/v, gate/up) run together: one pass over x forward, one backward, one dropout mask.

This happens inside one call of their parent's forward and nowhere else. The first sibling called with an x computes for
all of them; the others, called in the same forward with the very same tensor, pick up their y. A sibling whose scale,
dropout, dtype or device differs runs alone, and so does one that has changed since, or that is given another x. Results
are those of the single layers up to the order of summation, except under dropout: x is dropped once for all siblings.
One change cannot be seen: that of a sibling's tensor through ``.data``, in place, by the parent's forward itself.
The op for all of them is ``forgetless.ops.autograd``.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter import Adapter
from ..names import bare_modules
from ..ops.bodies import autocasts, draw_seed
from .passes import alive

#: y (..., N) of one sibling, h (M, R) if it is wanted, and what was made for its penalties
Result = tuple[Tensor, Tensor | None, Any]

#: Names under one parent that are called with one x in the models of the field.
KNOWN = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("query", "key", "value"),
    ("q", "k", "v"),
    ("wq", "wk", "wv"),
    ("w1", "w3"),
    ("wi_0", "wi_1"),
    ("q_lin", "k_lin", "v_lin"),
)


def form_groups(model: nn.Module, layers: dict[str, Any]) -> None:
    """Let siblings run together inside a call of their parent, where stored factors allow it."""
    modules = bare_modules(model)
    for names in families(list(layers)):
        members = [layers[name] for name in names if not layers[name].around and _stores_factors(layers[name].adapter)]
        if len(members) > 1 and len({m.in_features for m in members}) == 1:
            group = Group(modules[names[0].rpartition(".")[0]], members)
            for member in members:
                member.group = group


def _stores_factors(adapter: Adapter) -> bool:
    """Whether the factors are parameters or buffers: siblings' backward passes could not run apart through products."""
    with torch.enable_grad():
        return all(part is None or part.is_leaf for part in adapter.parts())


def families(names: list[str]) -> list[list[str]]:
    """Groups of two or more of ``names`` that share a parent and stand together in ``KNOWN``."""
    known = set(names)
    matches = []
    for parent in dict.fromkeys(name.rpartition(".")[0] for name in names):
        prefix = f"{parent}." if parent else ""
        for row in KNOWN:
            group = [prefix + last for last in row if prefix + last in known]
            if len(group) > 1:
                matches.append(group)
    return matches


class Scope:
    """What siblings share during one call of their parent's forward; it dies with that call."""

    def __init__(self) -> None:
        self.results: dict[Any, tuple[Result, State]] = {}  # by layer
        self.x: Tensor | None = None  # that the results were computed from
        self.memory: Any = None  # of x, kept so that nothing else can be at its address
        self.call: Any = None
        self.seed: Tensor | None = None
        self.seed_of: tuple[Tensor | None, int] = None, 0  # x that it was drawn for, and its version


class Group:
    """Siblings under one parent, and the scope that the parent's forward opens and closes.

    Outside of a scope each layer runs alone. Scopes are per thread: two threads may run the model at once.

    Args:
        parent: the module whose forward calls the siblings.
        members: the adapted layers.
    """

    def __init__(self, parent: nn.Module, members: list[Any]):
        self.members = list(members)
        self.sets = [list(members)]  # those that are given one x; a sibling that is given another x leaves its set
        self._local = threading.local()
        self.handles = [
            parent.register_forward_pre_hook(self.open),
            parent.register_forward_hook(self.close, always_call=True),  # also when the forward raises
        ]

    def detach(self) -> None:
        """Take the hooks off the parent: from now on each layer runs alone."""
        for handle in self.handles:
            handle.remove()
        for member in self.members:
            if member.group is self:
                member.group = None

    def open(self, module: nn.Module, args: Any) -> None:
        """Begin a scope; what a call left behind that was interrupted is dropped."""
        if not torch.compiler.is_compiling():
            self._local.scope = Scope()

    def close(self, module: nn.Module, args: Any, output: Any) -> None:
        """End the scope: results that nobody asked for are dropped."""
        if not torch.compiler.is_compiling():
            self._local.scope = None

    @property
    def scope(self) -> Scope | None:
        """The scope of this thread; None outside of the parent's forward."""
        return getattr(self._local, "scope", None)

    def partners(self, member: Any) -> list[Any]:
        """The siblings that run with ``member``, itself included, in their order."""
        return next((together for together in self.sets if member in together), [member])

    def take(self, member: Any, x: Tensor, dropout: float) -> tuple[bool, Result | None]:
        """Whether something was computed for this member, and what; None if it is not for this x as it is now."""
        scope = self.scope
        if scope is None or member not in scope.results:
            return False, None
        result, state = scope.results.pop(member)
        if scope.x is not x:
            # Computed for nothing. From now on it goes its own way, with those that wait like it.
            left = [other for other in self.partners(member) if other is member or other in scope.results]
            self.sets = [[m for m in together if m not in left] for together in self.sets] + [left]
            scope.results.clear()
            return False, None
        same = scope.call == _call(x, dropout) and state.same(State(member))
        return True, result if same else None

    def share(self, first: Any, x: Tensor, dropout: float, results: list[Result]) -> Result:
        """The result of ``first``; those of its partners, in their order, wait in the scope."""
        scope, partners = self.scope, self.partners(first)
        assert scope is not None
        pairs = dict(zip(partners, results, strict=True))
        scope.x, scope.memory, scope.call = x, x.untyped_storage(), _call(x, dropout)
        scope.results = {member: (result, State(member)) for member, result in pairs.items() if member is not first}
        return pairs[first]

    def seed(self, x: Tensor) -> Tensor:  # (2,) int32
        """One dropout seed for all siblings that are given x in this scope, whether they run together or alone.

        So masks do not depend on what was shared: recomputing a pass finds them again.
        """
        scope = self.scope
        assert scope is not None
        version = 0 if x.is_inference() else x._version
        if scope.seed is None or scope.seed_of[0] is not x or scope.seed_of[1] != version:
            scope.seed, scope.seed_of = draw_seed(x.device), (x, version)
        return scope.seed

    def __getstate__(self) -> dict[str, Any]:
        kept = {name: value for name, value in self.__dict__.items() if name != "_local"}
        return {**kept, "handles": alive(self.handles)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _local=threading.local())


def _call(x: Tensor, dropout: float) -> Any:
    """What must be the same of the call when a result is picked up as when it was computed."""
    device = x.device.type
    autocast = torch.get_autocast_dtype(device) if autocasts(device) else None
    stream = (torch.cuda.current_stream(x.device), torch.cuda.is_current_stream_capturing()) if x.is_cuda else None
    now = x._version, x.data_ptr(), x.shape, x.stride(), x.requires_grad
    return now, torch.is_grad_enabled(), autocast, dropout, stream


class State:
    """What must be the same of the layer: its tensors and numbers, as they are now.

    Their memory is kept: a tensor that is given other memory, twice, could else be back at the first address.
    """

    def __init__(self, member: Any):
        adapter = member._modules["adapter"]
        self.tensors = [*member.stored(), *adapter.parts()]
        self.memory = [t.untyped_storage() for t in self.tensors if t is not None]
        self.numbers = [
            adapter.scale,
            *((t._version, t.data_ptr(), t.shape, t.requires_grad) for t in self.tensors if t is not None),
        ]

    def same(self, other: State) -> bool:
        return self.numbers == other.numbers and all(a is b for a, b in zip(self.tensors, other.tensors, strict=True))
