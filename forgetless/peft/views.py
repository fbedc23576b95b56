"""A PEFT LoRA layer with one of its adapters, as the rest of the library sees an adapted layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter import Adapter, Site
from ..layers.frozen import hooked, stored
from ..layers.linear import AdaptedLinear
from ..methods import LoRA
from ..ops.add_lowrank import Term
from ..penalties import Penalty
from ..report import LayerReport
from .routes import adapter_reason, base_reason, state_reason

#: Name of the submodule that holds the states of attached penalties; there is none without penalties.
PENALTIES = "forgetless_penalties"

#: What stands behind a class that goes before one of PEFT's: that one.
Theirs: Any = object


class HidesPenalties(Theirs):
    """A tuner layer whose penalties PEFT saves only if they are an adapter's own: it saves what children it is told."""

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        hidden = () if PENALTIES in self.adapter_layer_names else (PENALTIES,)
        return ((name, child) for name, child in super().named_children() if name not in hidden)

    def children(self) -> Iterator[nn.Module]:
        """All of them: what moves a layer moves its penalties."""
        return (child for _, child in super().named_children())


class OwnLayer:
    """A tuner layer of ours among PEFT's: what the rest of the library asks of it."""

    def active_layers(self) -> dict[str, AdaptedLinear]:
        """Adapter -> adapted layer, of the active adapters."""
        raise NotImplementedError

    def report(self) -> LayerReport:
        """How it runs."""
        raise NotImplementedError


class PeftAdapter(Adapter):
    """One PEFT adapter of one layer, read where PEFT keeps it: nothing is held twice."""

    key: str
    layer: Any
    module: nn.Module  # PEFT's lora_A of the adapter: another one is another adapter of the same name

    def __init__(self, layer: Any, key: str):
        # past nn.Module: the layer is not a submodule
        self.__dict__.update(layer=layer, key=key, module=layer.lora_A._modules[key])
        super().__init__()

    @property
    def _parameters(self) -> dict[str, Any]:
        return {"down": self.down, "up": self.up}

    @_parameters.setter
    def _parameters(self, value: Any) -> None: ...  # nn.Module sets an empty dictionary

    @property
    def down(self) -> Tensor:
        return self.layer.lora_A._modules[self.key]._parameters["weight"]

    @property
    def up(self) -> Tensor:
        return self.layer.lora_B._modules[self.key]._parameters["weight"]

    def _dropout(self) -> float:
        drop = self.layer.lora_dropout._modules[self.key]
        return drop.p if drop.training and type(drop) is nn.Dropout else 0.0

    scale: Any = property(lambda self: self.layer.scaling[self.key])
    dropout: Any = property(_dropout)

    @property
    def bias(self) -> Tensor | None:
        """scale * bias of lora_B"""
        bias = self.layer.lora_B._modules[self.key]._parameters["bias"]
        return None if bias is None else bias * self.scale

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.down, self.up

    def pullback(self, ddown: Tensor, dup: Tensor) -> dict[str, Tensor]:
        return {"down": ddown, "up": dup}


class View(AdaptedLinear):
    """Not in the model; the layer itself stays PEFT's."""

    layer: Any
    adapter: PeftAdapter
    lends_weight = False
    shares_dropout = False  # each layer of PEFT has a mask of its own

    def __init__(self, layer: Any, key: str, name: str, specs: tuple[Penalty, ...]):
        adapter = PeftAdapter(layer, key)
        super().__init__(layer.base_layer, adapter, LoRA(), name)
        del self._modules["base"]
        self.__dict__["layer"] = layer
        if specs:
            adapter.attach(specs, self.site())
            self.needs_hidden = any(state.needs_hidden for state in adapter.penalty_states())

    @property
    def frozen(self) -> Tensor:
        """The frozen weight; where it is packed or hidden, a tensor of its shape that takes no memory."""
        base = self.layer.base_layer
        if base_reason(base) is None:
            return base.weight
        down = self.adapter.down
        dtype = getattr(base, "compute_dtype", None) or down.dtype
        return torch.empty(1, 1, dtype=dtype, device=down.device).expand(self.out_features, self.in_features)

    def site(self) -> Site:
        weight = self.weight.detach()
        return Site(self.name, weight.T if self.transposed else weight, self.transposed)

    @property
    def bias(self) -> Tensor | None:
        return self.stored()[1]

    @property
    def in_features(self) -> int:
        return self.adapter.down.shape[1]

    @property
    def out_features(self) -> int:
        return self.adapter.up.shape[0]

    def term(self) -> Term:
        adapter = self.adapter
        return Term(adapter.down, adapter.up, adapter.scale, adapter.dropout, adapter.bias)

    def runs_base(self) -> bool:
        return False  # the layer's route has decided that

    def stored(self) -> tuple[Tensor, Tensor | None]:
        weight, bias = stored(self.layer.base_layer)
        more = self.adapter.bias
        if more is None:
            return weight, bias
        return weight, (more if bias is None else bias + more).to(self.weight.dtype)

    def _joins(self, first: AdaptedLinear, like: Tensor, dropout: float) -> bool:
        return (
            dropout == 0.0  # each layer of PEFT has a dropout mask of its own
            and isinstance(first, View)
            and not hooked(self.layer)
            and (self is first or self._runs_like(first.layer))
            and super()._joins(first, like, dropout)
        )

    def _runs_like(self, first: Any) -> bool:
        """Whether this layer, as it is now, would go the way of PEFT's layer ``first``."""
        layer, adapter = self.layer, self.adapter
        return (
            "_forgetless" in layer.__dict__
            and state_reason(layer) is None
            and layer.active_adapters == first.active_adapters
            and layer.lora_A._modules.get(adapter.key) is adapter.module
            and adapter_reason(layer, adapter.key) is None
            and base_reason(layer.base_layer) is None
        )

    def register_forward_hook(self, hook: Any, **kwargs: Any) -> Any:
        return self.layer.register_forward_hook(lambda _, args, y: hook(self, args, y), **kwargs)

    def register_forward_pre_hook(self, hook: Any, **kwargs: Any) -> Any:
        return self.layer.register_forward_pre_hook(lambda _, args: hook(self, args), **kwargs)
