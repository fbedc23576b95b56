"""One batch of calibration: which of a layer's rows are of which sequence, and what each sequence weighs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from .adapter import Adapter
from .layers.linear import AdaptedLinear

LossFunction = Callable[[nn.Module, Any], Tensor]

#: Entries of a batch that say how many sequences it has, the first one that is there; else its first tensor.
_SEQUENCES = ("input_ids", "inputs_embeds", "labels")
_MASKS = ("attention_mask", "decoder_attention_mask")
#: Ends of the names of models whose loss takes label i from the prediction at i, not at i - 1.
_UNSHIFTED = ("ForMaskedLM", "ForTokenClassification")


@dataclass
class Calls:
    """One layer's calls in one batch, as far as their gradients have come.

    Attributes:
        count: calls in the forward pass.
        xs: inputs (sequences, tokens, K), one for each gradient.
        dys: gradients of the outputs (sequences, tokens, N).
        masks: the real tokens (sequences, tokens), bool; None: all.
        finished: they have been taken.
    """

    count: int = 0
    xs: list[Tensor] = field(default_factory=list)
    dys: list[Tensor] = field(default_factory=list)
    masks: list[Tensor | None] = field(default_factory=list)
    finished: bool = False

    def add(self, x: Tensor, dy: Tensor, mask: Tensor | None) -> None:
        """One call's input, gradient and mask."""
        self.xs.append(x)
        self.dys.append(dy)
        self.masks.append(None if mask is None else mask.reshape(x.shape[:2]))

    def joined(self, layer: AdaptedLinear, sequences: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """All calls side by side: x (S, T, K) and dy (S, T, N) in one dtype, the mask (S, T); gives the calls away.

        T is 0 for a layer without a call or a gradient.
        """
        weight = layer.weight
        masks = [x.new_ones(x.shape[:2]).bool() if m is None else m for m, x in zip(self.masks, self.xs, strict=True)]
        joint = torch.cat(masks, 1) if any(mask is not None for mask in self.masks) else None
        x = torch.cat(self.xs or [weight.new_empty(sequences, 0, layer.in_features)], 1)
        dy = torch.cat(self.dys or [weight.new_empty(sequences, 0, layer.out_features)], 1)
        self.xs, self.dys, self.masks, self.finished = [], [], [], True
        dtype = torch.float32 if x.dtype == torch.float16 else x.dtype  # squares of half precision's gradients vanish
        return x.to(dtype), dy.to(dtype), joint


class Window:
    """One batch: its tensors on the model's device, its sequences, tokens and label counts."""

    def __init__(self, batch: Any, device: torch.device, model: nn.Module):
        self.batch = batch
        self.masks: list[Tensor] = []  # (sequences, tokens) bool, if anything is padding
        self.share: Tensor | None = None  # (sequences,) share of each sequence in the batch's mean loss
        self.labels: Tensor | None = None  # how many labels it has
        self.sequences = 0  # not known yet
        self.lengths: set[int] = set()  # tokens of a sequence
        self.leaves: list[Tensor] = []  # where the graph starts
        self.calls: defaultdict[nn.Module, Calls] = defaultdict(Calls)
        self._start: tuple[Tensor, int] | None = None  # the x of the last leaf, and its version
        tensors = {"": batch} if isinstance(batch, Tensor) else batch if isinstance(batch, Mapping) else {}
        tensors = {key: _normal(v.to(device)) if isinstance(v, Tensor) else v for key, v in tensors.items()}
        if tensors:
            self.batch = tensors[""] if isinstance(batch, Tensor) else tensors
        sized = {key: v for key, v in tensors.items() if isinstance(v, Tensor) and v.dim() >= 1}
        if not sized:
            return
        self.sequences = next((sized[key] for key in _SEQUENCES if key in sized), next(iter(sized.values()))).shape[0]
        self.lengths = {v.shape[1] for v in sized.values() if v.dim() >= 2 and v.shape[0] == self.sequences}
        self._take_masks(sized, bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False)))
        labels = sized.get("labels")
        if labels is not None and labels.dim() == 2:
            self._count(self._labels(labels, model) != -100)

    def _take_masks(self, tensors: dict[str, Tensor], decoder: bool) -> None:
        masks = {key: tensors[key].bool() for key in _MASKS if key in tensors and tensors[key].dim() == 2}
        if all(mask.all() for mask in masks.values()):
            return
        if decoder and "decoder_attention_mask" not in masks:
            raise ValueError("the batch has padding but no decoder_attention_mask, which says what the decoder's is")
        self.masks = list(masks.values())

    @staticmethod
    def _labels(labels: Tensor, model: nn.Module) -> Tensor:
        """Those that the model's own loss counts: a causal model predicts all but the first token."""
        names = {type(module).__name__ for module in model.modules()}
        encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
        return labels if encoder_decoder or any(name.endswith(_UNSHIFTED) for name in names) else labels[:, 1:]

    def drop(self) -> None:
        """Let go of the batch and of the graph."""
        self.batch = self.share = self._start = None
        self.leaves, self.masks = [], []
        self.calls.clear()

    def _count(self, counted: Tensor) -> None:  # (sequences, ..) bool
        counts = counted.flatten(1).sum(1).double()
        self.labels = counts.sum().long()
        self.share = counts / self.labels.clamp(min=1)

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
        output = run(model, self.batch, without=("labels",))
        logits = output if isinstance(output, Tensor) else entry(output, "logits")
        if not isinstance(logits, Tensor) or logits.dim() not in (2, 3):
            raise ValueError("the model returned no logits (sequences, tokens, classes): fisher='true' draws from them")
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if logits.dim() == 3:
            logits = logits[:, :-1]  # as a causal model's own loss has it
            labels = self.batch.get("labels") if isinstance(self.batch, Mapping) else None
            counted = torch.ones(logits.shape[:2], dtype=torch.bool, device=logits.device)
            if isinstance(labels, Tensor):
                counted = labels[:, 1:] != -100
            elif self.masks:
                counted = self.masks[0][:, 1:]
            self._count(counted)
            logits = logits[counted]
        return cross_entropy(logits, draw_labels(logits.detach(), generator))

    def split(self, name: str, t: Tensor) -> Tensor:  # -> (sequences, tokens, features)
        """A layer's (sequences, .., features), (sequences, features), or all tokens, in order, in one dimension.

        Raises:
            ValueError: it is none of these.
        """
        S, rows = self.sequences, t.numel() // max(t.shape[-1], 1)
        flat = t.dim() <= 2 and rows in (S, *(S * length for length in self.lengths))
        if S != 1 and not flat and not (t.dim() > 2 and t.shape[0] == S):
            raise ValueError(
                f"{name} was given {tuple(t.shape)} in a batch of {S} sequences: which tokens are of which sequence "
                "cannot be told, as where tokens are routed to experts; calibrate on batches of one sequence"
            )
        return t.reshape(S, rows // max(S, 1), t.shape[-1])

    def mask_of(self, name: str, x: Tensor) -> Tensor | None:  # (..) bool, of the shape of x (.., K) without K
        """Which of x's tokens are real; None: all.

        Raises:
            ValueError: the batch has padding, and no mask fits x, or two do.
        """
        lead = x.shape[:-1]
        if not self.masks or len(lead) == 1 and lead[0] == self.sequences:  # one token of each sequence
            return None
        fitting = [m for m in self.masks if (m.shape == lead[:2] if len(lead) > 1 else m.numel() == lead[0])]
        if not fitting or any(not torch.equal(fitting[0], other) for other in fitting[1:]):
            raise ValueError(
                f"{name} was given {tuple(x.shape)}: which of its tokens are padding cannot be told from masks of "
                f"{[tuple(mask.shape) for mask in self.masks]}; calibrate on batches without padding"
            )
        mask = fitting[0].reshape(-1) if len(lead) == 1 else fitting[0]
        return mask.reshape(*mask.shape, *(1 for _ in lead[2:])).expand(lead)

    def real(self, name: str, x: Tensor) -> Tensor:  # (.., K) -> (real tokens, K)
        mask = self.mask_of(name, x)
        return x.reshape(-1, x.shape[-1]) if mask is None else x[mask]


def draw_labels(logits: Tensor, generator: torch.Generator) -> Tensor:  # (rows, classes) -> (rows,)
    """One class per row from softmax(logits); the generator lives on the CPU, so that every device draws alike."""
    spots = torch.rand(logits.shape[0], 1, generator=generator, dtype=torch.float64).to(logits.device)
    summed = logits.double().softmax(1).cumsum(1)
    return torch.searchsorted(summed, spots * summed[:, -1:]).squeeze(1).clamp(max=logits.shape[1] - 1)


def _normal(t: Tensor) -> Tensor:
    """t without a graph, or a copy that may be part of one: tensors of inference mode may not."""
    return t.clone() if t.is_inference() else t.detach()


@dataclass
class Tokens:
    """One layer's tokens of one batch, as samples: the sequences, or the batch as one."""

    adapter: Adapter
    x: Tensor  # (S, T, K) in the dtype that products are taken in, as dy
    dy: Tensor  # (S, T, N), the gradient of the batch's mean loss at the layer's output
    mask: Tensor | None  # (S, T) bool, the real tokens; None: all
    factor: Tensor | None  # (S,): contribution to the batch's mean -> gradient of the sample's own mean; None: 1
    count: Tensor | int  # samples that have labels
    labels: Tensor | int  # of the batch; where it names none, its samples

    def _scaled(self, t: Tensor) -> Tensor:  # (S, T, ..), its own
        t *= self.adapter.scale
        return t if self.factor is None else t.mul_(self.factor.to(t.dtype)[:, None, None])

    def scaled_dy(self) -> Tensor:  # (S, T, N)
        """Gradients of the samples' own mean losses at the output of up."""
        return self._scaled(self.dy.clone())

    def summed_dy(self) -> Tensor:  # (S, T, N)
        """The gradient of the batch's summed loss at the layer's output."""
        return self.dy * self.labels

    def real_x(self) -> Tensor:  # (tokens, K)
        return self.x.flatten(0, 1) if self.mask is None else self.x[self.mask]

    @cached_property
    def gradients(self) -> dict[str, Tensor]:
        """Parameter name -> (S, *shape), by S small products: no second backward pass."""
        down, up = (t.to(self.x.dtype) for t in self.adapter.factors())
        dup = self.dy.transpose(1, 2) @ self._scaled(self.x @ down.T)
        if up.any():
            ddown = self._scaled(self.dy @ up).transpose(1, 2) @ self.x
        else:  # the usual start: no gradient reaches down
            ddown = self.x.new_zeros(1, 1, 1).expand(self.x.shape[0], *down.shape)
        return self.adapter.pullback(ddown, dup)


def loss_of(model: nn.Module, batch: Any, loss: LossFunction | None, needed: bool = True) -> Any:
    """The loss of the batch: the model's own where no function is given. None if there is none and none is needed."""
    value = entry(run(model, batch), "loss") if loss is None else loss(model, batch)
    if not isinstance(value, Tensor) and needed:
        raise ValueError('the model returned no loss: put "labels" into the batches, or pass loss=')
    return value


def run(model: nn.Module, batch: Any, without: tuple[str, ...] = ()) -> Any:
    """The model on the batch, without these of its entries."""
    if not isinstance(batch, Mapping):
        return model(batch)
    return model(**{key: value for key, value in batch.items() if key not in without})


def entry(output: Any, name: str) -> Any:
    """``output.name`` or ``output["name"]``; None if it has neither."""
    value = getattr(output, name, None)
    return output.get(name) if value is None and isinstance(output, Mapping) else value
