"""Every provider computes the same layer, model or penalty; shapes and FLOPs are right."""

from __future__ import annotations

import types

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import forgetless as fl

pytest.importorskip("transformers")
from forgetless_bench import dispatch, providers, shapes  # noqa: E402

CPU = torch.device("cpu")
N, K, R, M, SCALE = 24, 16, 4, 7, 0.75


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def layer(dtype: torch.dtype = torch.float64, bias: bool = True) -> tuple[nn.Linear, Tensor, Tensor]:
    base = providers.frozen_linear(N, K, bias, dtype, CPU)
    return base, *providers.random_factors(base, R)


def modules(base: nn.Linear, down: Tensor, up: Tensor, dropout: float) -> dict[str, nn.Module]:
    return {name: make().train() for name, make in providers.lora_layers(base, down, up, SCALE, dropout).items()}


def gradients(module: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """y and every gradient, the factors' under our names whoever's they are."""
    leaf = x.detach().requires_grad_(True)
    y = module(leaf)
    leaves_of = {name: p for name, p in module.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(y, [leaf, *leaves_of.values()], dy)
    result = {"y": y.detach(), "dx": grads[0]}
    for name, grad in zip(leaves_of, grads[1:], strict=True):
        result["dup" if "up" in name.split(".") or "lora_B" in name else "ddown"] = grad
    return result


def truth(base: nn.Linear, down: Tensor, up: Tensor, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    leaves = [t.detach().requires_grad_(True) for t in (x, down, up)]
    with fl.ops.backend("reference"):
        y = fl.ops.lowrank_linear(leaves[0], base.weight, *leaves[1:], base.bias, SCALE)
        grads = torch.autograd.grad(y, leaves, dy)
    return dict(zip(("y", "dx", "ddown", "dup"), (y.detach(), *grads), strict=True))


# -------------------------------------------------------------------------------------- baselines


@pytest.mark.parametrize("bias", [False, True])
def test_every_lora_provider_is_the_reference(bias):
    base, down, up = layer(bias=bias)
    x, dy = torch.randn(M, K, dtype=torch.float64), torch.randn(M, N, dtype=torch.float64)
    expected = truth(base, down, up, x, dy)
    layers = modules(base, down, up, 0.0)
    assert {"frozen", "eager PyTorch", "LoRAFusion-style", "forgetless"} <= set(layers)
    for name, module in layers.items():
        if name == "frozen":
            continue
        got = gradients(module, x, dy)
        assert got.keys() == expected.keys(), name
        for key, value in got.items():
            torch.testing.assert_close(value, expected[key], rtol=1e-10, atol=1e-12, msg=f"{name}: {key}")


@pytest.mark.parametrize("name", ["eager PyTorch", "LoRAFusion-style", "PEFT"])
def test_dropout_of_the_baselines_is_the_formula(name):
    p = 0.4
    base, down, up = layer()
    layers = modules(base, down, up, p)
    if name not in layers:
        pytest.skip("PEFT is not installed")
    x, dy = torch.randn(M, K, dtype=torch.float64), torch.randn(M, N, dtype=torch.float64)
    torch.manual_seed(3)
    mask = torch.native_dropout(torch.ones_like(x), p, True)[0]  # 0 or 1 / (1 - p)
    torch.manual_seed(3)
    got = gradients(layers[name], x, dy)
    leaves = [t.detach().requires_grad_(True) for t in (x, down, up)]
    y = base(leaves[0]) + SCALE * ((leaves[0] * mask) @ leaves[1].T) @ leaves[2].T
    expected = dict(zip(("y", "dx", "ddown", "dup"), (y, *torch.autograd.grad(y, leaves, dy)), strict=True))
    assert 0 < (mask == 0).sum() < mask.numel()
    for key, value in got.items():
        torch.testing.assert_close(value, expected[key].detach(), rtol=1e-10, atol=1e-12, msg=key)


def test_every_provider_computes_the_same_in_bfloat16():
    base, down, up = layer(torch.bfloat16)
    down, up = (t.bfloat16().float() for t in (down, up))  # the same numbers in every provider's dtype
    x, dy = torch.randn(M, K).bfloat16(), torch.randn(M, N).bfloat16()
    expected = truth(base.double(), down.double(), up.double(), x.double(), dy.double())
    base.bfloat16()
    layers = modules(base, down, up, 0.0)
    errors = {}
    for name, module in layers.items():
        if name != "frozen":
            got = gradients(module, x, dy)
            errors[name] = {key: (got[key].double() - expected[key]).abs().max().item() for key in expected}
    for name, row in errors.items():
        for key, error in row.items():
            assert error <= 3 * errors["eager PyTorch"][key] + 1e-6, (name, key)


def test_the_authors_curlora_is_ours():
    base, _, _ = layer()
    result = {name: make() for name, make in providers.curlora_layers(base, R).items()}
    x, dy = torch.randn(M, K, dtype=torch.float64), torch.randn(M, N, dtype=torch.float64)
    ours, theirs = (gradients(result[name], x, dy) for name in ("forgetless", "authors' CURLoRA"))
    dense = base.weight + result["forgetless"].delta()
    torch.testing.assert_close(theirs["y"], x @ dense.T + base.bias)
    for key in ours:
        torch.testing.assert_close(ours[key], theirs[key])


def test_the_authors_clora_loop_is_our_penalty():
    holder = nn.Sequential(nn.Linear(40, 24), nn.Linear(24, 40)).double()
    fl.adapt(holder, fl.CLoRA(4, k=9, weight=0.7), ["0", "1"])
    result = list(fl.adapters(holder).values())
    factors, bases = [], []
    for one in result:
        nn.init.normal_(one.adapter.up)
        (state,) = one.adapter.penalty_states()
        factors.append((one.adapter.down, one.adapter.up))
        bases.append((state.input.basis, state.output.basis))
    loop = providers.CloraAuthors(factors, bases, weight=0.7)
    leaves = [t for pair in factors for t in pair]
    ours, theirs = fl.penalty(holder), loop()
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, leaves), strict=True):
        torch.testing.assert_close(a, b)
    drawn = providers.CloraAuthors.drawn(factors, 9, torch.float64)
    for v, _ in drawn.bases:
        torch.testing.assert_close(v.T @ v, torch.eye(9, dtype=torch.float64), atol=1e-6, rtol=0)
    assert drawn.bytes() == 8 * 9 * 2 * (40 + 24)


def test_the_baseline_of_dispatch_is_the_reference():
    base, down, up = layer(torch.float32, bias=False)
    x, dy = torch.randn(M, K, requires_grad=True), torch.randn(M, N)
    leaves = [t.detach().requires_grad_(True) for t in (down, up)]
    y = dispatch.Bare.apply(x, base.weight, *leaves)
    with fl.ops.backend("reference"):
        expected = fl.ops.lowrank_linear(x, base.weight, *leaves)
        torch.testing.assert_close(y, expected)
        gradients_of = torch.autograd.grad(expected, [x, *leaves], dy)
    for a, b in zip(torch.autograd.grad(y, [x, *leaves], dy), gradients_of, strict=True):
        torch.testing.assert_close(a, b)


def test_authors_curlora_of_a_whole_model_is_ours():
    base, name = providers.smollm2(CPU, smoke=True)
    assert "toy" in name
    inputs, ids = providers.batch(base, 1, 4)
    ours, theirs = providers.adapted(base, fl.CURLoRA(4)), providers.authors_curlora(base)
    assert sum(isinstance(m, providers.CurloraAuthors) for m in theirs.modules()) == 14
    with torch.no_grad():
        a, b = (model(inputs_embeds=inputs).logits for model in (ours, theirs))
    assert torch.equal(a, b)  # U = 0: both are the base model
    shared = {p.data_ptr() for p in base.parameters()}
    assert {p.data_ptr() for p in providers.twin(base).parameters()} == shared


# ----------------------------------------------------------------------------------------- shapes


def test_flops_are_those_that_torch_counts():
    base, down, up = layer(torch.float32, bias=False)
    case = shapes.Case("tiny.q", M, R, "float32", 0.0, "lora")
    assert (shapes.SHAPES["tiny.q"].N, shapes.SHAPES["tiny.q"].K) == (N, K)
    x = torch.randn(M, K, requires_grad=True)
    for frozen, run in ((True, base), (False, providers.Eager(base, down, up, 1.0))):
        with FlopCounterMode(display=False) as counter:
            run(x).sum().backward()
        assert counter.get_total_flops() == shapes.work(case, frozen)[0]


def test_what_does_not_fit_is_left_out_with_a_note(monkeypatch):
    monkeypatch.setattr(shapes, "available_bytes", lambda device: 1 << 20)
    options = types.SimpleNamespace(
        shapes=["tiny.q", "llama3.up"], dtypes=["float32"], methods=["lora"], dropout=[0.0], tokens=[8], ranks=[4]
    )
    notes: list[str] = []
    cases = shapes.fitting(shapes.grid(options), CPU, notes)
    assert [case.shape for case in cases] == ["tiny.q"]
    assert len(notes) == 1 and "llama3.up" in notes[0] and "left out" in notes[0]


def test_sweeps_are_one_shape_by_rank_and_one_by_tokens():
    options, notes = types.SimpleNamespace(smoke=False, tokens=[512], ranks=[16], dtypes=["float32"]), []
    cases = shapes.sweeps(options, CPU, notes)
    sizes = [(case.M, case.R) for case in cases]
    assert sizes == [(512, R) for R in shapes.RANKS] + [(M, 16) for M in (512, 1024, 2048, 4096)]
    assert len(notes) == 1 and "4096" in notes[0]
    many = shapes.sweeps(options, torch.device("cuda"), notes)
    assert [case.M for case in many[len(shapes.RANKS) :]] == list(shapes.TOKENS) and len(notes) == 1
