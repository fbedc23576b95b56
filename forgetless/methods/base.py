"""What a method is: a frozen description that builds, for one layer, the factors of its low-rank update."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from ..adapter import Adapter, Described, Site, from_json
from ..penalties import Penalty

#: Every method by its name, filled by ``register``.
METHODS: dict[str, type[Method]] = {}


def register(cls: type[Method]) -> type[Method]:
    """Class decorator: make a method known by its ``name`` to ``fl.load`` and to the command line."""
    METHODS[cls.name] = cls
    return cls


@dataclass(frozen=True)
class Method(Described):
    """A way to adapt a layer: ``build`` makes its adapter. Subclasses are frozen dataclasses with plain fields.

    Fields are what JSON can hold (numbers, strings, booleans), but for ``penalties``, a tuple of ``Penalty``.

    Raises:
        ValueError: ``rank``, ``alpha``, ``dropout`` or ``penalties``, where there is one, is no such thing.
    """

    #: ``build`` reads the weight's numbers; if not, it is given a stand-in where the layer packs them.
    reads_weight: ClassVar[bool] = True
    #: ``build`` makes LoRA factors, which experts can have stacked.
    adapts_experts: ClassVar[bool] = False

    def __post_init__(self) -> None:
        title = type(self).__name__
        for name, fits, wants in _CHECKS:
            if hasattr(self, name) and not fits(getattr(self, name)):
                raise ValueError(f"{title}.{name} is {getattr(self, name)!r}, wants {wants}")
        penalties = getattr(self, "penalties", ())
        if not isinstance(penalties, tuple):
            object.__setattr__(self, "penalties", tuple(penalties))
        for penalty in self.all_penalties():  # the method's own refuse nonsense in its fields
            if not isinstance(penalty, Penalty):
                raise ValueError(f"{title}.penalties holds {penalty!r}, wants Penalty instances such as fl.NullSpace()")

    def build(self, site: Site) -> Adapter:
        """The adapter for one layer; before training it must leave the layer's function unchanged.

        Raises:
            ValueError: the method does not fit this layer.
        """
        raise NotImplementedError

    def all_penalties(self) -> tuple[Penalty, ...]:
        """The method's own penalties, then those the user composed with it."""
        return tuple(getattr(self, "penalties", ()))

    def to_json(self) -> dict[str, Any]:
        """Name and fields, as ``fl.save`` writes them."""
        data = super().to_json()
        if "penalties" in data:
            data["penalties"] = [penalty.to_json() for penalty in data["penalties"]]
        return data

    @staticmethod
    def from_json(data: dict[str, Any]) -> Method:
        """Inverse of ``to_json``.

        Raises:
            ValueError: the name or a field is unknown.
        """
        if "penalties" in data:
            items = data["penalties"]
            if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
                raise ValueError(f"method {data.get('name')!r}: penalties is {items!r}, wants a list of objects")
            data = {**data, "penalties": tuple(Penalty.from_json(item) for item in items)}
        return from_json("method", METHODS, data)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


#: Field that most methods share, whether a value fits, what it wants.
_CHECKS: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("rank", lambda value: type(value) is int and value >= 1, "an integer >= 1"),
    ("alpha", _is_number, "a number"),
    ("alpha", lambda value: 0.0 <= value < math.inf, "a finite number >= 0"),  # 0: scaled away
    ("dropout", _is_number, "a number"),
    ("dropout", lambda value: 0.0 <= value < 1.0, "a probability in [0, 1)"),
)
