"""What a penalty is: a frozen description, and the module that holds its state beside one adapter."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ..adapter import Adapter, Described, Site, Stays, from_json, whole, wide
from ..ops.rows import Products, Rows
from .covariance import Covariance

#: Every penalty by its name, filled by ``register``.
PENALTIES: dict[str, type[Penalty]] = {}


def register(cls: type[Penalty]) -> type[Penalty]:
    """Class decorator: make a penalty known by its ``name`` to ``fl.load`` and to the command line."""
    PENALTIES[cls.name] = cls
    return cls


@dataclass(frozen=True)
class Penalty(Described):
    """A term added to the training loss, one per adapted layer; the terms of all layers are summed.

    Subclasses are frozen dataclasses of fields that JSON can hold; ``attach`` makes the state for one layer.

    Args:
        weight: factor of the term, >= 0.

    Raises:
        ValueError: a field is of another type or out of range.
    """

    weight: float = 1.0

    def __post_init__(self) -> None:
        if not (isinstance(self.weight, (int, float)) and 0.0 <= self.weight < float("inf")):
            raise ValueError(f"{type(self).__name__}.weight is {self.weight!r}, wants a number >= 0")

    def attach(self, adapter: Adapter, site: Site) -> PenaltyState:
        """State for one layer: ``adapter`` sits on ``site``.

        Raises:
            ValueError: the penalty makes no sense for this adapter.
        """
        raise NotImplementedError

    @staticmethod
    def from_json(data: dict[str, Any]) -> Penalty:
        """Inverse of ``to_json``.

        Raises:
            ValueError: the name or a field is unknown.
        """
        return from_json("penalty", PENALTIES, data)


class PenaltyState(Stays):
    """Buffers and value of one penalty on one layer. A subclass writes ``value`` or ``total``.

    Persistent buffers are saved with the adapter (statistics of data that may be gone), the others are rebuilt. Those
    named ``centre_`` are the point that the statistics were measured at.
    """

    #: The value needs h of the last forward pass, with its graph.
    needs_hidden: ClassVar[bool] = False
    #: What ``fl.calibrate`` must supply: None, "inputs" (x of each layer), "gradients" (per-sequence gradients of the
    #: parameters) or "tokens" (x and the gradient of the layer's output, without padding).
    statistics: ClassVar[str | None] = None
    #: Name of the buffer that says how many samples or tokens the statistics are of, a scalar.
    counter: ClassVar[str | None] = None

    def __init__(self, spec: Penalty):
        super().__init__()
        self.spec: Any = spec
        self._known_calibrated = False

    def value(self, adapter: Adapter, hidden: Tensor | None) -> Tensor:
        """The weighted penalty, a scalar in float32 (float64 for float64 parameters), differentiable.

        Args:
            adapter: the one that it was attached to.
            hidden: with ``needs_hidden``, h = scale * drop(x) @ down.T (M, R) of the last forward pass with its graph,
                those of all its calls of the layer, None if it had none; else None.
        """
        own: Any = type(self).total
        if own.__func__ is PenaltyState.__dict__["total"].__func__:
            raise NotImplementedError(f"{type(self).__name__} writes neither value nor total")
        return self.total([Item(self, adapter, hidden)])

    @classmethod
    def total(cls, items: list[Item]) -> Tensor:
        """Sum of ``value`` over all layers, once per step, here in fewer and larger products.

        With ``needs_hidden``, ``total`` takes one argument more: ``weights``, one per token, or None.
        """
        return torch.stack([item.state.value(item.adapter, item.hidden) for item in items]).sum()

    def rows(self) -> tuple[Rows, ...]:
        """The products that the forward pass can make for ``total_made``; none where the value is not made of such."""
        return ()

    @classmethod
    def total_made(cls, items: list[Item], made: list[Products]) -> Tensor:
        """``total`` from what the last forward pass made of each item's ``rows``.

        Args:
            items: as of ``total``, all of one rank.
            made: their rows and products, those of one or more items each, in the order of the items.
        """
        raise NotImplementedError

    def begin_statistics(self, adapter: Adapter) -> None:
        """Forget earlier statistics; centre at the adapter's present parameters. ``fl.calibrate`` calls it first."""
        self._known_calibrated = False
        for name, t in self.state_dict().items():
            if name.startswith("centre_"):
                t.copy_(getattr(adapter, name.removeprefix("centre_")).detach())
            else:
                t.zero_()
        for part in self.modules():
            if isinstance(part, Covariance):
                part.stream = None

    def add_inputs(self, x: Tensor) -> None:
        """Take in x (tokens, K) of source-domain text."""

    def add_tokens(self, tokens: Any) -> None:
        """Take in one layer's inputs and output gradients of one batch, of all its calls: ``samples.Tokens``."""

    def end_statistics(self) -> None:
        """All data has been seen: normalise."""

    def export_statistics(self) -> dict[str, Tensor]:
        """Copies of what has been measured, for ``add_statistics`` after another calibration."""
        return {name: t.clone() for name, t in self.state_dict().items() if not name.startswith("centre_")}

    def add_statistics(self, earlier: dict[str, Tensor]) -> None:
        """Add what was measured earlier: several domains are kept at full strength each."""

    def shareable(self) -> Any:
        """Siblings whose states return equal values here may share their statistics if they see one x; None: never."""
        return None

    def shared(self) -> nn.Module:
        """The module that holds the statistics: siblings that share have it in common."""
        return self

    def share(self, other: Any) -> None:
        """Use the statistics of ``other``, a sibling's state, from now on."""

    def separate(self) -> None:
        """Use a copy of the statistics of its own again."""

    def make_room(self, names: Iterable[str]) -> None:
        """Saved statistics of these names are to be copied in: have a buffer for each."""

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        self._known_calibrated = False
        self.make_room([name.removeprefix(prefix) for name in state_dict if name.startswith(prefix)])
        super()._load_from_state_dict(state_dict, prefix, *args)

    @property
    def calibrated(self) -> bool:
        """Whether ``value`` has the statistics it needs.

        A yes is remembered, since asking an accelerator waits for it. It is forgotten when statistics begin anew or
        are loaded. A fake or meta tensor has no number to ask for: the answer is yes and is not remembered.
        """
        if self._known_calibrated or self.counter is None:
            return True
        positive = self.get_buffer(self.counter) > 0
        if type(positive) is not Tensor or positive.is_meta:
            return True
        self._known_calibrated = bool(positive)
        return self._known_calibrated


class Item(NamedTuple):
    """One penalty on one layer, as ``PenaltyState.total`` takes them."""

    state: Any
    adapter: Adapter
    hidden: Tensor | None


def check_choice(title: str, value: object, known: tuple[str, ...]) -> None:
    """ValueError unless ``value`` is one of the ``known`` words."""
    if value not in known:
        choices = ", ".join(map(repr, known[:-1])) + f" or {known[-1]!r}"
        raise ValueError(f"{title} is {value!r}, wants {choices}")


def nothing(adapter: Adapter) -> Tensor:
    """A value of zero."""
    return wide(whole(adapter.factors()[0])).new_zeros(())
