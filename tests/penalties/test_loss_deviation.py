"""LossDeviation: its formula on dense factors in float64, what it predicts, and its pairs of texts."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import stir, token_batch
from plain_penalties import plain_value
from torch import Tensor, nn

import forgetless as fl
from forgetless.samples import draw_labels

TEXT = [token_batch((9, 6, 8), prompts=(0, 3, 6), seed=1), token_batch((4, 9), prompts=(2, 5), seed=2)]
TASK = [token_batch((7, 5), prompts=(1, 2), seed=3)]
EXACT: dict[str, float] = {"rtol": 1e-10, "atol": 1e-14}


class Text(nn.Module):
    """A causal model with siblings, in float64 throughout."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(37, 16)
        self.q_proj, self.k_proj, self.o_proj = nn.Linear(16, 12), nn.Linear(16, 12), nn.Linear(12, 16, bias=False)
        self.head = nn.Linear(16, 37)
        self.double()

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        x = self.embed(input_ids)
        seen = (torch.tanh(self.q_proj(x)) * self.k_proj(x)).cumsum(1)
        logits = self.head(x + self.o_proj(seen / torch.arange(1, x.shape[1] + 1, dtype=x.dtype)[:, None]))
        if labels is None:
            return {"logits": logits}
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return {"logits": logits, "loss": loss}


def adapted(covariance: str | int = "full", start: float = 0.1, **fields: Any) -> Any:
    penalty = fl.LossDeviation(0.7, covariance, **fields)
    model = fl.adapt(Text(), fl.LoRA(rank=3, alpha=6.0, penalties=(penalty,)), ["q_proj", "k_proj", "o_proj"])
    return stir(model, start) if start else model


def state_of(model: nn.Module, name: str) -> Any:
    return fl.adapters(model)[name].adapter.penalty_states()[0]


def dense_factors(model: Any, batches: list[dict[str, Tensor]]) -> dict[str, tuple[Tensor, Tensor]]:
    """S and G of each layer, one sequence at a time, from gradients of summed losses at the layers' outputs."""
    taken: dict[str, tuple[Tensor, Tensor]] = {}
    hooks = []
    for name, layer in fl.adapters(model).items():

        def keep(_: Any, args: Any, y: Tensor, name: str = name) -> None:
            y.retain_grad()
            taken[name] = args[0], y

        hooks.append(layer.register_forward_hook(keep))
    S, G = dict.fromkeys(fl.adapters(model), 0.0), dict.fromkeys(fl.adapters(model), 0.0)
    tokens = labels = 0
    for batch in batches:
        for i in range(len(batch["labels"])):
            row = {key: value[i : i + 1] for key, value in batch.items()}
            counted = int((row["labels"][:, 1:] != -100).sum())
            (model(**row)["loss"] * counted).backward()
            real = row["attention_mask"].bool()
            tokens, labels = tokens + int(real.sum()), labels + counted
            for name, (x, y) in taken.items():
                S[name] = S[name] + x[real].detach().T @ x[real].detach()
                G[name] = G[name] + y.grad.flatten(0, 1).T @ y.grad.flatten(0, 1)
    for hook in hooks:
        hook.remove()
    return {name: (S[name] / tokens, G[name] / labels) for name in S}


def plain(model: Any, texts: list[dict[str, tuple[Tensor, Tensor]]], diagonal: bool = False) -> Tensor:
    total: Any = 0.0
    for name, layer in fl.adapters(model).items():
        down, up = layer.adapter.factors()
        delta = layer.adapter.scale * up @ down
        for text in texts:
            S, G = (t.diagonal().diag() if diagonal else t for t in text[name])
            total = total + 0.35 * (G @ delta @ S * delta).sum()
    return total


def same(model: nn.Module, expected: Tensor) -> None:
    parameters = [p for p in model.parameters() if p.requires_grad]
    layers = fl.adapters(model).values()
    each = sum(plain_value(layer.adapter.penalty_states()[0], layer.adapter, None) for layer in layers)
    reference = torch.autograd.grad(expected, parameters, retain_graph=True)
    assert all(grad.any() for grad in reference)
    for value in (fl.penalty(model), each):
        torch.testing.assert_close(value, expected, **EXACT)
        torch.testing.assert_close(torch.autograd.grad(value, parameters), reference, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("start", [0.0, 0.1], ids=["at zero", "later"])
@pytest.mark.parametrize("covariance", ["full", 99, "diag", 0])
def test_it_is_its_formula_on_dense_factors(covariance, start):
    model = adapted(covariance, start)
    factors = dense_factors(copy.deepcopy(model), TEXT)
    fl.calibrate(model, TEXT)
    stir(model, 0.2, seed=5)
    same(model, plain(model, [factors], diagonal=covariance in ("diag", 0)))


def test_true_fisher_is_that_of_drawn_labels():
    model, twin = adapted(fisher="true"), adapted()
    generator = torch.Generator().manual_seed(0)
    drawn = []
    for batch in TEXT:
        logits, counted = model(**batch)["logits"][:, :-1].detach(), batch["labels"][:, 1:] != -100
        labels = torch.full_like(batch["labels"], -100)
        labels[:, 1:][counted] = draw_labels(logits[counted], generator)
        drawn.append({**batch, "labels": labels})
    fl.calibrate(model, TEXT)
    fl.calibrate(twin, drawn)
    torch.testing.assert_close(*(fl.penalty(stir(m, 0.2, seed=5)) for m in (model, twin)), rtol=1e-9, atol=1e-16)


def test_it_predicts_the_rise_of_the_loss_in_nats_per_token():
    """One layer that sees one x: the Kronecker form is exact, and the rise over the labels' own distribution its KL."""

    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.head = nn.Linear(6, 5).double()

        def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
            return {"logits": self.head(torch.ones(*input_ids.shape, 6, dtype=torch.float64))}

    model = fl.adapt(One(), fl.LoRA(2, alpha=2.0, penalties=(fl.LossDeviation(1.0, "full", fisher="true"),)), ["head"])
    ids = torch.zeros(4, 2001, dtype=torch.int64)
    fl.calibrate(model, [{"input_ids": ids, "labels": ids}])
    before = model(ids[:1, :1])["logits"][0, 0].log_softmax(0)
    stir(model, 0.05, seed=1)
    rise = (before.exp() * (before - model(ids[:1, :1])["logits"][0, 0].log_softmax(0))).sum()
    assert 1e-5 < rise < 1e-2
    torch.testing.assert_close(fl.penalty(model), rise, rtol=0.1, atol=0)  # 8,000 draws, and the third order


def test_a_finished_task_is_a_further_pair(tmp_path):
    model = adapted()
    first = dense_factors(copy.deepcopy(model), TEXT)
    fl.calibrate(model, TEXT)
    before = {name: tensor.clone() for name, tensor in state_of(model, "q_proj").state_dict().items()}
    done = fl.consolidate(model, TASK, undo=True)
    second = dense_factors(copy.deepcopy(model), TASK)
    stir(model, 0.1, seed=6)
    same(model, plain(model, [first, second]))

    fl.save(model, tmp_path)
    again = fl.load(Text(), tmp_path)
    assert torch.equal(fl.penalty(again), fl.penalty(model)) and len(state_of(again, "q_proj").pairs) == 2
    twin = adapted()
    twin.load_state_dict(model.state_dict())
    assert torch.equal(fl.penalty(twin), fl.penalty(model))

    done.undo()
    after = state_of(model, "q_proj").state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    same(stir(model, 0.1, seed=6), plain(model, [first]))


def test_calibrating_anew_forgets_all_pairs():
    model = adapted()
    fl.calibrate(model, TEXT)
    fl.consolidate(model, TASK)
    fl.calibrate(model, TASK)
    factors = dense_factors(copy.deepcopy(model), TASK)
    same(stir(model, 0.1, seed=6), plain(model, [factors]))


def test_batches_without_labels_count_by_their_sequences():
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return model(x).square().mean()

    torch.manual_seed(0)
    x = torch.randn(5, 8, dtype=torch.float64)
    model = fl.adapt(
        nn.Sequential(nn.Linear(8, 3).double()), fl.LoRA(2, penalties=(fl.LossDeviation(1.0, "full"),)), "0"
    )
    fl.calibrate(model, [x], loss)
    stir(model, 0.1)
    dy = 2 * model[0].base(x).detach() / 3
    down, up = fl.adapters(model)["0"].adapter.factors()
    delta = fl.adapters(model)["0"].adapter.scale * up @ down
    torch.testing.assert_close(fl.penalty(model), 0.5 * ((dy.T @ dy / 5) @ delta @ (x.T @ x / 5) * delta).sum())


def test_bad_fields_are_named():
    with pytest.raises(ValueError, match="LossDeviation.covariance is 'round', wants"):
        fl.LossDeviation(1.0, "round")
    with pytest.raises(ValueError, match="LossDeviation.fisher is 'batch', wants 'empirical' or 'true'"):
        fl.LossDeviation(fisher="batch")
