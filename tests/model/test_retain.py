"""fl.retain solves its problem, fl.fit_budget keeps to its budget, and a scaled task is folded scaled."""

import copy
import itertools

import pytest
import torch
from helpers import stir, tiny_llama, token_batch
from tiny_experts import STACKS, tiny_experts
from torch import nn

import forgetless as fl
from forgetless.budget import _mean_loss
from forgetless.layers.experts import matrices
from forgetless.model import running
from forgetless.retain import _RIDGE


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(10, 8), nn.Linear(10, 6, bias=False)
        self.o_proj = nn.Linear(6, 5)
        self.double()

    def forward(self, x):
        return self.o_proj(torch.tanh(self.k_proj(x))) + self.q_proj(x)[..., :5]


def loss(model, x):
    return (model(x) - 1).square().mean()


def learnt(covariance="full", weight=0.0, method=fl.LoRA):
    """An adapted model after a task, its kept batches and those of the task."""
    torch.manual_seed(0)
    model = fl.adapt(Net(), method(3, penalties=(fl.SourceDeviation(weight, covariance),)))
    kept, task = ([torch.randn(50, 10).double() * torch.rand(10) for _ in range(2)] for _ in range(2))
    fl.calibrate(model, kept, loss)
    for layer in fl.adapters(model).values():
        nn.init.normal_(layer.adapter.up, std=0.3)
    return model, kept, task


def inputs_of(model, batches):
    """What each layer is given, one below the other."""
    seen = {name: [] for name in fl.adapters(model)}
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, name=name: seen[name].append(args[0].detach()))
        for name, layer in fl.adapters(model).items()
    ]
    for batch in batches:
        model(batch)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(xs) for name, xs in seen.items()}


def test_the_new_update_is_the_minimum():
    """The gradient of E_task ||(D' - D) x||^2 + w E_kept ||D' x||^2 in A' is zero, up to the ridge."""
    model, kept, task = learnt()
    before = {name: layer.delta() for name, layer in fl.adapters(model).items()}
    xs = inputs_of(model, task)
    with fl.disabled(model):
        ks = inputs_of(model, kept)  # calibrated before training, at B = 0
    fl.retain(model, task, 0.3, loss)
    for name, layer in fl.adapters(model).items():
        A = layer.adapter.down.detach().clone().requires_grad_()
        D = layer.adapter.scale * layer.adapter.up.detach() @ A
        x, k = xs[name], ks[name]
        value = (x @ (D - before[name]).T).square().sum() / len(x) + 0.3 * (k @ D.T).square().sum() / len(k)
        (grad,) = torch.autograd.grad(value, A)
        start = (k @ before[name].T).square().sum() / len(k)
        assert grad.norm() < 1e-3 * start, name
        assert (k @ D.T).square().sum() / len(k) < 0.9 * start, "the kept text is acted on less"


def test_the_weight_runs_from_the_update_to_none():
    model, _, task = learnt()
    states = copy.deepcopy(model.state_dict())
    sizes = []
    for weight in (1e-6, 0.1, 1.0, 1e6):
        model.load_state_dict(states)
        moved = fl.retain(model, task, weight, loss)
        sizes.append(fl.adapters(model)["q_proj"].delta().norm())
        assert moved.keys() == fl.adapters(model).keys()
    assert all(a > b for a, b in itertools.pairwise(sizes))
    assert moved["q_proj"] > 0.999 and sizes[0] > 100 * sizes[-1]


@pytest.mark.parametrize("covariance", ["diag", 4, "full"])
def test_every_form_of_the_statistics(covariance):
    model, _, task = learnt(covariance)
    source = fl.adapters(model)["q_proj"].adapter.penalty_states()[0].source
    before, kept = fl.adapters(model)["q_proj"].adapter.down.detach().clone(), source.dense().clone()
    up = fl.adapters(model)["q_proj"].adapter.up.detach().clone()
    x = torch.cat(task)
    S = x.T @ x / len(x)
    fl.retain(model, task, 0.5, loss)
    layer = fl.adapters(model)["q_proj"].adapter
    torch.testing.assert_close(source.dense(), kept, rtol=0, atol=0)  # the statistics stay
    torch.testing.assert_close(layer.up, up, rtol=0, atol=0)
    if covariance == "diag":
        S = S.diagonal().diag()
    if covariance != 4:  # the eigenbasis of the task's own is not this one
        torch.testing.assert_close(layer.down, before @ S @ torch.linalg.inv(S + 0.5 * kept), rtol=2e-3, atol=2e-4)
    assert not torch.equal(layer.down, before)


def test_earlier_tasks_are_kept_after_consolidation():
    """A second task turned away from the kept text and the first one changes the first one's outputs less."""
    changes = []
    for retained in (False, True):
        model, _, task = learnt()
        fl.consolidate(model, task, loss)
        start = model(task[0])
        for layer in fl.adapters(model).values():
            nn.init.normal_(layer.adapter.up, std=0.3)
        torch.manual_seed(1)
        other = [torch.randn(50, 10).double() * torch.linspace(0, 1, 10) for _ in range(2)]
        if retained:
            fl.retain(model, other, 1.0, loss)
        changes.append((model(task[0]) - start).norm())
    assert changes[1] < 0.7 * changes[0]


def test_the_files_stay_as_they_are(tmp_path):
    model, _, task = learnt()
    fl.retain(model, task, 0.5, loss)
    fl.save(model, tmp_path)
    torch.manual_seed(0)
    other = fl.load(Net(), tmp_path)
    x = torch.randn(4, 10).double()
    torch.testing.assert_close(other(x), model(x))


def test_what_cannot_be_retained_is_refused_and_nothing_changes():
    model, _, task = learnt()
    before = copy.deepcopy(model.state_dict())
    for weight in (0, -1.0, float("nan"), True, "much"):
        with pytest.raises(ValueError, match="weight is .*, wants a number above 0"):
            fl.retain(model, task, weight, loss)
    with pytest.raises(ValueError, match="batches is empty"):
        fl.retain(model, [], 0.1, loss)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    with pytest.raises(ValueError, match="q_proj has no statistics of kept text"):
        fl.retain(fl.adapt(Net(), fl.LoRA(2)), task, 0.1, loss)
    with pytest.raises(ValueError, match="CURLoRAAdapter does not train its two factors"):
        fl.retain(fl.adapt(Net(), fl.CURLoRA(2, penalties=(fl.SourceDeviation(),))), task, 0.1, loss)


def test_a_weight_of_zero_only_measures():
    model, kept, _ = learnt(weight=0.0)
    assert fl.penalty(model) == 0 and not fl.penalty(model).requires_grad
    model, kept, _ = learnt(weight=0.1)
    assert fl.penalty(model) > 0


# A budget -----------------------------------------------------------------------------------------------


def test_a_budget_is_kept_to():
    model, kept, _ = learnt()
    with fl.disabled(model), torch.no_grad():
        start = sum(loss(model, x).item() for x in kept) / 2
    with torch.no_grad():
        whole = sum(loss(model, x).item() for x in kept) / 2 - start
    assert whole > 0.01
    before = model(kept[0])
    factor = fl.fit_budget(model, kept, 0.5 * whole, loss)
    torch.testing.assert_close(model(kept[0]), before, rtol=0, atol=0)
    assert 0 < factor < 1 and factor * 32 == int(factor * 32)

    def rise(factor):
        with fl.scaled(model, factor), torch.no_grad():
            return sum(loss(model, x).item() for x in kept) / 2 - start

    assert rise(factor) <= 0.5 * whole < rise(factor + 1 / 32)
    assert fl.fit_budget(model, kept, 2 * whole, loss) == 1.0


@pytest.mark.parametrize(("title", "counts"), [("NetForMaskedLM", (3, 1)), ("NetForCausalLM", (2, 0))])
def test_batches_count_by_the_labels_of_the_model_s_own_loss(title, counts):
    model = type(title, (Net,), {})()
    rows = [([[1, 1, 1]], 2.0), ([[1, -100, -100]], 5.0)]
    batches = [{"labels": torch.tensor(labels), "value": torch.tensor(value)} for labels, value in rows]
    expected = sum(n * value for n, (_, value) in zip(counts, rows, strict=True)) / sum(counts)
    assert _mean_loss(model, batches, lambda model, batch: batch["value"]) == pytest.approx(expected)


def test_a_budget_that_is_none_is_refused():
    model, kept, _ = learnt()
    for budget in (0, -0.1, float("nan"), "little", True):
        with pytest.raises(ValueError, match="budget is .*, wants a number of nats per token above 0"):
            fl.fit_budget(model, kept, budget, loss)
    with pytest.raises(ValueError, match="batches is empty"):
        fl.fit_budget(model, [], 0.1, loss)
    with pytest.raises(ValueError, match="no adapters"):
        fl.fit_budget(Net(), kept, 0.1, loss)


# A scaled task ------------------------------------------------------------------------------------------


def test_a_scaled_task_is_folded_scaled(tmp_path):
    model, kept, task = learnt()
    base = {name: layer.weight.detach().clone() for name, layer in fl.adapters(model).items()}
    delta = {name: layer.delta() for name, layer in fl.adapters(model).items()}
    scale = fl.adapters(model)["q_proj"].adapter.scale
    fl.consolidate(model, task, loss, scale=0.6)
    for name, layer in fl.adapters(model).items():
        torch.testing.assert_close(layer.weight, base[name] + 0.6 * delta[name])
        assert layer.adapter.scale == scale, "the next task has the method's own scale"
    fl.save(model, tmp_path)  # with what was folded
    torch.manual_seed(0)
    x = torch.randn(4, 10).double()
    original = Net()
    original.load_state_dict({k.replace(".base", ""): v for k, v in unfolded(model, base).items()}, strict=False)
    torch.testing.assert_close(fl.load(original, tmp_path)(x), model(x))


def unfolded(model, base):
    rest = {
        f"{name}.bias": layer.base.bias for name, layer in fl.adapters(model).items() if layer.base.bias is not None
    }
    return {**{f"{name}.weight": weight for name, weight in base.items()}, **rest}


def test_a_scale_of_zero_is_refused():
    model, _, task = learnt()
    with pytest.raises(ValueError, match="scale is 0"):
        fl.consolidate(model, task, loss, scale=0)
    with pytest.raises(ValueError, match="factor is nan"):
        fl.consolidate(model, task, loss, scale=float("nan"))


def swapped_in(model, **targets):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, **{"target_modules": ["o_proj"], **targets})
    return fl.swap_in(peft.get_peft_model(model, config), penalties=(fl.SourceDeviation(0, "full"),))


@pytest.mark.parametrize("kind", ["experts", "PEFT's layers", "PEFT's experts"])
def test_experts_and_layers_of_peft_are_retained(kind):
    if kind == "experts":
        model = fl.adapt(tiny_experts("Qwen3Moe"), fl.LoRA(rank=2, penalties=(fl.SourceDeviation(0, "full"),)), STACKS)
    else:
        experts = kind == "PEFT's experts"
        model = swapped_in(tiny_experts("Qwen3Moe") if experts else tiny_llama(), target_parameters=experts and STACKS)
    stir(model.eval())
    kept, task = token_batch((30, 30)), token_batch((30, 30), seed=1)
    other = copy.deepcopy(model)
    fl.calibrate(model, [kept])
    fl.calibrate(other, [task])
    layers, others = (matrices(running(m)) for m in (model, other))
    before = {name: layer.adapter.factors()[0].detach().double().clone() for name, layer in layers.items()}
    moved = fl.retain(model, [task], 0.3)
    assert moved.keys() == layers.keys() and any(moved.values())
    for name, layer in matrices(running(model)).items():
        (kept_state,), (task_state,) = layer.adapter.penalty_states(), others[name].adapter.penalty_states()
        S_kept, S_task = kept_state.source.dense().double(), task_state.source.dense().double()
        A = layer.adapter.factors()[0].detach().double()
        ridge = _RIDGE * (S_task.diagonal().mean() + 0.3 * S_kept.diagonal().mean())
        gradient = (A - before[name]) @ (S_task + ridge * torch.eye(len(S_task))) + 0.3 * A @ S_kept
        assert gradient.norm() <= 1e-4 * (0.3 * before[name] @ S_kept).norm(), name
        assert torch.equal(A, before[name]) == (moved[name] == 0), name
