"""What a forward pass makes for penalties beside y, and whether it still is what the penalty would make itself."""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..ops.bodies import Operands
from ..ops.rows import Products, Rows, Term, Terms


class Asked(NamedTuple):
    """What the penalty of one layer asks of a call."""

    layer: int
    state: Any
    rows: tuple[Rows, ...]


class Made:
    """The products that the penalties of one kind asked of one call, with their graph, and what they were made of.

    Attributes:
        states: of the penalty, in the order of their products.
        products: the rows of each, and the products.
    """

    def __init__(self, layers: Operands, terms: Terms, asked: list[Asked], z: Tensor):
        self.terms = terms
        self.states = [one.state for one in asked]
        self.products = Products([one.rows for one in asked], z)
        self.parts: list[Any] = []
        for layer, _, rows in asked:
            self.parts += _parts((layers.downs[layer], layers.ups[layer]), rows)
        self.tensors = [part for part in self.parts if isinstance(part, Tensor)]
        self.memory = [t.untyped_storage() for t in self.tensors]  # kept: nothing else can be at their addresses
        self.facts = self.present()

    def present(self) -> list[Any]:
        """What is another where a tensor has been written to, or been given other memory."""
        tensors = self.tensors
        return [t._version for t in tensors] + [t.data_ptr() for t in tensors] + [t.requires_grad for t in tensors]

    def holds(self, adapters: Sequence[Any]) -> bool:
        """Whether nothing it was made of has changed since, and no backward pass has freed its graph.

        A change through ``.data`` in the same memory cannot be seen.

        Args:
            adapters: that have ``states``, in their order.
        """
        if self.terms.spent or torch.is_grad_enabled() and not self.products.z.requires_grad:
            return False
        parts: list[Any] = []
        for adapter, state in zip(adapters, self.states, strict=True):
            parts += _parts(adapter.factors(), state.rows())
        return len(parts) == len(self.parts) and all(map(is_, parts, self.parts)) and self.present() == self.facts


def _parts(factors: tuple[Tensor, Tensor], rows: tuple[Rows, ...]) -> list[Any]:
    """All that the products are made of, and of which kind they are."""
    return [*factors, *[part for one in rows for part in one]]


def terms_of(members: Sequence[Any], layers: Operands) -> tuple[Terms | None, list[list[Asked]]]:
    """What the penalties of these layers want of one call of the op for all; and who asked, by tensor of products."""
    kinds: dict[Any, list[Asked]] = {}
    for i, member in enumerate(members):
        own = member._modules["adapter"].penalty_states() if member.makes_products else ()
        if not own or not all([_plain(factor) and factor.is_leaf for factor in (layers.downs[i], layers.ups[i])]):
            continue
        for state in own:
            rows = state.rows()
            if rows and all([part is None or type(part) is str or _plain(part) for one in rows for part in one]):
                kinds.setdefault((type(state), layers.ups[i].shape[1]), []).append(Asked(i, state, rows))
    asked = list(kinds.values())
    items = [Term(one.layer, one.rows, one is not some[0]) for some in asked for one in some]
    return (Terms(tuple(items)) if items else None), asked


def _plain(t: Any) -> bool:
    """Whether a change of it can be seen: it is neither a shard nor a tensor of inference mode."""
    return type(t) in _PLAIN and not t.is_inference()


_PLAIN = (nn.Parameter, Tensor)


def made_of(layers: Operands, terms: Terms, asked: list[list[Asked]], zs: Sequence[Tensor]) -> dict[Any, Made]:
    """By state, what the call has made."""
    result: dict[Any, Made] = {}
    for some, z in zip(asked, zs, strict=True):
        result.update(dict.fromkeys([one.state for one in some], Made(layers, terms, some, z)))
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
            items = [some[state][0] for state in made.states if state in some]
            if len(items) == len(made.states) and made.holds([item.adapter for item in items]):
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
