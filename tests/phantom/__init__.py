"""A card that is not there: all of the CUDA path runs, line by line, but the arithmetic.

    with phantom.card(90) as card:              # sm_90; in a process of its own, without TRITON_INTERPRET
        x = torch.randn(4, 8, device="cuda")    # takes no memory and has no values
        ...
        card.launches, card.compiled            # what Triton launched, what it compiled for it
        card.copies, card.waits                 # host to device; the host waiting for the card

Tensors of the card are meta tensors that say they are CUDA's: shapes, strides, dtypes, views and autograd are torch's
own. Triton binds, specialises and compiles for the card as for a real one; its launches are checked and written down.
Every number that is read back is one; so two tensors are equal, and neither is the greater.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from unittest import mock

from .driver import Driver, driving
from .runtime import cuda_of
from .tensors import Disguise, Operations
from .trace import CARDS, Trace

__all__ = ["CARDS", "Trace", "card", "environment"]


@contextlib.contextmanager
def card(arch: int) -> Iterator[Trace]:
    """Within the block, ``cuda:0`` is a card of that compute capability (90: sm_90), for torch and for Triton."""
    trace = Trace(arch)
    with contextlib.ExitStack() as stack:
        disguise = Disguise(trace)
        for part in (cuda_of(trace), driving(Driver(trace)), disguise, Operations(trace, disguise)):
            stack.enter_context(part)
        yield trace


@contextlib.contextmanager
def environment(**variables: str) -> Iterator[None]:
    """Within the block, these environment variables are set."""
    with mock.patch.dict(os.environ, variables):
        yield
