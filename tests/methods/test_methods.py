"""What every method promises, checked for all that are registered, and what is special about each."""

from __future__ import annotations

import copy
import math
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from helpers import stir, tiny_gpt2
from torch import Tensor, nn
from torch.nn.functional import linear

import forgetless as fl
from forgetless.methods import METHODS, Adapter, Method, Site, register
from forgetless.methods.curlora import draw
from forgetless.ops import dispatch as ops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
N, K = 20, 24


@dataclass(frozen=True)
class Toy(Method):
    """A fifth method, as a user would add one: random frozen down, trained up."""

    rank: int = 4
    strength: float = 0.5

    name: ClassVar[str] = "toy"

    def build(self, site: Site) -> Adapter:
        return ToyAdapter(site, self)


class ToyAdapter(Adapter):
    def __init__(self, site: Site, method: Toy):
        super().__init__()
        self.scale = method.strength
        like = {"dtype": torch.promote_types(site.weight.dtype, torch.float32), "device": site.weight.device}
        self.register_buffer("fixed", torch.randn(method.rank, site.weight.shape[1], **like))
        self.grown = nn.Parameter(torch.zeros(site.weight.shape[0], method.rank, **like))

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.fixed, self.grown


@pytest.fixture(autouse=True, scope="module")
def _toy_is_registered() -> Iterator[None]:
    register(Toy)
    yield
    del METHODS[Toy.name]


def conv1d() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(N, K)
    nn.init.normal_(layer.bias)
    return layer


LAYERS = {
    "linear": lambda: nn.Linear(K, N),
    "no bias": lambda: nn.Linear(K, N, bias=False),
    "conv1d": conv1d,
}
every_method = pytest.mark.parametrize("name", [*sorted(METHODS), Toy.name])
every_layer = pytest.mark.parametrize("kind", LAYERS)


@pytest.fixture(params=["reference", "blas", "triton"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "triton" and ops.kernels is None:
        pytest.skip("Triton is not installed")
    with ops.backend(request.param):
        yield request.param


def base_model(kind: str, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(OrderedDict(layer=LAYERS[kind]())).to(DEVICE, dtype)


def adapted(name: str, kind: str, dtype: torch.dtype = torch.float64, moved: bool = True) -> nn.Module:
    model = fl.adapt(base_model(kind, dtype), METHODS[name](), ["layer"])
    return stir(model, 0.2) if moved else model


def tokens(dtype: torch.dtype = torch.float64, *lead: int) -> Tensor:
    gen = torch.Generator().manual_seed(3)
    return torch.randn(*(lead or (2, 5)), K, generator=gen, dtype=torch.float64).to(DEVICE, dtype)


def dtype_of(backend: str) -> tuple[torch.dtype, float]:
    """float64 where the backend has it, and what may differ."""
    return (torch.float32, 5e-5) if backend == "triton" else (torch.float64, 1e-12)


# ------------------------------------------------------------------------------ the shared contract


@every_method
@every_layer
def test_starts_as_the_base_layer(name, kind, backend):
    dtype, tol = dtype_of(backend)
    want = base_model(kind, dtype)(tokens(dtype))
    torch.testing.assert_close(adapted(name, kind, dtype, moved=False)(tokens(dtype)), want, rtol=tol, atol=tol)


@every_method
@every_layer
def test_gradients_are_those_of_the_dense_weight(name, kind, backend):
    """x, and every trained parameter, against autograd through W + delta."""
    dtype, tol = dtype_of(backend)
    model = adapted(name, kind, dtype)
    layer = model.layer
    trained = [p for p in model.parameters() if p.requires_grad]
    x = tokens(dtype).requires_grad_()
    y = model(x)
    down, up = layer.adapter.factors()
    weight = layer.weight.T if layer.transposed else layer.weight
    want = linear(x, weight + layer.adapter.scale * up @ down, layer.bias)
    torch.testing.assert_close(y, want, rtol=tol, atol=tol)
    dy = torch.randn_like(y)
    ours = torch.autograd.grad(y, [x, *trained], dy)
    dense = torch.autograd.grad(want, [x, *trained], dy)
    for a, b in zip(ours, dense, strict=True):
        torch.testing.assert_close(a, b, rtol=20 * tol, atol=20 * tol)
    assert all(grad.any() for grad in ours)


@every_method
@every_layer
def test_merged_is_the_same_function(name, kind):
    model = adapted(name, kind)
    want = model(tokens())
    plain = fl.merge(model)
    assert type(plain.layer) is type(base_model(kind).layer)
    torch.testing.assert_close(plain(tokens()), want, rtol=1e-12, atol=1e-12)


@every_method
@every_layer
def test_only_the_adapter_trains(name, kind):
    model = adapted(name, kind)
    before = copy.deepcopy(model.state_dict())
    assert not any(p.requires_grad for p in model.layer.base.parameters())
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    model(tokens()).square().sum().backward()
    assert all(p.grad is None for p in model.layer.base.parameters())
    optimizer.step()
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert moved == {key for key, p in model.named_parameters() if p.requires_grad}


@every_method
def test_parameters_are_float32_beside_half_and_float64_beside_double(name):
    for dtype, wanted in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        model = adapted(name, "linear", dtype)
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {wanted}
        assert model(tokens(dtype)).dtype == dtype


@every_method
def test_the_penalty_is_a_differentiable_scalar(name):
    model = adapted(name, "linear")
    if any(state.statistics for state in model.layer.adapter.penalty_states()):
        stir(model, -0.1, seed=1)
        fl.calibrate(model, [tokens(), tokens()], loss=lambda model, x: model(x).square().mean())
        stir(model, 0.1, seed=2)
    value = fl.penalty(model)
    assert value.shape == () and value.isfinite() and value >= 0
    if model.layer.adapter.penalty_states():
        trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
        grads = torch.autograd.grad(value, list(trained.values()), allow_unused=True)
        assert any(grad is not None and grad.any() for grad in grads)
    else:
        assert value == 0
    (model(tokens()).square().mean() + fl.penalty(model)).backward()


@every_method
@every_layer
def test_the_state_dict_makes_the_round_trip(name, kind):
    model, twin = adapted(name, kind), adapted(name, kind, moved=False)
    assert not torch.equal(model(tokens()), twin(tokens()))
    twin.load_state_dict(model.state_dict())
    assert torch.equal(model(tokens()), twin(tokens()))


@every_method
def test_saved_and_loaded_it_is_the_same_function(name, tmp_path):
    model = adapted(name, "linear")
    fl.save(model, tmp_path)
    again = fl.load(base_model("linear"), tmp_path)
    assert torch.equal(model(tokens()), again(tokens()))
    assert again.layer.method == model.layer.method
    assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in model.parameters()]


@every_method
@pytest.mark.parametrize(
    "kind, where",
    [("linear", "reference"), ("linear", "blas"), ("linear", "triton"), ("no bias", "blas"), ("conv1d", "blas")],
)
def test_compiles_whole(name, kind, where):
    torch._dynamo.reset()
    model = adapted(name, kind, torch.float32).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = tokens(torch.float32).requires_grad_()
    parameters = [x, *[p for p in model.parameters() if p.requires_grad]]
    with ops.backend(where):
        want = torch.autograd.grad(model(x).square().sum(), parameters)
        y = compiled(x)
        got = torch.autograd.grad(y.square().sum(), parameters)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(y, model(x), rtol=1e-5, atol=1e-5)


def test_a_new_length_does_not_compile_the_layer_again():
    """Once, once for any length, and once more where ``fl.drift`` begins to thin out its sample."""
    torch._dynamo.reset()
    model = adapted("lora", "linear", torch.float32).train()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for length in (5, 8, 13, 21, 34, 130, 300, 700):
        x = tokens(torch.float32, 2, length)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)
    assert counter.frame_count <= 3


@every_method
def test_can_be_copied_after_a_forward_pass(name):
    model = adapted(name, "linear")
    model(tokens().requires_grad_())
    twin = copy.deepcopy(model)
    assert torch.equal(twin(tokens()), model(tokens()))
    before = model(tokens())
    stir(twin, 1.0, seed=5)
    assert torch.equal(model(tokens()), before) and not torch.equal(twin(tokens()), before)


@every_method
def test_it_is_a_value_that_json_carries(name):
    method = METHODS[name]()
    assert Method.from_json(method.to_json()) == method == METHODS[name]()
    assert hash(method) == hash(METHODS[name]())
    with pytest.raises(ValueError, match=f"method '{name}': .*unheard"):
        Method.from_json({**method.to_json(), "unheard": 1})


@every_method
def test_one_token_and_none(name):
    model = adapted(name, "linear")
    x = tokens()
    torch.testing.assert_close(model(x[0, 0]), model(x)[0, 0], rtol=1e-12, atol=1e-12)
    assert model(x[:0]).shape == (0, 5, N)


@every_method
def test_the_command_line_knows_it(name):
    plans = pytest.importorskip("forgetless.study.plans")
    plan = plans.parse_method(name, lr=1e-3)
    assert isinstance(plan.method, METHODS[name])


def test_an_unknown_method_is_named():
    with pytest.raises(ValueError, match="unknown method 'dora', wants one of .*'clora'"):
        Method.from_json({"name": "dora"})


def test_the_toy_leaves_no_trace_in_the_others():
    assert set(METHODS) == {"lora", "clora", "curlora", "lalora", "toy"} | set(METHODS)
    assert METHODS["toy"] is Toy


@pytest.mark.parametrize(
    "cls, fields, message",
    [
        (fl.LoRA, {"rank": 0}, r"LoRA.rank is 0, wants an integer >= 1"),
        (fl.LoRA, {"rank": 2.5}, r"LoRA.rank is 2.5, wants an integer >= 1"),
        (fl.LoRA, {"rank": True}, r"LoRA.rank is True"),
        (fl.LoRA, {"alpha": float("nan")}, r"LoRA.alpha is nan, wants a finite number"),
        (fl.LoRA, {"alpha": -1}, r"LoRA.alpha is -1, wants a finite number >= 0"),
        (fl.CURLoRA, {"alpha": -0.5}, r"CURLoRA.alpha is -0.5, wants a finite number >= 0"),
        (fl.LoRA, {"alpha": "16"}, r"LoRA.alpha is '16', wants a number"),
        (fl.LoRA, {"alpha": None}, r"LoRA.alpha is None, wants a number"),
        (fl.CURLoRA, {"alpha": None}, r"CURLoRA.alpha is None, wants a number"),
        (fl.LoRA, {"dropout": 1.0}, r"LoRA.dropout is 1.0, wants a probability in \[0, 1\)"),
        (fl.LoRA, {"penalties": ("decay",)}, r"LoRA.penalties holds 'decay', wants Penalty instances"),
        (fl.CLoRA, {"k": 0}, r"NullSpace.k is 0, wants an integer >= 1"),
        (fl.CLoRA, {"basis": "fourier"}, r"NullSpace.basis is 'fourier', wants one of \['hadamard', 'orthogonal', "),
        (fl.CLoRA, {"weight": -1.0}, r"NullSpace.weight is -1.0, wants a number >= 0"),
        (fl.CURLoRA, {"smoothing": -1.0}, r"CURLoRA.smoothing is -1.0, wants a number >= 0"),
        (fl.CURLoRA, {"alpha": float("inf")}, r"CURLoRA.alpha is inf"),
        (fl.LaLoRA, {"curvature": "hessian"}, r"Laplace.curvature is 'hessian', wants 'diag', "),
        (fl.LaLoRA, {"fisher": "joint"}, r"Laplace.fisher is 'joint', wants 'empirical', 'true' or 'batch'"),
        (fl.LaLoRA, {"prior_precision": -1.0}, r"Laplace.prior_precision is -1.0, wants a number >= 0"),
    ],
)
def test_nonsense_is_refused_before_any_work(cls, fields, message):
    with pytest.raises(ValueError, match=message):
        cls(**fields)


# --------------------------------------------------------------------------------------------- LoRA


@pytest.mark.parametrize("name", ["lora", "clora", "lalora"])
def test_lora_starts_as_peft_s_does(name):
    """A within the bounds of kaiming_uniform(a=sqrt 5): 1 / sqrt(in_features); B zero."""
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(
        nn.Sequential(OrderedDict(layer=nn.Linear(400, 300))), peft.LoraConfig(r=32, target_modules=["layer"])
    ).base_model.model.layer
    model = nn.Sequential(OrderedDict(layer=nn.Linear(400, 300)))
    ours = fl.adapt(model, METHODS[name](rank=32), ["layer"]).layer.adapter
    a, b = theirs.lora_A.default.weight, theirs.lora_B.default.weight
    assert ours.down.shape == a.shape and ours.up.shape == b.shape
    assert not ours.up.any() and not b.any()
    for factor in (ours.down, a):
        assert 0.99 / 20 < factor.abs().max() <= 1 / 20
        assert abs(factor.std() - 1 / 20 / math.sqrt(3)) < 1e-3


def test_scaling_is_alpha_over_rank_or_its_root():
    site = Site("layer", torch.zeros(N, K))
    assert fl.LoRA(rank=16, alpha=32).build(site).scale == 2
    assert fl.LoRA(rank=16, alpha=32, rslora=True).build(site).scale == 8
    assert fl.CLoRA(rank=4, alpha=2).build(site).scale == fl.LaLoRA(rank=4, alpha=2).build(site).scale == 0.5


def test_dropout_acts_in_training_alone():
    model = fl.adapt(base_model("linear"), fl.LoRA(rank=4, dropout=0.5), ["layer"])
    stir(model)
    want = linear(tokens(), model.layer.weight + model.layer.delta(), model.layer.bias)
    torch.testing.assert_close(model.eval()(tokens()), want)
    assert not torch.allclose(model.train()(tokens()), want)
    runs = torch.stack([model(tokens()) for _ in range(1000)])
    assert ((runs.mean(0) - want).abs() / (runs.std(0) / 1000**0.5)).max() < 5


def test_clora_is_lora_with_its_penalty_and_lalora_too():
    extra = (fl.Decay(0.5),)
    assert fl.CLoRA(k=8, weight=2.0, seed=3, penalties=extra).all_penalties() == (fl.NullSpace(2.0, 8, seed=3), *extra)
    assert fl.LaLoRA(weight=5.0, penalties=extra).all_penalties() == (fl.Laplace(5.0), *extra)
    assert fl.LoRA(penalties=list(extra)).all_penalties() == extra
    assert fl.CLoRA().all_penalties() == (fl.NullSpace(weight=1.0, k=256, basis="orthogonal"),)


# ------------------------------------------------------------------------------------------ CURLoRA


def official(x: Tensor, layer: Any, alpha: float) -> Tensor:
    """The author's forward: C U R formed densely from the weight as it is stored, alpha undivided."""
    adapter, stored = layer.adapter, layer.weight
    C, R = stored[:, adapter.columns], stored[adapter.rows, :]
    dense = C @ adapter.core @ R
    if layer.transposed:
        return x @ (stored + alpha * dense) + layer.bias
    return linear(x, stored, layer.bias) + alpha * (x @ dense.t())


@pytest.mark.parametrize("shape", [(20, 24), (24, 20), (20, 20)], ids=str)
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_curlora_is_the_author_s(kind, shape):
    """Square Conv1D layers too, which the author's code multiplies by the transpose."""
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    base = nn.Linear(*shape) if kind == "linear" else Conv1D(shape[1], shape[0])
    model = nn.Sequential(OrderedDict(layer=base.double()))
    fl.adapt(model, fl.CURLoRA(rank=12, alpha=0.7), ["layer"])
    layer = stir(model).layer
    assert len(set(layer.adapter.rows.tolist())) < 12  # duplicates are legal and stay
    x = torch.randn(5, shape[0], dtype=torch.float64, requires_grad=True)
    y, want = model(x), official(x, layer, 0.7)
    torch.testing.assert_close(y, want, rtol=1e-12, atol=1e-12)
    dy = torch.randn_like(y)
    ours, theirs = (torch.autograd.grad(t, [x, layer.adapter.core], dy) for t in (y, want))
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


def test_curlora_trains_its_core_alone_and_starts_at_zero():
    model = fl.adapt(base_model("linear"), fl.CURLoRA(rank=5), ["layer"])
    assert [key for key, p in model.named_parameters() if p.requires_grad] == ["layer.adapter.core"]
    assert model.layer.adapter.core.shape == (5, 5) and not model.layer.adapter.core.any()
    stir(model)
    want = model.layer.weight[:, model.layer.adapter.columns] @ model.layer.adapter.core
    torch.testing.assert_close(model.layer.delta(), want @ model.layer.weight[model.layer.adapter.rows])


@pytest.mark.parametrize("smoothing", [0.0, 1e-3, 0.1])
def test_curlora_draws_weak_columns_more_often(smoothing):
    """Odds proportional to 1 / (share of the squared norm + smoothing), with replacement."""
    gen = torch.Generator().manual_seed(0)
    weight = torch.randn(30, 16, generator=gen) * torch.linspace(-1, 1, 16).exp()
    share = weight.double().square().sum(0) / weight.double().square().sum()
    odds = 1 / (share + smoothing)
    odds /= odds.sum()
    n = 200_000
    counts = torch.bincount(draw(weight, n, smoothing, gen), minlength=16)
    sigma = (n * odds * (1 - odds)).sqrt()
    assert ((counts - n * odds).abs() / sigma).max() < 4.5


def test_curlora_columns_index_inputs_and_rows_outputs_of_the_stored_weight():
    """A weight with one weak column and one weak row: those are drawn, in a Conv1D as well."""
    for kind, conv in (("linear", False), ("conv1d", True)):
        model = base_model(kind)
        stored = model.layer.weight.data.fill_(1.0)
        stored[:, 3] = 1e-5
        stored[7, :] = 1e-5
        fl.adapt(model, fl.CURLoRA(rank=8, smoothing=0.0), ["layer"])
        adapter = model.layer.adapter
        assert set(adapter.columns.tolist()) == {3} and set(adapter.rows.tolist()) == {7}
        down, up = adapter.factors()
        assert down.shape == (8, K) and up.shape == (N, 8) and model.layer.transposed == conv


def test_curlora_draws_are_of_the_seed_and_the_layer_s_name():
    def drawn(seed: int, name: str) -> tuple[list[int], list[int]]:
        adapter = fl.CURLoRA(rank=10, seed=seed).build(Site(name, base_model("linear").layer.weight.detach()))
        return adapter.rows.tolist(), adapter.columns.tolist()

    torch.manual_seed(1)
    first = drawn(0, "a")
    torch.manual_seed(2)
    assert drawn(0, "a") == first
    assert drawn(1, "a") != first and drawn(0, "b") != first


@pytest.mark.parametrize("smoothing", [0.0, 1e-3])
@pytest.mark.parametrize("zeros", [1, 4])
def test_curlora_draws_no_zeros(smoothing, zeros):
    """Nothing could be learnt through them."""
    weight = torch.ones(6, 5)
    weight[:, :zeros] = 0
    weight[:zeros] = 0
    model = nn.Sequential(nn.Linear(5, 6))
    model[0].weight.data.copy_(weight)
    fl.adapt(model, fl.CURLoRA(rank=20, smoothing=smoothing))
    adapter = model[0].adapter
    assert set(adapter.columns.tolist()) == set(range(zeros, 5)) and set(adapter.rows.tolist()) == set(range(zeros, 6))
    model(torch.randn(7, 5)).square().sum().backward()
    assert adapter.core.grad.any()


@pytest.mark.parametrize(
    "value, said", [(0.0, "is all zeros"), (float("nan"), "holds NaN"), (float("inf"), "holds NaN")]
)
def test_curlora_refuses_a_weight_it_cannot_draw_from(value, said):
    model = nn.Sequential(OrderedDict(fine=nn.Linear(5, 6), odd=nn.Linear(6, 6)))
    weight = model.odd.weight.data
    weight.zero_() if value == 0.0 else weight[2].fill_(value)
    with pytest.raises(ValueError, match=f"the weight of odd {said}"):
        fl.adapt(model, fl.CURLoRA(rank=2))
    assert not fl.adapters(model) and all(p.requires_grad for p in model.parameters())


def test_curlora_keeps_its_copies_when_the_weight_changes():
    model = fl.adapt(base_model("linear"), fl.CURLoRA(rank=5), ["layer"])
    delta = stir(model).layer.delta()
    with torch.no_grad():
        model.layer.weight.mul_(2)
    assert torch.equal(model.layer.delta(), delta)


def test_the_state_dict_of_other_draws_is_refused():
    """As when training goes on from a checkpoint under another seed: C and R would not be those of its U."""
    model = stir(fl.adapt(base_model("linear"), fl.CURLoRA(rank=5, seed=1), ["layer"]))
    twin = fl.adapt(base_model("linear"), fl.CURLoRA(rank=5, seed=2), ["layer"])
    with pytest.raises(RuntimeError, match="other rows"):
        twin.load_state_dict(model.state_dict())


# ----------------------------------------------------------------------------------- GPT-2, end to end


@every_method
def test_a_gpt2_is_adapted_trained_and_merged(name):
    model = tiny_gpt2()
    ids = torch.arange(12).view(2, 6)
    before = model(ids).logits
    method = METHODS[name](**{"rank": 4})
    fl.adapt(model, method)
    assert set(fl.adapters(model)) == {
        f"transformer.h.0.{part}" for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    torch.testing.assert_close(model(ids).logits, before)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Laplace has no statistics")
        for _ in range(8):
            loss = model(input_ids=ids, labels=ids).loss
            (loss + 1e-3 * fl.penalty(model)).backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert losses[-1] < losses[0]
    want = model(ids).logits
    fl.merge(model)
    assert not fl.adapters(model)
    torch.testing.assert_close(model(ids).logits, want, rtol=1e-4, atol=1e-5)
