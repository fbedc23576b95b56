"""What need not be kept for the backward pass: an input that is the product of two tensors that autograd keeps.

The input of a SwiGLU's or GeGLU's last layer is act(gate) * up, the largest activation of a block, and the product's
own node holds both factors until it has run backward, which is after the layer's. So the layer holds the node, and
makes its input once more: one elementwise pass for (M, K) numbers not kept. It is what fused MLPs do by hand.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

#: Inputs of fewer elements are kept: nothing worth a pass.
SMALL = 1 << 16


def product_of(x: Tensor) -> Any:
    """The autograd node of x = a * b if ``remake`` can make x of it, bit for bit; else None.

    Both factors must be held by the node as they are: of the shape and dtype of x, and by no hook (activation
    checkpointing unpacks once only, offloading would copy them back). An x changed in place since is kept itself.
    """
    node = x.grad_fn
    if node is None or node.name() != "MulBackward0" or x.numel() < SMALL or x._version:
        return None
    a, b = node._raw_saved_self, node._raw_saved_other  # type: ignore[attr-defined]
    return node if _plainly(a, x) and _plainly(b, x) else None


def _plainly(saved: Any, x: Tensor) -> bool:
    if getattr(saved, "unpack_hook", saved) is not None:  # a hook, or a torch that does not say
        return False
    held = saved.data
    return held is not None and held.shape == x.shape and held.dtype == x.dtype and held.device == x.device


def hold(ctx: Any, x: Tensor) -> Tensor | None:
    """What of x is to be saved for the backward pass: x itself, or nothing, as its node is held by ``ctx``."""
    ctx.product = product_of(x)
    return x if ctx.product is None else None


def held(ctx: Any, x: Tensor | None) -> Tensor | None:
    """x again, of what ``hold`` said and ``ctx`` saved."""
    product = getattr(ctx, "product", None)
    return x if product is None else remake(product)


def remake(node: Any) -> Tensor:
    """x, detached.

    Raises:
        RuntimeError: a factor was changed in place, or the node has run backward without ``retain_graph``.
    """
    with torch.no_grad():
        return node._saved_self * node._saved_other
