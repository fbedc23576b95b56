"""The factors of a stack of experts: E low-rank updates in two tensors, and each of them as an adapter of its own."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter import Adapter, Site
from ..methods.base import Method
from ..methods.lora import LoRAAdapter
from ..penalties import Penalty


class _Part(Adapter):
    """The factors of one expert, slices of the stack, for one call of a penalty."""

    down: Tensor
    up: Tensor

    def __init__(self, owner: Adapter, down: Tensor, up: Tensor, states: list[Any]):
        super().__init__()
        self.scale, self.dropout = owner.scale, owner.dropout
        own: Any = self._parameters  # slices are no parameters
        own.update(down=down, up=up)
        self.states = states

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.down, self.up

    def pullback(self, ddown: Tensor, dup: Tensor) -> dict[str, Tensor]:
        return {"down": ddown, "up": dup}

    def penalty_states(self) -> list[Any]:
        return self.states


def parts(adapter: Adapter) -> list[_Part]:
    """The adapter of each expert. Its factors are slices, all of one graph."""
    with torch.enable_grad():
        downs, ups = (factor.unbind() for factor in adapter.factors())
    states = adapter.penalty_states()
    n = len(states) // len(downs)
    pairs = enumerate(zip(downs, ups, strict=True))
    return [_Part(adapter, down, up, states[n * e : n * (e + 1)]) for e, (down, up) in pairs]


def attach_to_parts(adapter: Adapter, penalties: tuple[Any, ...], site: Site) -> None:
    """One state for each expert and penalty, expert after expert, of an adapter without any."""
    for e, part in enumerate(parts(adapter)):
        for penalty in penalties:
            adapter.penalties.append(penalty.attach(part, expert_site(site, e)))


def expert_site(site: Site, expert: int) -> Site:
    """One expert as a layer: "...experts.gate_up_proj.3"."""
    return Site(f"{site.name}.{expert}", site.weight[expert])


class ExpertsLoRA(LoRAAdapter):
    """``down`` (E, R, K) and ``up`` (E, N, R), each expert's as its method starts it."""

    def __init__(self, members: list[Adapter]):
        Adapter.__init__(self)
        self.scale, self.dropout = members[0].scale, members[0].dropout
        self.down, self.up = (
            nn.Parameter(torch.stack([factor.detach() for factor in factors]))
            for factors in zip(*(member.factors() for member in members), strict=True)
        )

    @torch.no_grad()
    def restart(self, site: Site) -> None:
        for down in self.down:
            nn.init.kaiming_uniform_(down, a=math.sqrt(5))
        self.up.zero_()

    def attach(self, penalties: tuple[Penalty, ...], site: Site) -> None:
        attach_to_parts(self, penalties, site)


def build_experts(method: Method, site: Site) -> ExpertsLoRA:
    """The adapter of a stack (E, N, K), penalties attached; of a method that ``adapts_experts``."""
    members = [method.build(expert_site(site, e)) for e in range(site.weight.shape[0])]
    adapter = ExpertsLoRA(members)
    adapter.attach(method.all_penalties(), site)
    return adapter
