"""What methods and penalties share: the layer that is adapted, and the adapter that is put on it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from .offload import Stays

T = TypeVar("T")


@dataclass(frozen=True)
class Site:
    """A layer about to be adapted.

    Attributes:
        name: its path in the model, "model.layers.0.self_attn.q_proj".
        weight: its frozen weight as (out_features N, in_features K), a view: writing to it changes the layer.
        transposed: True for a Conv1D (GPT-2), which stores (in_features, out_features).
    """

    name: str
    weight: Tensor
    transposed: bool = False


class Adapter(Stays):
    """The low-rank update of one layer: delta = scale * up @ down.

    Subclasses set ``scale`` (and ``dropout`` if they have one), hold their parameters and supply ``factors``; the
    penalties that need gradients of the factors want ``pullback``, ``fl.consolidate`` wants ``restart``.
    """

    scale: float = 1.0
    dropout: float = 0.0
    has_core = False  # ``parts`` has one

    def __init__(self) -> None:
        super().__init__()
        self.penalties = nn.ModuleList()

    def factors(self) -> tuple[Tensor, Tensor]:  # down (R, K), up (N, R)
        """The two factors, down (R, K) and up (N, R) of any floating dtype, differentiable in the parameters."""
        raise NotImplementedError

    def parts(self) -> tuple[Tensor, Tensor, Tensor | None]:  # down (R, K), up (N, R), core (R, R)
        """What the op is given: the two factors; or down, a frozen up and a core, where the factor is up @ core."""
        return (*self.factors(), None)

    def pullback(self, ddown: Tensor, dup: Tensor) -> dict[str, Tensor]:
        """Gradients of the parameters from those of the factors: ddown (S, R, K), dup (S, N, R), any S."""
        raise NotImplementedError

    def restart(self, site: Site) -> None:
        """Start again from no update, as ``fl.consolidate`` wants after folding; ``site`` has the new weight."""
        raise NotImplementedError(f"{type(self).__name__} does not say how to start again")

    def attach(self, penalties: tuple[Any, ...], site: Site) -> None:
        """Hold a state of each of these, beside those it holds.

        Raises:
            ValueError: a penalty makes no sense for this adapter.
        """
        for penalty in penalties:
            self.penalties.append(penalty.attach(self, site))

    def penalty_states(self) -> list[Any]:
        """The states of the attached penalties, in their order."""
        penalties: Any = self._modules["penalties"]  # a module's attribute costs a microsecond
        return list(penalties._modules.values())

    def extra_repr(self) -> str:
        return ", ".join(f"{name} {tuple(p.shape)}" for name, p in self.named_parameters(recurse=False))

    @property
    def trains_factors(self) -> bool:
        """Whether its parameters are its two factors themselves."""
        down, up = self.factors()
        return getattr(self, "down", None) is down and getattr(self, "up", None) is up


class Described:
    """A frozen dataclass of fields that JSON can hold."""

    name: ClassVar[str]

    def to_json(self) -> dict[str, Any]:
        """Name and fields, as ``fl.save`` writes them."""
        own: Any = self
        return {"name": self.name, **{f.name: getattr(self, f.name) for f in fields(own)}}


def from_json(title: str, known: Mapping[str, type[T]], data: Mapping[str, Any]) -> T:
    """The one of ``known``, name -> class, that ``to_json`` describes.

    Raises:
        ValueError: the name or a field is unknown.
    """
    given = dict(data)
    name = given.pop("name", None)
    if not isinstance(name, str) or name not in known:
        raise ValueError(f"unknown {title} {name!r}, wants one of {sorted(known)}")
    try:
        return known[name](**given)
    except TypeError as error:
        raise ValueError(f"{title} {name!r}: {error}") from None


def generator_of(seed: int, name: str) -> torch.Generator:
    """A generator on the CPU whose draws are a function of the seed and the name alone."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def adapter_dtype(weight: Tensor) -> torch.dtype:
    """float32 (float64 beside float64): half-precision parameters lose small optimiser steps."""
    return torch.promote_types(weight.dtype, torch.float32)


def wide(t: Tensor) -> Tensor:
    """float32, or float64 where it already is: penalties are summed in this."""
    return t if t.dtype == torch.float64 else t.float()


def whole(t: Tensor) -> Tensor:
    """t itself, or all of a parameter that is sharded over processes: between forward passes FSDP leaves its shards.

    Gathered differentiably: each shard gets the mean of all processes' gradients, as those of the data. A collective
    call.
    """
    if type(t) in _HERE or not hasattr(t, "full_tensor"):
        return t
    from torch.distributed.tensor import Partial

    shards: Any = t
    gathered: Tensor = shards.full_tensor(grad_placements=[Partial("avg")] * shards.device_mesh.ndim)
    return gathered


_HERE = (Tensor, nn.Parameter)
