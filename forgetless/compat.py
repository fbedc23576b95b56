"""Private parts of torch that have no public twin: what each is used for, and why."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def is_view(t: Tensor) -> bool:
    """Whether ``t`` is a view: autograd refuses to change some views in place. ``Tensor._is_view``, since torch 1.5."""
    return t._is_view()


def is_batched(t: Tensor) -> bool:
    """Whether ``t`` is many gradients at once, of ``torch.autograd.grad(is_grads_batched=True)``. Since torch 2.0."""
    return torch._C._functorch.is_legacy_batchedtensor(t)


#: () -> bool, whether a ``torch.func`` transform runs: no eager autograd Function can run inside one. Since torch 2.0.
transforms_active = torch._C._are_functorch_transforms_active


def forward_mode_active() -> bool:
    """Whether forward-mode differentiation runs: the op has no such derivative. Since torch 1.11."""
    return torch.autograd.forward_ad._current_level >= 0


def has_global_hooks() -> bool:
    """Whether hooks of all modules are set, which a layer run by another way would not call. Since torch 1.8."""
    return nn.modules.module._has_any_global_hook()


def in_backward() -> bool:
    """Whether autograd runs a backward pass in this thread, as torch.utils.checkpoint asks. Since torch 2.0."""
    return torch._C._current_graph_task_id() != -1


def saves_elsewhere() -> bool:
    """Whether hooks take what is saved for backward, as a non-reentrant checkpoint's do. Since torch 2.5."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def _store() -> Any:
    """The keys and values that the processes of a job have in common, None outside of one. Since torch 2.0."""
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized() or distributed.get_world_size() < 2:
        return None
    return distributed.distributed_c10d._get_default_store()


def agreed(key: str) -> str | None:
    """What a process of the job has written under ``key``; None if none has, or outside of a job."""
    store = _store()
    return store.get(key).decode() if store is not None and store.check([key]) else None


def agree(key: str, value: str) -> str:
    """``value``, or what another process of the job has written under ``key`` before. Nobody waits for anybody."""
    store = _store()
    return value if store is None else store.compare_set(key, "", value).decode()
