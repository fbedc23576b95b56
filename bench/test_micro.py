"""Microbenchmarks by pytest-benchmark: the op, each kernel, each penalty, and one layer beside its peers.

    pytest bench --benchmark-only [-k kernels] [--shapes 4096x4096]

A group is one case, a row one provider; the times are the host's, with a synchronisation on CUDA. Kernels are timed as
"Triton" on CUDA; on a CPU as "BLAS", and at small shapes as "interpreter", which says nothing of their speed. Rows of a
group run one after the other: to compare providers on a busy machine use ``python -m bench``, which interleaves them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from forgetless.ops import blas, dispatch
from forgetless_bench import dispatch as op
from forgetless_bench import layer, penalty, providers
from forgetless_bench.check import KERNELS, operands
from forgetless_bench.harness import FROZEN, OURS, PEFT
from forgetless_bench.shapes import Case, shape_of

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NATIVE = "Triton" if DEVICE.type == "cuda" else "interpreter"
#: Multiply-adds that the interpreter may be asked for.
SMALL = 1 << 21
PEERS = (FROZEN, OURS, "eager PyTorch", "LoRAFusion-style", PEFT, "PEFT, bf16 adapters")
OPS = (op.BARE, FROZEN, "forgetless, op", "forgetless, layer", "forgetless, custom op", "eager PyTorch", PEFT)


@pytest.fixture
def case(shape: str, pytestconfig: pytest.Config) -> Case:
    given = [pytestconfig.getoption(name) for name in ("tokens", "rank", "dtype")]
    return Case(shape, *given, dropout=0.0, method="lora")


def timed(benchmark: Any, call: Callable[[], Any] | None, case: str, provider: str, phase: str) -> None:
    """Time ``call``; the JSON has the other arguments in a row."""
    if call is None:
        pytest.skip(f"no {provider} here")
    benchmark.group = f"{phase}, {case}"
    benchmark.extra_info.update(case=case, provider=provider, phase=phase)

    def run() -> None:
        call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    run()
    benchmark(run)


@pytest.mark.parametrize("provider", OPS)
def test_op(benchmark: Any, provider: str) -> None:
    """What a call costs before any arithmetic, forward and backward."""
    timed(benchmark, op.calls(DEVICE).get(provider), op.CASE.removesuffix(", one thread"), provider, "op")


@pytest.mark.parametrize("backend", ["BLAS", NATIVE])
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels(benchmark: Any, kernel: str, backend: str, case: Case) -> None:
    sizes = case.M, shape_of(case.shape).N, shape_of(case.shape).K
    run = blas if backend == "BLAS" else dispatch.kernels
    if run is None or (backend == "interpreter" and sizes[0] * sizes[1] * sizes[2] > SMALL):
        pytest.skip("Triton is not installed" if run is None else "too large for the interpreter: --shapes, --tokens")
    t = operands((*sizes, case.R), case.torch_dtype, DEVICE)
    timed(benchmark, lambda: KERNELS[kernel](run, t, (0.0, None)), case.name, f"{kernel}, {backend}", "kernel")


class OneLayer(nn.Module):
    """A model of one linear layer, called as penalties are calibrated and measured."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.layer = base

    def forward(self, inputs_embeds: Tensor, labels: Tensor | None = None) -> Any:
        y = self.layer(inputs_embeds)
        return SimpleNamespace(logits=y, loss=y.float().square().mean())


@pytest.mark.parametrize("name", [*penalty.specs(1), penalty.AUTHORS])
def test_penalties(benchmark: Any, name: str, case: Case) -> None:
    """Value and gradient of one layer's penalty."""
    N, K = shape_of(case.shape).N, shape_of(case.shape).K
    k = min(providers.K, N, K)
    base = OneLayer(providers.frozen_linear(N, K, False, case.torch_dtype, DEVICE))
    x = torch.randn(4, case.M // 4, K, device=DEVICE).to(case.torch_dtype)
    value = penalty.Value(name, base, k, [{"inputs_embeds": x, "labels": x}], x, case.R)
    timed(benchmark, value, f"{case.name} k={k}", name, "penalty")


@functools.lru_cache(1)
def layers(case: Case) -> Mapping[str, layer.Layer]:
    return layer.make(dataclasses.asdict(case), str(DEVICE))[0]


@pytest.mark.parametrize("provider", PEERS)
def test_peers(benchmark: Any, provider: str, case: Case) -> None:
    """One layer, forward and backward."""
    made = layers(case).get(provider)
    timed(benchmark, made and made.both, case.name, provider, "layer")
