"""Private parts of torch that have no public twin: what each is used for, and why."""

from __future__ import annotations

import torch
from torch import Tensor


def is_view(t: Tensor) -> bool:
    """Whether ``t`` is a view: autograd refuses to change some views in place. ``Tensor._is_view``, since torch 1.5."""
    return t._is_view()


def transforms_active() -> bool:
    """Whether a ``torch.func`` transform runs: no eager autograd Function can run inside one. Since torch 2.0."""
    return torch._C._are_functorch_transforms_active()
