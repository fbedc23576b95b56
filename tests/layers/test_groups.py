"""Layers fed by one x share a pass over it, and nothing else changes."""

import copy
import threading
import weakref

import numpy as np
import pytest
import torch
from torch import nn

import forgetless as fl
from forgetless.layers import groups
from forgetless.layers.groups import families
from forgetless.ops import autograd, blas, reference
from forgetless.ops import dispatch as ops


class Attention(nn.Module):
    """q, k and v of one x (or of two, as in cross-attention), then o."""

    def __init__(self, width=24, dtype=torch.float64, bias=True):
        super().__init__()
        self.q_proj = nn.Linear(width, width, bias)
        self.k_proj = nn.Linear(width, 8, bias)
        self.v_proj = nn.Linear(width, 8, bias)
        self.o_proj = nn.Linear(8, width, bias)
        self.to(dtype)

    def forward(self, x, other=None):
        other = x if other is None else other
        q, k, v = self.q_proj(x), self.k_proj(other), self.v_proj(other)
        return self.o_proj(torch.tanh(q[..., :8]) * k + v)


def pair(method, dtype=torch.float64, **fields):
    """The same adapted model twice: with siblings, and with every layer on its own."""
    torch.manual_seed(0)
    model = fl.adapt(Attention(dtype=dtype, **fields), method)
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.2)
    alone = copy.deepcopy(model)
    for layer in fl.adapters(alone).values():
        layer.group = None
    return model, alone


def run(model, x, *others):
    x = x.clone().requires_grad_(True)
    loss = model(x, *others).square().sum() + fl.penalty(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    return [loss.detach(), *torch.autograd.grad(loss, [x, *trained])]


def same(model, alone, *inputs):
    for ours, theirs in zip(run(model, *inputs), run(alone, *inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.fixture
def projections(monkeypatch):
    """Counts the calls that read x forward."""
    calls = []
    plain = blas.project
    monkeypatch.setattr(
        blas,
        "project",
        lambda x, down, *rest, **options: calls.append(tuple(down.shape)) or plain(x, down, *rest, **options),
    )
    return calls


METHODS = [fl.LoRA(4), fl.LoRA(4, penalties=(fl.OutputDeviation(0.3),)), fl.CURLoRA(4)]


@pytest.mark.parametrize("method", METHODS, ids=["lora", "output deviation", "curlora"])
@pytest.mark.parametrize("shape", [(5, 24), (2, 3, 24), (1, 24), (0, 24)], ids=str)
def test_results_and_gradients_are_those_of_the_single_layers(method, shape):
    same(*pair(method), torch.randn(shape, dtype=torch.float64))


def test_one_projection_serves_three_layers(projections):
    model, _ = pair(fl.LoRA(4))
    with torch.no_grad():
        model(torch.randn(5, 24, dtype=torch.float64))
    assert projections == [(12, 24), (4, 8)]


def test_another_input_leaves_the_group_and_stays_right(projections):
    model, alone = pair(fl.LoRA(4))
    x, other = (torch.randn(5, 24, dtype=torch.float64) for _ in range(2))
    same(model, alone, x, other)
    projections.clear()
    with torch.no_grad():
        model(x, other)
    assert projections == [(4, 24), (8, 24), (4, 8)]  # q on its own, k with v, o
    same(model, alone, x, other)
    assert "v_proj" in fl.explain(model)["k_proj"].reason and "pass" not in fl.explain(model)["q_proj"].reason


def test_a_changed_x_is_projected_again():
    model, alone = pair(fl.LoRA(4))
    x = torch.randn(5, 24, dtype=torch.float64)
    with torch.no_grad():
        model.q_proj(x)
        x.mul_(2.0)
        torch.testing.assert_close(model.k_proj(x), alone.k_proj(x))


@pytest.mark.parametrize("backend", ["reference", "blas", "triton"])
def test_dropout_is_of_x_once_for_all_siblings(backend, monkeypatch):
    """Against the plain formula with the generator's own mask: values and every gradient."""
    model, _ = pair(fl.LoRA(4, dropout=0.5), torch.float64 if backend != "triton" else torch.float32)
    dtype = model.q_proj.weight.dtype
    seed = torch.tensor([3, 4], dtype=torch.int32)
    monkeypatch.setattr(autograd, "draw_seed", lambda device: seed)
    monkeypatch.setattr(groups, "draw_seed", lambda device: seed)
    x = torch.randn(6, 24, dtype=dtype, requires_grad=True)
    siblings = [model.q_proj, model.k_proj, model.v_proj]
    wanted = [x, *(p for layer in siblings for p in layer.adapter.parameters())]
    dys = [torch.randn(6, layer.out_features, dtype=dtype) for layer in siblings]
    model.train().forward = lambda x: [layer(x) for layer in siblings]
    with ops.backend(backend):
        ys = model(x)
        ours = torch.autograd.grad(ys, wanted, dys)
    dropped = x * reference.keep_mask(seed, 0.5, 6, 24) / 0.5
    plain = [
        layer.base(x) + layer.adapter.scale * dropped @ layer.adapter.down.T @ layer.adapter.up.T for layer in siblings
    ]
    theirs = torch.autograd.grad(plain, wanted, dys)
    tight = {"rtol": 1e-10, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close([*ys, *ours], [*plain, *theirs], **tight)


def test_another_dropout_rate_goes_alone(projections):
    model, _ = pair(fl.LoRA(4, dropout=0.5))
    model.train().k_proj.eval()
    model(torch.randn(5, 24, dtype=torch.float64))
    assert projections == [(4, 24)] * 3 + [(4, 8)]


@pytest.mark.parametrize("what", ["weight", "bias"])
def test_a_trained_base_goes_alone_and_gets_its_gradient(what):
    model, alone = pair(fl.LoRA(4))
    for m in (model, alone):
        getattr(m.k_proj.base, what).requires_grad_(True)
    same(model, alone, torch.randn(5, 24, dtype=torch.float64))


def test_outside_of_the_parent_each_layer_runs_alone(projections):
    model, _ = pair(fl.LoRA(4))
    x = torch.randn(5, 24, dtype=torch.float64)
    for name in ("q_proj", "k_proj", "v_proj"):
        getattr(model, name)(x)
    assert projections == [(4, 24)] * 3


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_pass_that_dies_leaves_nothing_for_the_next(error, projections):
    model, alone = pair(fl.LoRA(4))
    x = torch.randn(5, 24, dtype=torch.float64)

    def dies(*_):
        raise error("between two siblings")

    handle = model.k_proj.register_forward_pre_hook(dies)
    with pytest.raises(error):
        model(x)
    handle.remove()
    group = model.q_proj.group
    if error is RuntimeError:  # torch runs hooks after every Exception; after an interrupt the next call drops it
        assert group.scope is None
    same(model, alone, x)
    assert group.scope is None


def test_siblings_run_backward_one_after_the_other():
    for trained in (True, False):
        model, alone = pair(fl.LoRA(4))
        grads = []
        for m in (model, alone):
            x = torch.ones(5, 24, dtype=torch.float64, requires_grad=trained)
            ys = []
            m.forward = lambda x, m=m, ys=ys: ys.extend([m.q_proj(x), m.k_proj(x), m.v_proj(x)])
            m(x)
            for y in ys:
                y.square().sum().backward()
            grads.append([x.grad, *(p.grad for layer in fl.adapters(m).values() for p in layer.adapter.parameters())])
        torch.testing.assert_close(grads[0][:-2], grads[1][:-2], rtol=1e-10, atol=1e-12)


def test_a_factor_changed_between_two_backward_passes_is_an_error():
    model, _ = pair(fl.LoRA(4))
    ys = []
    model.forward = lambda x: ys.extend([model.q_proj(x), model.k_proj(x), model.v_proj(x)])
    model(torch.ones(5, 24, dtype=torch.float64))
    ys[0].sum().backward()
    with torch.no_grad():
        model.k_proj.adapter.up.add_(1.0)
    with pytest.raises(RuntimeError, match="in-place|inplace"):
        ys[1].sum().backward()


def change_scale(m, x):
    m.k_proj.adapter.scale = 0.25


def change_bias(m, x):
    m.k_proj.base.bias.data = m.k_proj.base.bias.data + 1.0


def change_weight(m, x):
    with torch.no_grad():
        m.k_proj.base.weight.mul_(0.5)


def change_factor(m, x):
    with torch.no_grad():
        m.k_proj.adapter.down.mul_(0.5)


def change_x(m, x):
    with torch.no_grad():
        x.mul_(2.0)


def add_hook(m, x):
    m.k_proj.base.register_forward_hook(lambda module, args, y: y + 1.0)


@pytest.mark.parametrize("change", [change_scale, change_bias, change_weight, change_factor, change_x, add_hook])
def test_a_change_between_two_siblings_is_seen(change):
    model, alone = pair(fl.LoRA(4))
    results = []
    for m in (model, alone):

        def forward(x, m=m):
            q = m.q_proj(x)
            change(m, x)
            return q, m.k_proj(x), m.v_proj(x)

        m.forward = forward
        with torch.no_grad():
            results.append(m(torch.ones(5, 24, dtype=torch.float64)))
    torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-12)


def test_each_sibling_has_its_own_scale_and_factors_a_rank(projections):
    model, alone = pair(fl.LoRA(4))
    for m in (model, alone):
        m.q_proj.adapter.scale = 0.5
    same(model, alone, torch.randn(5, 24, dtype=torch.float64))
    assert (4, 24) in projections and (12, 24) not in projections


def test_a_copy_shares_by_itself_and_a_removed_adapter_leaves_no_hook(projections):
    model, _ = pair(fl.LoRA(4))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin(torch.randn(5, 24, dtype=torch.float64))
    assert projections == [(12, 24), (4, 8)] and twin.q_proj.group is not model.q_proj.group
    assert not fl.remove(twin)._forward_hooks and not twin._forward_pre_hooks and model._forward_hooks


def test_only_wanted_gradients_flow():
    model, alone = pair(fl.LoRA(4))
    for m in (model, alone):
        m.k_proj.adapter.down.requires_grad_(False)
        m.v_proj.adapter.up.requires_grad_(False)
        m(torch.ones(5, 24, dtype=torch.float64)).sum().backward()
    assert model.k_proj.adapter.down.grad is None and model.v_proj.adapter.up.grad is None
    torch.testing.assert_close(model.q_proj.adapter.down.grad, alone.q_proj.adapter.down.grad)
    torch.testing.assert_close(model.k_proj.adapter.up.grad, alone.k_proj.adapter.up.grad)


def test_an_unused_sibling_costs_no_gradient():
    model, alone = pair(fl.LoRA(4))
    x = torch.randn(5, 24, dtype=torch.float64)
    grads = []
    for m in (model, alone):
        y = m.q_proj(x.requires_grad_(True))
        grads.append(torch.autograd.grad(y.sum(), [x, m.q_proj.adapter.down]))
    torch.testing.assert_close(grads[0], grads[1])


def test_gradient_checkpointing_recomputes_the_same():
    from torch.utils.checkpoint import checkpoint

    model, alone = pair(fl.LoRA(4))
    x = torch.randn(5, 24, dtype=torch.float64, requires_grad=True)
    for reentrant in (True, False):
        (checkpoint(model, x, use_reentrant=reentrant).square().sum()).backward()
        ours, x.grad = x.grad, None
        alone(x).square().sum().backward()
        theirs, x.grad = x.grad, None
        torch.testing.assert_close(ours, theirs)


def test_autocast_matches_the_single_layers():
    model, alone = pair(fl.LoRA(4), torch.float32)
    x = torch.randn(6, 24)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = model(x), alone(x)
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours, theirs, rtol=3e-2, atol=3e-2)


def test_threads_do_not_take_each_others_projections():
    model, alone = pair(fl.LoRA(4))
    wrong = []

    def work(seed):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(30):
            x = torch.randn(4, 24, dtype=torch.float64, generator=generator)
            with torch.no_grad():
                if not torch.allclose(model(x), alone(x)):
                    wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_the_kernels_give_the_same():
    pytest.importorskip("triton")
    model, alone = pair(fl.LoRA(4), torch.float32)
    x = torch.randn(6, 24)
    with ops.backend("triton"):
        ours = run(model, x)
        theirs = run(alone, x)
    with ops.backend("reference"):
        truth = run(alone, x)
    for a, b, c in zip(ours, theirs, truth, strict=True):
        torch.testing.assert_close(a, c, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(b, c, rtol=1e-4, atol=1e-4)


def test_families_share_a_parent_and_a_row():
    names = ["a.q_proj", "a.k_proj", "b.v_proj", "a.o_proj", "m.gate_proj", "m.up_proj", "q_proj", "v_proj"]
    assert families(names) == [["a.q_proj", "a.k_proj"], ["m.gate_proj", "m.up_proj"], ["q_proj", "v_proj"]]


def test_a_sibling_s_penalty_on_h_does_not_hang_on_who_is_called_first():
    model, _ = pair(fl.LoRA(4, penalties=(fl.OutputDeviation(0.3),)))
    model.q_proj.adapter.penalties = nn.ModuleList()
    model.q_proj.needs_hidden = False
    alone = copy.deepcopy(model)
    for layer in fl.adapters(alone).values():
        layer.group = None
    same(model, alone, torch.randn(5, 24, dtype=torch.float64))
    assert model.k_proj.trace.hidden is not None


def test_the_memory_of_what_a_result_was_made_of_is_kept():
    """Else a tensor that is given other memory twice could be back at the first address, and look unchanged."""
    model, _ = pair(fl.LoRA(rank=3))
    up = model.v_proj.adapter.up
    array = np.zeros(tuple(up.shape))
    kept = weakref.ref(array)
    up.data = torch.from_numpy(array)
    del array
    state = groups.State(model.v_proj)
    up.data = up.data.clone()
    assert kept() is not None and not state.same(groups.State(model.v_proj))
    del state
    assert kept() is None
