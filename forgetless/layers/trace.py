"""What a layer keeps of the last forward pass, for penalties and for ``fl.drift``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..ops.bodies import as_rows
from .made import Made

#: ``fl.drift`` looks at this many evenly spaced tokens of the last forward pass at most.
DRIFT_TOKENS = 32


@dataclass
class Trace:
    """What the last forward pass left behind."""

    x: Tensor | None  # (tokens, K) every so many tokens of x, DRIFT_TOKENS a call, detached; None if not recorded
    hidden: Tensor | None  # (M, R) with its graph, call after call, only if a penalty needs it
    made: dict[Any, Made] | None = None  # what this call has made for penalties, by state, siblings' too

    def after(self, earlier: Trace) -> Trace:
        """This call's trace behind those of the same pass's earlier calls."""
        pairs = ((earlier.x, self.x), (earlier.hidden, self.hidden))
        x, h = (now if now is None or before is None else torch.cat((before, now)) for before, now in pairs)
        return Trace(x, h)


def sample(x: Tensor) -> Tensor:  # (..., K) -> (tokens, K)
    """Every so many tokens of x, a copy."""
    K = x.shape[-1]
    M = x.numel() // max(K, 1)
    step = max(1, -(-M // DRIFT_TOKENS))
    return as_rows(x.detach())[::step].clone()
