"""Consolidation keeps the function, adds the statistics, starts afresh, and can be saved, loaded and undone."""

import copy

import pytest
import torch
from torch import nn

import forgetless as fl


class Net(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(24, 20), nn.Linear(20, 24, bias=False)
        self.to(dtype)

    def forward(self, x):
        return self.v_proj(torch.tanh(self.q_proj(x)))


def loss(model, x):
    return (model(x) - 1).square().mean()


METHODS = [
    fl.LoRA(4),
    fl.LoRA(4, rslora=True, penalties=(fl.SourceDeviation(0.3),)),
    fl.LoRA(4, penalties=(fl.LossDeviation(0.3),)),
    fl.CLoRA(4, k=6),
    fl.CURLoRA(4),
    fl.LaLoRA(4, weight=3.0),
]


def learnt(method, dtype=torch.float32, tasks=1):
    """A model after ``tasks`` tasks, all but the last consolidated; with its original base."""
    torch.manual_seed(0)
    base = Net(dtype)
    model = fl.adapt(copy.deepcopy(base), method)
    batches = [torch.randn(5, 24, dtype=dtype) for _ in range(2)]
    if method.all_penalties() and not isinstance(method, fl.CLoRA):
        fl.calibrate(model, batches, loss)
    for task in range(tasks):
        for p in model.parameters():
            if p.requires_grad:
                p.data += 0.2 * torch.randn_like(p)
        if task < tasks - 1:
            fl.consolidate(model, batches, loss)
    return base, model, batches


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_the_function_stays_and_the_adapter_starts_afresh(method):
    base, model, batches = learnt(method, torch.float64)
    x = torch.randn(7, 24, dtype=torch.float64)
    before = model(x)
    start = model.q_proj.weight.clone()
    done = fl.consolidate(model, batches, loss)
    torch.testing.assert_close(model(x), before)
    assert not torch.equal(model.q_proj.weight, start)
    assert all(error < 1e-12 for error in done.rounding.values())
    model(x)
    assert all(value == 0.0 for value in fl.drift(model).values())
    fl.remove(model)
    torch.testing.assert_close(model(x), before)


def test_rounding_is_measured():
    _, model, _ = learnt(fl.LoRA(4), torch.bfloat16)
    layer = model.q_proj
    exact = layer.weight.float() + layer.delta()
    size = layer.delta().norm()
    done = fl.consolidate(model)
    assert done.rounding["q_proj"] == pytest.approx(((layer.weight.float() - exact).norm() / size).item())
    assert done.rounding["q_proj"] > 0


@pytest.mark.parametrize("covariance", ["diag", "full"])
def test_source_statistics_add_up(covariance):
    method = fl.LoRA(4, penalties=(fl.SourceDeviation(0.3, covariance),))
    base, model, batches = learnt(method, torch.float64)
    held = model.q_proj.adapter.penalties[0].covariance.clone()
    task = [torch.randn(6, 24, dtype=torch.float64) * 3]
    fl.consolidate(model, task, loss)
    outer = task[0].T @ task[0] / 6
    expected = held + (outer.diagonal() if covariance == "diag" else outer)
    torch.testing.assert_close(model.q_proj.adapter.penalties[0].covariance, expected)
    assert fl.penalty(model) == 0


def test_fisher_adds_up_and_is_centred_at_the_new_start():
    _, model, batches = learnt(fl.LaLoRA(4, weight=3.0), torch.float64)
    state = model.q_proj.adapter.penalties[0]
    held = state.fisher_up.clone()
    fl.consolidate(model, batches, loss)
    fresh = copy.deepcopy(model)
    fl.calibrate(fresh, batches, loss)
    torch.testing.assert_close(state.fisher_up, held + fresh.q_proj.adapter.penalties[0].fisher_up)
    torch.testing.assert_close(state.centre_down, model.q_proj.adapter.down.detach())
    assert fl.penalty(model) == 0


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_saved_and_loaded_onto_the_original_base_it_is_the_same_model(method, tmp_path):
    base, model, _ = learnt(method, torch.bfloat16, tasks=3)
    x = torch.randn(7, 24, dtype=torch.bfloat16)
    fl.save(model, tmp_path)
    again = fl.load(copy.deepcopy(base), tmp_path)
    assert torch.equal(again(x), model(x))
    assert torch.equal(again.q_proj.weight, model.q_proj.weight)
    torch.testing.assert_close(fl.penalty(again), fl.penalty(model))
    fl.save(again, tmp_path / "once more")
    assert torch.equal(fl.load(copy.deepcopy(base), tmp_path / "once more")(x), model(x))


def test_peft_computes_the_whole_change_on_the_original_base(tmp_path):
    peft = pytest.importorskip("peft")
    for method in (fl.LoRA(4), fl.LoRA(4, rslora=True), fl.CLoRA(4, k=6)):
        base, model, _ = learnt(method, tasks=3)
        fl.save(model, tmp_path)
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
        x = torch.randn(7, 24)
        torch.testing.assert_close(theirs(x), model(x), rtol=1e-5, atol=1e-4)


def test_curlora_still_refuses_another_base(tmp_path):
    base, model, _ = learnt(fl.CURLoRA(4), tasks=2)
    fl.save(model, tmp_path)
    folded = copy.deepcopy(base)
    folded.q_proj.weight.data.copy_(model.q_proj.weight)
    with pytest.raises(ValueError, match="weight of q_proj is not the one"):
        fl.load(folded, tmp_path)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_undo_is_exact(method):
    _, model, batches = learnt(method, torch.bfloat16)
    x = torch.randn(7, 24, dtype=torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    y, penalty = model(x), fl.penalty(model)
    done = fl.consolidate(model, batches, loss, undo=True)
    done.undo()
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert torch.equal(model(x), y) and torch.equal(fl.penalty(model), penalty) and not model.q_proj.folded
    with pytest.raises(ValueError, match="nothing was kept to undo"):
        done.undo()


def test_a_failure_changes_nothing():
    method = fl.LoRA(4, penalties=(fl.SourceDeviation(0.3),))
    _, model, batches = learnt(method)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def broken():
        yield batches[0]
        raise RuntimeError("the disk is gone")

    with pytest.raises(RuntimeError, match="the disk is gone"):
        fl.consolidate(model, broken(), loss)
    with pytest.raises(ValueError, match="batches is missing: SourceDeviation"):
        fl.consolidate(model)
    model.q_proj.adapter.up.data[0, 0] = float("nan")
    before["q_proj.adapter.up"][0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN or Inf; nothing was consolidated"):
        fl.consolidate(model, batches, loss)
    after = model.state_dict()
    assert all(torch.equal(after[name].nan_to_num(7), tensor.nan_to_num(7)) for name, tensor in before.items())
