"""Penalties keep nothing from one mode for another: whatever came before, value and gradients are the formula's."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import warnings
import weakref
from typing import Any

import pytest
import torch
from plain_penalties import plain_value
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import forgetless as fl

PENALTIES = {
    "orthogonal": fl.NullSpace(0.7, 6),
    "complement": fl.NullSpace(0.7, 20),
    "everything": fl.NullSpace(0.7, 99),
    "shared": fl.NullSpace(0.7, 6, "shared"),
    "hadamard": fl.NullSpace(0.7, 6, "hadamard"),
    "diag": fl.Laplace(3.0, prior_precision=0.1),
    "balanced": fl.Laplace(3.0, at_zero="balanced"),
    "kfac": fl.Laplace(3.0, curvature="kfac", columns=4),
    "tri_kfac": fl.Laplace(3.0, curvature="tri_kfac", columns=4),
    "output": fl.OutputDeviation(0.3),
    "weight": fl.WeightDeviation(0.2),
    "source diag": fl.SourceDeviation(0.1),
    "source q": fl.SourceDeviation(0.1, 4),
    "source full": fl.SourceDeviation(0.1, "full"),
    "loss": fl.LossDeviation(0.1, 4),
    "decay": fl.Decay(0.3),
}
every = pytest.mark.parametrize("name", PENALTIES)


class Net(nn.Module):
    """Siblings that are given one x, and a layer alone."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.o_proj = nn.Linear(24, 18), nn.Linear(24, 18), nn.Linear(18, 24)

    def forward(self, x: Tensor) -> Tensor:
        return self.o_proj(torch.tanh(self.q_proj(x)) * self.k_proj(x).sigmoid())


def square(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def batch(seed: int = 1) -> Tensor:
    return torch.randn(3, 7, 24, generator=torch.Generator().manual_seed(seed))


def move(model: nn.Module, seed: int) -> None:
    gen = torch.Generator().manual_seed(seed)
    for p in trained(model):
        p.data += 0.1 * torch.randn(p.shape, generator=gen)


def needs_statistics(model: nn.Module) -> bool:
    return any(s.statistics for layer in fl.adapters(model).values() for s in layer.adapter.penalty_states())


def made(name: str, calibrated: bool = True, inference: bool = False) -> nn.Module:
    torch.manual_seed(0)
    model = fl.adapt(Net(), fl.LoRA(4, penalties=(PENALTIES[name],)))
    move(model, 2)
    if calibrated and needs_statistics(model):
        with torch.inference_mode(inference):
            fl.calibrate(model, [batch()], square)
    move(model, 3)
    return model


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def results(model: nn.Module) -> list[Tensor]:
    model(batch(5))
    value = fl.penalty(model)
    return [value.detach(), *torch.autograd.grad(value, trained(model))]


def same(ours: list[Tensor], expected: list[Tensor]) -> None:
    assert all(type(t) is Tensor and not t.is_inference() for t in ours)
    torch.testing.assert_close(ours, expected, rtol=0, atol=0)


# ------------------------------------------------------------------------------------ inference mode


@every
def test_a_first_value_under_inference_mode_spoils_nothing(name):
    expected = results(made(name))
    model = made(name)
    saved = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.inference_mode():
        model(batch(5))
        assert torch.equal(fl.penalty(model), expected[0])
    same(results(model), expected)
    (square(model, batch()) + fl.penalty(model)).backward()
    model.load_state_dict(saved)
    same(results(model), expected)
    if needs_statistics(model):
        fl.calibrate(model, [batch()], square)
        assert not any(b.is_inference() for b in model.buffers())
    assert results(model)[0] >= 0


@pytest.mark.parametrize("name", ["diag", "balanced", "kfac", "tri_kfac", "source diag", "source q", "source full"])
def test_calibration_under_inference_mode_is_calibration(name):
    same(results(made(name, inference=True)), results(made(name)))


@every
def test_under_no_grad_and_outside_it_in_either_order(name):
    expected = results(made(name))
    model = made(name)
    model(batch(5))
    with torch.no_grad():
        value = fl.penalty(model)
    assert not value.requires_grad and torch.equal(value, expected[0])
    same(results(model), expected)
    with torch.no_grad():
        assert torch.equal(fl.penalty(model), value)


# ---------------------------------------------------------------------------------------- fake tensors


def fake_pass(name: str) -> None:
    """A model that is all fake: built, and its penalty differentiated."""
    with FakeTensorMode(allow_non_fake_inputs=name == "output"):  # which alone needs the layers to run
        model = fl.adapt(Net(), fl.LoRA(4, penalties=(PENALTIES[name],)))
        if name == "output":
            model(torch.randn(3, 7, 24))
        value = fl.penalty(model)
        grads = torch.autograd.grad(value, trained(model))
        assert isinstance(value, FakeTensor) and value.shape == ()
        assert [g.shape for g in grads] == [p.shape for p in trained(model)]


@every
def test_a_fake_model_before_and_after_a_real_one(name):
    expected = results(made(name))
    fake_pass(name)
    model = made(name)
    same(results(model), expected)
    fake_pass(name)
    same(results(model), expected)
    same(results(made(name)), expected)


@every
def test_a_real_model_under_fake_tensors_between_real_passes(name):
    expected = results(made(name))
    model = made(name)
    for _ in range(2):
        with FakeTensorMode(allow_non_fake_inputs=True):
            if name != "output":  # whose h comes from the layers
                assert isinstance(fl.penalty(model), FakeTensor)
        assert not any(isinstance(t, FakeTensor) for t in [*model.parameters(), *model.buffers()])
        same(results(model), expected)


def test_what_was_fake_does_not_count_as_calibrated():
    model = made("source diag", calibrated=False)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fl.penalty(model)
    with pytest.warns(UserWarning, match="no statistics"):
        fl.penalty(model)


# -------------------------------------------------------------------------------- copies and threads


@every
def test_copies_after_use_are_of_their_own(name):
    model = made(name)
    expected = results(model)
    other = copy.deepcopy(model)
    same(results(other), expected)
    for t in [*other.parameters(), *other.buffers()]:
        if t.is_floating_point():
            t.data.mul_(0.5)
    same(results(model), expected)


@every
def test_states_are_pickled_after_use(name):
    model = made(name)
    expected = results(model)
    for layer in fl.adapters(model).values():
        layer.adapter.penalties = pickle.loads(pickle.dumps(layer.adapter.penalties))
    same(results(model), expected)


def test_a_pickled_shared_basis_is_held_once():
    model = made("shared")
    layers = fl.adapters(model).values()
    states = pickle.loads(pickle.dumps([layer.adapter.penalties for layer in layers]))
    assert len({id(s[0].input.basis) for s in states[:2]}) == 1


@every
def test_two_threads_do_not_meet(name):
    models = [made(name), made(name)]
    move(models[1], 9)
    expected = [results(model) for model in models]
    wrong: list[Any] = []

    def work(model: nn.Module, expected: list[Tensor], inference: bool) -> None:
        for _ in range(10):
            if inference:
                with torch.inference_mode():
                    fl.penalty(model)
            value = fl.penalty(model)  # h of the last pass is of the thread that ran it
            grads = torch.autograd.grad(value, trained(model), retain_graph=True)
            if not all(torch.equal(a, b) for a, b in zip([value, *grads], expected, strict=True)):
                wrong.append(name)

    for model in models:
        model(batch(5))
    threads = [
        threading.Thread(target=work, args=(model, kept, i == 0 and name != "output"))
        for i, (model, kept) in enumerate(zip(models, expected, strict=True))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@every
def test_autocast_between_calls_changes_nothing(name):
    expected = results(made(name))
    model = made(name)
    for enabled in (True, False, True):
        model(batch(5))
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            value = fl.penalty(model)
            grads = torch.autograd.grad(value, trained(model))
        same([value.detach(), *grads], expected)


# ---------------------------------------------------------------------------- changes by the user


def per_layer(model: nn.Module) -> list[Tensor]:
    model(batch(5))
    rows = [(s, row) for row in fl.adapters(model).values() for s in row.adapter.penalty_states()]
    value = sum(plain_value(s, row.adapter, row.trace.hidden if s.needs_hidden else None) for s, row in rows)
    return [value.detach(), *torch.autograd.grad(value, trained(model))]


@every
@pytest.mark.parametrize("how", ["data", "copy_", "replaced"])
def test_a_buffer_that_is_changed_is_seen(name, how):
    model = made(name)
    results(model)
    for state in (s for layer in fl.adapters(model).values() for s in layer.adapter.penalty_states()):
        for module in state.modules():
            for key, buffer in module._buffers.items():
                if buffer is None or not buffer.is_floating_point():
                    continue
                changed = buffer * 1.5
                if how == "data":
                    buffer.data = changed
                elif how == "copy_":
                    buffer.copy_(changed)
                else:
                    setattr(module, key, changed)
    torch.testing.assert_close(results(model), per_layer(model), rtol=1e-4, atol=1e-6)


@every
@pytest.mark.parametrize("fused", [False, True])
def test_steps_of_an_optimiser_are_seen(name, fused):
    model = made(name)
    optimiser = torch.optim.AdamW(trained(model), lr=1e-2, fused=fused)
    for _ in range(3):
        optimiser.zero_grad()
        (square(model, batch()) + fl.penalty(model)).backward()
        optimiser.step()
        torch.testing.assert_close(results(model), per_layer(model), rtol=1e-4, atol=1e-6)


@every
def test_a_second_backward_pass_gives_the_gradient_of_the_value(name):
    """Also after the parameters have moved in between."""
    model = made(name)
    expected = results(model)
    model(batch(5))
    value = fl.penalty(model)
    first = torch.autograd.grad(value, trained(model), retain_graph=True)
    first[0].zero_()  # what was handed out is the user's
    if name != "output":  # which goes on through the layers
        move(model, 7)
    same(list(torch.autograd.grad(value, trained(model))), expected[1:])


def test_loading_statistics_is_seen():
    model, empty = made("source q"), made("source q", calibrated=False)
    results(model)
    model.load_state_dict(empty.state_dict())
    with pytest.warns(UserWarning, match="no statistics"):
        assert fl.penalty(model) == 0
    model.load_state_dict(made("source q").state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fl.penalty(model) > 0


# ------------------------------------------------------------------------------------ calibration


@pytest.mark.parametrize("name", ["diag", "kfac", "source q"])
def test_a_failed_calibration_keeps_no_graph_and_no_batch(name):
    model = made(name)
    activations: list[Any] = []
    model.q_proj.register_forward_hook(lambda module, args, y: activations.extend(map(weakref.ref, (args[0], y))))
    x = batch()
    given = weakref.ref(x)

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return square(model, x) * float("nan") if name != "source q" else square(model, x)

    def stop(done: int) -> None:
        raise RuntimeError("stopped")

    try:
        fl.calibrate(model, (x for _ in range(1)), loss, on_batch=stop)
    except (RuntimeError, ValueError) as error:
        kept = error  # as a notebook does
    del x
    gc.collect()
    assert kept.__traceback__ is not None
    assert activations and all(ref() is None for ref in activations)
    assert given() is None
    assert not any(s.calibrated for layer in fl.adapters(model).values() for s in layer.adapter.penalty_states())


class Overwriting(Net):
    """x is written to between two siblings."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        q = self.q_proj(x)
        x.mul_(2.0)
        return self.o_proj(torch.tanh(q) * self.k_proj(x).sigmoid())


@pytest.mark.parametrize("form", ["diag", 24, "full"])
def test_an_x_that_is_overwritten_between_siblings_is_another_x(form):
    model = fl.adapt(Overwriting(), fl.LoRA(4, penalties=(fl.SourceDeviation(0.1, form),)))
    fl.calibrate(model, [batch(), batch(2)], square)
    rows = torch.cat([batch().flatten(0, 1), batch(2).flatten(0, 1)])
    for layer, factor in ((model.q_proj, 1.0), (model.k_proj, 4.0)):
        (state,) = layer.adapter.penalty_states()
        expected = factor * rows.T @ rows / len(rows)
        expected = expected.diagonal() if form == "diag" else expected
        ours = state.source.diagonal() if form == "diag" else state.source.dense()
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_an_x_that_is_overwritten_before_its_gradient_is_refused():
    model = fl.adapt(Overwriting(), fl.LoRA(4, penalties=(fl.Laplace(),)))
    with pytest.raises(ValueError, match="the input of q_proj was changed in place after the layer had run on it"):
        fl.calibrate(model, [batch()], square)
    assert not any(s.calibrated for layer in fl.adapters(model).values() for s in layer.adapter.penalty_states())
