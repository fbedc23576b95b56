"""What a forward pass makes for penalties beside y, and whether it still is what the penalty would make itself."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..ops.bodies import Operands
from ..ops.rows import Products, Rows, Term, Terms


class Shards(NamedTuple):
    """Parameters that are shards between passes, as they are at some time."""

    facts: list[Any]
    memory: list[Any]


class _Steps:
    """How many steps optimizers have taken: those of many tensors at once do not count as changes of a shard."""

    def __init__(self) -> None:
        self.taken, self.counts = 0, False

    def count(self) -> int:
        if not self.counts:  # from the first shard on
            register_optimizer_step_post_hook(self._add)
            self.counts = True
        return self.taken

    def _add(self, *_: Any) -> None:
        self.taken += 1


_steps = _Steps()


def shards_of(adapter: Any) -> Shards | None:
    """An adapter's shards; None where it has whole parameters."""
    parameters = adapter._parameters.values()
    for p in parameters:
        if type(p) is not nn.Parameter and hasattr(p, "to_local"):
            break
    else:
        return None
    with torch.no_grad():
        local = tuple([p.to_local() if hasattr(p, "to_local") else p for p in parameters])
    versions = [p._version for p in parameters]
    return Shards([_steps.count(), versions, *_facts(local)], [t.untyped_storage() for t in local])


def _facts(tensors: Sequence[Tensor]) -> list[Any]:
    """What is another where a tensor is, or has been written to."""
    return [(t.data_ptr(), t._version, t.shape, t.stride(), t.dtype, t.device, t.requires_grad) for t in tensors]


class Asked(NamedTuple):
    """What the penalties of one kind ask of a call, in one tensor of products."""

    states: list[Any]
    rows: list[tuple[Rows, ...]]
    factors: list[Tensor]
    tensors: list[Tensor]  # of these and of the rows


class Request(NamedTuple):
    """What all penalties ask of a call of the op; the same as long as its parts and rows are."""

    parts: list[Any]
    rows: list[tuple[Rows, ...]]
    items: tuple[Term, ...]
    asked: list[Asked]


class Made:
    """The products that the penalties of one kind asked of one call, with their graph, and what they were made of.

    Attributes:
        states: of the penalty, in the order of their products.
        products: the rows of each, and the products; None after a backward pass.
    """

    def __init__(self, asked: Asked, terms: Terms, z: Tensor):
        self.terms, self.states, self.factors, self.tensors = terms, asked.states, asked.factors, asked.tensors
        self.products: Products | None = Products(asked.rows, z)
        self.memory = [t.untyped_storage() for t in self.tensors]  # kept: nothing else can be at their addresses
        self.facts = self.present()
        terms.users.append(weakref.ref(self))

    def release(self) -> None:
        """Let go of all that it keeps: a backward pass has gone through the products."""
        self.products, self.factors, self.tensors, self.memory = None, [], [], []
        self.terms = _SPENT

    def present(self) -> list[Any]:
        """What is another where a tensor has been written to, or been given other memory."""
        return [(t._version, t.data_ptr(), t.requires_grad) for t in self.tensors]

    def holds(self, items: Sequence[tuple[Any, Any]]) -> bool:
        """Whether nothing it was made of has changed since, and no backward pass has freed its graph.

        A change through ``.data`` in the same memory cannot be seen; of shards, nor one by torch._foreach outside of an
        optimizer's step.

        Args:
            items: of ``states``, in their order, each with its layer.
        """
        if self.terms.spent or self.products is None or torch.is_grad_enabled() and not self.products.z.requires_grad:
            return False
        factors: list[Tensor] = []
        rows = []
        for item, layer in items:
            now = shards_of(item.adapter)
            if now is None:
                factors += item.adapter.factors()
            elif layer.shards is None or layer.shards.facts != now.facts:
                return False
            rows.append(item.state.rows())
        return _same(factors, self.factors) and _same_rows(rows, self.products.rows) and self.present() == self.facts


#: Of products that a backward pass has gone through.
_SPENT = Terms((), spent=True)


def _same(parts: Sequence[Any], others: Sequence[Any]) -> bool:
    return len(parts) == len(others) and all(map(is_, parts, others))


def _same_rows(some: Sequence[tuple[Rows, ...]], others: Sequence[tuple[Rows, ...]]) -> bool:
    """Whether they are of the same tensors, in the same way."""
    if _same(some, others):  # a state may keep them
        return True
    return len(some) == len(others) and all(
        len(a) == len(b) and all(map(_same, a, b)) for a, b in zip(some, others, strict=True)
    )


def request_of(members: Sequence[Any], layers: Operands) -> Request | None:
    """What the penalties of these layers want of one call of the op for all.

    It is kept beside the first of them, and worked out again where a layer, a state, a tensor or a rank is another.
    """
    parts: list[Any] = []  # six of each state
    all_rows: list[tuple[Rows, ...]] = []
    if layers.cores:
        return None
    for i, (member, down, up) in enumerate(zip(members, layers.downs, layers.ups, strict=True)):
        if member.makes_products and down.is_leaf and up.is_leaf:
            for state in member._modules["adapter"].penalty_states():
                rows = state.rows()
                if rows:
                    parts += i, state, member.shards is not None, down, up, up.shape[1]
                    all_rows.append(rows)
    if not parts:
        return None
    kept: Request | None = members[0].__dict__.get("request")
    if kept is None or not (_same(parts, kept.parts) and _same_rows(all_rows, kept.rows)):
        kept = _request(parts, all_rows, layers)
        members[0].__dict__["request"] = kept
    return kept if kept.items else None


def _request(parts: list[Any], all_rows: list[tuple[Rows, ...]], layers: Operands) -> Request:
    kinds: dict[Any, Asked] = {}
    terms: dict[Any, list[Term]] = {}
    for i, state, gathered, rows in zip(parts[::6], parts[1::6], parts[2::6], all_rows, strict=True):
        own = [layers.downs[i], layers.ups[i], *[part for one in rows for part in one]]
        if all(part is None or isinstance(part, str) or _plain(part) for part in own):
            key = type(state), layers.ups[i].shape[1]
            asked = kinds.setdefault(key, Asked([], [], [], []))
            asked.states.append(state)
            asked.rows.append(rows)
            if not gathered:  # what was is freed after the pass: see ``shards_of``
                asked.factors.extend(own[:2])
            asked.tensors.extend(part for part in own[2 * gathered :] if isinstance(part, Tensor))
            some = terms.setdefault(key, [])
            some.append(Term(i, rows, bool(some)))
    return Request(parts, all_rows, tuple(term for some in terms.values() for term in some), list(kinds.values()))


def _plain(t: Any) -> bool:
    """Whether a change of it can be seen: it is neither a shard nor a tensor of inference mode."""
    return type(t) in (nn.Parameter, Tensor) and not t.is_inference()


def made_of(request: Request, terms: Terms, zs: Sequence[Tensor]) -> dict[Any, Made]:
    """By state, what the call has made."""
    result: dict[Any, Made] = {}
    for asked, z in zip(request.asked, zs, strict=True):
        result.update(dict.fromkeys(asked.states, Made(asked, terms, z)))
    return result


class Items:
    """The penalties of a model's layers, sorted by how they are computed."""

    def __init__(self) -> None:
        self.loose: list[tuple[Any, Any]] = []  # what no pass has made: an item and its layer
        self.made: dict[Made, dict[Any, tuple[Any, Any]]] = {}  # by state

    def add(self, item: Any, layer: Any, made: Made | None) -> None:
        """One of ``layer``, and what its last pass has made for it."""
        if made is None:
            self.loose.append((item, layer))
        else:
            self.made.setdefault(made, {})[item.state] = item, layer

    def kinds(self) -> dict[Any, tuple[list[Any], list[Products]]]:
        """By kind of state, device and ranks: items, and their products in this order, if a pass has made them.

        What a pass has made is taken as a whole or not at all.
        """
        result: dict[Any, tuple[list[Any], list[Products]]] = {}
        loose = list(self.loose)
        for made, some in self.made.items():
            own = [some[state] for state in made.states if state in some]
            if len(own) == len(made.states) and made.holds(own):
                assert made.products is not None
                items = [item for item, _ in own]
                z = made.products.z
                kept, products = result.setdefault((type(items[0].state), z.device, z.shape[1]), ([], []))
                kept += items
                products.append(made.products)
            else:
                loose += some.values()
        for item, layer in loose:
            result.setdefault((type(item.state), _device(layer, item.adapter), None), ([], []))[0].append(item)
        return result


def _device(layer: Any, adapter: Any) -> torch.device:
    """Where the layer is, without a walk through its modules: this is asked for every step."""
    for t in adapter._parameters.values():
        if t is not None:
            return t.device
    device: torch.device = layer.device
    return device
