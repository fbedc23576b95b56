"""The untouched base beside a model whose own weights change: to put them back, and to see how far it has moved."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from forgetless.layers.linear import DRIFT_TOKENS, AdaptedLinear, is_conv1d
from forgetless.targets import find_layers


class Original:
    """Copies of all parameters of a model without adapters.

    ``drift`` is that of ``fl.drift``, mean over tokens of ||delta x|| / ||x||, with the whole change since the start
    as delta: what was folded into the weights, or trained in place, and what the adapters add now.
    """

    def __init__(self, model: nn.Module, targets: str | list[str]) -> None:
        self.parameters = dict(model.named_parameters())
        self.values = {name: p.detach().clone() for name, p in self.parameters.items()}
        #: Layer name -> the layer itself and its first weight.
        self.layers = {
            name: (layer, self.values[self._name_of(layer.weight)])  # type: ignore[arg-type]
            for name, layer in find_layers(model, targets).items()
        }
        self.seen: dict[str, Tensor] = {}

    def _name_of(self, weight: Tensor) -> str:
        return next(name for name, p in self.parameters.items() if p is weight)

    @torch.no_grad()
    def restore(self) -> None:
        """Put the parameters back, frozen and without gradients."""
        for name, parameter in self.parameters.items():
            parameter.copy_(self.values[name])
            parameter.grad = None
            parameter.requires_grad_(False)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, the inputs of the layers are sampled in every forward pass; the last one counts."""

        def sampling(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
            def hook(layer: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
                x = args[0].detach().flatten(0, -2)
                self.seen[name] = x[:: -(-x.shape[0] // DRIFT_TOKENS) or 1].float()

            return hook

        self.seen.clear()
        handles = [layer.register_forward_hook(sampling(name)) for name, (layer, _) in self.layers.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def drift(self, adapted: dict[str, AdaptedLinear]) -> dict[str, float]:
        """Per layer, from the inputs that adapters or ``watching`` have seen last."""
        found = {}
        for name, (layer, start) in self.layers.items():
            wrapped = adapted.get(name)
            seen = self.seen.get(name) if wrapped is None else None if wrapped.trace is None else wrapped.trace.x
            if seen is None or not len(seen):
                continue
            x = seen.float()
            delta = layer.weight.float() - start.float()  # type: ignore[operator]
            delta = delta.T if is_conv1d(layer) else delta  # (N, K)
            if wrapped is not None:
                delta = delta + wrapped.delta().float()
            moved = (x @ delta.T).norm(dim=1) / x.norm(dim=1).clamp(min=torch.finfo(torch.float32).tiny)
            found[name] = moved.mean().item()
        return found
