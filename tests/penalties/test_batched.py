"""The grouped penalties equal the sum of the per-layer formulas, values and gradients, in float64."""

import copy
import threading

import pytest
import torch
from plain_penalties import plain_value
from torch import nn

import forgetless as fl
from forgetless.penalties.batched import buckets

PENALTIES = [
    *(fl.NullSpace(0.7, k, basis) for k in (5, 30, 47, 1000) for basis in ("orthogonal", "shared", "hadamard")),
    fl.Laplace(3.0),
    fl.Laplace(3.0, prior_precision=0.5),
    fl.Laplace(3.0, fisher="batch"),
    fl.OutputDeviation(0.3),
    fl.WeightDeviation(0.2),
    fl.SourceDeviation(0.1),
    fl.SourceDeviation(0.1, "full"),
    fl.SourceDeviation(0.1, 5),
    fl.SourceDeviation(0.1, 0),
    fl.LossDeviation(0.1, 5),
    fl.LossDeviation(0.1, "full"),
    fl.Decay(0.3),
]

MEASURED = (fl.Laplace, fl.LossDeviation, fl.SourceDeviation)


class Net(nn.Module):
    """Layers of several shapes, some alike."""

    def __init__(self):
        super().__init__()
        sizes = [(24, 48), (48, 48), (48, 48), (48, 24), (24, 24)]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in sizes)
        self.double()

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def moved(method, calibrated):
    torch.manual_seed(0)
    model = fl.adapt(Net(), method)
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:
        nn.init.normal_(p, std=0.1)
    x = torch.randn(6, 24, dtype=torch.float64)
    if calibrated:
        fl.calibrate(model, [x, x + 1], loss=lambda m, batch: m(batch).square().mean())
    for p in trained:
        p.data += 0.1 * torch.randn_like(p)
    model(x)
    return model, trained


def per_layer(model):
    rows = fl.adapters(model).values()
    hidden = {layer: None if layer.trace is None else layer.trace.hidden for layer in rows}
    return sum(plain_value(s, layer.adapter, hidden[layer]) for layer in rows for s in layer.adapter.penalty_states())


@pytest.mark.parametrize("method", [fl.LoRA, fl.CURLoRA])
@pytest.mark.parametrize("penalty", PENALTIES, ids=str)
def test_frozen_adapters_have_a_penalty_without_gradient(penalty, method):
    model, trained = moved(method(4, penalties=(penalty,)), isinstance(penalty, MEASURED))
    for p in trained:
        p.requires_grad_(False)
    model(torch.randn(6, 24, dtype=torch.float64))
    grouped = fl.penalty(model)
    torch.testing.assert_close(grouped, per_layer(model), rtol=1e-13, atol=0)
    assert grouped.shape == () and not grouped.requires_grad
    assert (grouped == 0) == isinstance(penalty, fl.Decay)  # of what is trained


@pytest.mark.parametrize("method", [fl.LoRA, fl.CURLoRA])
@pytest.mark.parametrize("penalty", PENALTIES, ids=str)
def test_grouped_equals_the_sum_over_layers(penalty, method):
    model, trained = moved(method(4, penalties=(penalty,)), isinstance(penalty, MEASURED))
    grouped, plain = fl.penalty(model), per_layer(model)
    assert plain > 0
    torch.testing.assert_close(grouped, plain, rtol=1e-13, atol=0)
    ours = torch.autograd.grad(2 * grouped, trained, allow_unused=True, retain_graph=True)
    theirs = torch.autograd.grad(2 * plain, trained, allow_unused=True)
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_kinds_add_up():
    both, _ = moved(fl.LoRA(4, penalties=(fl.Decay(0.3), fl.NullSpace(0.7, 5), fl.Decay(0.1))), False)
    assert torch.allclose(fl.penalty(both), per_layer(both))


@pytest.mark.parametrize("penalty", PENALTIES, ids=str)
def test_to_compute_it_changes_no_module_and_a_copy_gives_the_same(penalty):
    model, _ = moved(fl.LoRA(4, penalties=(penalty,)), isinstance(penalty, MEASURED))
    before = {name: (b, b.data_ptr(), b._version, b.untyped_storage().nbytes()) for name, b in model.named_buffers()}
    first = fl.penalty(model)
    first.backward()
    after = dict(model.named_buffers())
    assert after.keys() == before.keys()
    for name, (buffer, pointer, version, size) in before.items():
        assert after[name] is buffer and buffer.data_ptr() == pointer
        assert buffer._version == version and buffer.untyped_storage().nbytes() == size
    if not isinstance(penalty, fl.OutputDeviation):  # a copy has no last forward pass
        assert torch.equal(fl.penalty(copy.deepcopy(model)), first)


@pytest.mark.parametrize("limit", [0, 5000, 1 << 30])
@pytest.mark.parametrize(
    "penalty", [fl.NullSpace(0.7, 5), fl.SourceDeviation(0.1, 5), fl.Laplace(3.0, curvature="kfac")]
)
def test_the_bound_on_a_stack_s_bytes_changes_no_result(penalty, limit, monkeypatch):
    monkeypatch.setattr("forgetless.penalties.batched.STACK_BYTES_CPU", limit)
    model, trained = moved(fl.LoRA(4, penalties=(penalty,)), not isinstance(penalty, fl.NullSpace))
    torch.testing.assert_close(fl.penalty(model), per_layer(model), rtol=1e-13, atol=0)


def test_groups_are_cut_where_a_stack_would_be_too_large():
    assert buckets(["a", "a", "a", "b", "c"], [40, 40, 40, 1, 400], 100) == [[0, 1], [2], [3], [4]]
    assert buckets(["a", "b", "a"], [1, 1, 1], 2) == [[0, 2], [1]]


def test_models_that_share_a_basis_do_not_share_a_change_of_it():
    """One tensor while it is the same, whoever holds it; another as soon as a user writes to one."""
    one, two = (moved(fl.CLoRA(4, k=5, basis="shared"), False)[0] for _ in range(2))
    first = fl.penalty(two)
    one.layers[1].adapter.penalties[0].input.basis.data.zero_()
    later = moved(fl.CLoRA(4, k=5, basis="shared"), False)[0]
    assert torch.equal(fl.penalty(later), first)
    assert torch.equal(
        fl.penalty(copy.deepcopy(later).float().double()), fl.penalty(copy.deepcopy(later).float().double())
    )


def test_a_shared_basis_is_held_once_wherever_it_goes():
    model, _ = moved(fl.CLoRA(4, k=5, basis="shared"), False)
    first = fl.penalty(model)
    for net in (model, copy.deepcopy(model), copy.deepcopy(model).float()):
        sides = [(p.input.basis, p.output.basis) for la in fl.adapters(net).values() for p in la.adapter.penalties]
        wide = [basis for pair in sides for basis in pair if basis.shape[0] == 48]
        assert len(wide) == 6 and len({basis.data_ptr() for basis in wide}) == 2
    assert torch.equal(fl.penalty(model), first)


def test_a_frozen_factor_gets_no_gradient():
    model, _ = moved(fl.CLoRA(4, k=5), False)
    for layer in fl.adapters(model).values():
        layer.adapter.down.requires_grad_(False)
    fl.penalty(model).backward()
    assert all(layer.adapter.down.grad is None for layer in fl.adapters(model).values())
    assert all(layer.adapter.up.grad is not None for layer in fl.adapters(model).values())


@pytest.mark.parametrize("basis", ["orthogonal", "shared", "hadamard"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_later_call_changes_no_result(basis, dtype):
    """A later call, of this model or another, changes nothing that was handed out; threads do not meet."""

    def made(seed):
        torch.manual_seed(seed)
        model = fl.adapt(Net().to(dtype), fl.LoRA(4, penalties=(fl.NullSpace(0.7, 9, basis),)))
        for layer in fl.adapters(model).values():
            nn.init.normal_(layer.adapter.up, std=0.1)
        return model, [p for p in model.parameters() if p.requires_grad]

    def results(model, trained):
        value = fl.penalty(model)
        return [value.detach(), *torch.autograd.grad(value, trained)]

    model, trained = made(0)
    first = results(model, trained)
    kept = [t.clone() for t in first]
    for other in (made(1), (model, trained)):
        for p in other[1]:
            p.data.mul_(1.5)
        results(*other)
    assert all(torch.equal(a, b) for a, b in zip(first, kept, strict=True))
    expected = results(model, trained)
    wrong = []

    def work():
        for _ in range(20):
            if not all(torch.equal(a, b) for a, b in zip(results(model, trained), expected, strict=True)):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
