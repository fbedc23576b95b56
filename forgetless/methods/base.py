"""What a method is: a frozen description that builds, for one layer, the factors of its low-rank update."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from ..adapter import Adapter, Site
from ..penalties import Penalty

#: Every method by its name, filled by ``register``.
METHODS: dict[str, type[Method]] = {}


def register(cls: type[Method]) -> type[Method]:
    """Class decorator: make a method known by its ``name`` to ``fl.load`` and to the command line."""
    METHODS[cls.name] = cls
    return cls


@dataclass(frozen=True)
class Method:
    """A way to adapt a layer: ``build`` makes its adapter. Subclasses are frozen dataclasses with plain fields.

    Fields are what JSON can hold (numbers, strings, booleans), but for ``penalties``, a tuple of ``Penalty``.
    """

    name: ClassVar[str]
    #: ``build`` reads the weight's numbers; if not, it is given a stand-in where the layer packs them.
    reads_weight: ClassVar[bool] = True

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
        data: dict[str, Any] = {"name": self.name, **{f.name: getattr(self, f.name) for f in fields(self)}}
        if "penalties" in data:
            data["penalties"] = [penalty.to_json() for penalty in data["penalties"]]
        return data

    @staticmethod
    def from_json(data: dict[str, Any]) -> Method:
        """Inverse of ``to_json``.

        Raises:
            ValueError: the name or a field is unknown.
        """
        data = dict(data)
        name = data.pop("name", None)
        if not isinstance(name, str) or name not in METHODS:
            raise ValueError(f"unknown method {name!r}, wants one of {sorted(METHODS)}")
        if "penalties" in data:
            items = data["penalties"]
            if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
                raise ValueError(f"method {name!r}: penalties is {items!r}, wants a list of objects")
            data["penalties"] = tuple(Penalty.from_json(item) for item in items)
        try:
            return METHODS[name](**data)
        except TypeError as error:
            raise ValueError(f"method {name!r}: {error}") from None


def check_fields(method: Method) -> None:
    """Refuse nonsense in the fields that most methods share; called from ``__post_init__``."""
    title = type(method).__name__

    def number(name: str) -> float | None:
        if not hasattr(method, name):
            return None
        value = getattr(method, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"{title}.{name} is {value!r}, wants a number")
        return value

    rank = getattr(method, "rank", 1)
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"{title}.rank is {rank!r}, wants an integer >= 1")
    alpha = number("alpha")
    if alpha is not None and not math.isfinite(alpha):
        raise ValueError(f"{title}.alpha is {alpha!r}, wants a finite number")
    dropout = number("dropout")
    if dropout is not None and not 0.0 <= dropout < 1.0:
        raise ValueError(f"{title}.dropout is {dropout!r}, wants a probability in [0, 1)")
    penalties = getattr(method, "penalties", ())
    if not isinstance(penalties, tuple):
        object.__setattr__(method, "penalties", tuple(penalties))
    for penalty in getattr(method, "penalties", ()):
        if not isinstance(penalty, Penalty):
            raise ValueError(f"{title}.penalties holds {penalty!r}, wants Penalty instances such as fl.NullSpace()")
