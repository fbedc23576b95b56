"""Statistics that sibling layers share: q/k/v, or gate/up, which are given the very same x, need one covariance."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from .layers.groups import families
from .layers.linear import AdaptedLinear
from .model import running

StatesOf = Callable[[AdaptedLinear], list[Any]]


def states_of(layer: AdaptedLinear) -> list[Any]:
    """The layer's penalty states that need statistics."""
    return [state for state in layer.adapter.penalty_states() if state.statistics]


def siblings(layers: dict[str, AdaptedLinear], of: StatesOf = states_of) -> Iterator[list[Any]]:
    """Groups of states of sibling layers that may have one set of statistics, by names alone."""
    for names in families(list(layers)):
        groups: dict[Any, list[Any]] = {}
        for name in names:
            for index, state in enumerate(of(layers[name])):
                if state.shareable() is not None:
                    groups.setdefault((index, state.shareable()), []).append(state)
        yield from (members for members in groups.values() if len(members) > 1)


def share_statistics(model: nn.Module) -> None:
    """Siblings with equal statistics share one copy of them: after loading, which gives each its own."""
    for members in siblings({name: layer for name, layer in running(model).items() if states_of(layer)}):
        for member in members[1:]:
            if member.shared() is not members[0].shared() and member.shared().same_as(members[0].shared()):
                member.share(members[0])


class Family:
    """States of siblings that share one set of statistics for as long as all are given the same x.

    The same tensor, unchanged since the first of them was called with it: an x that was written to in between is
    another x. Keeps x for one round of calls, within one batch.
    """

    def __init__(self, members: list[Any]):
        self.members = members
        self.drop()
        for member in members[1:]:
            member.share(members[0])

    def drop(self) -> None:
        """End the round without adding its x."""
        self.called: list[Any] = []
        self.x: Tensor | None = None
        self.rows: Tensor | None = None

    def take(self, state: Any, x: Tensor, rows: Tensor) -> None:
        """``state`` is called with x (.., K), whose real tokens are rows (tokens, K)."""
        if state not in self.members:
            state.add_inputs(rows)
            return
        if state in self.called:
            self.close()  # called again: a round is over
        if not self.called:
            # a copy: a member that leaves must not have added it, and x may be written to before the others do
            self.x, self.version, self.rows = x, x._version, rows.clone()
        elif x is not self.x or x._version != self.version:
            self._leave(state)
            state.add_inputs(rows)
            return
        self.called.append(state)
        if len(self.called) == len(self.members):
            self.close()

    def close(self) -> None:
        """Add x once for the members that were called with it; the others leave."""
        if self.called:
            for member in [m for m in self.members if m not in self.called]:
                self._leave(member)
            self.called[0].add_inputs(self.rows)
        self.drop()

    def _leave(self, state: Any) -> None:
        state.separate()
        self.members.remove(state)
