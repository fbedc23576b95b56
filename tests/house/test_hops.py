"""How far x travels: our functions nested between a layer and the matrix products or the kernel."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from kernel_plans import PLANS, on_kernels
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import forgetless as fl
from forgetless.layers.linear import AdaptedLinear
from forgetless.ops import autograd, dispatch

ROOT = Path(__file__).resolve().parents[2]
OURS = tuple(str(ROOT / part) for part in ("forgetless", "kernels"))


class Nested:
    """The longest chain of our functions above a product or a kernel, per entry point."""

    def __init__(self, entries: dict[Any, str]):
        self.entries = entries
        self.chains: dict[str, list[str]] = {}

    def note(self, frame: FrameType | None, last: str | None) -> None:
        chain = [] if last is None else [last]
        while frame is not None:
            path = str(Path(frame.f_code.co_filename).resolve())
            if path.startswith(OURS) and not frame.f_code.co_name.startswith("<"):  # a comprehension is no function
                chain.append(f"{path.removeprefix(str(ROOT) + '/')}:{frame.f_code.co_name}")
            name = self.entries.get(frame.f_code)
            if name is not None:
                if len(chain) > len(self.chains.get(name, [])):
                    self.chains[name] = chain[::-1]
                return
            frame = frame.f_back


class Products(TorchDispatchMode):
    """Notes every matrix product of torch's."""

    def __init__(self, nested: Nested):
        super().__init__()
        self.nested = nested

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in ("mm", "addmm", "bmm"):
            self.nested.note(sys._getframe(1), None)
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def watched(nested: Nested, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every product of torch's and every kernel launched in the block is noted."""
    if dispatch.kernels is not None:
        from forgetless_kernels.launcher import Launch

        plain = Launch.__call__

        def launch(self: Any, *arguments: Any) -> None:  # from here on it is the launch itself, as Triton's own call is
            path = str(Path(self.kernel.fn.__code__.co_filename).resolve()).removeprefix(str(ROOT) + "/")
            nested.note(sys._getframe(1), f"{path}:{self.kernel.fn.__name__}")
            plain(self, *arguments)

        monkeypatch.setattr(Launch, "__call__", launch)
    with Products(nested):
        yield


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.out = (nn.Linear(32, 32) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.q_proj(x) + self.k_proj(x))


METHODS = {"LoRA": fl.LoRA(4), "dropout": fl.LoRA(4, dropout=0.25), "CURLoRA": fl.CURLoRA(4), "CLoRA": fl.CLoRA(4, k=8)}
BACKENDS = ["blas", "reference", *PLANS]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("targets", [["out"], ["q_proj", "k_proj"]], ids=["alone", "siblings"])
def test_at_most_four_hops_and_four_files(targets, method, backend, monkeypatch):
    if backend in PLANS and dispatch.kernels is None:
        pytest.skip("Triton is not installed")
    torch.manual_seed(0)
    model = fl.adapt(Attention().bfloat16(), METHODS[method], targets).train()
    x = torch.randn(40, 32, dtype=torch.bfloat16, requires_grad=True)
    entries = {
        AdaptedLinear.forward.__code__: "forward",
        autograd.LowrankLinear.backward.__code__: "backward",
    }
    nested = Nested(entries)
    block = on_kernels(backend, monkeypatch) if backend in PLANS else dispatch.backend(backend)
    with block, watched(nested, monkeypatch):
        model(x).sum().backward()
    assert nested.chains.keys() == {"forward", "backward"}
    for chain in nested.chains.values():
        assert len(chain) - 1 <= 4, chain
        assert len({place.partition(":")[0] for place in chain}) <= 4, chain
        assert backend not in PLANS or chain[-1].startswith("kernels/"), chain


def test_one_formula_of_the_backward_pass():
    """The others: that of a stack of experts, which makes the same products for each expert's rows; one moves parts
    between processes, one puts gradients of penalties in their places."""
    functions = {
        f"{path.relative_to(ROOT)}:{line.split()[1].partition('(')[0]}"
        for folder in ("forgetless", "kernels")
        for path in (ROOT / folder).rglob("*.py")
        for line in path.read_text(encoding="utf-8").splitlines()
        if line.startswith("class ") and "autograd.Function" in line
    }
    assert functions == {
        "forgetless/ops/autograd.py:LowrankLinear",
        "forgetless/ops/grouped.py:_Grouped",
        "forgetless/layers/tensor_parallel.py:_Own",
        "forgetless/penalties/batched.py:_ClosedForm",
    }
