"""What a forward pass makes for penalties beside y, and whether it still is what the penalty would make itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..ops.bodies import Operands
from ..ops.rows import Products, Rows, Term, Terms


class Made(NamedTuple):
    """The products that one penalty wants of one layer, with their graph, and what they were made of."""

    products: Products
    terms: Terms
    factors: tuple[Tensor, Tensor]
    facts: list[Any]
    of_factors: list[Any]
    memory: list[Any]  # of rows and factors, kept so that nothing else can be at their addresses

    def holds(self, state: Any, adapter: Any, before: Shards | None) -> bool:
        """Whether nothing it was made of has changed since, and no backward pass has freed its graph.

        A change through ``.data`` cannot be seen; of shards, nor one by torch._foreach outside of an optimizer's step.

        Args:
            state: of the penalty.
            adapter: of the layer.
            before: its shards when the pass began. What was gathered of them is gone, but they are still those.
        """
        if self.terms.spent or torch.is_grad_enabled() and not self.products.z.requires_grad:
            return False
        now = shards_of(adapter)
        if now is None:
            down, up = adapter.factors()
            same = down is self.factors[0] and up is self.factors[1] and self.of_factors == _facts((), self.factors)
        else:
            same = before is not None and before.facts == now.facts
        return same and self.facts == _facts(state.rows(), ())


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
    return Shards([_steps.count(), versions, *_facts((), local)], [t.untyped_storage() for t in local])


def _facts(rows: tuple[Rows, ...], factors: tuple[Tensor, ...]) -> list[Any]:
    """What is another where the rows or the factors are others, or have been written to."""
    facts: list[Any] = [one.of for one in rows]
    for t in _tensors(rows, factors):
        facts += (
            (None,)
            if t is None
            else (t.data_ptr(), t._version, t.shape, t.stride(), t.dtype, t.device, t.requires_grad)
        )
    return facts


def _tensors(rows: tuple[Rows, ...], factors: tuple[Tensor, ...]) -> list[Tensor | None]:
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
    gathered = all(member.shards is not None for member in members)
    return (Terms(tuple(terms), gathered) if terms else None), states


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
        facts = _facts(rows, ()), _facts((), factors)
        result[i][state] = Made(Products(rows, z), terms, factors, *facts, memory)
    return result
