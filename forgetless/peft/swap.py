"""PEFT's own LoRA layers on our op, in place: ``swap_in`` and ``swap_out``.

A taken-over layer keeps its modules, parameters and names; its class becomes a subclass of PEFT's whose ``forward``
runs on our op where that gives what PEFT's would, and is PEFT's everywhere else. So everything that PEFT does with a
layer goes on working, because it is done to the same layer. Which way each layer goes, and why, says ``fl.explain``.

PEFT is looked up when it is needed, never at import.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import compat, versions
from ..adapter import Adapter, Site
from ..layers.linear import AdaptedLinear, form_groups, hooked, is_conv1d, runs_by, stored
from ..layers.passes import Passes
from ..methods import LoRA
from ..ops import explain_path
from ..ops.add_lowrank import Term, add_terms
from ..ops.check import FLOATS
from ..penalties import Penalty
from ..report import LayerReport

#: What is asked of a PEFT layer.
_ASKED = (
    "lora_A", "lora_B", "lora_dropout", "scaling", "r", "base_layer", "active_adapters", "merged", "merged_adapters",
    "disable_adapters", "_disable_adapters", "adapter_layer_names",
)  # fmt: skip

#: PEFT's layers whose forward is base_layer(x) + sum of lora_B(lora_A(dropout(x))) * scaling.
LAYERS = (
    "peft.tuners.lora.layer.Linear",
    "peft.tuners.lora.bnb.Linear4bit",
    "peft.tuners.lora.bnb.Linear8bitLt",
    "peft.tuners.lora.torchao.TorchaoLoraLinear",
)


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
    result = dict(_lora_layers(model, _peft("tuners.lora.layer").LoraLayer))
    if not result:
        raise ValueError(
            f"model is a {type(model).__name__} without PEFT LoRA layers; "
            "make it with peft.get_peft_model(model, peft.LoraConfig(...)), or use fl.adapt"
        )
    versions.warn_untested("peft", "fl.swap_in")
    missing = next((name for name in _ASKED if not hasattr(next(iter(result.values())), name)), None)
    if missing is not None:
        raise versions.missing_error("peft", "fl.swap_in", f"LoraLayer.{missing}")
    specs = None if penalties is None else tuple(penalties)
    for spec in specs or ():
        if not isinstance(spec, Penalty):
            raise ValueError(f"penalties holds {spec!r}, wants Penalty instances such as fl.NullSpace()")
    taken = {name: layer for name, layer in result.items() if _taken(layer)}
    takers = {}
    for name, layer in taken.items():
        current = _taker(layer)
        taker = _Taker(layer, _site_name(name), specs if specs is not None else current.specs if current else ())
        if specs is None and current:
            taker.views = current.views
        takers[name] = taker
    if specs:
        for name, layer in result.items():
            reason = None if name in taken else _kind_reason(layer)
            reason = reason or next(filter(None, (_adapter_reason(layer, a) for a in layer.lora_A)), None)
            if reason is not None:
                raise ValueError(f"penalties cannot be attached to {name}: {reason}")
        for taker in takers.values():
            taker.make_views()  # raises before anything is changed
    for name, layer in taken.items():
        if _taker(layer) is None or specs is not None:
            takers[name].install()
    _form_groups(model)
    for module in model.modules():
        if isinstance(module, _peft("tuners.tuners_utils").BaseTuner) and not isinstance(module, _SwappedTuner):
            _put_before(_SwappedTuner, module)
    _mark_passes(model)
    return model


def swap_out(model: nn.Module) -> nn.Module:
    """Undo ``swap_in``, in place: every layer has PEFT's own class and forward again, and no penalties.

    Raises:
        ValueError: no layer of the model was swapped in.
    """
    swapped = _swapped(model)
    if not swapped:
        raise ValueError("no layer of model is swapped in; call fl.swap_in(model) first")
    _detach_groups(swapped)
    for taker in swapped:
        if taker.passes is not None:
            taker.passes.detach()
        taker.remove()
    for module in model.modules():
        own = vars(type(module)).get("_forgetless_base")
        if own is not None:  # else another class was put before ours: the layer's forward is PEFT's all the same
            module.__class__ = own
    return model


def views(model: nn.Module) -> dict[str, AdaptedLinear]:
    """Name -> active adapter of each swapped-in layer, as an adapted layer; "name:adapter" where several are active."""
    result: dict[str, AdaptedLinear] = {}
    for name, layer in model.named_modules():
        taker = _taker(layer)
        if taker is not None:
            active = taker.active()
            for view in active:
                result[name if len(active) == 1 else f"{name}:{view.adapter.key}"] = view
    return result


def reports(model: nn.Module) -> dict[str, LayerReport]:
    """Name -> how it runs, of every PEFT LoRA layer of the model, swapped in or not."""
    peft = sys.modules.get("peft.tuners.lora.layer")  # without it there is no such layer
    return {} if peft is None else {name: _report(layer) for name, layer in _lora_layers(model, peft.LoraLayer)}


def _peft(module: str) -> Any:
    try:
        return importlib.import_module(f"peft.{module}")
    except ImportError as error:
        if error.name is None or error.name.split(".")[0] != "peft":
            raise
        raise ImportError(
            f"swap_in needs PEFT: pip install 'peft>=0.18' (tested with {versions.tested('peft')})"
        ) from error


def _lora_layers(model: nn.Module, cls: type) -> Iterator[tuple[str, Any]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, cls))


def _taker(module: nn.Module) -> _Taker | None:
    return module.__dict__.get("_forgetless")


def _swapped(model: nn.Module) -> list[_Taker]:
    return [taker for module in model.modules() if (taker := _taker(module)) is not None]


def _site_name(name: str) -> str:
    """The layer's name before PEFT wrapped the model, so that penalties' bases are those of ``fl.adapt``."""
    return name.removeprefix("base_model.model.")


# ------------------------------------------------------------------------------------- which way


def _full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _taken(layer: Any) -> bool:
    return isinstance(layer, _SwappedLayer) or _full_name(type(layer)) in LAYERS


def _kind_reason(layer: Any) -> str:
    """Why PEFT's own forward runs a layer that is not taken over."""
    return f"{type(layer).__name__} is none of {', '.join(name.rpartition('.')[2] for name in LAYERS)}"


def _adapter_reason(layer: Any, key: str) -> str | None:
    """Why PEFT's own forward must run this adapter; None if our op gives the same."""
    variant = getattr(layer, "lora_variant", {}).get(key)
    if variant is not None:
        return f"adapter {key!r} is a {type(variant).__name__.removesuffix('LinearVariant')} adapter"
    if getattr(layer, "use_dora", {}).get(key):
        return f"adapter {key!r} is a Dora adapter"
    A, B, drop = layer.lora_A._modules[key], layer.lora_B._modules[key], layer.lora_dropout._modules[key]
    if type(A) is not nn.Linear or type(B) is not nn.Linear:
        return f"lora_A and lora_B of {key!r} are {type(A).__name__} and {type(B).__name__}, not nn.Linear"
    if hooked(A) or hooked(B) or hooked(drop):
        return f"lora_A, lora_B or lora_dropout of {key!r} have hooks"
    if type(drop) is nn.Dropout:
        if drop.inplace or drop.p >= 1.0:
            return f"dropout of {key!r} is in place, or drops everything"
    elif type(drop) is not nn.Identity:
        return f"dropout of {key!r} is a {type(drop).__name__}"
    down, up = A._parameters["weight"], B._parameters["weight"]
    if A._parameters["bias"] is not None:
        return f"lora_A of {key!r} has a bias"
    if not (_plain(down) and _plain(up)):
        return f"the factors of {key!r} are not plain tensors of one of the dtypes {_names(sorted(FLOATS, key=str))}"
    return None


def _plain(t: Tensor | None) -> bool:
    """A tensor of no subclass (DTensor, fake, functorch) in memory, with a dtype that the op takes."""
    return t is not None and type(t) in (Tensor, nn.Parameter) and t.dtype in FLOATS and t.device.type != "meta"


def _names(dtypes: Iterable[torch.dtype]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def _base_reason(base: Any) -> str | None:
    """Why the frozen layer's own forward must make x @ W.T; None if the op can read its weight."""
    if type(base) is not nn.Linear and not is_conv1d(base):
        return f"{type(base).__name__} makes x W^T itself"
    if not _plain(base.weight):
        return f"the weight is a {type(base.weight).__name__} and its layer makes x W^T itself"
    if hooked(base):
        return "the frozen layer has hooks and runs itself"
    return None


def _state_reason(layer: Any) -> str | None:
    """Why no adapter runs at all."""
    if layer.disable_adapters:
        return "adapters are disabled: the frozen layer alone"
    if layer.merged:
        return f"merged into the weight: {', '.join(layer.merged_adapters)}"
    return None


def _surroundings_allow(x: Any) -> bool:
    """Whether a call with this x, here and now, is one for our op: no transform, no tracer, no global hook."""
    if not _plain(x) or x.dim() == 0:
        return False
    if torch.compiler.is_compiling():
        return not torch.compiler.is_exporting()
    return not (
        compat.transforms_active()
        or compat.forward_mode_active()
        or torch.jit.is_tracing()
        or compat.has_global_hooks()
    )


# -------------------------------------------------------------------------------------- the layers


class _SwappedLayer:
    """Goes before PEFT's class in the bases of a taken-over layer."""

    _forgetless: _Taker | None = None  # None: swapped out, and PEFT's through and through

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        taker = self._forgetless
        if taker is None:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        if taker.passes is not None and not torch.compiler.is_compiling():
            taker.passes.enter()
        if not args and (not kwargs or (kwargs.keys() <= _IDLE and not any(v is not None for v in kwargs.values()))):
            route = taker.route(x)
            if route is not None:
                return taker.run(x, *route)
        taker.forget()
        return super().forward(x, *args, **kwargs)  # type: ignore[misc]


#: Arguments that mean nothing if they are None.
_IDLE = {"adapter_names", "alora_offsets"}


class _SwappedTuner:
    """Goes before PEFT's tuner: what it adds later is taken over as well."""

    def inject_adapter(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        super().inject_adapter(model, *args, **kwargs)  # type: ignore[misc]
        current = _swapped(model)
        if current:  # not swapped out since
            for name, layer in _lora_layers(model, _peft("tuners.lora.layer").LoraLayer):
                if _taken(layer) and _taker(layer) is None:
                    _Taker(layer, name, current[0].specs).install()
            _form_groups(model)
            _mark_passes(model)


class _PeftAdapter(Adapter):
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

    @property
    def scale(self) -> float:  # type: ignore[override]
        return self.layer.scaling[self.key]

    @property
    def dropout(self) -> float:  # type: ignore[override]
        drop = self.layer.lora_dropout._modules[self.key]
        return drop.p if drop.training and type(drop) is nn.Dropout else 0.0

    @property
    def bias(self) -> Tensor | None:
        """scale * bias of lora_B"""
        bias = self.layer.lora_B._modules[self.key]._parameters["bias"]
        return None if bias is None else bias * self.scale

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.down, self.up

    def pullback(self, ddown: Tensor, dup: Tensor) -> dict[str, Tensor]:
        return {"down": ddown, "up": dup}


class _Biased(NamedTuple):
    """A frozen layer whose bias has that of lora_B in it."""

    weight: Tensor
    bias: Tensor | None


class _View(AdaptedLinear):
    """A PEFT layer with one of its adapters, as the rest of the library sees an adapted layer. Not in the model."""

    layer: Any
    adapter: _PeftAdapter
    shares_dropout = False  # each layer of PEFT has a mask of its own

    def __init__(self, layer: Any, key: str, name: str, specs: tuple[Penalty, ...]):
        adapter = _PeftAdapter(layer, key)
        base = layer.base_layer
        super().__init__(base, adapter, LoRA(), name)
        del self._modules["base"]
        self.__dict__.update(layer=layer, adapter=adapter)
        if specs:
            weight = self.weight.detach()
            adapter.attach(specs, Site(name, weight.T if self.transposed else weight, self.transposed))
            self.needs_hidden = any(state.needs_hidden for state in adapter.penalty_states())

    @property
    def base(self) -> Any:  # type: ignore[override]
        base = self.layer.base_layer
        return base if self.adapter.bias is None else _Biased(base.weight, self.bias)

    @property
    def weight(self) -> Tensor:
        return self.frozen

    @property
    def frozen(self) -> Tensor:
        """The frozen weight; where it is packed or hidden, a tensor of its shape that takes no memory."""
        base = self.layer.base_layer
        if _base_reason(base) is None:
            return base.weight
        down = self.adapter.down
        dtype = getattr(base, "compute_dtype", None) or down.dtype
        return torch.empty(1, 1, dtype=dtype, device=down.device).expand(self.out_features, self.in_features)

    @property
    def bias(self) -> Tensor | None:
        own, more = self.layer.base_layer.bias, self.adapter.bias
        if more is None:
            return own
        return (more if own is None else own + more).to(self.weight.dtype)

    @property
    def in_features(self) -> int:
        return self.adapter.down.shape[1]

    @property
    def out_features(self) -> int:
        return self.adapter.up.shape[0]

    def term(self) -> Term:
        adapter = self.adapter
        return Term(adapter.down, adapter.up, adapter.scale, adapter.dropout, adapter.bias)

    def fits(self, first: _View) -> bool:
        """Whether this layer, as it is now, can take its part from the projection that ``first`` makes."""
        layer, adapter = self.layer, self.adapter
        return self is first or (
            _taker(layer) is not None
            and _state_reason(layer) is None
            and layer.active_adapters == first.layer.active_adapters
            and layer.lora_A._modules.get(adapter.key) is adapter.module
            and _adapter_reason(layer, adapter.key) is None
            and _base_reason(layer.base_layer) is None
            and adapter.scale == first.adapter.scale
        )

    def runs_base(self) -> bool:
        return False  # the taker's route has decided that

    def stored(self) -> tuple[Tensor, Tensor | None]:
        weight, bias = stored(self.layer.base_layer)
        return weight, bias if self.adapter.bias is None else self.bias

    def _joins(self, first: AdaptedLinear, like: Tensor, dropout: float) -> bool:
        # each layer of PEFT has a dropout mask of its own
        if dropout or not isinstance(first, _View) or not self.fits(first) or hooked(self.layer):
            return False
        return super()._joins(first, like, dropout)

    def register_forward_hook(self, hook: Any, **kwargs: Any) -> Any:
        return self.layer.register_forward_hook(lambda _, args, y: hook(self, args, y), **kwargs)

    def register_forward_pre_hook(self, hook: Any, **kwargs: Any) -> Any:
        return self.layer.register_forward_pre_hook(lambda _, args: hook(self, args), **kwargs)


class _Taker:
    """What a taken-over layer knows beside what PEFT put there."""

    def __init__(self, layer: Any, name: str, specs: tuple[Penalty, ...]):
        self.layer, self.name, self.specs = layer, name, specs
        self.passes: Passes | None = None
        self.views: dict[str, _View] = {}

    def view(self, key: str) -> _View:
        view = self.views.get(key)
        if view is None or view.adapter.module is not self.layer.lora_A._modules[key]:  # deleted and added again
            view = self.views[key] = _View(self.layer, key, self.name, self.specs)
            view.passes = self.passes
            if self.layer.__dict__.get("_forgetless") is self:
                self._register()
        return view

    def make_views(self) -> list[_View]:
        keys = self.layer.lora_A._modules
        return [self.view(key) for key in keys if _adapter_reason(self.layer, key) is None]

    def _register(self) -> None:
        """Penalties' buffers go where the layer goes."""
        current = {key: view.adapter.penalties for key, view in self.views.items() if len(view.adapter.penalties)}
        self.layer._modules.pop(_PENALTIES, None)
        if current:
            self.layer.add_module(_PENALTIES, nn.ModuleDict(current))

    def install(self) -> None:
        layer = self.layer
        if not isinstance(layer, _SwappedLayer):
            _put_before(_SwappedLayer, layer)
        layer.__dict__["_forgetless"] = self
        self.make_views()
        self._register()

    def remove(self) -> None:
        self.layer._modules.pop(_PENALTIES, None)
        del self.layer.__dict__["_forgetless"]

    def keys(self) -> list[str]:
        """The active adapters that this layer has."""
        known = self.layer.lora_A._modules
        return [key for key in self.layer.active_adapters if key in known]

    def active(self) -> list[_View]:
        return [self.view(key) for key in self.keys() if _adapter_reason(self.layer, key) is None]

    def route(self, x: Any) -> tuple[list[_View], bool] | None:
        """Views to run, and whether the frozen layer runs itself; None: PEFT's own forward."""
        layer = self.layer
        if layer._disable_adapters or layer.merged_adapters or not _surroundings_allow(x):
            return None
        keys = self.keys()
        if not keys:
            return None
        for key in keys:
            if _adapter_reason(layer, key) is not None:
                return None
            down, up = layer.lora_A._modules[key].weight, layer.lora_B._modules[key].weight
            if not x.device == down.device == up.device or x.shape[-1] != down.shape[1]:
                return None
            if down.dtype == torch.float64 != x.dtype:
                return None  # PEFT computes in float64 then
        base = layer.base_layer
        onto = _base_reason(base) is not None
        if not onto:
            weight, bias = base.weight, base.bias
            if weight.device != x.device or weight.shape[0 if is_conv1d(base) else 1] != x.shape[-1]:
                return None
            alike = x.dtype == weight.dtype and (bias is None or bias.dtype == x.dtype)
            if not alike and (x.dtype == torch.float64 or not torch.is_autocast_enabled(x.device.type)):
                return None
        if (onto or len(keys) > 1) and torch.compiler.is_compiling():
            return None  # the compiler fuses PEFT's formula
        return [self.view(key) for key in keys], onto

    def run(self, x: Tensor, active: list[_View], onto: bool) -> Tensor:
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


#: Name of the submodule that holds the states of attached penalties; there is none without penalties.
_PENALTIES = "forgetless_penalties"


def _form_groups(model: nn.Module) -> None:
    _detach_groups(_swapped(model))
    together: dict[str, dict[str, AdaptedLinear]] = {}
    for name, module in model.named_modules():
        taker = _taker(module)
        for view in [] if taker is None else taker.make_views():
            if _base_reason(view.layer.base_layer) is None:
                together.setdefault(view.adapter.key, {})[name] = view
    for same in together.values():
        form_groups(model, same)


def _mark_passes(model: nn.Module) -> None:
    swapped = _swapped(model)
    for taker in swapped:
        if taker.passes is not None:
            taker.passes.detach()
    passes = Passes(model, [taker.layer for taker in swapped], swapped)
    for taker in swapped:
        taker.passes = passes
        for view in taker.views.values():
            view.passes = passes


def _detach_groups(takers: list[_Taker]) -> None:
    for taker in takers:
        for view in taker.views.values():
            if view.group is not None:
                view.group.detach()


def _report(layer: Any) -> LayerReport:
    taker = _taker(layer)
    known = {**layer.lora_A._modules, **getattr(layer, "lora_embedding_A", {})}
    keys = [key for key in layer.active_adapters if key in known]
    path, reason = "peft", None
    if taker is None:
        reason = (
            "not swapped in: call fl.swap_in(model), again after adding layers"
            if _taken(layer)
            else _kind_reason(layer)
        )
    elif state := _state_reason(layer):
        path, reason = "base", state
    elif not keys:
        path, reason = "base", "none of its adapters is active: the frozen layer alone"
    else:
        reason = next(filter(None, (_adapter_reason(layer, key) for key in keys)), None)
    if reason is None:
        path, reason = _op_report(taker.active())  # type: ignore[union-attr]
    rank = sum(layer.r[key] for key in keys)
    trainable = sum(
        p.numel()
        for part in layer.adapter_layer_names
        for p in getattr(layer, part, nn.Module()).parameters()
        if p.requires_grad
    )
    return LayerReport("lora", layer.in_features, layer.out_features, rank, trainable, path, reason)


def _op_report(active: list[_View]) -> tuple[str, str]:
    first = active[0]
    down = first.adapter.down
    own = _base_reason(first.layer.base_layer)
    several = f"; {len(active)} adapters: {', '.join(view.adapter.key for view in active)}" if len(active) > 1 else ""
    if own is not None:
        return "onto", f"{own}, the low-rank product is added to its result{several}"
    weight = first.weight
    N, K = first.out_features, first.in_features
    path, reason = explain_path(weight.device, weight.dtype, N, K, down.shape[0])
    members = first.group.partners(first) if first.group else []
    partners = [view.name.rpartition(".")[2] for view in members if view is not first]
    like, dropout = first.stored()[0], first.adapter.dropout
    together = all(view._joins(first, like, dropout) for view in members)
    if not several and partners and first in members and together:
        reason += f"; one pass over x with {', '.join(partners)}"
    return path, reason + several


def _put_before(mixin: type, module: Any) -> None:
    cls: Any = type(module)
    module.__class__ = _subclass(mixin, cls)


@functools.cache
def _subclass(mixin: type, cls: type) -> type:
    """``cls`` with the mixin before it, under the name of ``cls``; pickle finds it by ``__getattr__`` below."""
    made = type(cls.__name__, (mixin, cls), {"_forgetless_base": cls, "__module__": __name__})
    made.__qualname__ = f"{mixin.__name__}:{cls.__module__.replace('.', '/')}:{cls.__qualname__}"
    return made


def __getattr__(name: str) -> Any:
    mixin, _, rest = name.partition(":")
    module, _, cls = rest.partition(":")
    if not cls or mixin not in ("_SwappedLayer", "_SwappedTuner"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _subclass(globals()[mixin], getattr(importlib.import_module(module.replace("/", ".")), cls))
