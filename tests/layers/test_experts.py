"""Experts of mixture models: adapted like PEFT's target_parameters, under every penalty, merged, removed, measured."""

import collections
import copy
import warnings

import pytest
import torch
from helpers import stir, token_batch
from tiny_experts import FAMILIES, STACKS, tiny_experts

import forgetless as fl
from forgetless.layers.experts import matrices

peft = pytest.importorskip("peft")
pytest.importorskip("transformers.integrations.moe")

BATCH = token_batch((7, 5))
PENALTIES = {
    "null-space": fl.NullSpace(k=4),
    "decay": fl.Decay(),
    "weight": fl.WeightDeviation(),
    "output": fl.OutputDeviation(),
    "source": fl.SourceDeviation(),
    "source-columns": fl.SourceDeviation(covariance=4),
    "laplace": fl.Laplace(),
    "laplace-balanced": fl.Laplace(at_zero="balanced"),
    "kfac": fl.Laplace(curvature="kfac"),
    "tri-kfac": fl.Laplace(curvature="tri_kfac"),
}


def adapted(family="Qwen3Moe", method=fl.LoRA(rank=2, alpha=4), targets=STACKS, dtype=torch.float32):  # noqa: B008
    return stir(fl.adapt(tiny_experts(family, dtype), method, targets))


def theirs(family, dtype, like):
    """PEFT's model with the factors of ours."""
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["o_proj"], target_parameters=STACKS)
    model = peft.get_peft_model(tiny_experts(family, dtype), config, autocast_adapter_dtype=False)
    for name, layer in fl.adapters(like).items():
        for factor, p in peft_factors(model, name).items():
            mine = getattr(layer.adapter, factor).detach()
            p.data = flat(factor, mine)
    return model


def peft_factors(model, name):
    modules = dict(model.named_modules())
    wrapper = modules.get(f"base_model.model.{name}")
    if wrapper is None:
        parent, _, key = name.rpartition(".")
        wrapper = modules[f"base_model.model.{parent}"]
        wrapper = wrapper if wrapper.parameter_name == key else wrapper.base_layer
    return {"down": wrapper.lora_A["default"].weight, "up": wrapper.lora_B["default"].weight}


def flat(factor, t):
    """A stack as PEFT has it: lora_A with the expert slowest, lora_B with the expert fastest."""
    if t.dim() == 2:
        return t
    return t.flatten(0, 1) if factor == "down" else t.permute(1, 2, 0).flatten(1)


@pytest.mark.parametrize(
    "family, dtype, bound",
    [*((family, torch.float32, 1e-5) for family in FAMILIES), ("GptOss", torch.float64, 1e-13)],
)
def test_logits_and_gradients_are_those_of_peft(family, dtype, bound):
    ours = adapted(family, targets=["o_proj", *STACKS], dtype=dtype)
    other = theirs(family, dtype, ours)
    a, b = ours(**BATCH), other(**BATCH)
    assert (b.logits - tiny_experts(family, dtype)(**BATCH).logits).abs().max() > 0.01  # the update counts
    torch.testing.assert_close(a.logits, b.logits, rtol=bound, atol=bound * b.logits.abs().max().item())
    a.loss.backward()
    b.loss.backward()
    for name, layer in fl.adapters(ours).items():
        for factor, p in peft_factors(other, name).items():
            grad = flat(factor, getattr(layer.adapter, factor).grad)
            assert (grad - p.grad).norm() <= bound * p.grad.norm(), (name, factor)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_linear_reaches_the_experts_and_leaves_the_router(family):
    model = tiny_experts(family)
    before, names = model(**BATCH).logits, [name for name, _ in model.named_parameters()]
    fl.adapt(model, fl.LoRA(rank=2))
    torch.testing.assert_close(model(**BATCH).logits, before)
    reached = list(fl.adapters(model))
    assert {name.rpartition(".")[2] for name in reached if ".experts." in name} == {"gate_up_proj", "down_proj"}
    assert not any("router" in name or name.endswith(".gate") for name in reached)
    assert all("_adapter." in name or ".adapter." in name for name, p in model.named_parameters() if p.requires_grad)
    assert {report.path for name, report in fl.explain(model).items() if ".experts." in name} == {"experts"}
    model(**BATCH).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    fl.remove(model)
    assert [name for name, _ in model.named_parameters()] == names
    assert torch.equal(model(**BATCH).logits, before)


@pytest.mark.parametrize("family", FAMILIES)
def test_merge_gives_the_model_its_own_experts_again(family):
    model = adapted(family)
    expected, state = model(**BATCH).logits, set(tiny_experts(family).state_dict())
    fl.merge(model)
    assert set(model.state_dict()) == state
    assert not any(hasattr(m, "config") and m.config is not model.config for m in model.modules())
    torch.testing.assert_close(model(**BATCH).logits, expected, rtol=1e-4, atol=1e-5)


def saved_bytes(experts, arguments):
    """Bytes that the experts keep for backward, beside parameters and what they were given."""
    known = {t.untyped_storage().data_ptr() for t in [*experts.parameters(), *arguments]}
    storages = {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = experts(*arguments)
    y.sum().backward()
    return [storage.nbytes() for storage in storages.values()]


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@pytest.mark.parametrize("hidden, width, E, tokens, top", [(64, 96, 32, 64, 2), (128, 192, 64, 256, 4)])
def test_a_tenth_of_what_peft_saves_and_nothing_of_the_size_of_the_stack(hidden, width, E, tokens, top, implementation):
    sizes = {"hidden_size": hidden, "moe_intermediate_size": width, "num_experts": E}
    models = [tiny_experts("Qwen3Moe", torch.bfloat16, **sizes) for _ in range(2)]
    models[1].set_experts_implementation(implementation)
    fl.adapt(models[0], fl.LoRA(rank=4), STACKS)
    config = peft.LoraConfig(r=4, target_modules=[], target_parameters=STACKS)
    peft.get_peft_model(models[1], config)
    x = torch.randn(tokens, hidden, dtype=torch.bfloat16, requires_grad=True)
    index = torch.rand(tokens, E).argsort(1)[:, :top]
    shares = torch.rand(tokens, top, dtype=torch.bfloat16, requires_grad=True)
    models[0].model.layers[0].mlp.experts(x, index, shares)  # the first call compares
    ours, other = (saved_bytes(model.model.layers[0].mlp.experts, (x, index, shares)) for model in models)
    assert max(ours) <= tokens * top * 2 * width * 2  # what gate_up_proj makes, and nothing of what comes after it
    assert sum(ours) <= 0.07 * sum(other), (sum(ours), sum(other))


@pytest.mark.parametrize("name", PENALTIES)
def test_every_penalty_is_the_sum_over_single_experts(name):
    penalty = PENALTIES[name]
    model = adapted(method=fl.LoRA(rank=2, penalties=(penalty,)))
    if penalty.name in ("laplace", "source-deviation"):
        assert fl.calibrate(model, [BATCH])["layers"] == 8
        stir(model, seed=1)
    loss = model(**BATCH).loss
    value = fl.penalty(model)
    singles = matrices(fl.adapters(model))
    assert len(singles) == 2 * 4
    each = [
        state.value(layer.adapter, layer.trace and layer.trace.hidden)
        for layer in singles.values()
        for state in layer.adapter.penalty_states()
    ]
    torch.testing.assert_close(value, torch.stack(each).sum())
    assert value > 0
    (loss + value).backward()
    copy.deepcopy(model)


def watch(model):
    """hidden states and experts of each token, of the model's experts modules."""
    seen = []
    for module in model.modules():
        if hasattr(module, "gate_up_proj"):
            module.register_forward_pre_hook(lambda _, args: seen.append(args[:2]))
    return seen


@pytest.mark.parametrize("penalty", [fl.SourceDeviation(1.0, covariance="full"), fl.OutputDeviation(1.0)])
def test_deviations_are_means_over_all_tokens_of_what_their_experts_change(penalty):
    model = adapted(method=fl.LoRA(rank=2, penalties=(penalty,)), targets=["gate_up_proj"])
    mask = BATCH["attention_mask"]
    seen = watch(model)
    if isinstance(penalty, fl.SourceDeviation):
        fl.calibrate(model, [BATCH])
        value = fl.penalty(model)
    else:
        model(**BATCH)
        value = fl.penalty(model, token_weights=mask)
    expected = 0.0
    for (x, index), layer in zip(seen, fl.adapters(model).values(), strict=True):
        delta = layer.delta().double()
        moved = torch.einsum("tenk,tk->ten", delta[index], x.double()).square().sum((1, 2))
        expected = expected + moved[mask.flatten().bool()].mean()
    torch.testing.assert_close(value, expected.float())


def test_fisher_is_taken_over_each_sequence_s_gradient():
    model = adapted(method=fl.LoRA(rank=2, penalties=(fl.Laplace(),)))
    batch = token_batch((6, 6, 6))
    fl.calibrate(model, [batch])
    squares = collections.Counter()
    for row in range(3):
        model.zero_grad()
        model(**{key: value[row : row + 1] for key, value in batch.items()}).loss.backward()
        for name, layer in fl.adapters(model).items():
            for factor in ("down", "up"):
                squares[name, factor] += getattr(layer.adapter, factor).grad.square() / 3
    for name, layer in fl.adapters(model).items():
        for factor in ("down", "up"):
            measured = torch.stack([getattr(s, f"fisher_{factor}") for s in layer.adapter.penalty_states()])
            torch.testing.assert_close(measured, squares[name, factor], rtol=1e-4, atol=1e-9)


def test_consolidate_folds_the_experts_and_can_be_undone():
    model = adapted(method=fl.LoRA(rank=2, penalties=(fl.SourceDeviation(),)))
    fl.calibrate(model, [BATCH])
    expected = model(**BATCH).logits
    done = fl.consolidate(model, [BATCH], undo=True)
    assert max(done.rounding.values()) < 1e-5
    torch.testing.assert_close(model(**BATCH).logits, expected, rtol=1e-4, atol=1e-5)
    assert all(not layer.adapter.up.any() for layer in fl.adapters(model).values())
    done.undo()
    assert torch.equal(model(**BATCH).logits, expected)


def test_drift_and_dropout_and_checkpointing():
    model = adapted(method=fl.LoRA(rank=2, dropout=0.5))
    with torch.no_grad():
        first = model(**BATCH).logits
    assert fl.drift(model).keys() == fl.adapters(model).keys() and min(fl.drift(model).values()) > 0
    model.train()
    torch.manual_seed(0)
    dropped = model(**BATCH)
    assert not torch.allclose(dropped.logits, first)
    dropped.loss.backward()
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    torch.manual_seed(0)
    model(**BATCH).loss.backward()
    for a, b in zip(grads, [p.grad for p in model.parameters() if p.grad is not None], strict=True):
        torch.testing.assert_close(a, b)


def test_training_runs_in_bfloat16_and_under_autocast():
    for dtype, enabled in ((torch.bfloat16, False), (torch.float32, True)):
        model = adapted(dtype=dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = model(**BATCH).loss
        loss.backward()
        assert all(p.grad.dtype == p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


def test_the_implementation_of_the_model_can_be_set_and_does_not_switch_the_adapters_off():
    model = adapted()
    expected = model(**BATCH).logits
    model.set_experts_implementation("grouped_mm")
    assert torch.equal(model(**BATCH).logits, expected)
    fl.remove(model)
    assert model.model.layers[0].mlp.experts.config._experts_implementation == "grouped_mm"


class Slope(torch.nn.Module):
    """An activation with a parameter."""

    def __init__(self):
        super().__init__()
        self.slope = torch.nn.Parameter(torch.tensor(0.5))

    def forward(self, x):
        return torch.nn.functional.leaky_relu(x) * self.slope


def test_an_activation_may_be_trained():
    model, grads = adapted(), []
    experts = model.model.layers[0].mlp.experts
    experts.act_fn = Slope()
    for trained in (True, False):
        experts.act_fn.slope.requires_grad_(trained)
        model.zero_grad()
        model(**BATCH).loss.backward()
        assert (experts.act_fn.slope.grad is not None) == trained
        grads.append([p.grad.clone() for layer in fl.adapters(model).values() for p in layer.adapter.parameters()])
    torch.testing.assert_close(*grads)


def test_one_of_two_stacks_may_be_adapted():
    model = adapted(targets=["experts.down_proj"])
    assert {name.rpartition(".")[2] for name in fl.adapters(model)} == {"down_proj"}
    other = adapted(targets=["experts.down_proj"])
    expected = other(**BATCH).logits
    fl.merge(other)
    torch.testing.assert_close(other(**BATCH).logits, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(**BATCH).logits, expected)


def test_experts_that_compute_something_else_are_refused_before_anything_is_changed():
    model = tiny_experts("Qwen3Moe")
    kind = type(model.model.layers[0].mlp.experts)
    model.model.layers[0].mlp.experts._apply_gate = lambda t: t[..., ::2] * t[..., 1::2]
    with pytest.raises(ValueError, match=f"experts of {kind.__name__} do not compute what their flags say"):
        fl.adapt(model, fl.LoRA(rank=2))
    assert not fl.adapters(model) and all(p.requires_grad for p in model.parameters())
    assert all(m.config is model.config for m in model.modules() if hasattr(m, "config"))


def test_curlora_leaves_experts_out_with_a_word():
    model = tiny_experts("Qwen3Moe")
    with pytest.warns(UserWarning, match="stack of experts, which curlora does not adapt.*2 stacks"):
        fl.adapt(model, fl.CURLoRA(rank=2))
    assert not any(".experts." in name for name in fl.adapters(model))
    with pytest.raises(ValueError, match="stack of experts, which curlora does not adapt"):
        fl.adapt(tiny_experts("Qwen3Moe"), fl.CURLoRA(rank=2), STACKS)


def test_a_regular_expression_reaches_experts():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = fl.adapt(tiny_experts("Mixtral"), fl.LoRA(rank=2), r"q_proj|layers\.0\..*experts\.gate_up_proj")
    assert sum(".experts." in name for name in fl.adapters(model)) == 1
