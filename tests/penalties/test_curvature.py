"""Low-rank covariances and Kronecker-factored curvature against the dense formulas, by brute force, in float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import stir, token_batch
from plain_penalties import plain_value
from torch import Tensor, nn

import forgetless as fl
from forgetless.penalties.covariance import BLOCK, Covariance, merged
from forgetless.samples import draw_labels

EXACT = {"rtol": 1e-9, "atol": 1e-13}


def rows_of(count: int, K: int, rank: int | None = None, seed: int = 0, decay: float = 0.0) -> Tensor:
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(count, rank or K, generator=gen, dtype=torch.float64)
    if decay:
        x = x * torch.arange(1, x.shape[1] + 1, dtype=torch.float64) ** -decay
    turn = torch.linalg.qr(
        torch.randn(K, rank or K, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    ).Q
    return x @ turn.T


def measured(form: str | int, blocks: list[Tensor]) -> Covariance:
    cov = Covariance(form, blocks[0].shape[1], blocks[0])
    for block in blocks:
        cov.add(block)
    cov.finish()
    return cov


# ---------------------------------------------------------------------------------- low-rank basis


@pytest.mark.parametrize("blocks", [(7,), (3, 1, 0, 40), (BLOCK, 5), (700, 650, 1)], ids=str)
@pytest.mark.parametrize("q", [30, 31, 500])
def test_with_as_many_columns_as_dimensions_it_is_the_full_matrix(blocks, q):
    data = [rows_of(n, 30, seed=i) for i, n in enumerate(blocks)]
    low, full = measured(q, data), measured("full", data)
    torch.testing.assert_close(low.dense(), full.dense(), **EXACT)
    assert low.basis.shape == (30, 30) and low.tokens == full.tokens == sum(blocks)


@pytest.mark.parametrize("blocks", [(9,), (4, 300, 2), (600, 700, 800)], ids=str)
def test_data_of_low_rank_loses_nothing(blocks):
    """K well above the width of the random range: nothing but the rank makes it exact."""
    K, q = 200, 12
    data = [rows_of(n, K, rank=6, seed=i) for i, n in enumerate(blocks)]
    data[-1] = data[-1] + rows_of(blocks[-1], K, rank=12, seed=9)[:, :K] * 0  # same span
    low, full = measured(q, data), measured("full", data)
    torch.testing.assert_close(low.dense(), full.dense(), rtol=1e-9, atol=1e-12)
    assert low.rest.max() < 1e-12 * full.diagonal().max()


def test_directions_that_come_late_are_found():
    """Two blocks of rank 6 in orthogonal subspaces: together of rank 12."""
    K = 200
    span = torch.linalg.qr(rows_of(K, K, seed=5)).Q
    data = [rows_of(600, 6, seed=i) @ span[6 * i : 6 * i + 6] for i in range(2)]
    torch.testing.assert_close(measured(12, data).dense(), measured("full", data).dense(), rtol=1e-9, atol=1e-12)


def test_no_columns_is_the_diagonal():
    data = [rows_of(50, 30), rows_of(9, 30, seed=1)]
    low, diag = measured(0, data), measured("diag", data)
    assert dict(low.named_buffers()).keys() == dict(diag.named_buffers()).keys()
    assert torch.equal(low.rest, diag.rest)


@pytest.mark.parametrize("q", [8, 32])
def test_the_diagonal_is_exact_and_the_strongest_directions_are_kept(q):
    data = [rows_of(n, 300, seed=i, decay=0.7) for i, n in enumerate((900, 40, 700, 600))]
    low, full = measured(q, data), measured("full", data)
    torch.testing.assert_close(low.diagonal(), full.diagonal(), rtol=1e-9, atol=0)
    best = torch.linalg.eigvalsh(full.dense()).flip(0)[:q].sum()
    held = (low.basis.T @ full.dense() @ low.basis).trace()
    assert 0.98 * best < held <= best * (1 + 1e-9)
    torch.testing.assert_close(low.spectrum.sum(), held, rtol=0.02, atol=0)
    torch.testing.assert_close(low.basis.T @ low.basis, torch.eye(q).double(), rtol=0, atol=1e-10)
    assert (low.rest >= 0).all()


def test_it_is_a_function_of_the_data_alone():
    data = [rows_of(n, 100, seed=n) for n in (600, 700)]
    torch.manual_seed(1)
    one = measured(5, data)
    state = torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)  # nothing drawn from the global generator
    torch.manual_seed(2)
    assert one.same_as(measured(5, data))


def test_merging_adds():
    a, b = [rows_of(40, 30, rank=3, seed=1)], [rows_of(25, 30, rank=3, seed=2)]
    one, other = measured(7, a), measured(7, b)
    want = one.dense() + other.dense()
    one.merge(dict(other.named_buffers()))
    torch.testing.assert_close(one.dense(), want, **EXACT)
    assert one.tokens == 65


def test_no_large_matrix_is_made():
    with Shapes() as seen:
        measured(16, [rows_of(600, 1, seed=3).expand(600, 1000).contiguous() + 0.1 for _ in range(3)])
    assert seen.of(1000) and all(s.count(1000) < 2 for s in seen.of(1000))


class Shapes(torch.utils._python_dispatch.TorchDispatchMode):
    """Every shape that any operation puts out, and how many operations there were."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.names.append(str(func))
        for t in torch.utils._pytree.tree_leaves(out):
            if isinstance(t, Tensor):
                self.shapes.add(tuple(t.shape))
        return out

    def of(self, dim: int) -> list[tuple[int, ...]]:
        """Shapes of two or more dimensions with this dimension."""
        return [s for s in self.shapes if len(s) > 1 and dim in s]


def test_nan_is_named():
    with pytest.raises(ValueError, match="hold NaN or Inf"):
        measured(3, [torch.full((4, 9), float("nan"))])


# ------------------------------------------------------------------------------- SourceDeviation(q)


class Net(nn.Module):
    """A block with siblings: q/k/v get one x, gate/up another."""

    def __init__(self, K: int = 26, N: int = 18, inner: int = 34):
        super().__init__()
        torch.manual_seed(0)
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(K, N), nn.Linear(K, N), nn.Linear(K, 10)
        self.o_proj = nn.Linear(N, K)
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(K, inner), nn.Linear(K, inner), nn.Linear(inner, K)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.o_proj(torch.tanh(self.q_proj(x)) * self.k_proj(x).sigmoid() + self.v_proj(x).mean())
        return x + self.down_proj(torch.tanh(self.gate_proj(x)) * self.up_proj(x))


def square(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def batch_of(seed: int, *lead: int) -> Tensor:
    return torch.randn(*lead, 26, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


BATCHES = [batch_of(1, 3, 7), batch_of(2, 2, 5)]


def fitted(penalty: Any, net: Any = Net, batches: list[Tensor] = BATCHES, start: float = 0.2, **options: Any) -> Any:
    model = fl.adapt(net(), fl.LoRA(rank=4, alpha=6.0, penalties=(penalty,), **options))
    if start:
        stir(model, start)
    fl.calibrate(model, batches, square)
    return model


def states(model: nn.Module) -> dict[str, Any]:
    return {name: layer.adapter.penalty_states()[0] for name, layer in fl.adapters(model).items()}


def trained(model: nn.Module) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


def same(ours: Tensor, plain: Tensor, parameters: list[Tensor]) -> None:
    torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-14)
    got, want = (
        torch.autograd.grad(v, parameters, allow_unused=True, materialize_grads=True, retain_graph=True)
        for v in (ours, plain)
    )
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-13)
    assert any(grad.any() for grad in want)


@pytest.mark.parametrize("q", [0, 1, 5, 26, 100])
def test_source_deviation_with_q_columns_is_its_formula(q):
    model = stir(fitted(fl.SourceDeviation(0.3, q)), 0.1, seed=3)
    plain: Any = 0.0
    for name, layer in fl.adapters(model).items():
        down, up = layer.adapter.factors()
        delta = layer.adapter.scale * up @ down
        plain = plain + 0.3 * (delta @ states(model)[name].source.dense() * delta).sum()
    same(fl.penalty(model), plain, trained(model))


@pytest.mark.parametrize("q, form", [(0, "diag"), (34, "full"), (99, "full")])
def test_at_its_ends_it_is_diag_and_full(q, form):
    low, other = fitted(fl.SourceDeviation(0.3, q)), fitted(fl.SourceDeviation(0.3, form))
    torch.testing.assert_close(fl.penalty(low), fl.penalty(other), **EXACT)
    for a, b in zip(grads_of(low), grads_of(other), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)


def grads_of(model: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(fl.penalty(model), trained(model)))


def test_it_is_saved_and_loaded(tmp_path):
    model = fitted(fl.SourceDeviation(0.3, 5))
    fl.save(model, tmp_path)
    again = fl.load(Net(), tmp_path)
    assert torch.equal(fl.penalty(again), fl.penalty(model))
    assert all(states(again)[name].source.same_as(state.source) for name, state in states(model).items())
    assert states(again)["q_proj"].source is states(again)["v_proj"].source  # held once again
    assert states(again)["q_proj"].source is not states(again)["o_proj"].source


def test_consolidate_adds_the_statistics_of_the_task():
    model = fitted(fl.SourceDeviation(0.3, 26))
    before = states(model)["q_proj"].source.dense().clone()
    task = [3 * batch_of(7, 4, 6)]
    done = fl.consolidate(model, task, square, undo=True)
    fresh = copy.deepcopy(model)
    fl.calibrate(fresh, task, square)
    now = states(model)["q_proj"].source
    torch.testing.assert_close(now.dense(), before + states(fresh)["q_proj"].source.dense(), **EXACT)
    assert now is states(model)["k_proj"].source and fl.penalty(model) == 0
    done.undo()
    back = states(model)["q_proj"].source
    torch.testing.assert_close(back.dense(), before, rtol=0, atol=0)
    assert back is states(model)["k_proj"].source


# ----------------------------------------------------------------------------------------- siblings


@pytest.mark.parametrize("form", ["diag", 4, "full"])
def test_siblings_hold_one_covariance_of_the_same_values(form):
    model = fitted(fl.SourceDeviation(0.3, form))
    held = states(model)
    assert held["q_proj"].source is held["k_proj"].source is held["v_proj"].source
    assert held["gate_proj"].source is held["up_proj"].source
    assert len({id(s.source) for s in held.values()}) == 4
    alone = copy.deepcopy(model)
    for state in states(alone).values():
        state.separate()
    assert len({id(s.source) for s in states(alone).values()}) == 7
    torch.testing.assert_close(fl.penalty(alone), fl.penalty(model), rtol=1e-13, atol=0)
    for a, b in zip(grads_of(alone), grads_of(model), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-15)


def test_the_covariance_of_siblings_is_computed_once(monkeypatch):
    calls: list[int] = []
    add = Covariance.add
    monkeypatch.setattr(Covariance, "add", lambda self, x: (calls.append(id(self)), add(self, x))[1])
    fitted(fl.SourceDeviation(0.3, 4))
    assert len(calls) == 4 * len(BATCHES) and len(set(calls)) == 4


class Stray(Net):
    """k_proj is given another x, from the ``since``-th batch on; v_proj is left out there."""

    since = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls = getattr(self, "calls", 0) + 1
        stray = self.calls > self.since
        k = self.k_proj(2 * x if stray else x)
        v = 0.0 if stray else self.v_proj(x).mean()
        return x + self.o_proj(torch.tanh(self.q_proj(x)) * k.sigmoid() + v)


@pytest.mark.parametrize("since", [0, 1])
def test_siblings_that_are_given_different_inputs_part(since):
    """Values as if each had been measured on its own, whenever they part."""

    class Parting(Stray):
        pass

    Parting.since = since
    model = fitted(fl.SourceDeviation(0.3, 26), Parting)
    held = states(model)
    flat = [b.flatten(0, 1) for b in BATCHES]
    want = {
        "q_proj": flat,
        "k_proj": [x * (2 if i >= since else 1) for i, x in enumerate(flat)],
        "v_proj": flat[:since],
    }
    for name, blocks in want.items():
        joint = torch.cat(blocks) if blocks else torch.zeros(0, 26).double()
        torch.testing.assert_close(held[name].source.dense(), joint.T @ joint / max(len(joint), 1), **EXACT)
        assert held[name].tokens == len(joint)


def test_who_separates_takes_no_more_than_its_own():
    model = fitted(fl.SourceDeviation(0.3, 4))
    value = fl.penalty(model)
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    for state in states(model).values():
        for buffer in state.buffers():
            assert buffer.untyped_storage().nbytes() == buffer.numel() * buffer.element_size()
    assert states(model)["q_proj"].source is not states(model)["k_proj"].source
    torch.testing.assert_close(fl.penalty(model), value, rtol=1e-13, atol=0)


def test_a_layer_that_is_called_twice_counts_both():
    class Twice(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(super().forward(x))

    seen: list[Tensor] = []
    model = fl.adapt(Twice(), fl.LoRA(rank=4, penalties=(fl.SourceDeviation(0.3, "full"),)))
    model.q_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().flatten(0, 1)))
    fl.calibrate(model, BATCHES, square)
    x = torch.cat(seen)
    assert len(seen) == 4 and states(model)["q_proj"].tokens == len(x)
    torch.testing.assert_close(states(model)["q_proj"].source.dense(), x.T @ x / len(x))
    assert states(model)["q_proj"].source is states(model)["k_proj"].source


# --------------------------------------------------------------------------------------------- KFAC


TEXT = [token_batch((9, 6, 8), prompts=(0, 3, 6), seed=1), token_batch((4, 9), prompts=(2, 5), seed=2)]
LINEAR = ["q_proj", "o_proj", "down_proj"]


class Text(nn.Module):
    """A causal model of a few layers, in float64 throughout (transformers' norms and losses are float32)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(37, 16)
        self.q_proj, self.o_proj = nn.Linear(16, 12), nn.Linear(12, 16, bias=False)
        self.up_proj, self.down_proj = nn.Linear(16, 24), nn.Linear(24, 16)
        self.head = nn.Linear(16, 37)
        self.double()

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        x = self.embed(input_ids)
        seen = torch.tanh(self.q_proj(x)).cumsum(1) / torch.arange(1, x.shape[1] + 1, dtype=x.dtype)[:, None]
        x = x + self.o_proj(seen)
        x = x + self.down_proj(torch.tanh(self.up_proj(x)))
        logits = self.head(x)
        if labels is None:
            return {"logits": logits}
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return {"logits": logits, "loss": loss}


def text_model(start: float = 0.1, **laplace: Any) -> Any:
    model = fl.adapt(Text(), fl.LaLoRA(rank=3, weight=2.0, **laplace), LINEAR)
    return stir(model, start) if start else model


def brute_force(model: Any, batches: list[dict[str, Tensor]], whole: bool = False) -> dict[str, dict[str, Tensor]]:
    """S_x, S_t, S_c, G_y, G_t, G_c of every layer: one sequence at a time, by autograd on dense layers."""
    taken: dict[str, dict[str, Any]] = {}
    sums: dict[str, dict[str, Any]] = {name: {} for name in fl.adapters(model)}
    handles = []
    for name, layer in fl.adapters(model).items():

        def run(x: Tensor, layer: Any = layer, name: str = name) -> Tensor:
            down, up = (t.detach() for t in layer.adapter.factors())
            t = (x @ down.T).requires_grad_()
            low = t @ up.T  # lora_B's output; the scale belongs to dy
            low.retain_grad()
            t.retain_grad()
            taken[name] = {"x": x.detach(), "t": t, "y": low}
            return nn.functional.linear(x, layer.frozen, layer.bias) + layer.adapter.scale * low

        handles.append((layer, layer.forward))
        layer.forward = run
    samples = 0
    for batch in batches:
        rows = [batch] if whole else [{k: v[i : i + 1] for k, v in batch.items()} for i in range(len(batch["labels"]))]
        for row in rows:
            model(**row)["loss"].backward()
            samples += 1
            real = row["attention_mask"].bool()
            for name, part in taken.items():
                x, t = part["x"][real], part["t"].detach()[real]
                dy, dt = part["y"].grad.flatten(0, 1), part["t"].grad.flatten(0, 1)
                found = {
                    "S_x": x.T @ x, "S_t": t.T @ t, "S_c": x.T @ t, "G_y": dy.T @ dy, "G_t": dt.T @ dt, "G_c": dt.T @ dy
                }  # fmt: skip
                for key, value in found.items():
                    sums[name][key] = sums[name].get(key, 0.0) + value
                sums[name]["tokens"] = sums[name].get("tokens", 0) + len(x)
    for layer, _ in handles:
        del layer.forward
    for row in sums.values():
        tokens = row.pop("tokens")
        for key in row:
            row[key] = row[key] / (tokens if key.startswith("S") else samples)
    model.zero_grad()
    return sums


def plain_kfac(model: Any, parts: dict[str, Any], tri: bool, prior: float = 0.0) -> Tensor:
    """The paper's formula, from dense factors (papers: tr(D_A^T G_t D_A S_x) + tr(D_B^T G_y D_B S_t) + cross)."""
    total: Any = 0.0
    for name, layer in fl.adapters(model).items():
        state, f = states(model)[name], parts[name]
        A, B = layer.adapter.down - state.centre_down, layer.adapter.up - state.centre_up
        total = total + (A.T @ f["G_t"] @ A @ f["S_x"]).trace() + (B.T @ f["G_y"] @ B @ f["S_t"]).trace()
        if tri:
            total = total + 2 * (A.T @ f["G_c"] @ B @ f["S_c"].T).trace()
        total = total + prior * (A.square().sum() + B.square().sum())
    return 0.5 * 2.0 * total


@pytest.mark.parametrize("start", [0.0, 0.1], ids=["at zero", "later"])
@pytest.mark.parametrize("fisher", ["empirical", "batch"])
@pytest.mark.parametrize("curvature", ["kfac", "tri_kfac"])
@pytest.mark.parametrize("prior", [0.0, 0.3])
def test_kfac_is_the_formula_on_brute_force_factors(curvature, fisher, start, prior):
    model = text_model(start, curvature=curvature, fisher=fisher, columns=99, prior_precision=prior)
    parts = brute_force(copy.deepcopy(model), TEXT, whole=fisher == "batch")
    fl.calibrate(model, TEXT)
    assert fl.penalty(model) == 0  # centred
    stir(model, 0.2, seed=5)
    plain = plain_kfac(model, parts, curvature == "tri_kfac", prior)
    same(fl.penalty(model), plain, trained(model))
    rows = fl.adapters(model).values()
    each = sum(plain_value(state, row.adapter, None) for row in rows for state in row.adapter.penalty_states())
    same(each, plain, trained(model))


def test_at_zero_tri_is_kfac_and_nothing_holds_down():
    models = [text_model(0.0, curvature=c, columns=99) for c in ("kfac", "tri_kfac")]
    for model in models:
        fl.calibrate(model, TEXT)
        stir(model, 0.2, seed=5)
        for name, layer in fl.adapters(model).items():
            assert not states(model)[name].gram_y.any()
            (grad,) = torch.autograd.grad(fl.penalty(model), [layer.adapter.down])
            assert not grad.any()
    torch.testing.assert_close(*(fl.penalty(model) for model in models), **EXACT)


def test_few_columns_keep_the_diagonal_and_never_go_below_zero():
    exact, low = (text_model(0.3, curvature="tri_kfac", columns=columns) for columns in (99, 2))
    for model in (exact, low):
        fl.calibrate(model, TEXT)
    for name, state in states(low).items():
        other = states(exact)[name]
        torch.testing.assert_close(state.outputs.diagonal(), other.outputs.diagonal(), rtol=1e-8, atol=1e-16)
        torch.testing.assert_close(state.gram_x, other.gram_x, **EXACT)
        torch.testing.assert_close(state.gram_y, other.gram_y, rtol=1e-8, atol=1e-18)
        assert state.outputs.basis.shape[1] == 2
    for seed in range(20):
        assert fl.penalty(stir(low, 0.3, seed=seed)) > 0


@pytest.mark.parametrize("curvature", ["diag", "kfac", "tri_kfac"])
def test_balanced_gives_down_the_curvature_of_an_average_up(curvature):
    """Against its definition: the mean over random B of what is measured with that B, up to the common factor."""
    model = text_model(0.0, curvature=curvature, columns=99, at_zero="balanced")
    fl.calibrate(model, TEXT)
    full = brute_force(text_model(0.0, curvature=curvature, columns=99), TEXT)
    for name, state in states(model).items():
        if curvature == "diag":
            torch.testing.assert_close(state.fisher_down.sum(), state.fisher_up.sum())
            assert torch.equal(state.fisher_down[0], state.fisher_down[1])
            ratio = state.fisher_down[0] / per_sequence_product(model, name)
            torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio), rtol=1e-8, atol=0)
        else:
            f = full[name]
            torch.testing.assert_close(state.gram_y, state.gram_y[0, 0] * torch.eye(3).double())
            mine = state.gram_y.trace() * f["S_x"].trace()
            torch.testing.assert_close(mine, f["G_y"].trace() * f["S_t"].trace(), rtol=1e-9, atol=0)
            torch.testing.assert_close(state.inputs.dense(), f["S_x"], **EXACT)
    stir(model, 0.2, seed=5)
    rows = fl.adapters(model).values()
    each = sum(plain_value(s, row.adapter, None) for row in rows for s in row.adapter.penalty_states())
    same(fl.penalty(model), each, trained(model))
    for layer in fl.adapters(model).values():
        assert torch.autograd.grad(fl.penalty(model), [layer.adapter.down])[0].any()


def per_sequence_product(model: Any, name: str) -> Tensor:
    """sum over sequences of ||column k of dY^T X||^2: the mean square of (dY B)^T X over random B, up to a factor."""
    layer = fl.adapters(model)[name]
    total: Any = 0.0
    for batch in TEXT:
        for i in range(len(batch["labels"])):
            kept: dict[str, Tensor] = {}

            def hook(_: Any, args: Any, y: Tensor, kept: dict[str, Tensor] = kept) -> None:
                y.retain_grad()
                kept.update(x=args[0].detach(), y=y)

            handle = layer.register_forward_hook(hook)
            model(**{k: v[i : i + 1] for k, v in batch.items()})["loss"].backward()
            handle.remove()
            total = total + (kept["y"].grad[0].T @ kept["x"][0]).square().sum(0)
    model.zero_grad()
    return total


def test_kfac_is_saved_loaded_and_consolidated(tmp_path):
    model = text_model(0.1, curvature="tri_kfac", columns=4)
    fl.calibrate(model, TEXT)
    stir(model, 0.1, seed=5)
    fl.save(model, tmp_path)
    again = fl.load(Text(), tmp_path)
    assert torch.equal(fl.penalty(again), fl.penalty(model)) and fl.penalty(model) > 0
    fl.consolidate(model, TEXT)
    assert fl.penalty(model) == 0 and fl.penalty(stir(model, 0.1, seed=6)) > 0


def test_one_task_twice_counts_twice():
    once = text_model(0.0, curvature="kfac", columns=99)
    fl.calibrate(once, TEXT)
    twice = copy.deepcopy(once)
    for state in states(twice).values():
        state.add_statistics(state.export_statistics())
    stir(once, 0.2), stir(twice, 0.2)
    torch.testing.assert_close(fl.penalty(twice), 2 * fl.penalty(once), **EXACT)


def test_kfac_wants_trained_factors():
    penalty = fl.Laplace(curvature="kfac")
    with pytest.raises(ValueError, match="Laplace.curvature is 'kfac', but CURLoRAAdapter does not train down and up"):
        fl.adapt(Net(), fl.CURLoRA(rank=4, penalties=(penalty,)))


# --------------------------------------------------------------------------------------- true Fisher


def test_labels_are_drawn_from_the_prediction():
    logits = torch.tensor([0.3, -1.0, 1.2, -40.0]).log_softmax(0).expand(20000, 4)
    drawn = draw_labels(logits, torch.Generator().manual_seed(0))
    share = drawn.bincount(minlength=4) / len(drawn)
    assert (share - logits[0].exp()).abs().max() < 4.5 * (0.25 / 20000) ** 0.5 and share[3] == 0


@pytest.mark.parametrize("curvature", ["diag", "kfac"])
def test_true_fisher_is_that_of_the_drawn_labels(curvature):
    """The same draws by hand, one sequence at a time."""
    model = text_model(0.1, curvature=curvature, fisher="true", columns=99)
    generator = torch.Generator().manual_seed(0)
    drawn = []
    for batch in TEXT:
        logits = model(**batch)["logits"][:, :-1].detach()
        labels = torch.full_like(batch["labels"], -100)
        counted = batch["labels"][:, 1:] != -100
        labels[:, 1:][counted] = draw_labels(logits[counted], generator)
        drawn.append({**batch, "labels": labels})
    twin = text_model(0.1, curvature=curvature, columns=99)
    fl.calibrate(twin, drawn)
    fl.calibrate(model, TEXT)
    stir(model, 0.2, seed=5), stir(twin, 0.2, seed=5)
    torch.testing.assert_close(fl.penalty(model), fl.penalty(twin), rtol=1e-9, atol=1e-16)
    unlike = text_model(0.1, curvature=curvature, columns=99)
    fl.calibrate(unlike, TEXT)
    assert not torch.allclose(fl.penalty(stir(unlike, 0.2, seed=5)), fl.penalty(model), rtol=1e-2)


def test_true_fisher_is_on_average_the_fisher_information():
    """One predicted token a sequence: sum over classes of p_c (d log p_c)^2, exactly; reached by many draws."""
    batch = token_batch((5,), prompts=(4,), seed=3)
    model = text_model(0.3, fisher="true")
    fl.calibrate(model, [batch] * 600)
    logp = model(**batch)["logits"][0, 3].log_softmax(0)
    p = logp.detach().exp()
    each = [torch.autograd.grad(v, trained(model), retain_graph=True) for v in logp]
    exact = sum((pc * sum((g.square().sum() for g in grads))) for pc, grads in zip(p, each, strict=True))
    ours = sum(s.fisher_down.sum() + s.fisher_up.sum() for s in states(model).values())
    torch.testing.assert_close(ours, exact, rtol=0.15, atol=0)


def test_true_fisher_wants_logits_and_one_kind():
    model = text_model(fisher="true")
    with pytest.raises(ValueError, match="loss is given, but fisher='true' draws labels"):
        fl.calibrate(model, TEXT, loss=lambda m, b: m(**b)["loss"])
    both = fl.adapt(Net(), fl.LoRA(4, penalties=(fl.Laplace(fisher="true"), fl.Laplace())))
    with pytest.raises(ValueError, match="one Laplace penalty has fisher='true', another has not"):
        fl.calibrate(both, BATCHES)


def test_merged_takes_no_rows():
    values, basis = merged(torch.ones(2).double(), torch.eye(5, 2).double(), torch.zeros(0, 5).double(), 3, None)
    torch.testing.assert_close((basis * values) @ basis.T, torch.diag(torch.tensor([1.0, 1, 0, 0, 0]).double()))
