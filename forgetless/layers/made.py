"""What a forward pass makes for penalties beside y, and whether it still is what the penalty would make itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..ops.bodies import Operands
from ..ops.rows import Products, Rows, Term, Terms


class Made(NamedTuple):
    """The products that one penalty wants of one layer, with their graph, and what they were made of."""

    products: Products
    terms: Terms
    factors: tuple[Tensor, Tensor]
    facts: list[Any]
    memory: list[Any]  # of rows and factors, kept so that nothing else can be at their addresses

    def holds(self, state: Any, adapter: Any) -> bool:
        """Whether nothing it was made of has changed since, and no backward pass has freed its graph.

        A change through ``.data`` cannot be seen.
        """
        if self.terms.spent or torch.is_grad_enabled() and not self.products.z.requires_grad:
            return False
        down, up = adapter.factors()
        if down is not self.factors[0] or up is not self.factors[1]:
            return False
        return self.facts == _facts(state.rows(), self.factors)


def _facts(rows: tuple[Rows, ...], factors: tuple[Tensor, Tensor]) -> list[Any]:
    """What is another where the rows or the factors are others, or have been written to."""
    facts: list[Any] = [one.of for one in rows]
    for t in _tensors(rows, factors):
        facts += (
            (None,)
            if t is None
            else (t.data_ptr(), t._version, t.shape, t.stride(), t.dtype, t.device, t.requires_grad)
        )
    return facts


def _tensors(rows: tuple[Rows, ...], factors: tuple[Tensor, Tensor]) -> list[Tensor | None]:
    return [*factors, *[t for one in rows for t in one[1:]]]


def terms_of(members: Sequence[Any], layers: Operands) -> tuple[Terms | None, list[tuple[int, Any]]]:
    """What the penalties of these layers want of one call of the op for all; and of which layer and state each is."""
    terms: list[Term] = []
    states: list[tuple[int, Any]] = []
    for i, member in enumerate(members):
        own = member._modules["adapter"].penalty_states() if member.makes_products and not layers.cores else ()
        if own and all(_plain(factor) and factor.is_leaf for factor in (layers.downs[i], layers.ups[i])):
            for state in own:
                rows = state.rows()
                if rows and all(t is None or _plain(t) for one in rows for t in one[1:]):
                    terms.append(Term(i, rows))
                    states.append((i, state))
    return (Terms(tuple(terms)) if terms else None), states


def _plain(t: Any) -> bool:
    """Whether a change of it can be seen: it is neither a shard nor a tensor of inference mode."""
    return type(t) in (nn.Parameter, Tensor) and not t.is_inference()


def made_of(
    layers: Operands, terms: Terms, states: list[tuple[int, Any]], zs: Sequence[Tensor]
) -> list[dict[Any, Made]]:
    """Of each layer, by state, what the call has made."""
    result: list[dict[Any, Made]] = [{} for _ in layers.downs]
    for (i, state), term, z in zip(states, terms.items, zs, strict=True):
        rows, factors = term.rows, (layers.downs[i], layers.ups[i])
        memory = [t.untyped_storage() for t in _tensors(rows, factors) if t is not None]
        result[i][state] = Made(Products(rows, z), terms, factors, _facts(rows, factors), memory)
    return result
