"""Statistics of the source domain against brute force: one sequence at a time, by autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import stir, tiny_gpt2, tiny_llama, token_batch
from torch import Tensor, nn

import forgetless as fl

LINEAR = ["q_proj", "o_proj", "down_proj"]
BATCHES = [
    token_batch((9, 6, 8), prompts=(0, 3, 6), seed=1),  # unequal label counts, padding, prompts left out
    token_batch((4, 9), prompts=(2, 5), seed=2),
]
tolerance = {"rtol": 2e-4, "atol": 1e-10}


def adapted(*penalties: Any, moved: float = 0.1, method: type = fl.LoRA, **options: Any) -> Any:
    model = fl.adapt(tiny_llama(), method(rank=3, penalties=penalties, **options), LINEAR)
    return stir(model, moved) if moved else model


def states(model: nn.Module) -> dict[str, Any]:
    return {name: layer.adapter.penalty_states()[0] for name, layer in fl.adapters(model).items()}


def gradients(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return dict(zip(trained, torch.autograd.grad(model(**batch).loss, list(trained.values())), strict=True))


def row(batch: dict[str, Tensor], i: int) -> dict[str, Tensor]:
    return {key: value[i : i + 1] for key, value in batch.items()}


def fisher_of(model: Any) -> dict[str, Tensor]:
    """Parameter name in the model -> its Fisher entries."""
    return {
        f"{name}.adapter.{key}": getattr(state, f"fisher_{key}")
        for name, state in states(model).items()
        for key in state.names
    }


# ------------------------------------------------------------------------------------------ Fisher


@pytest.mark.parametrize("method", [fl.LoRA, fl.CURLoRA])
def test_empirical_fisher_is_the_mean_squared_gradient_of_each_sequence(method):
    model = adapted(fl.Laplace(), method=method)
    assert fl.calibrate(model, BATCHES) == {"layers": 6, "batches": 2, "sequences": 5}
    each = [gradients(model, row(batch, i)) for batch in BATCHES for i in range(len(batch["labels"]))]
    for name, fisher in fisher_of(model).items():
        assert fisher.any()
        torch.testing.assert_close(fisher, torch.stack([g[name].square() for g in each]).mean(0), **tolerance)


def test_batch_fisher_squares_the_gradient_of_the_batch():
    model = adapted(fl.Laplace(fisher="batch"))
    fl.calibrate(model, BATCHES)
    each = [gradients(model, batch) for batch in BATCHES]
    for name, fisher in fisher_of(model).items():
        torch.testing.assert_close(fisher, torch.stack([g[name].square() for g in each]).mean(0), **tolerance)


def test_a_gpt2_s_conv1d_layers_too():
    model = stir(fl.adapt(tiny_gpt2().double(), fl.CURLoRA(rank=4, penalties=(fl.Laplace(),))), 0.1)
    fl.calibrate(model, BATCHES)
    each = [gradients(model, row(batch, i)) for batch in BATCHES for i in range(len(batch["labels"]))]
    for name, fisher in fisher_of(model).items():
        want = torch.stack([g[name].square() for g in each]).mean(0)
        torch.testing.assert_close(fisher, want, rtol=1e-6, atol=1e-20)


def test_at_the_usual_start_only_up_is_held():
    model = adapted(moved=0, method=fl.LaLoRA)
    fl.calibrate(model, BATCHES)
    for name, fisher in fisher_of(model).items():
        assert fisher.any() == name.endswith(".up")
    value = fl.penalty(model)
    assert value == 0
    with torch.no_grad():
        for layer in fl.adapters(model).values():
            layer.adapter.down.add_(1.0)
    assert fl.penalty(model) == 0
    stir(model)
    assert fl.penalty(model) > 0


def test_after_some_training_down_is_held_too():
    model = adapted(method=fl.LaLoRA)
    fl.calibrate(model, BATCHES)
    assert all(fisher.any() for fisher in fisher_of(model).values())


def test_the_centre_is_where_it_was_calibrated():
    model = adapted(method=fl.LaLoRA)
    fl.calibrate(model, BATCHES)
    assert fl.penalty(model) == 0
    value = fl.penalty(stir(model, 0.1, seed=4))
    assert value > 0
    fl.calibrate(model, BATCHES)
    assert fl.penalty(model) == 0


def test_a_sequence_without_labels_does_not_count():
    silent = token_batch((9, 6, 8), prompts=(0, 9, 6), seed=1)
    model, without = adapted(fl.Laplace()), adapted(fl.Laplace())
    fl.calibrate(model, [silent])
    fl.calibrate(without, [{key: value[[0, 2]] for key, value in silent.items()}])
    for name, fisher in fisher_of(model).items():
        torch.testing.assert_close(fisher, fisher_of(without)[name], **tolerance)


def test_a_batch_without_any_label_is_refused():
    """Its mean loss is NaN, which would make every Fisher entry NaN."""
    model = adapted(fl.Laplace())
    with pytest.raises(ValueError, match="batch 2.*loss.*nan"):
        fl.calibrate(model, [BATCHES[0], token_batch((5, 5), prompts=(5, 5))])
    assert not any(state.calibrated for state in states(model).values())


def test_a_loss_of_one_s_own():
    """Without labels every first-dimension entry is a sample of equal share."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    stir(fl.adapt(model, fl.LoRA(rank=2, penalties=(fl.Laplace(),))))
    x = torch.randn(7, 6, dtype=torch.float64)

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return model(x).square().mean()

    assert fl.calibrate(model, [x], loss=loss)["sequences"] == 7
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    each = [torch.autograd.grad(loss(model, x[i : i + 1]), list(trained.values())) for i in range(7)]
    for i, (name, fisher) in enumerate(fisher_of(model).items()):
        assert name in trained
        want = torch.stack([g[list(trained).index(name)].square() for g in each]).mean(0)
        torch.testing.assert_close(fisher, want, rtol=1e-10, atol=1e-20, msg=f"{i} {name}")


def test_the_batch_size_does_not_matter_to_the_empirical_fisher():
    joint, single = adapted(fl.Laplace()), adapted(fl.Laplace())
    fl.calibrate(joint, BATCHES)
    fl.calibrate(single, [row(batch, i) for batch in BATCHES for i in range(len(batch["labels"]))])
    for name, fisher in fisher_of(joint).items():
        torch.testing.assert_close(fisher, fisher_of(single)[name], **tolerance)


# -------------------------------------------------------------------------------------- covariance


@pytest.mark.parametrize("covariance", ["diag", "full"])
@pytest.mark.parametrize("labels", [True, False], ids=["labels", "no labels"])
def test_the_covariance_is_that_of_the_real_tokens(covariance, labels):
    """Padding is left out; no labels are needed."""
    model = adapted(fl.SourceDeviation(covariance=covariance))
    seen: dict[str, list[Tensor]] = {name: [] for name in fl.adapters(model)}
    for name, layer in fl.adapters(model).items():
        layer.register_forward_pre_hook(lambda _, args, name=name: seen[name].append(args[0].detach()))
    batches = [{k: v for k, v in batch.items() if labels or k != "labels"} for batch in BATCHES]
    assert fl.calibrate(model, batches)["sequences"] == 5
    for name, state in states(model).items():
        real = torch.cat([x[b["attention_mask"].bool()] for x, b in zip(seen[name], BATCHES, strict=True)]).double()
        assert state.tokens == len(real) == 9 + 6 + 8 + 4 + 9
        want = real.T @ real / len(real)
        want = want if covariance == "full" else want.diagonal()
        torch.testing.assert_close(state.covariance.double(), want, rtol=1e-5, atol=1e-6)


def test_padding_changes_nothing():
    padded, packed = adapted(fl.SourceDeviation()), adapted(fl.SourceDeviation())
    batch = BATCHES[0]
    fl.calibrate(padded, [batch])
    fl.calibrate(packed, [{"input_ids": row(batch, i)["input_ids"][:, :n]} for i, n in enumerate((9, 6, 8))])
    for name, state in states(padded).items():
        torch.testing.assert_close(state.covariance, states(packed)[name].covariance, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("penalty", [fl.Laplace(), fl.Laplace(curvature="kfac"), fl.SourceDeviation(covariance=99)])
def test_whatever_stands_in_the_padding_does_not_count(penalty, side):
    """Statistics are those of the sequences without their padding, whichever side it is on."""
    padded, packed = adapted(penalty), adapted(penalty)
    lengths = (9, 6, 8)
    batch = token_batch(lengths, prompts=(0, 3, 6), seed=1)
    strange = torch.where(batch["attention_mask"].bool(), batch["input_ids"], 11)
    plain = [{k: v[i : i + 1, :n] for k, v in batch.items()} for i, n in enumerate(lengths)]
    batch = {**batch, "input_ids": strange}
    if side == "left":
        batch = {k: torch.stack([r.roll(9 - n) for r, n in zip(v, lengths, strict=True)]) for k, v in batch.items()}
        batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    fl.calibrate(padded, [batch])
    fl.calibrate(packed, plain)
    stir(padded, 0.1, seed=4), stir(packed, 0.1, seed=4)
    torch.testing.assert_close(fl.penalty(padded), fl.penalty(packed), rtol=1e-4, atol=0)


def test_covariances_alone_need_no_backward_pass(monkeypatch):
    model = adapted(fl.SourceDeviation())

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a gradient was asked for")

    monkeypatch.setattr(torch.autograd, "grad", refuse)
    fl.calibrate(model, BATCHES)


def test_both_kinds_in_one_pass():
    both = adapted(fl.Laplace(), fl.SourceDeviation())
    fl.calibrate(both, BATCHES)
    laplace, source = adapted(fl.Laplace()), adapted(fl.SourceDeviation())
    fl.calibrate(laplace, BATCHES)
    fl.calibrate(source, BATCHES)
    assert fisher_of(both).keys() == fisher_of(laplace).keys()
    for name, fisher in fisher_of(both).items():
        assert torch.equal(fisher, fisher_of(laplace)[name])
    for name, layer in fl.adapters(both).items():
        torch.testing.assert_close(layer.adapter.penalty_states()[1].covariance, states(source)[name].covariance)


# --------------------------------------------------------------------------------------- manners


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(training):
    model = adapted(fl.Laplace(), fl.SourceDeviation(), dropout=0.5)
    model.train(training)
    model.model.layers[0].self_attn.eval()
    modes = [module.training for module in model.modules()]
    before = {name: p.clone() for name, p in model.named_parameters()}
    hooks = [len(module._forward_hooks) for module in model.modules()]
    fl.calibrate(model, BATCHES)
    assert [module.training for module in model.modules()] == modes
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_gradients_waiting_for_a_step_are_not_touched():
    model = adapted(fl.Laplace())
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.full_like(p, 7.0)
    fl.calibrate(model, BATCHES)
    assert all((p.grad == 7.0).all() for p in model.parameters() if p.requires_grad)


def test_dropout_is_off_while_measuring():
    without, dropping = adapted(fl.Laplace()), adapted(fl.Laplace(), dropout=0.5).train()
    fl.calibrate(without, BATCHES)
    fl.calibrate(dropping, BATCHES)
    for name, fisher in fisher_of(dropping).items():
        torch.testing.assert_close(fisher, fisher_of(without)[name], **tolerance)


def test_it_works_under_no_grad_and_leaves_no_graph_behind():
    model = adapted(fl.Laplace(), fl.OutputDeviation())
    with torch.no_grad():
        fl.calibrate(model, BATCHES)
    assert all(fisher.any() and not fisher.requires_grad for fisher in fisher_of(model).values())
    assert all(layer.trace is None for layer in fl.adapters(model).values())


def test_the_progress_is_told():
    told: list[int] = []
    fl.calibrate(adapted(fl.SourceDeviation()), iter(BATCHES), on_batch=told.append)
    assert told == [1, 2]


def test_a_second_calibration_replaces_the_first():
    once, twice = adapted(fl.Laplace(), fl.SourceDeviation()), adapted(fl.Laplace(), fl.SourceDeviation())
    fl.calibrate(once, BATCHES[1:])
    fl.calibrate(twice, BATCHES[:1])
    fl.calibrate(twice, BATCHES[1:])
    for a, b in zip(once.buffers(), twice.buffers(), strict=True):
        assert torch.equal(a, b)


# ----------------------------------------------------------------------------------------- errors


def test_what_cannot_be_calibrated_is_named():
    with pytest.raises(ValueError, match="model has no adapters; call fl.adapt"):
        fl.calibrate(tiny_llama(), BATCHES)
    with pytest.raises(ValueError, match="no attached penalty asks for statistics"):
        fl.calibrate(adapted(fl.Decay()), BATCHES)


def test_no_batch_is_an_error_and_nothing_is_calibrated():
    model = adapted(fl.Laplace())
    fl.calibrate(model, BATCHES)
    with pytest.raises(ValueError, match="batches is empty"):
        fl.calibrate(model, [])
    assert not any(state.calibrated for state in states(model).values())


def test_no_loss_is_an_error_that_says_what_to_do():
    model = adapted(fl.Laplace())
    with pytest.raises(ValueError, match='returned no loss: put "labels" into the batches, or pass loss='):
        fl.calibrate(model, [{"input_ids": BATCHES[0]["input_ids"]}])
    assert model.training is False


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_midway_leaves_nothing_half_measured(error):
    """Sums that were never divided must not be taken for statistics."""
    model = adapted(fl.Laplace(), fl.SourceDeviation()).train()

    def batches() -> Any:
        yield BATCHES[0]
        raise error

    with pytest.raises(error):
        fl.calibrate(model, batches())
    for layer in fl.adapters(model).values():
        assert not any(state.calibrated for state in layer.adapter.penalty_states())
    assert all(module.training for module in model.modules())
    with pytest.warns(UserWarning, match="no statistics"):
        assert fl.penalty(model) == 0


@pytest.mark.parametrize("batches", [["x"], "x", [3], [["x"]]])
def test_what_is_no_batch_is_said(batches: Any) -> None:
    with pytest.raises(ValueError, match="batch 1 is a (str|int|list), wants a mapping of tensors"):
        fl.calibrate(adapted(fl.Laplace()), batches)
