"""Faults put into the kernels: another plan takes over with one warning and the same numbers. And long runs."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import stir
from torch import Tensor, nn

import forgetless as fl
from forgetless.ops import blas, first_use
from forgetless.ops import dispatch as plans
from forgetless.ops import plans as choices
from forgetless.ops.autograd import lowrank_linear

tl_utils = pytest.importorskip("forgetless_kernels.tl_utils")

pytestmark = pytest.mark.usefixtures("no_plans")
needs_triton = pytest.mark.skipif(plans.kernels is None, reason="Triton is not installed")
STEPS = int(os.environ.get("FORGETLESS_STEPS", "1000"))


class Attention(nn.Module):
    """Three siblings and a layer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(12, 16), nn.Linear(12, 8), nn.Linear(12, 16)
        self.out = nn.Linear(16, 12, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.q_proj(x) * self.k_proj(x).sum(-1, keepdim=True) + self.v_proj(x))


def model(targets: Any = "all-linear", method: Any = None) -> nn.Module:
    torch.manual_seed(0)
    return stir(fl.adapt(Attention(), method or fl.LoRA(rank=3), targets))


def results(net: nn.Module, x: Tensor) -> list[Tensor]:
    """y, dx and the gradient of every adapter parameter"""
    x = x.detach().requires_grad_()
    y = net(x)
    leaves = [x, *(p for p in net.parameters() if p.requires_grad)]
    return [y.detach(), *torch.autograd.grad(y.square().sum(), leaves)]


X = torch.randn(5, 12, generator=torch.Generator().manual_seed(1))


def compile_error() -> Exception:
    from triton.compiler.errors import CompilationError

    return CompilationError(None, None, "no such instruction")


def resources() -> Exception:
    from triton.runtime.errors import OutOfResources

    return OutOfResources(300000, 232448, "shared memory")


FAULTS = {
    "does not compile": compile_error,
    "asks for too much": resources,
    "fails to launch": lambda: RuntimeError("CUDA error: invalid configuration argument"),
    "fails an assertion": lambda: AssertionError("tile"),
    "divides by zero": lambda: ZeroDivisionError("grid"),
}


TARGETS = {"alone": ["out"], "siblings": ["q_proj", "k_proj", "v_proj"]}
#: What a step of each launches; ``test_these_are_the_launchers`` keeps the list true.
LAUNCHED = {
    "alone": ("matmul_lowrank", "outer", "project", "project_outer"),
    "siblings": ("matmul_lowrank", "outer", "project", "project_outer"),
}
PLACES = [(who, launcher) for who, launchers in LAUNCHED.items() for launcher in launchers]


def failing(monkeypatch: pytest.MonkeyPatch, launcher: str, error: Exception) -> list[str]:
    """From now on the launcher raises; the list grows by each call of it."""
    calls: list[str] = []

    def broken(*_: Any, **__: Any) -> Any:
        calls.append(launcher)
        with tl_utils.launching(launcher, X):
            raise error

    monkeypatch.setattr(plans.kernels, launcher, broken)
    return calls


@needs_triton
@pytest.mark.parametrize("who", TARGETS)
def test_these_are_the_launchers(who, monkeypatch):
    called = set()

    def noted(name: str, plain: Any) -> Any:
        return lambda *arguments, **options: called.add(name) or plain(*arguments, **options)

    for name in ("project", "matmul_lowrank", "linear_lowrank", "outer", "project_outer"):
        monkeypatch.setattr(plans.kernels, name, noted(name, getattr(plans.kernels, name)))
    with plans.backend("triton"):
        results(model(TARGETS[who]), X)
    assert sorted(called) == sorted(LAUNCHED[who])


@needs_triton
@pytest.mark.parametrize(("who", "launcher"), PLACES)
@pytest.mark.parametrize("fault", FAULTS)
def test_blas_takes_over_with_one_warning_and_its_numbers(fault, who, launcher, monkeypatch):
    net = model(TARGETS[who])
    want = results(net, X)
    calls = failing(monkeypatch, launcher, FAULTS[fault]())
    with plans.backend("triton"), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = results(net, X)
        first, told = len(calls), [str(w.message) for w in said if "forgetless" in str(w.message)]
        again = results(net, X)
    for ours in (found, again):
        for a, b in zip(ours, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert 0 < first == len(calls)  # what failed is not tried again
    assert len([w for w in said if "forgetless" in str(w.message)]) == len(told) == len(set(told))
    assert 1 <= len(told) <= 2 and all("plan 'split' dropped" in text for text in told)


@needs_triton
@pytest.mark.parametrize(("who", "launcher"), PLACES)
@pytest.mark.parametrize("fault", FAULTS)
def test_strict_raises_whatever_failed(fault, who, launcher, monkeypatch):
    """That very error, at the first call, in whichever pass: nothing is tried again, on BLAS or otherwise."""
    monkeypatch.setenv("FORGETLESS_PLAN", "split,strict")
    error = FAULTS[fault]()
    net, calls = model(TARGETS[who]), failing(monkeypatch, launcher, error)
    for name in ("linear_lowrank", "dx_and_ddown", "project", "matmul_lowrank"):
        monkeypatch.setattr(blas, name, lambda *_, **__: pytest.fail("BLAS took over"))
    with plans.backend("triton"), warnings.catch_warnings(record=True) as said, pytest.raises(type(error)) as raised:
        warnings.simplefilter("always")
        results(net, X)
    assert raised.value is error and len(calls) == 1
    assert not [w for w in said if "dropped" in str(w.message)]


@needs_triton
@pytest.mark.parametrize("targets", [["out"], ["q_proj", "k_proj", "v_proj"]], ids=["alone", "siblings"])
def test_out_of_memory_is_said_as_it_is(targets, monkeypatch):
    """BLAS needs more memory than the kernels: nothing to fall back on."""

    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    for launcher in ("project", "linear_lowrank"):
        monkeypatch.setattr(plans.kernels, launcher, full)
    with plans.backend("triton"), pytest.raises(torch.OutOfMemoryError):
        results(model(targets), X)
    assert not choices._failed


@needs_triton
@pytest.mark.parametrize("how", ["a number", "NaN", "a shape"])
def test_a_kernel_that_disagrees_at_its_first_use_is_dropped(how, monkeypatch):
    """As on a card, where the first use of a shape is checked."""
    net = model(["out"])
    want = results(net, X)
    for name in ("matmul_lowrank", "add_products"):  # the GEMM of the forward and of the backward pass
        plain = getattr(plans.kernels, name)

        def wrong(*arguments: Any, plain: Any = plain, **options: Any) -> Any:
            y = plain(*arguments, **options)
            return {"a number": y + 0.1, "NaN": y * float("nan"), "a shape": y[:-1]}[how]

        monkeypatch.setattr(plans.kernels, name, wrong)
    monkeypatch.setattr(first_use, "checkable", lambda device: True)
    with plans.backend("triton"), pytest.warns(UserWarning, match="'split' dropped for .* result 0") as said:
        found = results(net, X)
    told = sorted(str(w.message).split(" dropped for ")[1].split()[0] for w in said if "dropped" in str(w.message))
    assert told == ["backward", "forward"]
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@needs_triton
@pytest.mark.parametrize("shape", [(0, 4), (4, 0)], ids=["no outputs", "no inputs"])
def test_a_layer_without_inputs_or_outputs_needs_no_kernel(shape, monkeypatch):
    monkeypatch.setenv("FORGETLESS_PLAN", "split,strict")
    N, K = shape
    tensors = [torch.ones(size, requires_grad=True) for size in ((3, K), (N, K), (2, K), (N, 2))]
    with plans.backend("triton"):
        y = lowrank_linear(*tensors)
        grads = torch.autograd.grad(y.sum(), tensors)
    assert y.shape == (3, N) and not y.any() and not any(g.any() for g in grads)


# -------------------------------------------------------------------------------------- long runs


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def handles() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc")
def test_nothing_grows_over_many_steps(tmp_path, record_property):
    """Penalty, drift, gradients, optimiser; now and then a save, a load and an evaluation."""
    method = fl.LoRA(rank=3, dropout=0.1, penalties=(fl.Decay(0.01), fl.OutputDeviation(0.01)))
    net = model(method=method)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], 1e-3)
    before: tuple[int, int, int] | None = None
    for step in range(STEPS):
        optimizer.zero_grad()
        (net(X).square().mean() + fl.penalty(net)).backward()
        optimizer.step()
        if step % 200 == 199:
            fl.drift(net)
            fl.save(net, tmp_path / "adapter")
            torch.manual_seed(0)
            again = fl.load(Attention(), tmp_path / "adapter")
            with torch.no_grad():
                assert torch.equal(again.eval()(X), net.eval()(X))
            net.train()
            del again
        if step == STEPS // 4:
            gc.collect()
            before = resident(), handles(), len(gc.get_objects())
    gc.collect()
    after = resident(), handles(), len(gc.get_objects())
    assert before is not None
    record_property("steps", STEPS)
    for name, early, late in zip(("bytes", "handles", "objects"), before, after, strict=True):
        record_property(f"{name} more", late - early)
    assert after[1] == before[1]
    assert after[2] <= before[2] + 200, "objects are kept"
    assert after[0] <= before[0] + (4 << 20), f"{(after[0] - before[0]) >> 10} KiB more"


@needs_triton
def test_the_paths_do_not_drift_apart():
    """The same training on BLAS and on the kernels."""
    ends = []
    for backend in ("blas", "triton"):
        net = model()
        optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], 1e-4)
        with plans.backend(backend):
            for _ in range(15):
                optimizer.zero_grad()
                net(0.1 * X).square().mean().backward()
                optimizer.step()
            ends.append([p.detach().clone() for p in net.parameters()])
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_deep_copy_stands_on_its_own():
    net = model()
    want = results(net, X)
    twin = copy.deepcopy(net)
    for a, b in zip(results(twin, X), want, strict=True):
        assert torch.equal(a, b)
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert all(torch.equal(a, b) for a, b in zip(results(net, X), want, strict=True))


@pytest.mark.parametrize(
    "method", [fl.LoRA(rank=3), fl.CLoRA(rank=3, k=4), fl.CURLoRA(rank=3), fl.LaLoRA(rank=3)], ids=str
)
def test_a_module_goes_to_a_spawned_process(method):
    """Which is by pickle: torch's own, of our objects; forgetless reads none."""
    net = model(method=method)
    want = results(net, X)
    again = pickle.loads(pickle.dumps(net))
    assert all(torch.equal(a, b) for a, b in zip(results(again, X), want, strict=True))
    assert fl.adapters(again).keys() == fl.adapters(net).keys()


def test_threads_give_what_one_gives():
    net = model()
    inputs = [X * i for i in range(1, 7)]
    want = [results(net, x) for x in inputs]
    found: list[Any] = [None] * len(inputs)

    def work(i: int) -> None:
        for _ in range(10):
            found[i] = results(net, inputs[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for ours, theirs in zip(found, want, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b)


class Features(torch.utils.data.Dataset):
    """What an adapted model makes of each row, computed by whoever loads it."""

    def __init__(self, net: nn.Module) -> None:
        self.net = net

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Tensor:
        with torch.no_grad():
            return self.net(X * index)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("method", [fl.LoRA(rank=3), fl.CURLoRA(rank=3)], ids=str)
def test_workers_forked_from_a_training_process_compute_the_same(method):
    net = model(method=method)
    results(net, X)  # the parent has been through both passes
    want = [net(X * index).detach() for index in range(8)]
    loader = torch.utils.data.DataLoader(Features(net), None, num_workers=2, multiprocessing_context="fork", timeout=60)
    for ours, theirs in zip(loader, want, strict=True):
        torch.testing.assert_close(ours, theirs)
    results(net, X)


@pytest.mark.parametrize("method", [fl.LoRA(rank=3, dropout=0.1), fl.CLoRA(rank=3, k=4), fl.LaLoRA(rank=3)], ids=str)
def test_a_model_on_the_meta_device(method):
    """Adapted it has no storage and runs, forward and backward, to the right shapes; given storage, it runs as ever."""
    with torch.device("meta"):
        net, x = Attention(), torch.empty(2, 5, 12, requires_grad=True)
    fl.adapt(net, method)
    assert all(p.is_meta for p in net.parameters())
    for y in (net(x), net(x[0, :0])):
        learnt = [p for p in net.parameters() if p.requires_grad]
        grads = torch.autograd.grad(y.sum(), [x, *learnt])
        assert y.is_meta and y.shape[-1] == 12 and [g.shape for g in grads] == [t.shape for t in (x, *learnt)]
    net.to_empty(device="cpu")
    assert net(X).shape == (5, 12)


def test_curlora_wants_the_values_that_meta_has_not():
    with torch.device("meta"):
        net = Attention()
    with pytest.raises(ValueError, match="weight of q_proj is on the meta device; CURLoRA is drawn from its values"):
        fl.adapt(net, fl.CURLoRA(rank=3))
    assert not fl.adapters(net) and all(p.requires_grad for p in net.parameters())


def test_a_tied_weight_stays_tied():
    net = Attention()
    net.v_proj.weight = net.q_proj.weight
    fl.adapt(net, fl.LoRA(rank=3), ["q_proj"])
    stir(net)
    assert net.v_proj.weight is net.q_proj.weight
    with pytest.raises(ValueError, match="weight of q_proj is also that of v_proj"):
        fl.merge(net)


def test_adapting_twice_is_refused():
    net = model()
    with pytest.raises(ValueError, match="model is adapted already; fl.merge"):
        fl.adapt(net, fl.LoRA(rank=3))
    with pytest.raises(ValueError, match="adapted already"):
        fl.adapt(nn.Sequential(net), fl.CLoRA(rank=3), ["out"])
