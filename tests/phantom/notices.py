"""That a phantom card notices what it is there for: ``python -m phantom.notices`` exits 0."""

from __future__ import annotations

import copy

import torch
import triton
import triton.language as tl

import forgetless as fl
import phantom
from forgetless.ops.autograd import lowrank_linear
from forgetless_kernels import fused, tiles
from forgetless_kernels.tl_utils import LaunchError

CUDA = torch.device("cuda", 0)


@triton.jit
def _double(x_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < n, other=0.0)
    tl.store(x_ptr + offs, x + x, mask=offs < n)


def copies(card: phantom.Trace) -> None:
    x = torch.zeros(4, 4, device=CUDA)
    sources = {
        "to": lambda: torch.ones(4).to("cuda"),
        "cuda": lambda: torch.ones(4).cuda(),
        "copy_": lambda: x.copy_(torch.ones(4)),
        "tensor": lambda: torch.tensor([1.0, 2.0], device="cuda"),
        "a list as an index": lambda: x[[0, 1]],
        "a list that is assigned to": lambda: x.__setitem__([0, 1], 1.0),
        "an index of the host": lambda: x[torch.tensor([0, 1])],
    }
    for name, source in sources.items():
        card.clear()
        source()
        assert len(card.copies) == 1 and not card.waits, (name, card.copies, card.waits)
    card.clear()
    x * torch.tensor(2.0) + 3  # by value
    assert not card.copies
    raises(RuntimeError, "same device", lambda: x + torch.ones(4))


def waits(card: phantom.Trace) -> None:
    x = torch.zeros(4, 4, device=CUDA)
    readers = {
        "item": lambda: x.sum().item(),
        "bool": lambda: bool(x.isfinite().all()),
        "tolist": x.tolist,
        "cpu": x.cpu,
        "equal": lambda: torch.equal(x, x),
        "nonzero": x.nonzero,
        "a mask": lambda: x[x > 0],
        "synchronize": torch.cuda.synchronize,
        "copy_": lambda: torch.ones(4, 4).copy_(x),
        "an event": lambda: torch.cuda.Event().synchronize(),
    }
    for name, reader in readers.items():
        card.clear()
        reader()
        assert len(card.waits) == 1 and not card.copies, (name, card.waits, card.copies)
    assert x.sum().item() == 1.0 and not x.sum() > x.sum() and bool(x.sum() > 0)


def launches(card: phantom.Trace) -> None:
    x = torch.zeros(100, device=CUDA)
    _double[4,](x, 100, BLOCK=32)
    assert card.launches[-1] == ("_double", (4, 1, 1)) and card.compiled[-1:] == ["_double"]
    card.clear()
    _double[4,](x, 99, BLOCK=32)
    assert not card.compiled
    _double[4,](x[1:], 99, BLOCK=32)  # not aligned
    _double[2,](x, 100, BLOCK=64)
    assert card.compiled == ["_double", "_double"] and len(card.launches) == 3
    raises(KeyError, "unrecognised", lambda: _double[4,](x, 100, BLOCK=32, WIDTH=3))
    raises(ValueError, "cpu tensor", lambda: _double[4,](torch.zeros(100), 100, BLOCK=32))
    raises(RuntimeError, "grid", lambda: _double[1, 1 << 17](x, 100, BLOCK=32))
    with tiles.forced("project", BLOCK_N=32):
        raises(LaunchError, "unrecognised", lambda: fused.project(x.view(10, 10), x.view(10, 10)))


def tensors(card: phantom.Trace) -> None:
    layer = torch.nn.Linear(8, 4).to("cuda")
    assert type(layer.weight) is torch.nn.Parameter and layer.weight.device == CUDA and layer.weight.is_cuda
    x = torch.randn(3, 8, device="cuda", requires_grad=True)
    layer(x).sum().backward()
    assert layer.weight.grad.shape == (4, 8) and layer.weight.grad.is_cuda and x.grad.device == CUDA
    twin = copy.deepcopy(layer)
    assert twin.weight is not layer.weight and type(twin.weight) is torch.nn.Parameter and twin.weight.is_cuda
    assert x[1:].data_ptr() - x.data_ptr() == 32 and not torch.zeros(1).is_cuda
    raises(ValueError, "down is on cpu", lambda: lowrank_linear(x, layer.weight, torch.ones(2, 8), torch.ones(4, 2)))
    assert fl.ops.explain_path(CUDA, torch.bfloat16, 8, 8, 2)[0] == "split"


def raises(kind: type[Exception], words: str, call: object) -> None:
    try:
        call()  # type: ignore[operator]
    except kind as error:
        assert words in str(error), error
        return
    raise AssertionError(f"no {kind.__name__}")


if __name__ == "__main__":
    with phantom.card(90) as card:
        for check in (copies, waits, launches, tensors):
            card.clear()
            check(card)
    assert not torch.cuda.is_available() and torch.ones(1, device="meta").is_meta
