"""One call of a model is one pass: what layers keep of a pass is of that one alone, and dies with it if it fails."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from .. import compat
from ..offload import check_not_around


def alive(handles: list[RemovableHandle]) -> list[RemovableHandle]:
    """Those of modules that there still are: torch cannot unpickle the others."""
    return [handle for handle in handles if handle.hooks_dict_ref() is not None]


class Passes:
    """Told by hooks when a pass begins and ends.

    A pass is a call of the model or, called by itself, of any module in it that holds all the adapted layers.

    Args:
        model: the module that holds the layers.
        layers: its modules that are adapted.
        members: what keeps something of a pass, one for each layer; ``forget`` is called where a pass begins or fails.
    """

    def __init__(self, model: nn.Module, layers: list[Any], members: list[Any]):
        self.layers, self.members = layers, members
        self.level: int | None = None  # of the module whose call is the pass under way
        self.fails = False  # until its end is seen
        self.completed = False  # whether any pass was
        self.told = False  # whether a warning was given for layers that no pass calls
        self.state = self.made = 0  # which scales are in force, and how many states there have been
        self.graded = False  # whether the pass under way has gradients
        self.ran: set[int] = set()  # the states in which checkpoints have run since the last that was recomputed
        self.recomputed = False
        self.handles = []
        for level, module in enumerate(_around(model, layers)):
            self.handles += [
                module.register_forward_pre_hook(functools.partial(self.open, level)),
                module.register_forward_hook(functools.partial(self.finish, level)),
                module.register_forward_hook(functools.partial(self.close, level), always_call=True),
            ]

    def detach(self) -> None:
        """Take the hooks off."""
        for handle in self.handles:
            handle.remove()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "handles": alive(self.handles)}

    def open(self, level: int, module: nn.Module, args: Any) -> None:
        """Begin a pass, unless one of an outer module is under way; one that was interrupted is over."""
        if self.level is not None and self.level < level:
            return
        self.level, self.fails = level, True
        self.graded = torch.is_grad_enabled()
        if "_hf_hook" in module.__dict__:
            check_not_around(self.layers)
        self._forget()

    def finish(self, level: int, module: nn.Module, args: Any, output: Any) -> None:
        """The pass has come to its end."""
        if level == self.level:
            self.fails, self.completed = False, True

    def close(self, level: int, module: nn.Module, args: Any, output: Any) -> None:
        """The pass is over: what a failed one left behind would keep its graph alive."""
        if level == self.level:
            self.level = None
            if self.fails:
                self._forget()

    def _forget(self) -> None:
        for member in self.members:
            member.forget()

    def enter(self) -> None:
        """A layer is called.

        Raises:
            RuntimeError: a checkpoint recomputes it, maybe in another state than it ran in.
        """
        if self.level is not None:
            if self.graded and (not torch.is_grad_enabled() or compat.saves_elsewhere()):  # a checkpoint, by either way
                if self.recomputed:
                    self.ran.clear()
                    self.recomputed = False
                self.ran.add(self.state)
        elif compat.in_backward():
            self.recomputed = True
            if self.ran - {self.state}:
                raise RuntimeError(
                    "a checkpoint recomputes a layer, but fl.scaled or fl.disabled has changed its scale since a "
                    "checkpoint ran: call backward within the same context, or run the other pass under torch.no_grad()"
                )


def _around(model: nn.Module, layers: list[Any]) -> list[nn.Module]:
    """The modules that hold all the layers, from the model inwards."""
    inside = {id(layer) for layer in layers}
    around: list[nn.Module] = []
    module: nn.Module | None = model
    while module is not None and id(module) not in inside:
        around.append(module)
        module = next((m for m in module.children() if inside <= {id(part) for part in m.modules()}), None)
    return around
