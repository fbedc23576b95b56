"""Every penalty against autograd of its plain dense formula, in float64."""

from __future__ import annotations

import math
import warnings
from collections import OrderedDict
from typing import Any

import pytest
import torch
from helpers import stir, tiny_llama, token_batch
from torch import Tensor, nn

import forgetless as fl
from forgetless.methods import Site
from forgetless.model import build
from forgetless.ops import autograd, reference
from forgetless.penalties import PENALTIES, Penalty
from forgetless.penalties.base import Item, PenaltyState
from forgetless.penalties.hadamard import hadamard_blocks
from forgetless.penalties.nullspace import make_basis

N, K, R = 21, 26, 4
METHODS = {"lora": fl.LoRA, "curlora": fl.CURLoRA}
every_adapter = pytest.mark.parametrize("method", METHODS)


def site(dtype: torch.dtype = torch.float64, name: str = "layer", shape: tuple[int, int] = (N, K)) -> Site:
    gen = torch.Generator().manual_seed(0)
    return Site(name, torch.randn(shape, generator=gen, dtype=torch.float64).to(dtype))


def adapter_with(*penalties: Penalty, method: str = "lora", dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    return stir(build(METHODS[method](rank=R, alpha=6.0, penalties=penalties), site(dtype)))


def network(*penalties: Penalty, method: str = "lora", **options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(OrderedDict(layer=nn.Linear(K, N))).double()
    return stir(fl.adapt(model, METHODS[method](rank=R, alpha=6.0, penalties=penalties, **options), ["layer"]))


def tokens(*lead: int, seed: int = 0) -> Tensor:
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(*(lead or (3, 5)), K, generator=gen, dtype=torch.float64) * torch.linspace(0.1, 3, K).double()


def same_value_and_gradients(ours: Tensor, plain: Tensor, parameters: list[Tensor]) -> None:
    torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-12)
    got = torch.autograd.grad(ours, parameters, allow_unused=True, materialize_grads=True, retain_graph=True)
    want = torch.autograd.grad(plain, parameters, allow_unused=True, materialize_grads=True, retain_graph=True)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    assert any(grad.any() for grad in want)


def trained(module: nn.Module) -> list[Tensor]:
    return [p for p in module.parameters() if p.requires_grad]


def dense(adapter: Any) -> Tensor:
    down, up = adapter.factors()
    return adapter.scale * up @ down


# ---------------------------------------------------------------------------------------- NullSpace


def columns_of(basis: Any, dim: int) -> Tensor:
    """The protected columns (dim, k) of a basis, as a plain matrix."""
    buffers = dict(basis.named_buffers())
    if not buffers:  # all of the space
        return torch.eye(dim, dtype=torch.float64)
    kept = buffers.get("basis")
    if kept is None:
        kept = hadamard_blocks(torch.eye(dim, dtype=torch.float64) * basis.signs)[:, basis.columns]
    if "signs" in buffers and "basis" in buffers:  # one basis for all layers of a width, with signs of each layer's own
        kept = basis.signs[:, None] * kept
    if not basis.complement:
        return kept.double()
    return torch.linalg.qr(kept.double(), mode="complete").Q[:, kept.shape[1] :]


@every_adapter
@pytest.mark.parametrize("basis", ["orthogonal", "shared", "hadamard"])
@pytest.mark.parametrize("k", [1, 5, 10, 11, 13, 14, 20, 21, 25, 26, 500])
def test_null_space_is_the_paper_s_formula(method, basis, k):
    """weight / 2 (||A P||^2 + ||B^T Q||^2): raw factors; beyond dim / 2 by the complement; at dim plain decay."""
    adapter = adapter_with(fl.NullSpace(weight=0.7, k=k, basis=basis), method=method)
    (state,) = adapter.penalty_states()
    down, up = adapter.factors()
    P, Q = columns_of(state.input, K), columns_of(state.output, N)
    assert P.shape == (K, min(k, K)) and Q.shape == (N, min(k, N))
    plain = 0.35 * ((down @ P).square().sum() + (up.T @ Q).square().sum())
    same_value_and_gradients(state.value(adapter, None), plain, trained(adapter))


@pytest.mark.parametrize("basis", ["orthogonal", "hadamard"])
def test_null_space_never_keeps_more_than_half_the_columns(basis):
    for k in (1, 12, 13, 14, 25, 26, 27):
        made = make_basis(fl.NullSpace(k=k, basis=basis), K, site().weight, "layer.P")
        kept = sum(b.shape[-1] for name, b in made.named_buffers() if name in ("basis", "columns"))
        assert kept == (0 if k >= K else min(k, K - k))


@pytest.mark.parametrize("basis", ["orthogonal", "shared", "hadamard"])
@pytest.mark.parametrize("dim", [1, 2, 7, 26, 64, 100])
def test_bases_are_orthonormal(basis, dim):
    for k in {1, max(1, dim // 2), dim}:
        P = columns_of(make_basis(fl.NullSpace(k=k, basis=basis), dim, torch.zeros(1).double(), "n"), dim)
        torch.testing.assert_close(P.T @ P, torch.eye(P.shape[1], dtype=torch.float64), rtol=0, atol=1e-13)


@pytest.mark.parametrize("dim", [1, 3, 16, 64, 80, 257])
def test_hadamard_is_exactly_orthonormal(dim):
    """In whole numbers: each block times the root of its size holds +1 and -1 alone."""
    H = hadamard_blocks(torch.eye(dim, dtype=torch.float64))
    done = 0
    for size in (1 << bit for bit in reversed(range(dim.bit_length())) if dim >> bit & 1):
        block = (H[done : done + size, done : done + size] * math.sqrt(size)).round()
        assert torch.equal(block @ block.T, size * torch.eye(size, dtype=torch.float64))
        assert set(block.unique().tolist()) <= {1.0, -1.0}
        torch.testing.assert_close(block / math.sqrt(size), H[done : done + size, done : done + size])
        done += size
    assert H.count_nonzero() == sum(4**bit for bit in range(dim.bit_length()) if dim >> bit & 1)


def test_hadamard_stores_signs_and_indices_alone():
    made = make_basis(fl.NullSpace(k=32, basis="hadamard"), 128, torch.zeros(1), "layer.P")
    stored = sum(b.numel() * b.element_size() for b in made.buffers())
    assert stored <= 128 + 8 * 32


@pytest.mark.parametrize("basis", ["orthogonal", "hadamard"])
def test_the_mean_over_bases_is_decay_by_k_over_dim(basis):
    row = torch.randn(1, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    spec, like = fl.NullSpace(k=3, basis=basis), torch.zeros(1).double()
    bases = [make_basis(spec, 12, like, f"layer{i}") for i in range(2000)]
    values = torch.stack([basis.stacked([basis], row[None])[0] for basis in bases])
    error = abs(values.mean() - 3 / 12 * row.square().sum())
    assert error < 4.5 * values.std() / 2000**0.5


def test_haar_columns_point_everywhere_alike():
    """Each entry has mean 0 and variance 1 / dim: without the sign of R's diagonal the mean is not 0."""
    spec, like = fl.NullSpace(k=4), torch.zeros(1).double()
    draws = torch.stack([make_basis(spec, 8, like, f"layer{i}").basis for i in range(2000)])
    assert draws.mean(0).abs().max() < 4.5 * (1 / 8 / 2000) ** 0.5
    assert (draws.square().mean(0) - 1 / 8).abs().max() < 0.02


@pytest.mark.parametrize("basis", ["orthogonal", "hadamard"])
def test_a_basis_is_a_function_of_seed_and_name(basis):
    def value(seed: int = 0, name: str = "layer") -> Tensor:
        adapter = build(fl.LoRA(rank=R, penalties=(fl.NullSpace(k=6, basis=basis, seed=seed),)), site(name=name))
        with torch.no_grad():
            for p in adapter.parameters():
                p.copy_(torch.linspace(-1, 1, p.numel()).view_as(p))
        return adapter.penalty_states()[0].value(adapter, None)

    torch.manual_seed(1)
    first = value()
    torch.manual_seed(2)
    assert value() == first
    assert len({value().item(), value(seed=1).item(), value(name="other").item()}) == 3


def test_layers_that_share_a_basis_differ_by_its_signs():
    """One draw for both, but not one subspace; the mean over the signs alone is k / dim on the diagonal."""
    made = [make_basis(fl.NullSpace(k=6, basis="shared"), 26, site().weight, f"{i}.P") for i in range(400)]
    assert len({basis.basis.data_ptr() for basis in made}) == 1
    P, Q = (columns_of(basis, 26) for basis in made[:2])
    assert not torch.allclose(P @ P.T, Q @ Q.T, atol=0.1)
    mean = sum(columns_of(basis, 26) @ columns_of(basis, 26).T for basis in made) / len(made)
    off = mean - torch.diag(mean.diagonal())
    assert off.abs().max() < 4.5 * 0.25 / 400**0.5 and mean.diagonal().sum() == pytest.approx(6)


def test_input_and_output_bases_differ_in_a_square_layer():
    adapter = build(fl.LoRA(rank=R, penalties=(fl.NullSpace(k=6),)), site(shape=(26, 26)))
    state = adapter.penalty_states()[0]
    assert not torch.allclose(state.input.basis, state.output.basis)


def test_bases_draw_nothing_from_the_global_generator():
    adapter = fl.LoRA(rank=R).build(site())
    state = torch.get_rng_state()
    fl.NullSpace(k=6).attach(adapter, site())
    fl.NullSpace(k=6, basis="hadamard").attach(adapter, site())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("basis", ["orthogonal", "hadamard"])
def test_bases_are_not_in_the_state_dict(basis):
    model = network(fl.NullSpace(k=6, basis=basis))
    assert set(model.state_dict()) == {f"layer.{key}" for key in ("weight", "bias", "adapter.down", "adapter.up")}


def test_bases_follow_the_weight_s_dtype_and_stay_orthonormal_in_half():
    adapter = adapter_with(fl.NullSpace(k=6), dtype=torch.bfloat16)
    P = adapter.penalty_states()[0].input.basis
    assert P.dtype == torch.bfloat16 and adapter.penalty_states()[0].value(adapter, None).dtype == torch.float32
    torch.testing.assert_close(P.double().T @ P.double(), torch.eye(6).double(), rtol=0, atol=1e-2)


# -------------------------------------------------------------------------------------- deviations


@every_adapter
def test_weight_deviation_is_the_frobenius_norm_of_delta(method):
    adapter = adapter_with(fl.WeightDeviation(weight=0.3), method=method)
    plain = 0.3 * dense(adapter).square().sum()
    same_value_and_gradients(adapter.penalty_states()[0].value(adapter, None), plain, trained(adapter))


@every_adapter
@pytest.mark.parametrize("lead", [(), (3,), (3, 5), (1, 2, 3)], ids=str)
def test_output_deviation_is_the_mean_squared_change_of_the_output(method, lead):
    """Its gradient reaches x too."""
    model = network(fl.OutputDeviation(weight=0.3), method=method).train()
    x = tokens(*(lead or (1,)))[0 if lead == () else slice(None)].clone().requires_grad_()
    model(x)
    plain = 0.3 * (x @ dense(model.layer.adapter).T).square().sum(-1).mean()
    same_value_and_gradients(fl.penalty(model), plain, [x, *trained(model)])


def test_output_deviation_counts_the_dropped_out_x(monkeypatch):
    seed = torch.tensor([5, 6], dtype=torch.int32)
    monkeypatch.setattr(autograd, "draw_seed", lambda device: seed)
    model = network(fl.OutputDeviation(weight=0.3), dropout=0.25).train()
    x = tokens().requires_grad_()
    model(x)
    dropped = x * reference.keep_mask(seed, 0.25, 15, K).view(x.shape) / 0.75
    plain = 0.3 * (dropped @ dense(model.layer.adapter).T).square().sum(-1).mean()
    same_value_and_gradients(fl.penalty(model), plain, [x, *trained(model)])


def test_output_deviation_trains_together_with_the_loss():
    model = network(fl.OutputDeviation(weight=0.3))
    x = tokens().requires_grad_()
    (model(x).square().mean() + fl.penalty(model)).backward()
    got = [x.grad, *[p.grad for p in trained(model)]]
    y = x.detach().requires_grad_()
    delta = dense(model.layer.adapter)
    plain = nn.functional.linear(y, model.layer.weight + delta, model.layer.bias).square().mean()
    plain = plain + 0.3 * (y @ delta.T).square().sum(-1).mean()
    want = torch.autograd.grad(plain, [y, *trained(model)])
    torch.testing.assert_close(got, list(want), rtol=1e-10, atol=1e-12)


@every_adapter
@pytest.mark.parametrize("kind", ["mask", "weights"])
def test_output_deviation_leaves_padding_out(method, kind):
    """The mean over the tokens that count, however strange the others are; weights are allowed too."""
    gen = torch.Generator().manual_seed(4)
    w = torch.rand(3, 5, generator=gen, dtype=torch.float64) if kind == "weights" else torch.ones(3, 5).tril(2).double()
    w[1, 4] = 0.0
    model = network(fl.OutputDeviation(weight=0.3), method=method).train()
    x = tokens(3, 5)
    x[w == 0] = 1e3
    x.requires_grad_()
    model(x)
    each = (x @ dense(model.layer.adapter).T).square().sum(-1)
    plain = 0.3 * (w * each).sum() / w.sum()
    given = w if kind == "weights" else w.long()
    same_value_and_gradients(fl.penalty(model, token_weights=given), plain, [x, *trained(model)])
    (state,) = model.layer.adapter.penalty_states()
    alone = state.total([Item(state, model.layer.adapter, model.layer.trace.hidden)], given)
    same_value_and_gradients(alone, plain, trained(model))
    with pytest.raises(ValueError, match=r"token_weights has 10 entries \(2, 5\), wants one for each of the 15 tokens"):
        fl.penalty(model, token_weights=w[:2])


def test_output_deviation_of_padding_alone_is_zero():
    model = network(fl.OutputDeviation(weight=0.3)).train()
    model(tokens(3, 5))
    assert fl.penalty(model, token_weights=torch.zeros(3, 5)) == 0


def test_output_deviation_is_zero_before_a_forward_pass_and_of_no_token():
    model = network(fl.OutputDeviation())
    assert fl.penalty(model) == 0
    model(tokens()[:0])
    assert fl.penalty(model) == 0


@pytest.mark.parametrize("reentrant", [True, False])
def test_output_deviation_under_checkpointing_is_right_or_refused(reentrant):
    """Reentrant checkpointing runs the forward pass without a graph: half the gradient would silently be missing."""
    from torch.utils.checkpoint import checkpoint

    def gradients(recompute: bool) -> list[Tensor]:
        model = network(fl.OutputDeviation(weight=0.3))
        x = tokens().requires_grad_()
        y = checkpoint(model, x, use_reentrant=reentrant) if recompute else model(x)
        (y.square().mean() + fl.penalty(model)).backward()
        return [x.grad, *[p.grad for p in trained(model)]]

    if reentrant:
        with pytest.raises(ValueError, match="OutputDeviation.*use_reentrant=False"):
            gradients(True)
    else:
        torch.testing.assert_close(gradients(True), gradients(False), rtol=1e-10, atol=1e-12)


def test_output_deviation_may_be_looked_at_after_an_evaluation():
    model = network(fl.OutputDeviation(weight=0.3))
    with torch.no_grad():
        model(tokens())
        value = fl.penalty(model)
    torch.testing.assert_close(value, 0.3 * (tokens() @ model.layer.delta().T).square().sum(-1).mean())


@every_adapter
@pytest.mark.parametrize("covariance", ["diag", "full"])
def test_source_deviation_is_the_expected_change_on_the_source(method, covariance):
    """E ||delta x||^2 over the calibration tokens; with the diagonal alone, of inputs with independent features."""
    model = network(fl.SourceDeviation(weight=0.3, covariance=covariance), method=method)
    batches = [tokens(3, 5, seed=1), tokens(2, 7, seed=2)]
    fl.calibrate(model, batches, loss=lambda model, x: model(x).mean())
    seen = torch.cat([b.flatten(0, 1) for b in batches])
    stir(model, 0.1, seed=3)
    delta = dense(model.layer.adapter)
    if covariance == "full":
        plain = (seen @ delta.T).square().sum(1).mean()
    else:
        plain = (delta.square() * seen.square().mean(0)).sum()
    same_value_and_gradients(fl.penalty(model), 0.3 * plain, trained(model))


# ------------------------------------------------------------------------------- Laplace and Decay


@every_adapter
@pytest.mark.parametrize("prior", [0.0, 0.2])
def test_laplace_is_the_curvature_weighted_distance_from_the_centre(method, prior):
    adapter = adapter_with(fl.Laplace(weight=3.0, prior_precision=prior), method=method)
    (state,) = adapter.penalty_states()
    state.begin_statistics(adapter)
    gen = torch.Generator().manual_seed(1)
    plain: Any = 0.0
    for name, p in adapter.named_parameters(recurse=False):
        fisher = torch.rand(p.shape, generator=gen, dtype=torch.float64)
        getattr(state, f"fisher_{name}").copy_(fisher)
        plain = plain + 1.5 * ((fisher + prior) * (p - p.detach().clone()).square()).sum()
        centre = p.detach().clone()
        with torch.no_grad():
            p.add_(torch.randn(p.shape, generator=gen, dtype=torch.float64))
        plain = plain + 1.5 * ((fisher + prior) * (p - centre).square()).sum()
    same_value_and_gradients(state.value(adapter, None), plain, trained(adapter))


def test_laplace_is_zero_at_its_centre():
    model = network(fl.Laplace(weight=3.0, prior_precision=1.0))
    fl.calibrate(model, [tokens()], loss=lambda model, x: model(x).square().mean())
    assert fl.penalty(model) == 0
    assert fl.penalty(stir(model, 0.1)) > 0


@every_adapter
def test_decay_is_half_the_squared_parameters(method):
    adapter = adapter_with(fl.Decay(weight=0.3), method=method)
    plain = 0.15 * sum(p.square().sum() for p in trained(adapter))
    same_value_and_gradients(adapter.penalty_states()[0].value(adapter, None), plain, trained(adapter))


def test_decay_equals_a_null_space_of_everything():
    decay, null = adapter_with(fl.Decay(0.3)), adapter_with(fl.NullSpace(0.3, k=K))
    torch.testing.assert_close(decay.penalty_states()[0].value(decay, None), null.penalty_states()[0].value(null, None))


# ---------------------------------------------------------------------------------- shared promises


def test_every_registered_penalty_is_tested_here():
    assert set(PENALTIES) >= {
        "decay",
        "laplace",
        "null-space",
        "output-deviation",
        "source-deviation",
        "weight-deviation",
    }


@pytest.mark.parametrize("name", sorted(PENALTIES))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_the_value_is_float32_or_wider(name, dtype):
    adapter = adapter_with(PENALTIES[name](), dtype=dtype)
    (state,) = adapter.penalty_states()
    hidden = torch.ones(3, R, dtype=dtype, requires_grad=True) if state.needs_hidden else None
    assert state.value(adapter, hidden).dtype == torch.promote_types(dtype, torch.float32)


@pytest.mark.parametrize("name", sorted(PENALTIES))
def test_the_weight_multiplies(name):
    values = []
    for weight in (0.0, 1.0, 2.0):
        adapter = adapter_with(PENALTIES[name](weight=weight))
        (state,) = adapter.penalty_states()
        if name == "laplace":
            state.begin_statistics(adapter)
            state.fisher_up.fill_(1.0)
            stir(adapter)
        if name == "source-deviation":
            state.covariance.fill_(1.0)
        if name == "loss-deviation":
            for buffer in (state.pairs[0].inputs.rest, state.pairs[0].outputs.rest):
                buffer.fill_(1.0)
        hidden = torch.ones(3, R, dtype=torch.float64, requires_grad=True)
        values.append(state.value(adapter, hidden).item())
    assert values[0] == 0 and values[1] > 0
    assert values[2] == pytest.approx(2 * values[1], rel=1e-12)


@pytest.mark.parametrize("name", sorted(PENALTIES))
def test_a_penalty_is_a_value_that_json_carries(name):
    penalty = PENALTIES[name](weight=0.25)
    assert Penalty.from_json(penalty.to_json()) == penalty and hash(penalty) == hash(PENALTIES[name](weight=0.25))
    with pytest.raises(ValueError, match=f"penalty '{name}': .*unheard"):
        Penalty.from_json({**penalty.to_json(), "unheard": 1})


@pytest.mark.parametrize("name", sorted(PENALTIES))
@pytest.mark.parametrize("weight", [-1.0, float("inf"), float("nan"), "1", None])
def test_a_weight_that_is_none_is_refused(name, weight):
    with pytest.raises(ValueError, match=r"\.weight is .*, wants a number >= 0"):
        PENALTIES[name](weight=weight)


def test_nonsense_is_refused():
    for make, message in (
        (lambda: fl.NullSpace(k=1.5), "NullSpace.k is 1.5"),
        (lambda: fl.SourceDeviation(covariance="block"), "SourceDeviation.covariance is 'block'"),
        (lambda: Penalty.from_json({"name": "hope"}), r"unknown penalty 'hope', wants one of \['decay'"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


def test_a_state_without_a_formula_says_so():
    class Nothing(PenaltyState):
        pass

    with pytest.raises(NotImplementedError, match="Nothing writes neither value nor total"):
        Nothing(fl.Decay()).value(adapter_with(), None)


def test_penalties_add_up_over_layers_and_over_themselves():
    def total(*penalties: Penalty) -> Tensor:
        model = stir(fl.adapt(tiny_llama().double(), fl.LoRA(rank=3, penalties=penalties), ["q_proj", "up_proj"]))
        return fl.penalty(model)

    terms = [fl.Decay(0.5), fl.WeightDeviation(0.2), fl.NullSpace(0.7, k=5)]
    torch.testing.assert_close(total(*terms), sum(total(term) for term in terms))
    model = stir(fl.adapt(tiny_llama().double(), fl.LoRA(rank=3, penalties=(fl.Decay(0.5),)), ["q_proj", "up_proj"]))
    torch.testing.assert_close(total(terms[0]), 0.25 * sum(p.square().sum() for p in trained(model)))


def test_a_method_s_own_penalty_and_added_ones_both_count():
    def model(*penalties: Penalty) -> nn.Module:
        torch.manual_seed(0)
        net = nn.Sequential(OrderedDict(layer=nn.Linear(K, N))).double()
        return stir(fl.adapt(net, fl.CLoRA(rank=R, k=5, penalties=penalties), ["layer"]))

    plain, both = model(), model(fl.Decay(0.5))
    extra = 0.25 * sum(p.square().sum() for p in trained(both))
    torch.testing.assert_close(fl.penalty(both), fl.penalty(plain) + extra)


def test_without_penalties_it_is_a_zero_scalar():
    value = fl.penalty(network())
    assert value.shape == () and value == 0
    (network()(tokens()).sum() + value).backward()
    with pytest.raises(ValueError, match="model has no adapters; call fl.adapt"):
        fl.penalty(nn.Linear(3, 3))


def test_of_a_half_precision_model_it_is_float32():
    model = fl.adapt(tiny_llama().bfloat16(), fl.CLoRA(rank=3, k=5, penalties=(fl.OutputDeviation(),)), ["q_proj"])
    model(**token_batch())
    assert fl.penalty(model).dtype == torch.float32


@pytest.mark.parametrize("k", [5, 20])
def test_autocast_does_not_round_it(k):
    """Trainers add the penalty within autocast."""
    model = network(fl.NullSpace(k=k), fl.WeightDeviation(), fl.OutputDeviation(), fl.Decay()).float()
    x = tokens().float()
    model(x)
    want = fl.penalty(model)
    gradients = torch.autograd.grad(want, trained(model), retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        value = fl.penalty(model)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, want, rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.autograd.grad(value, trained(model)), gradients, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "penalty, title", [(fl.Laplace(), "Laplace"), (fl.SourceDeviation(), "SourceDeviation")], ids=str
)
def test_without_statistics_it_warns_and_protects_nothing(penalty, title):
    model = stir(fl.adapt(tiny_llama(), fl.LoRA(rank=3, penalties=(penalty, fl.Decay(0.5))), ["q_proj", "v_proj"]))
    with pytest.warns(UserWarning, match=f"{title} has no statistics yet.*fl.calibrate") as record:
        value = fl.penalty(model)
    assert record[0].filename == __file__  # it points at the caller
    torch.testing.assert_close(value, 0.25 * sum(p.square().sum() for p in trained(model)))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("default")
        for _ in range(3):
            fl.penalty(model)
    assert len(seen) == 1
    fl.calibrate(model, [token_batch()])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fl.penalty(model)
