"""Adapting a whole model: adapt, penalty, drift, explain, remove."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from . import compat
from .adapter import Adapter, Site
from .coverage import passed_over, uncalled, warn_passed_over, warn_uncalled
from .layers.expert_factors import build_experts
from .layers.experts import SUFFIX, AdaptedExperts, check_experts, matrices
from .layers.frozen import site_of
from .layers.groups import form_groups
from .layers.linear import AdaptedLinear
from .layers.made import Items
from .layers.passes import Passes
from .layers.stack import Stack
from .layers.wrapped import wrap
from .methods.base import Method
from .names import checked, outer_modules
from .offload import check_here
from .ops.bodies import exact_products
from .penalties.base import Item, PenaltyState
from .report import LayerReport, Report
from .targets import ALL_LINEAR, find_layers


def adapt(
    model: nn.Module,
    method: Method,
    targets: str | Iterable[str] = ALL_LINEAR,
    exclude: str | Iterable[str] = (),
) -> nn.Module:
    """Put an adapter on every target layer, in place, and freeze everything else.

    Adapter parameters are float32 (float64 in a float64 model), on the device of their layer. Before training the
    model computes what it did before.

    Args:
        model: any module with nn.Linear or transformers' Conv1D layers, or with layers that pack their weight:
            bitsandbytes' 4-bit and int8, torchao's, GGUF's, or a class given to ``fl.packed.register``. Layers whose
            weight is cut over processes (tensor parallelism) are adapted after cutting, in every process.
        method: ``fl.LoRA(...)``, ``fl.CLoRA(...)``, ``fl.CURLoRA(...)``, ``fl.LaLoRA(...)`` or your own.
        targets: list of name suffixes, a regular expression, or "all-linear": every linear layer but the head. It
            warns if that leaves a tenth of the model's weights or more as they are; ``explain`` lists them.
        exclude: what to leave out of them, layers or whole modules, named in the same way.

    Returns:
        The same model.

    Raises:
        ValueError: the model is adapted already, nothing matches, or the method does not fit a layer. The model is
            then as it was.
    """
    if not isinstance(method, Method):
        raise ValueError(f"method is {method!r}, wants an instance such as fl.LoRA(rank=16)")
    adapt_layers(model, method, find_layers(model, targets, exclude), all_linear=targets == ALL_LINEAR)
    if targets == ALL_LINEAR:
        warn_passed_over(model, exclude)
    return model


def adapt_layers(
    model: nn.Module,
    method: Method,
    layers: dict[str, nn.Module],
    drawn_as: dict[str, str] | None = None,
    all_linear: bool = False,
) -> nn.Module:
    """``adapt`` for these layers of the model, by name; random bases are drawn for the names in ``drawn_as``."""
    if adapters(model):
        raise ValueError("model is adapted already; fl.merge(model) or fl.remove(model) first")
    _check_no_peft(model)
    layers = check_experts(layers, method, all_linear)
    sites = {name: site_of((drawn_as or {}).get(name, name), base) for name, base in layers.items()}
    for site in sites.values():
        if site.weight.is_meta and any(hasattr(module, "_hf_hook") for module in model.modules()):
            raise ValueError(
                f"the weight of {site.name} is offloaded with the module around it, and cannot be adapted there; "
                "leave preload_module_classes out"
            )
    built = {name: build(method, site, layers[name]) for name, site in sites.items()}
    model.requires_grad_(False)
    adapted = {name: wrap(layers[name], adapter, method, sites[name].name) for name, adapter in built.items()}
    for name, layer in adapted.items():
        layer.train(layers[name].training)
        if isinstance(layer, AdaptedExperts):
            layer.install()
        else:
            _replace(model, layers[name], layer)
    form_groups(model, adapted)
    passes = Passes(model, list(adapted.values()), list(adapted.values()))
    for layer in adapted.values():
        layer.passes = passes
    return model


def _check_no_peft(model: nn.Module) -> None:
    """PEFT's own factors are linear layers, too, and would be adapted and frozen."""
    peft = sys.modules.get("peft.tuners.tuners_utils")  # without it there is no such layer
    if peft is not None and any(isinstance(module, peft.BaseTunerLayer) for module in model.modules()):
        raise ValueError(
            "model has PEFT adapters: fl.swap_in(model) runs its LoRA layers on our op; to adapt the model that they "
            "change, call its merge_and_unload() first"
        )


def build(method: Method, site: Site, base: nn.Module | None = None) -> Adapter:
    """The adapter of one layer with its penalties attached; if ``base`` packs its weight, unpacked for who reads it."""
    if isinstance(base, Stack):
        return build_experts(method, site)
    adapter = method.build(site if base is None else site_of(site.name, base, method.reads_weight))
    adapter.attach(method.all_penalties(), site)
    return adapter


def adapters(model: nn.Module) -> dict[str, AdaptedLinear]:
    """Name -> adapted layer, in the model's order; empty for a model without adapters."""
    return {
        name.removesuffix(SUFFIX) if isinstance(module, AdaptedExperts) else name: module
        for name, module in outer_modules(model, AdaptedLinear)
        if isinstance(module, AdaptedLinear)
    }


def _checked(layers: dict[str, AdaptedLinear], call: str) -> dict[str, AdaptedLinear]:
    """The layers, if there are any and no weight is flattened, as by FSDP1 and ZeRO-3: so are the factors then."""
    if not layers:
        raise ValueError(f"model has no adapters; call {call} first")
    for name, layer in layers.items():
        if layer.frozen.dim() < 2:
            raise ValueError(
                f"the weight of {name} is flattened (FSDP1, ZeRO-3): gather all parameters first, or use FSDP2"
            )
    return layers


def running(model: nn.Module) -> dict[str, AdaptedLinear]:
    """Name -> layer on our op: those of ``adapters``, and the active adapters of PEFT layers that are swapped in."""
    result = adapters(model)
    if "peft" in sys.modules:
        from .peft.swap import views

        result |= views(model)
    return result


def running_layers(model: nn.Module) -> dict[str, AdaptedLinear]:
    """Those of ``running``; ValueError where there are none or a weight is flattened."""
    return _checked(running(model), "fl.adapt(model, method) or fl.swap_in(peft_model)")


def adapted_layers(model: nn.Module) -> dict[str, AdaptedLinear]:
    """Those of ``adapters``; ValueError where there are none or a weight is flattened."""
    return _checked(adapters(model), "fl.adapt(model, method)")


def penalty(model: nn.Module, token_weights: Tensor | None = None) -> Tensor:
    """Sum of the penalties of all layers: a float32 scalar to add to the loss, before gradient clipping.

    Add it once per optimiser step: with gradient accumulation, to one of the micro-batches only. A zero scalar when
    the method has no penalty. Penalties that need statistics count as zero until ``fl.calibrate``, with a warning.

    Args:
        model: an adapted model.
        token_weights: one number >= 0 for each token of the last forward pass, such as its attention mask, in the
            order of its tokens: what OutputDeviation's mean over tokens counts. All alike if not given. A layer that
            a pass calls more than once wants them call after call.

    Raises:
        ValueError: the model has no adapters, or ``token_weights`` does not fit the last forward pass.
        RuntimeError: within a transform of ``torch.func``.
    """
    layers = running_layers(model)
    passes = next(iter(layers.values())).passes
    if passes is not None and passes.completed and not passes.told:
        passes.told = True
        warn_uncalled(layers)
    result = matrices(layers)
    if compat.transforms_active():
        raise RuntimeError("fl.penalty is not for torch.func transforms: call it outside of them and add its gradient")
    asked = Items()
    for layer in result.values():
        trace, adapter = layer.trace, layer.adapter
        check_here(layer, adapter)
        for state in adapter.penalty_states():
            if state.spec.weight and _calibrated(state):  # with a weight of 0 it only holds statistics
                weighted = state.needs_hidden and token_weights is not None
                made = None if trace is None or trace.made is None or weighted else trace.made.get(state)
                item = Item(state, adapter, None if trace is None else trace.hidden)
                asked.add(item, layer, made)
    device = next(iter(result.values())).device
    totals = []
    with exact_products(device.type):  # trainers add it within autocast, which would round it
        for (kind, *_), (items, products) in asked.kinds().items():
            if products:
                total = kind.total_made(items, products)
            else:
                total = kind.total(items, token_weights) if kind.needs_hidden else kind.total(items)
            totals.append(total.to(device))
    return sum(totals[1:], totals[0]) if totals else torch.zeros((), device=device)


def _calibrated(state: PenaltyState) -> bool:
    """Whether the state has the statistics it needs; a warning if not."""
    if state.calibrated:
        return True
    title = type(state.spec).__name__
    warnings.warn(
        f"{title} has no statistics yet and protects nothing; call fl.calibrate(model, batches) before training",
        stacklevel=3,
    )
    return False


def drift(model: nn.Module) -> dict[str, float]:
    """Per layer, the mean over tokens of ||delta x|| / ||x|| in the last forward pass: CLoRA's F, its Eq. 3.

    Taken over at most 32 evenly spaced tokens, with the adapters as they are now and without dropout. Layers whose
    last pass was not recorded are left out: training passes are recorded only after ``fl.record_drift(model)``, those
    in eval mode or without gradients always.

    Raises:
        ValueError: the model has no adapters.
    """
    values = {name: layer.drift() for name, layer in running_layers(model).items()}
    return {name: value for name, value in values.items() if value is not None}


def record_drift(model: nn.Module, enabled: bool = True) -> nn.Module:
    """Keep a few tokens of every layer's input in training passes, too, so that ``fl.drift`` can be asked after them.

    Args:
        model: an adapted model, or one with PEFT's layers swapped in.
        enabled: False to stop: a copy of 32 tokens a layer and pass is saved.

    Returns:
        The same model.

    Raises:
        ValueError: the model has no adapters.
    """
    for layer in running_layers(model).values():
        layer.records_drift = enabled
    return model


def explain(model: nn.Module) -> Report:
    """Per layer: method, shape, rank, the path its op takes here, and why. ``print`` it for a table.

    Layers of PEFT in a swapped-in model are all listed; path "peft" is PEFT's own forward, "onto" the frozen layer's
    with the low-rank product added to its result, "base" the frozen layer alone. ``.passed_over`` has the weights that
    no adapter sits on, with their shares.

    Raises:
        ValueError: the model has no adapters.
    """
    from .peft.explain import reports

    listed = reports(checked(model))
    layers = adapters(model) if listed else adapted_layers(model)
    report = Report(listed, {} if listed else passed_over(model))
    idle = set(uncalled(layers))
    for name, layer in layers.items():
        with torch.no_grad():
            rank = layer.adapter.factors()[0].shape[-2]
        path, reason = layer.path(rank)
        members = layer.group.partners(layer) if layer.group else []
        partners = [m.name.rpartition(".")[2] for m in members if m is not layer]
        if partners:
            reason += f"; one pass over x with {', '.join(partners)}"
        if name in idle:
            reason += "; no forward pass has called it"
        if layer.disabled:
            path, reason = "base", "disabled: the frozen layer alone"
        trainable = sum(p.numel() for p in layer.adapter.parameters() if p.requires_grad)
        report[name] = LayerReport(
            layer.method.name, layer.in_features, layer.out_features, rank, trainable, path, reason
        )
    return report


def remove(model: nn.Module) -> nn.Module:
    """Drop the adapters, in place: the layers are what they were before ``adapt`` (and still frozen).

    Raises:
        ValueError: the model has no adapters.
    """
    for layer in adapted_layers(model).values():
        for hooks in (layer.group, layer.passes):
            if hooks is not None:
                hooks.detach()
        if isinstance(layer, AdaptedExperts):
            layer.uninstall()
        else:
            layer.base.train(layer.training)
            _replace(model, layer, layer.base)
    return model


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put ``new`` wherever ``old`` is held: a layer may be shared by several parents."""
    for parent in list(model.modules()):
        if parent is new or (isinstance(parent, AdaptedLinear) and parent is not old and parent.base is old):
            continue
        for key, child in list(parent._modules.items()):  # named_children skips a second name of the same child
            if child is old and parent is not old:
                setattr(parent, key, new)
