"""PEFT's LoRA on the experts of a mixture model (``target_parameters``), as the rest of the library sees it.

PEFT's ParamWrapper adds the whole update to the whole stack in each call. A wrapper that is swapped in calls what it
wraps with its view set down for this call, and the experts module takes the update by ``experts_forward``.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..adapter import Site
from ..layers.expert_factors import attach_to_parts
from ..layers.experts import AdaptedExperts
from ..methods import LoRA
from ..penalties import Penalty
from .routes import stack_of
from .views import PeftAdapter


def title(name: str, layer: Any) -> str:
    """The layer's name: of a stack that of the parameter, since PEFT nests a wrapper for each."""
    key = getattr(layer, "parameter_name", None)
    return name if key is None else f"{name.replace('.base_layer', '')}.{key}"


class PeftExperts(PeftAdapter):
    """lora_A (E * R, K) and lora_B (N, R * E) as stacks, views of PEFT's tensors."""

    def factors(self) -> tuple[Tensor, Tensor]:
        A, B, E = self.down, self.up, self.layer.num_experts
        return A.view(E, -1, A.shape[1]), B.view(B.shape[0], -1, E).permute(2, 0, 1)

    def attach(self, penalties: tuple[Penalty, ...], site: Site) -> None:
        attach_to_parts(self, penalties, site)


class ExpertsView(AdaptedExperts):
    """Not in the model; the wrapper itself stays PEFT's."""

    layer: Any
    adapter: PeftExperts

    def __init__(self, layer: Any, key: str, name: str, specs: tuple[Penalty, ...]):
        stack, adapter = stack_of(layer), PeftExperts(layer, key)
        assert stack is not None
        super().__init__(stack, adapter, LoRA(), name)
        self._modules.clear()
        self.__dict__.update(layer=layer, adapter=adapter, base=stack)
        adapter.attach(specs, Site(name, stack.matrices().detach()))
        self.needs_hidden = any(state.needs_hidden for state in adapter.penalty_states())
