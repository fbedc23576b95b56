"""Calibration: one pass over source-domain data fills the statistics that the attached penalties ask for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from .adapter import Adapter
from .layers.experts import matrices
from .layers.linear import AdaptedLinear
from .model import _running
from .siblings import Family, siblings, states_of

LossFunction = Callable[[nn.Module, Any], Tensor]


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    loss: LossFunction | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> dict[str, int]:
    """Measure what must not be forgotten, with the adapters as they are, and centre the penalties there.

    ``Laplace`` takes per-sequence gradients (one forward and backward per batch, no per-sample backward),
    ``SourceDeviation`` the inputs of each layer (forward only). Dropout is off. Saved with the adapter by ``fl.save``.
    Siblings (q/k/v, gate/up) that are given the very same x share one covariance from then on.

    Args:
        model: an adapted model.
        batches: source-domain batches: mappings of tensors for ``model(**batch)``, with "labels" where gradients
            are needed, first dimension sequences; padding is left out where "attention_mask" says so. Anything else
            if ``loss`` is given.
        loss: (model, batch) -> scalar mean loss; the model's own ``.loss`` if not given.
        on_batch: called with the number of batches done, for a progress bar.

    Returns:
        Counts: "layers" filled, "batches", "sequences".

    Raises:
        ValueError: no adapters, nothing asks for statistics, no batch, no loss, no logits where Laplace's
            fisher="true" draws labels from them, or two Laplace penalties of which one does (statistics are then
            reset); or weights are cut over processes by tensor parallelism.
    """
    running = matrices(_running(model))
    layers = {name: layer for name, layer in running.items() if states_of(layer)}
    measured = _Measured(model, layers, loss)
    counts = {"layers": len(layers), "batches": 0, "sequences": 0}
    try:
        with _measuring(model, list(running.values()), measured.needs_gradients):
            measured.begin()
            for batch in batches:
                counts["sequences"] += measured.take(batch, counts["batches"] + 1)
                counts["batches"] += 1
                if on_batch is not None:
                    on_batch(counts["batches"])
            if counts["batches"] == 0:
                raise ValueError("batches is empty, wants at least one batch of source-domain data")
            for state in {state.shared(): state for state in measured.states}.values():
                state.end_statistics()
    except BaseException:  # sums that were never divided must not be taken for statistics
        batch = None
        measured.reset()
        raise
    return counts


@contextmanager
def _measuring(model: nn.Module, layers: list[AdaptedLinear], needs_gradients: bool) -> Iterator[None]:
    """Evaluation mode without gradients of parameters; restores all modes afterwards and drops the layers' traces.

    Only gradients of the layers' outputs are measured. Inference mode is left: its tensors have no graph.
    """
    modes = {module: module.training for module in model.modules()}
    trained = [p for layer in layers for p in layer.adapter.parameters() if p.requires_grad and p.is_leaf]
    try:
        model.eval()
        for p in trained:
            p.requires_grad_(not needs_gradients)
        with torch.inference_mode(False), torch.set_grad_enabled(needs_gradients):
            yield
    finally:
        for p in trained:
            p.requires_grad_(True)
        for module, training in modes.items():
            module.training = training
        for layer in layers:
            layer.trace = None


class _Measured:
    """The layers that are measured, and what is measured on them, batch by batch. Raises what ``calibrate`` does."""

    def __init__(self, model: nn.Module, layers: dict[str, AdaptedLinear], loss: LossFunction | None):
        self.model, self.layers, self.loss = model, layers, loss
        if not layers:
            raise ValueError("no attached penalty asks for statistics; only Laplace (LaLoRA) and SourceDeviation do")
        cut = next((name for name, layer in layers.items() if getattr(layer, "cut", None) is not None), None)
        if cut is not None:
            raise ValueError(
                f"the weight of {cut} is cut over processes: calibrate the model whole and fl.save; "
                "fl.load after cutting"
            )
        self.states = [state for layer in layers.values() for state in states_of(layer)]
        draws = {getattr(s.spec, "fisher", None) == "true" for s in self.states if s.statistics != "inputs"}
        if len(draws) > 1:
            raise ValueError(
                "one Laplace penalty has fisher='true', another has not; calibrate wants one kind of labels"
            )
        if draws == {True} and loss is not None:
            raise ValueError("loss is given, but fisher='true' draws labels from the model's own logits; leave it out")
        self.needs_gradients = bool(draws)
        self.generator = torch.Generator().manual_seed(0) if draws == {True} else None
        self.families: dict[nn.Module, Family] = {}

    def begin(self) -> None:
        """Forget earlier statistics; siblings share what is to come."""
        self.reset()
        for members in siblings(self.layers):
            self.families.update(dict.fromkeys(members, Family(members)))

    def reset(self) -> None:
        """No statistics, and no tensor of a batch is kept."""
        for family in self.families.values():
            family.drop()
        for layer in self.layers.values():
            for state in states_of(layer):
                state.reset_caches()
                state.begin_statistics(layer.adapter)

    def take(self, batch: Any, number: int) -> int:
        """Run the model on one batch, the ``number``-th; returns its sequences."""
        window = _Window(batch, next(iter(self.layers.values())).device)
        value: Any = None
        try:
            with ExitStack() as hooks:
                for layer in self.layers.values():
                    if self.needs_gradients:
                        hooks.callback(layer.register_forward_pre_hook(window.start_graph).remove)
                    hooks.callback(layer.register_forward_hook(_observer(window, self.families)).remove)
                if self.generator is not None:
                    value = window.drawn_loss(self.model, self.generator)
                else:
                    value = _loss(self.model, window.batch, self.loss, self.needs_gradients)
                if self.needs_gradients:
                    if not torch.isfinite(value).all():
                        raise ValueError(f"batch {number} has a loss of {value.item()}; has it any label?")
                    torch.autograd.grad(value, window.leaves, allow_unused=True)
            for family in self.families.values():
                family.close()
            return window.sequences
        finally:  # an exception keeps this frame alive, and with it the graph
            batch = value = None
            window.drop()


class _Window:
    """One batch: its tensors on the model's device, its sequences, tokens and label counts."""

    def __init__(self, batch: Any, device: torch.device):
        self.batch = batch
        self.mask: Tensor | None = None  # (sequences, tokens) bool
        self.share: Tensor | None = None  # (sequences,) share of each sequence in the batch's mean loss
        self.sequences = 0
        self.leaves: list[Tensor] = []  # where the graph starts
        self._start: tuple[Tensor, int] | None = None  # the x of the last leaf, and its version
        if isinstance(batch, Tensor):
            self.batch = _normal(batch)
        if not isinstance(batch, Mapping):
            return
        self.batch = {k: _normal(v.to(device)) if isinstance(v, Tensor) else v for k, v in batch.items()}
        leading = next((v for v in self.batch.values() if isinstance(v, Tensor) and v.dim() >= 1), None)
        self.sequences = 0 if leading is None else leading.shape[0]
        mask = self.batch.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2:
            self.mask = mask.bool()
        labels = self.batch.get("labels")
        if isinstance(labels, Tensor) and labels.dim() == 2:
            self._count(labels[:, 1:] != -100)  # a causal model predicts all but the first token

    def drop(self) -> None:
        """Let go of the batch and of the graph."""
        self.batch = self.mask = self.share = self._start = None
        self.leaves = []

    def _count(self, counted: Tensor) -> None:  # (sequences, ..) bool
        counts = counted.flatten(1).sum(1).double()
        self.share = counts / counts.sum().clamp(min=1)

    def start_graph(self, layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """No parameter wants a gradient: an x that has none becomes a leaf, the same one for all that are given it."""
        x = args[0]
        if x.requires_grad:
            return None
        if self._start is None or self._start[0] is not x or self._start[1] != x._version:
            self._start = x, x._version
            self.leaves.append(x.detach().requires_grad_(True))
        return self.leaves[-1], *args[1:]

    def drawn_loss(self, model: nn.Module, generator: torch.Generator) -> Tensor:
        """Mean loss of labels drawn from the model's own prediction, where the batch has labels (or tokens)."""
        output = _run(model, self.batch, without=("labels",))
        logits = output if isinstance(output, Tensor) else _entry(output, "logits")
        if not isinstance(logits, Tensor) or logits.dim() not in (2, 3):
            raise ValueError("the model returned no logits (sequences, tokens, classes): fisher='true' draws from them")
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if logits.dim() == 3:
            logits = logits[:, :-1]  # as a causal model's own loss has it
            labels = self.batch.get("labels") if isinstance(self.batch, Mapping) else None
            counted = torch.ones(logits.shape[:2], dtype=torch.bool, device=logits.device)
            if isinstance(labels, Tensor):
                counted = labels[:, 1:] != -100
            elif self.mask is not None:
                counted = self.mask[:, 1:]
            self._count(counted)
            logits = logits[counted]
        return cross_entropy(logits, draw_labels(logits.detach(), generator))

    def split(self, t: Tensor) -> Tensor:  # -> (sequences, tokens, features)
        """Layers see (sequences, tokens, features), (samples, features), or tokens flattened into one dimension."""
        if t.dim() == 3:
            return t
        rows = t.reshape(-1, t.shape[-1])
        groups = self.sequences if self.sequences and rows.shape[0] % self.sequences == 0 else rows.shape[0]
        return rows.view(groups, -1, t.shape[-1])

    def real(self, x: Tensor) -> Tensor:  # (sequences, tokens, K) -> (real tokens, K)
        fits = self.mask is not None and self.mask.shape == x.shape[:2]
        return x[self.mask] if fits else x.flatten(0, 1)


def draw_labels(logits: Tensor, generator: torch.Generator) -> Tensor:  # (rows, classes) -> (rows,)
    """One class per row from softmax(logits); the generator lives on the CPU, so that every device draws alike."""
    spots = torch.rand(logits.shape[0], 1, generator=generator, dtype=torch.float64).to(logits.device)
    summed = logits.double().softmax(1).cumsum(1)
    return torch.searchsorted(summed, spots * summed[:, -1:]).squeeze(1).clamp(max=logits.shape[1] - 1)


def _normal(t: Tensor) -> Tensor:
    """t, or a copy that may be part of a graph: tensors of inference mode may not."""
    return t.clone() if t.is_inference() else t


def _observer(window: _Window, families: dict[nn.Module, Family]) -> Callable[..., None]:
    def hook(layer: nn.Module, args: tuple[Any, ...], y: Tensor) -> None:
        assert isinstance(layer, AdaptedLinear)
        x = window.split(args[0].detach())
        version = x._version
        window.sequences = window.sequences or x.shape[0]
        for state in states_of(layer):
            if state.statistics == "inputs":
                rows, family = window.real(x), families.get(state)
                family.take(state, args[0], rows) if family else state.add_inputs(rows)

        def take_gradient(dy: Tensor) -> None:
            if x._version != version:
                raise ValueError(f"the input of {layer.name} was changed in place after the layer had run on it")
            _add_gradients(layer, window, x, window.split(dy))

        if any(state.statistics != "inputs" for state in states_of(layer)) and y.requires_grad:
            y.register_hook(take_gradient)

    return hook


@dataclass
class Tokens:
    """One layer's tokens of one batch, as samples: the sequences, or the batch as one."""

    adapter: Adapter
    x: Tensor  # (S, T, K) in the dtype that products are taken in, as dy
    dy: Tensor  # (S, T, N), the gradient of the batch's mean loss at the layer's output
    mask: Tensor | None  # (S, T) bool, the real tokens; None: all
    factor: Tensor | None  # (S,): contribution to the batch's mean -> gradient of the sample's own mean; None: 1
    count: Tensor | int  # samples that have labels

    def _scaled(self, t: Tensor) -> Tensor:  # (S, T, ..), its own
        t *= self.adapter.scale
        return t if self.factor is None else t.mul_(self.factor.to(t.dtype)[:, None, None])

    def scaled_dy(self) -> Tensor:  # (S, T, N)
        """Gradients of the samples' own mean losses at the output of up."""
        return self._scaled(self.dy.clone())

    def real_x(self) -> Tensor:  # (tokens, K)
        return self.x.flatten(0, 1) if self.mask is None else self.x[self.mask]

    def gradients(self) -> dict[str, Tensor]:
        """Parameter name -> (S, *shape), by S small products: no second backward pass."""
        down, up = (t.to(self.x.dtype) for t in self.adapter.factors())
        dup = self.dy.transpose(1, 2) @ self._scaled(self.x @ down.T)
        if up.any():
            ddown = self._scaled(self.dy @ up).transpose(1, 2) @ self.x
        else:  # the usual start: no gradient reaches down
            ddown = self.x.new_zeros(1, 1, 1).expand(self.x.shape[0], *down.shape)
        return self.adapter.pullback(ddown, dup)


@torch.no_grad()
def _add_gradients(layer: AdaptedLinear, window: _Window, x: Tensor, dy: Tensor) -> None:
    dtype = torch.float32 if x.dtype == torch.float16 else x.dtype  # squares of half precision's gradients vanish
    x, dy = x.to(dtype), dy.to(dtype)
    mask = window.mask if window.mask is not None and window.mask.shape == x.shape[:2] else None
    states = [state for state in states_of(layer) if state.statistics != "inputs"]
    for by_batch in (False, True):
        group = [state for state in states if (getattr(state.spec, "fisher", None) == "batch") == by_batch]
        if not group:
            continue
        if by_batch:
            joint = None if mask is None else mask.flatten()[None]
            tokens = Tokens(layer.adapter, x.flatten(0, 1)[None], dy.flatten(0, 1)[None], joint, None, 1)
        else:
            share = window.share
            if share is None or share.shape[0] != x.shape[0]:
                share = x.new_full((x.shape[0],), 1.0 / x.shape[0], dtype=torch.float64)
            factor = torch.where(share > 0, 1.0 / share, 0.0)
            tokens = Tokens(layer.adapter, x, dy, mask, factor, (share > 0).sum())
        grads = tokens.gradients() if any(state.statistics == "gradients" for state in group) else {}
        for state in group:
            if state.statistics == "gradients":
                state.add_gradients(grads, tokens.count)
            if state.wants_tokens:
                state.add_tokens(tokens)


def _loss(model: nn.Module, batch: Any, loss: LossFunction | None, needed: bool) -> Any:
    if loss is not None:
        return loss(model, batch)
    value = _entry(_run(model, batch), "loss")
    if value is None and needed:
        raise ValueError('the model returned no loss: put "labels" into the batches, or pass loss=')
    return value


def _run(model: nn.Module, batch: Any, without: tuple[str, ...] = ()) -> Any:
    if not isinstance(batch, Mapping):
        return model(batch)
    return model(**{key: value for key, value in batch.items() if key not in without})


def _entry(output: Any, name: str) -> Any:
    """``output.name`` or ``output["name"]``; None if it has neither."""
    value = getattr(output, name, None)
    return output.get(name) if value is None and isinstance(output, Mapping) else value
