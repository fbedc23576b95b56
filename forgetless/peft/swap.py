"""PEFT's own LoRA layers on our op, in place: ``swap_in`` and ``swap_out``.

A taken-over layer keeps its modules, parameters and names; its class becomes a subclass of PEFT's whose ``forward``
runs on our op where that gives what PEFT's would, and is PEFT's everywhere else. So everything that PEFT does with a
layer goes on working. ``fl.explain`` says which way each layer goes, and why. PEFT is looked up when it is needed.
"""

from __future__ import annotations

import copyreg
import functools
import importlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .. import versions
from ..layers.experts import call_with, experts_forward
from ..layers.frozen import runs_by
from ..layers.groups import form_groups
from ..layers.linear import AdaptedLinear
from ..layers.passes import Passes
from ..layers.stack import give_back, run_by
from ..names import bare_name, checked, outer_modules
from ..ops.add_lowrank import add_terms
from ..penalties import Penalty
from .experts import ExpertsView, title
from .routes import adapter_reason, base_reason, kind_reason, lora_layers, onto_base, runs_experts, stack_of, taker_of
from .views import PENALTIES, HidesPenalties, OwnLayer, Theirs, View

#: What is asked of a PEFT layer.
_ASKED = (
    "lora_A", "lora_B", "lora_dropout", "scaling", "r", "base_layer", "active_adapters", "merged", "merged_adapters",
    "disable_adapters", "_disable_adapters", "adapter_layer_names",
)  # fmt: skip


def swap_in(model: nn.Module, penalties: Iterable[Penalty] | None = None) -> nn.Module:
    """Run the LoRA layers of a PEFT model on our op, in place; PEFT goes on working as before.

    Parameters are shared, not copied, so an optimiser made earlier stays valid. Layers and adapters that PEFT adds
    later to this ``PeftModel`` are taken over too; with PEFT's low-level ``inject_adapter_in_model``, call again.

    Args:
        model: a ``PeftModel``, or any model with PEFT's LoRA layers in it.
        penalties: for ``fl.penalty``, one set for each adapter of each layer, such as ``(fl.NullSpace(k=256),)``.
            None leaves those attached by an earlier call, () detaches them. They are not saved by PEFT.

    Returns:
        The same model.

    Raises:
        ImportError: PEFT is not installed.
        RuntimeError: its layers lack something that is needed here: a version that this was not tested with.
        ValueError: the model has no LoRA layers, or a penalty cannot be attached to one of them. Nothing is changed.
    """
    result = dict(lora_layers(model, _peft("tuners.lora.layer").LoraLayer))
    if not result:
        raise ValueError(
            f"model is a {type(model).__name__} without PEFT LoRA layers; "
            "make it with peft.get_peft_model(model, peft.LoraConfig(...)), or use fl.adapt"
        )
    missing = next((name for name in _ASKED if not hasattr(next(iter(result.values())), name)), None)
    if missing is not None:
        raise versions.missing_error("peft", "fl.swap_in", f"LoraLayer.{missing}")
    specs = None if penalties is None else tuple(penalties)
    for spec in specs or ():
        if not isinstance(spec, Penalty):
            raise ValueError(f"penalties holds {spec!r}, wants Penalty instances such as fl.NullSpace()")
    takers = {
        name: _Taker(layer, title(name, layer).removeprefix("base_model.model."), specs or ())  # as of fl.adapt
        for name, layer in result.items()
        if kind_reason(layer) is None and (specs is not None or taker_of(layer) is None)
    }
    if specs:
        for name, layer in result.items():
            reasons = [kind_reason(layer), *(adapter_reason(layer, key) for key in layer.lora_A)]
            if reason := next(filter(None, reasons), None):
                raise ValueError(f"penalties cannot be attached to {name}: {reason}")
        for taker in takers.values():
            taker.make_views()  # raises before anything is changed
    for taker in takers.values():
        taker.install()
    for module in model.modules():
        if isinstance(module, _peft("tuners.tuners_utils").BaseTuner) and not isinstance(module, _SwappedTuner):
            _put_before(_SwappedTuner, module)
    _hook(model)
    return model


def swap_out(model: nn.Module) -> nn.Module:
    """Undo ``swap_in``, in place: every layer has PEFT's own class and forward again, and no penalties.

    Raises:
        ValueError: no layer of the model was swapped in.
    """
    swapped = _swapped(model)
    if not swapped:
        raise ValueError("no layer of model is swapped in; call fl.swap_in(model) first")
    _detach(swapped)
    for taker in swapped:
        taker.remove()
    for module in model.modules():
        own = vars(type(module)).get("_forgetless_base")
        if own is not None:  # else another class was put before ours: the layer's forward is PEFT's all the same
            module.__class__ = own
    return model


def views(model: nn.Module) -> dict[str, AdaptedLinear]:
    """Name -> active adapter of each swapped-in layer, as an adapted layer; "name:adapter" where several are active."""
    result: dict[str, AdaptedLinear] = {}
    for name, layer in outer_modules(model, AdaptedLinear):
        taker = taker_of(layer)
        active: dict[str, AdaptedLinear] = {}
        if taker is not None:
            active = {view.adapter.key: view for view in taker.active()}
        elif isinstance(layer, OwnLayer):
            active = layer.active_layers()
        for key, view in active.items():
            own = title(name, layer)
            result[own if len(active) == 1 else f"{own}:{key}"] = view
    return result


def _peft(module: str) -> Any:
    try:
        return importlib.import_module(f"peft.{module}")
    except ImportError as error:
        if error.name is None or error.name.split(".")[0] != "peft":
            raise
        raise ImportError(
            f"swap_in needs PEFT: pip install 'peft>=0.18' (tested with {versions.tested('peft')})"
        ) from error


def _swapped(model: nn.Module) -> list[_Taker]:
    return [taker for module in checked(model).modules() if (taker := taker_of(module)) is not None]


# -------------------------------------------------------------------------------------- the layers


class _SwappedLayer(HidesPenalties):
    """Goes before PEFT's class in the bases of a taken-over layer."""

    _forgetless: _Taker | None = None  # None: swapped out, and PEFT's through and through

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        taker = self._forgetless
        if taker is None:
            return super().forward(x, *args, **kwargs)
        if taker.passes is not None and not torch.compiler.is_compiling():
            taker.passes.enter()
        if taker.stacked:
            active = taker.active() if runs_experts(self, taker.keys(), x) else []
            if active:
                return call_with(active[0], self.base_layer, x, *args, **kwargs)
        elif not args and (not kwargs or (kwargs.keys() <= _IDLE and not any(v is not None for v in kwargs.values()))):
            route = taker.route(x)
            if route is not None:
                return taker.run(x, *route)
        taker.forget()
        return super().forward(x, *args, **kwargs)


#: Arguments that mean nothing if they are None.
_IDLE = {"adapter_names", "alora_offsets"}


class _SwappedTuner(Theirs):
    """Goes before PEFT's tuner: what it adds later is taken over as well."""

    def inject_adapter(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        super().inject_adapter(model, *args, **kwargs)
        current = _swapped(model)
        if current:  # not swapped out since
            take_over(model, {}, current[0].specs)

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> Any:
        return self._leave(super().merge_and_unload, *args, **kwargs)

    def unload(self) -> Any:
        return self._leave(super().unload)

    def _leave(self, unload: Any, *args: Any, **kwargs: Any) -> Any:
        """The model without PEFT's layers is without our hooks, too."""
        swapped, model = _swapped(self.model), unload(*args, **kwargs)
        _detach(swapped)
        return model


def take_over(model: nn.Module, own: dict[str, tuple[Penalty, ...]], specs: tuple[Penalty, ...] = ()) -> None:
    """Run the layers that PEFT has added to the inner model on our op.

    Args:
        model: without PEFT's wrappers.
        own: adapter -> penalties that it has for itself.
        specs: penalties of every other adapter of a new layer.

    Raises:
        ValueError: an adapter that has its own penalties is one that PEFT's forward must run.
    """
    for name, layer in lora_layers(model, _peft("tuners.lora.layer").LoraLayer):
        for key in own.keys() & {*layer.lora_A, *getattr(layer, "lora_embedding_A", {})}:
            if reason := kind_reason(layer) or adapter_reason(layer, key, meta=True):
                raise ValueError(f"penalties cannot be attached to {name}: {reason}")
        if kind_reason(layer) is None:
            taker = taker_of(layer) or _Taker(layer, title(name, layer), specs)
            taker.own.update(own)
            taker.install()
    _hook(model)


@functools.cache
def _subclass(mixin: type, cls: type) -> Any:
    """``cls`` with the mixin before it, under the name of ``cls``."""
    made: Any = type(cls.__name__, (mixin, cls), {"_forgetless_base": cls, "__module__": __name__})
    # pickle and deepcopy make it anew: there is no place to import it from
    copyreg.pickle(made, lambda layer: (_blank, (mixin, cls), layer.__dict__))
    return made


def _put_before(mixin: type, module: Any) -> None:
    cls: Any = type(module)
    module.__class__ = _subclass(mixin, cls)


def _blank(mixin: type, cls: type) -> Any:
    made = _subclass(mixin, cls)
    return made.__new__(made)


class _Taker:
    """What a taken-over layer knows beside what PEFT put there."""

    def __init__(self, layer: Any, name: str, specs: tuple[Penalty, ...]):
        self.layer, self.name, self.specs = layer, name, specs
        self.own: dict[str, tuple[Penalty, ...]] = {}  # of adapters whose configuration has penalties
        self.views: dict[str, Any] = {}
        self.stacked = stack_of(layer) is not None
        self.passes: Passes | None = None

    def view(self, key: str) -> Any:
        view = self.views.get(key)
        if view is None or view.adapter.module is not self.layer.lora_A._modules[key]:  # deleted and added again
            made: Any = ExpertsView if self.stacked else View
            view = self.views[key] = made(self.layer, key, self.name, self.own.get(key, self.specs))
            view.passes = self.passes
            if self.layer.__dict__.get("_forgetless") is self:
                self._register()
        return view

    def make_views(self) -> list[Any]:
        keys = self.layer.lora_A._modules
        return [self.view(key) for key in keys if adapter_reason(self.layer, key, meta=key in self.own) is None]

    def _register(self) -> None:
        """Penalties' buffers go where the layer goes."""
        current = {key: view.adapter.penalties for key, view in self.views.items() if len(view.adapter.penalties)}
        self.layer._modules.pop(PENALTIES, None)
        if current:
            self.layer.add_module(PENALTIES, nn.ModuleDict(current))
        if self.own:  # PEFT saves, loads and deletes them as it does an adapter's other parts
            names = dict.fromkeys((*self.layer.adapter_layer_names, PENALTIES))
            self.layer.adapter_layer_names = tuple(n for n in names if n != PENALTIES or current)

    def install(self) -> None:
        layer = self.layer
        if not isinstance(layer, _SwappedLayer):
            _put_before(_SwappedLayer, layer)
        layer.__dict__["_forgetless"] = self
        if self.stacked:
            run_by(layer.get_base_layer(), experts_forward)
        self.make_views()
        self._register()

    def remove(self) -> None:
        self.layer._modules.pop(PENALTIES, None)
        del self.layer.__dict__["_forgetless"]
        if self.stacked:
            give_back(self.layer.get_base_layer())

    def keys(self) -> list[str]:
        """The active adapters that this layer has."""
        known = self.layer.lora_A._modules
        return [key for key in self.layer.active_adapters if key in known]

    def active(self) -> list[Any]:
        return [self.view(key) for key in self.keys() if adapter_reason(self.layer, key) is None]

    def route(self, x: Any) -> tuple[list[View], bool] | None:
        """Views to run, and whether the frozen layer runs itself; None: PEFT's own forward."""
        keys = self.keys()
        onto = onto_base(self.layer, keys, x)
        return None if onto is None else ([self.view(key) for key in keys], onto)

    def run(self, x: Tensor, active: list[View], onto: bool) -> Tensor:
        if onto:
            (base, fresh), rest = runs_by(self.layer.base_layer), active
        elif len(active) == 1:
            return active[0].forward(x)
        else:
            base, fresh, rest = active[0].forward, True, active[1:]  # its result is ours
        y, hidden = add_terms(base, x, [view.term() for view in rest], fresh=fresh)
        for view, h in zip(rest, hidden, strict=True):
            view._record(x, h)
        return y

    def forget(self) -> None:
        """The adapters run elsewhere this time: what the last pass left behind is of an earlier one."""
        if not self.layer.disable_adapters:
            for view in self.views.values():
                view.trace = None


def _hook(model: nn.Module) -> None:
    """Form the groups and mark the passes of the model as it is now."""
    swapped = _swapped(model)
    _detach(swapped)
    together: dict[str, dict[str, AdaptedLinear]] = {}
    for name, module in model.named_modules():
        taker = taker_of(module)
        for view in [] if taker is None else taker.make_views():
            if base_reason(view.layer.base_layer) is None:
                together.setdefault(view.adapter.key, {})[bare_name(model, name)] = view
    for same in together.values():
        form_groups(model, same)
    passes = Passes(model, [taker.layer for taker in swapped], swapped)
    for taker in swapped:
        taker.passes = passes
        for view in taker.views.values():
            view.passes = passes


def _detach(takers: list[_Taker]) -> None:
    """Take all hooks off."""
    for taker in takers:
        if taker.passes is not None:
            taker.passes.detach()
        for view in taker.views.values():
            if view.group is not None:
                view.group.detach()
