"""What a layer of a model meets after ``fl.adapt``: changes, modes and tracers that eager PyTorch would see."""

import pytest
import torch
from helpers import stir
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import forgetless as fl


class Net(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.fc = nn.Linear(width, width)

    def forward(self, x):
        return self.fc(x)


def adapted(method=None, dtype=torch.float64):
    torch.manual_seed(0)
    model = fl.adapt(Net().to(dtype), method or fl.LoRA(4))
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.3)
    return model, torch.randn(5, 16, dtype=dtype)


def update(layer, x):
    down, up = layer.adapter.factors()
    return layer.adapter.scale * x @ down.T @ up.T


def test_a_hook_put_on_the_frozen_layer_afterwards_runs():
    model, x = adapted()
    model.fc.base.register_forward_hook(lambda module, args, y: 2.0 * y)
    torch.testing.assert_close(model(x), 2.0 * F.linear(x, model.fc.weight, model.fc.bias) + update(model.fc, x))
    assert fl.explain(model)["fc"].path == "onto"


def test_a_forward_put_on_the_frozen_layer_afterwards_runs():
    model, x = adapted()
    model.fc.base.forward = lambda x: x * 3.0
    torch.testing.assert_close(model(x), 3.0 * x + update(model.fc, x))


def test_another_module_in_the_place_of_the_frozen_layer_runs():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2.0 * super().forward(x)

    model, x = adapted()
    model.fc.base = Doubled(16, 16).double().requires_grad_(False)
    torch.testing.assert_close(model(x), model.fc.base(x) + update(model.fc, x))


def test_a_parametrised_weight_is_read_in_every_call():
    class Halved(nn.Module):
        def forward(self, w):
            return 0.5 * w

    model, x = adapted()
    plain = model.fc.base.weight.detach().clone()
    parametrize.register_parametrization(model.fc.base, "weight", Halved())
    torch.testing.assert_close(model(x), F.linear(x, 0.5 * plain, model.fc.bias) + update(model.fc, x))


@pytest.mark.parametrize("write", ["in place", "data", "rows"])
def test_curlora_sees_every_change_of_the_weight_it_was_drawn_from(write):
    model, x = adapted(fl.CURLoRA(4))
    model(x)
    weight = model.fc.base.weight
    with torch.no_grad():
        if write == "in place":
            weight.mul_(2.0)
        elif write == "data":  # moves no version counter
            weight.data.mul_(2.0)
        else:
            weight.data[model.fc.adapter.rows] = 0.0
    torch.testing.assert_close(model(x), F.linear(x, weight, model.fc.bias) + update(model.fc, x))


@pytest.mark.parametrize("backend", ["reference", "blas", "triton"])
@pytest.mark.parametrize("scale", [1.0, 0.5, 64.0, 512.0])
def test_float16_overflows_no_sooner_than_eager(backend, scale):
    x = torch.full((2, 16), 100.0, dtype=torch.float16, requires_grad=True)
    weight = torch.zeros(8, 16, dtype=torch.float16)
    down, up = torch.full((2, 16), 1.5, requires_grad=True), torch.full((8, 2), 1e-4, requires_grad=True)
    with fl.ops.backend(backend):
        y, h = fl.ops.lowrank_linear(x, weight, down, up, scale=scale, return_h=True)
        grads = torch.autograd.grad(y.float().sum(), [x, down, up])
    wide = (x.double() @ down.double().T) @ up.double().T * scale
    torch.testing.assert_close(y.double(), wide, rtol=5e-3, atol=1e-3)
    theirs = torch.autograd.grad(wide.sum(), [x, down, up])
    torch.testing.assert_close([g.double() for g in grads], [g.double() for g in theirs], rtol=5e-3, atol=1e-3)
    expected = scale * x.double() @ down.double().T
    assert torch.isinf(h).all() if expected.max() > 65504 else torch.allclose(h.double(), expected, rtol=5e-3)


def test_jit_trace_records_the_formula():
    model, x = adapted()
    traced = torch.jit.trace(model, (x,))
    other = torch.randn(3, 16, dtype=torch.float64)
    torch.testing.assert_close(traced(other), model(other))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_fake_and_real_passes_in_one_process(dropout):
    from torch._subclasses.fake_tensor import FakeTensorMode

    for fake_first in (True, False):
        real, x = adapted(fl.LoRA(4, dropout=dropout), torch.float32)
        if not fake_first:
            real(x).sum().backward()
        with FakeTensorMode():
            model = fl.adapt(Net(), fl.LoRA(4, dropout=dropout))
            y = model(torch.randn(5, 16))
            y.sum().backward()
            assert y.shape == (5, 16) and model.fc.adapter.up.grad.shape == (16, 4)
        torch.manual_seed(1)
        results = real(x), real.eval()(x)
        assert all(type(result) is torch.Tensor and result.isfinite().all() for result in results)
        real.train()(x).sum().backward()


@pytest.mark.parametrize("shape", [(4, 16), (2, 3, 16)], ids=str)
def test_batched_gradients(shape):
    model, _ = adapted()
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    vectors = torch.randn(5, *shape, dtype=torch.float64)
    leaves = [x, model.fc.adapter.down, model.fc.adapter.up]
    ours = torch.autograd.grad(model(x), leaves, vectors, is_grads_batched=True)
    plain = F.linear(x, model.fc.weight, model.fc.bias) + update(model.fc, x)
    torch.testing.assert_close(ours, torch.autograd.grad(plain, leaves, vectors, is_grads_batched=True))


def test_a_nested_input_is_refused_by_name():
    model, _ = adapted(dtype=torch.float32)
    x = torch.nested.nested_tensor([torch.randn(2, 16), torch.randn(3, 16)], layout=torch.jagged)
    with pytest.raises(ValueError, match="x is a nested tensor"):
        model(x)


def test_a_float8_input_is_refused_by_name():
    model, x = adapted(dtype=torch.float32)
    with pytest.raises(ValueError, match="x has dtype float8_e4m3fn"):
        model(x.to(torch.float8_e4m3fn))


@pytest.mark.parametrize("dynamic", [None, True])
def test_compiled_in_one_graph_whatever_the_scale(dynamic):
    torch._dynamo.reset()
    for rank, alpha in ((4, 8.0), (8, 16.0), (4, 3.0)):
        model, x = adapted(fl.LoRA(rank, alpha))
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=dynamic)
        torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("backend", ["reference", "blas", "triton"])
def test_a_checkpoint_that_ends_in_siblings_may_stop_early(backend):
    """What stops it is an exception of torch's, no failing kernel."""
    if backend == "triton":
        pytest.importorskip("triton")

    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(16, 16) for _ in range(3))

        def forward(self, x):
            return self.q_proj(x) + self.k_proj(x) + self.v_proj(x)

    model, x = stir(fl.adapt(Heads(), fl.LoRA(4))), torch.randn(4, 16, requires_grad=True)
    with fl.ops.backend(backend):
        model(x).square().sum().backward()
        expected, x.grad = x.grad, None
        checkpoint(model, x, use_reentrant=False).square().sum().backward()
    torch.testing.assert_close(x.grad, expected)
