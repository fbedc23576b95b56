"""The rise of the loss on kept text that an update is predicted to cause, in nats per token."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..adapter import Adapter, Site
from .base import Penalty, PenaltyState, check_choice, register
from .covariance import Covariance
from .deviation import Gram, Pairs, check_form

FISHERS = ("empirical", "true")


@register
@dataclass(frozen=True)
class LossDeviation(Penalty):
    """weight / 2 * scale^2 * sum over kept texts of <up^T G up, down S down^T>: the predicted rise of their losses.

    In nats per token: the second-order term of the mean loss in the update D = scale up down of the layer, with the
    curvature in Kronecker form (K-FAC, Martens and Grosse, arXiv 1503.05671) in the space of the update (this project's
    own):

        S = E x x^T          (K, K), mean over the tokens of the kept text, x the layer's input
        G = sum dy dy^T / L  (N, N), over all tokens, dy the gradient of the summed loss at the layer's output, L labels

    ``fl.calibrate`` measures both, with the adapters as they are, in a forward and a backward pass per batch. Each
    ``fl.consolidate`` adds the finished task as a further pair (S, G). It predicts each layer alone: what layers do
    together is left out. So a weight of 1 counts a nat lost on kept text as a nat of the task; ``fl.fit_budget``
    measures the rise itself.

    Args:
        weight: nats of the task per predicted nat of kept text, >= 0.
        covariance: form of S and G: "diag", "full", or an integer q, as of ``SourceDeviation``. A layer holds its own:
            K + N numbers, (K + N)(q + 1), or K^2 + N^2, for each kept text.
        fisher: "empirical" takes the gradients of the text's own labels; "true" of labels that are drawn from the
            model's prediction, one draw per token.

    Raises:
        ValueError: a field is of another type or out of range.
    """

    weight: float = 1.0
    covariance: str | int = 64
    fisher: str = "empirical"

    name: ClassVar[str] = "loss-deviation"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_form("LossDeviation.covariance", self.covariance)
        check_choice("LossDeviation.fisher", self.fisher, FISHERS)

    def attach(self, adapter: Adapter, site: Site) -> PenaltyState:
        return _LossDeviation(self, site)


class _Pair(nn.Module):
    """S and G of one kept text; the tokens and labels they are of."""

    labels: Tensor

    def __init__(self, form: str | int, weight: Tensor):
        super().__init__()
        N, K = weight.shape
        self.inputs, self.outputs = Covariance(form, K, weight), Covariance(form, N, weight)
        self.register_buffer("labels", torch.zeros((), dtype=torch.int64, device=weight.device))


class _LossDeviation(Gram):
    factor = 0.5
    statistics = "tokens"
    counter = "pairs.0.labels"

    def __init__(self, spec: LossDeviation, site: Site):
        super().__init__(spec)
        self.pairs: Any = nn.ModuleList([_Pair(spec.covariance, site.weight)])  # the last calibration's first

    def begin_statistics(self, adapter: Adapter) -> None:
        del self.pairs[1:]
        super().begin_statistics(adapter)

    def add_tokens(self, tokens: Any) -> None:
        pair = self.pairs[0]
        pair.inputs.add(tokens.real_x())
        pair.outputs.add(tokens.summed_dy().flatten(0, 1))
        pair.labels += tokens.labels

    def end_statistics(self) -> None:
        pair = self.pairs[0]
        pair.inputs.finish()
        pair.outputs.finish(pair.labels)

    @torch.no_grad()
    def add_statistics(self, earlier: dict[str, Tensor]) -> None:
        """The earlier pairs beside those of now: no two texts are mixed."""
        now, then = len(self.pairs), _count(earlier)
        self._resize(now + then)
        own = dict(self.named_buffers())
        for name, tensor in earlier.items():
            _, index, rest = name.split(".", 2)
            own[f"pairs.{now + int(index)}.{rest}"].copy_(tensor)

    def make_room(self, names: Iterable[str]) -> None:
        self._resize(_count(names))

    def _resize(self, count: int) -> None:
        while len(self.pairs) < count:
            self.pairs.append(copy.deepcopy(self.pairs[0]))
        if count:
            del self.pairs[count:]

    def moments(self) -> Pairs:
        return [(pair.inputs, pair.outputs) for pair in self.pairs]


def _count(names: Iterable[str]) -> int:
    """How many pairs these names are of."""
    return len({name.split(".")[1] for name in names if name.startswith("pairs.")})
