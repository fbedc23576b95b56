"""CURLoRA's core in the passes: nothing of the size of C U, against float64, on every backend."""

import pytest
import torch
from kernel_plans import PLANS, on_kernels
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import forgetless as fl
from forgetless.ops import dispatch
from forgetless.ops.autograd import LowrankLinear, prepare
from forgetless.ops.bodies import Operands

NAMES = ("q_proj", "k_proj", "v_proj")


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        for name, n in zip(NAMES, (40, 24, 24), strict=True):
            self.add_module(name, nn.Linear(32, n, bias=name == "q_proj"))

    def forward(self, x):
        return torch.cat([getattr(self, name)(x) for name in NAMES], -1)


def adapted(rank, dtype):
    model = fl.adapt(Attention().to(dtype), fl.CURLoRA(rank, 1.5), "all-linear").train()
    torch.manual_seed(1)
    for name in NAMES:
        nn.init.normal_(getattr(model, name).adapter.core, std=rank**-0.5)
    return model


def gradients(model, x):
    x = x.clone().requires_grad_()
    y = model(x)
    cores = [getattr(model, name).adapter.core for name in NAMES]
    return [y, *torch.autograd.grad(y.square().sum(), [x, *cores])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rank", [1, 7, 40])
@pytest.mark.parametrize("plan", ["blas", "reference", "hybrid", "split"])
def test_siblings_against_float64(plan, rank, dtype, monkeypatch):
    if plan in PLANS and dispatch.kernels is None:
        pytest.skip("Triton is not installed")
    model, x = adapted(rank, dtype), torch.randn(3, 11, 32, generator=torch.Generator().manual_seed(2)).to(dtype)
    with on_kernels(plan, monkeypatch) if plan in PLANS else dispatch.backend(plan):
        ours = gradients(model, x)
    wide, x = adapted(rank, dtype), x.double().requires_grad_()
    ys, cores = [], []
    for name in NAMES:
        layer = getattr(wide, name)
        down, lift = layer.adapter.down.double(), layer.adapter.lift.double()
        cores.append(layer.adapter.core.detach().double().requires_grad_())
        bias = None if layer.bias is None else layer.bias.double()
        ys.append(nn.functional.linear(x, layer.weight.double() + 1.5 * lift @ cores[-1] @ down, bias))
    y = torch.cat(ys, -1)
    eps = 16 * torch.finfo(dtype).eps
    for i, (one, truth) in enumerate(zip(ours, [y, *torch.autograd.grad(y.square().sum(), [x, *cores])], strict=True)):
        size = truth.norm()
        if i > 1:  # of q.T @ h, which may cancel, the sum of its terms' sizes
            layer, dy = getattr(wide, NAMES[i - 2]).adapter, 2 * ys[i - 2].detach().flatten(0, 1)
            q, h = dy @ layer.lift.double(), 1.5 * x.detach().flatten(0, 1) @ layer.down.double().T
            size = (q.abs().T @ h.abs()).norm()
        assert (one.double() - truth).norm() <= eps * size
    assert all(grad.dtype == torch.float32 for grad in ours[2:])


class Sizes(TorchDispatchMode):
    """The sizes of every result that is no view of an argument."""

    def __init__(self):
        super().__init__()
        self.sizes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in given:
            self.sizes.add(tuple(sorted(out.shape)))
        return out


def test_nothing_of_the_size_of_up_is_made():
    layer = fl.adapt(nn.Sequential(nn.Linear(96, 160)), fl.CURLoRA(4), ["0"]).train()
    x = torch.randn(50, 96, requires_grad=True)
    with Sizes() as made:
        layer(x).sum().backward()
    assert (4, 50) in made.sizes and (4, 4) in made.sizes
    assert not made.sizes & {(4, 160), (4, 96), (96, 160)}


def operands(core_of):
    generator = torch.Generator().manual_seed(3)
    x, weight, down, up = (
        torch.randn(size, generator=generator, dtype=torch.float64) for size in ((9, 8), (12, 8), (3, 8), (12, 3))
    )
    return x.requires_grad_(), weight, down.requires_grad_(), up, core_of(generator).requires_grad_()


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_gradcheck_with_h(dropout):
    """In x, down and the core, with h as a second result."""
    x, weight, down, up, core = operands(lambda g: torch.randn(3, 3, generator=g, dtype=torch.float64))
    seed = torch.tensor([5, -9], dtype=torch.int32) if dropout else None

    def run(x, down, core):
        layers = Operands((weight,), (None,), (down,), (up,), (core,))
        return LowrankLinear.apply(*prepare(x, layers, 0.7, dropout, seed, return_h=True))

    assert torch.autograd.gradcheck(run, (x, down, core))


def test_an_up_that_is_trained_is_refused():
    x, weight, down, up, core = operands(lambda g: torch.randn(3, 3, generator=g, dtype=torch.float64))
    layers = Operands((weight,), (None,), (down,), (up.requires_grad_(),), (core,))
    with pytest.raises(ValueError, match="up requires a gradient, wants none beside a core"):
        prepare(x, layers, 1.0, 0.0, None)


def test_a_sibling_without_a_core_goes_alone():
    model = adapted(4, torch.float64)
    other = fl.adapt(Attention().double(), fl.LoRA(4, alpha=6.0), ["k_proj"]).train()
    other.k_proj.adapter.scale = 1.5
    expected = model(torch.ones(2, 32, dtype=torch.float64))[:, :40]
    group = model.q_proj.group
    group.members[1] = group.sets[0][1] = other.k_proj
    torch.testing.assert_close(model(torch.ones(2, 32, dtype=torch.float64))[:, :40], expected)


def test_compiled_it_is_the_same():
    model = fl.adapt(nn.Sequential(nn.Linear(32, 24).double()), fl.CURLoRA(3, 1.5), ["0"]).train()
    nn.init.normal_(model[0].adapter.core)
    x = torch.randn(7, 32, dtype=torch.float64)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager")
    for ours, truth in zip(
        *(torch.autograd.grad(run(x).square().sum(), model[0].adapter.core) for run in (compiled, model)), strict=True
    ):
        torch.testing.assert_close(ours, truth)
