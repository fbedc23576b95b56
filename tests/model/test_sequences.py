"""Statistics are sums over a sequence's uses of a layer, whatever the model does with it; or the batch is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import stir
from torch import Tensor, nn

import forgetless as fl

F64 = torch.float64


class Net(nn.Module):
    """``body`` is used ``times`` a pass: 0 times where the batch says so."""

    def __init__(self, times: int = 1) -> None:
        super().__init__()
        self.body, self.head, self.times = nn.Linear(8, 8), nn.Linear(8, 5), times

    def forward(self, x: Tensor, labels: Tensor, attention_mask: Any = None, skip: bool = False) -> dict[str, Tensor]:
        for _ in range(0 if skip else self.times):
            x = torch.tanh(self.apply_body(x))
        logp = self.head(x)[:, :-1].log_softmax(-1)
        return {"loss": -logp.gather(-1, labels[:, 1:, None]).mean()}

    def apply_body(self, x: Tensor) -> Tensor:
        return self.body(x)


class Routed(Net):
    """Tokens go to one of two experts, in an order of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def apply_body(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        out = torch.zeros_like(rows)
        for i, expert in enumerate(self.experts):
            chosen = ((rows[:, 0] > 0.3) == bool(i)).nonzero().squeeze(1).flip(0)
            out = out.index_add(0, chosen, expert(rows[chosen]))
        return out.view_as(x)


class Flattened(Net):
    def apply_body(self, x: Tensor) -> Tensor:
        return self.body(x.flatten(0, 1)).view_as(x)


def adapted(net: nn.Module, *penalties: fl.penalties.Penalty) -> Any:
    """All layers, but ``Net``'s head goes by a name that heads go by."""
    return stir(fl.adapt(net.double(), fl.LoRA(2, penalties=penalties)), 0.4)


def net(cls: Any, *args: Any) -> Any:
    torch.manual_seed(0)
    return cls(*args)


def batch(count: int = 6, **more: Any) -> dict[str, Any]:
    gen = torch.Generator().manual_seed(count)
    x = torch.randn(count, 4, 8, generator=gen, dtype=F64)
    return {"x": x, "labels": torch.randint(0, 5, (count, 4), generator=gen), **more}


def ones(given: dict[str, Any]) -> list[dict[str, Any]]:
    return [{k: v[i : i + 1] if isinstance(v, Tensor) else v for k, v in given.items()} for i in range(len(given["x"]))]


def each_squared(model: Any, batches: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Name -> mean over sequences of the squared gradient, one sequence at a time by autograd."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    sums = {name: torch.zeros_like(p) for name, p in trained.items()}
    rows = [row for given in batches for row in ones(given)]
    for row in rows:
        if row.get("skip"):
            continue  # nothing that is trained has a part in it
        grads = torch.autograd.grad(model(**row)["loss"], list(trained.values()), allow_unused=True)
        for name, grad in zip(trained, grads, strict=True):
            if grad is not None:
                sums[name] += grad.square() / len(rows)
    return sums


def check_fisher(model: Any, batches: list[dict[str, Any]]) -> None:
    for name, wanted in each_squared(model, batches).items():
        layer, _, factor = name.rpartition(".adapter.")
        (state,) = fl.adapters(model)[layer].adapter.penalty_states()
        torch.testing.assert_close(getattr(state, f"fisher_{factor}"), wanted, rtol=1e-8, atol=1e-16)
        assert state.samples == sum(len(given["x"]) for given in batches)


@pytest.mark.parametrize("net", [net(Net, 1), net(Net, 3), net(Flattened, 2)], ids=["once", "thrice", "flattened"])
def test_fisher_is_of_the_sum_over_all_uses(net):
    model = adapted(net, fl.Laplace())
    batches = [batch(6), batch(3)]
    fl.calibrate(model, batches)
    check_fisher(model, batches)


@pytest.mark.parametrize("skips", [(True, False), (False, True), (True, True)])
def test_a_skipped_layer_has_gradients_of_zero_there(skips):
    model = adapted(net(Net), fl.Laplace())
    batches = [batch(6, skip=skips[0]), batch(3, skip=skips[1])]
    fl.calibrate(model, batches)
    check_fisher(model, batches)


def test_the_batch_s_own_fisher_of_a_layer_used_twice():
    model = adapted(net(Net, 2), fl.Laplace(fisher="batch"))
    fl.calibrate(model, [batch(6)])
    (state,) = model.body.adapter.penalty_states()
    up = torch.autograd.grad(model(**batch(6))["loss"], model.body.adapter.up)[0]
    torch.testing.assert_close(state.fisher_up, up.square())
    assert state.samples == 1


def test_kfac_of_a_layer_used_twice_has_all_its_tokens_of_each_sequence():
    model = adapted(net(Net, 2), fl.Laplace(curvature="kfac", columns=99))
    (state,) = model.body.adapter.penalty_states()
    seen: list[Tensor] = []
    handle = model.body.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().flatten(0, 1)))
    fl.calibrate(model, [batch(6)])
    handle.remove()
    x = torch.cat(seen)
    assert state.samples == 6 and state.inputs.tokens == len(x) == 6 * 4 * 2
    torch.testing.assert_close(state.inputs.dense(), x.T @ x / len(x))
    torch.testing.assert_close(state.gram_x, state.centre_down @ state.inputs.dense() @ state.centre_down.T)


@pytest.mark.parametrize("penalty", [fl.Laplace(), fl.Laplace(curvature="kfac")], ids=["diag", "kfac"])
def test_routed_tokens_are_refused_in_batches_and_right_one_by_one(penalty):
    model = adapted(net(Routed), penalty)
    with pytest.raises(ValueError, match=r"experts\.\d was given \(\d+, 8\) in a batch of 6 sequences: which tokens"):
        fl.calibrate(model, [batch(6)])
    assert not any(s.calibrated for layer in fl.adapters(model).values() for s in layer.adapter.penalty_states())
    fl.calibrate(model, ones(batch(6)))
    if penalty.curvature == "diag":
        check_fisher(model, ones(batch(6)))


def test_a_routed_expert_s_covariance_is_of_its_own_tokens_and_never_of_padding():
    model = adapted(net(Routed), fl.SourceDeviation(covariance="full"))
    seen: list[Tensor] = []
    handle = model.experts[1].register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    fl.calibrate(model, [batch(6)])
    handle.remove()
    (state,) = model.experts[1].adapter.penalty_states()
    (rows,) = seen
    assert 0 < len(rows) < 24
    torch.testing.assert_close(state.covariance, rows.T @ rows / len(rows))
    mask = torch.ones(6, 4, dtype=torch.int64)
    fl.calibrate(model, [batch(6, attention_mask=mask)])
    mask[2, 3:] = 0
    with pytest.raises(ValueError, match=r"experts\.\d .* which of its tokens are padding cannot be told"):
        fl.calibrate(model, [batch(6, attention_mask=mask)])


@pytest.mark.parametrize("cls", [Net, Flattened])
def test_the_mask_is_that_of_the_layer_s_tokens(cls):
    model = adapted(net(cls), fl.SourceDeviation())
    mask = torch.arange(4) < torch.tensor([4, 2, 3])[:, None]
    fl.calibrate(model, [batch(3, attention_mask=mask)])
    (state,) = model.body.adapter.penalty_states()
    torch.testing.assert_close(state.covariance, batch(3)["x"][mask].square().mean(0))


class Reusing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.q_proj(x) + x.zero_()


def test_an_input_is_read_when_it_is_given():
    """Whatever becomes of its memory; the sibling is never called."""
    model = adapted(Reusing(), fl.SourceDeviation())
    x = batch()["x"]
    fl.calibrate(model, [x], lambda model, x: model(x.clone()))
    torch.testing.assert_close(model.q_proj.adapter.penalty_states()[0].covariance, x.square().mean((0, 1)))
    assert model.k_proj.adapter.penalty_states()[0].tokens == 0


# ------------------------------------------------------------------------------------ transformers


def tiny_t5() -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"vocab_size": 37, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).eval().double()


def t5_batch(lengths: tuple[int, ...], labels: tuple[int, ...]) -> dict[str, Tensor]:
    gen = torch.Generator().manual_seed(0)
    rows = {}
    for name, sizes in (("input_ids", lengths), ("labels", labels)):
        rows[name] = torch.randint(3, 37, (len(sizes), max(sizes)), generator=gen)
        rows[name + "_mask"] = torch.arange(max(sizes)) < torch.tensor(sizes)[:, None]
    return {
        "input_ids": rows["input_ids"].masked_fill(~rows["input_ids_mask"], 0),
        "attention_mask": rows["input_ids_mask"].long(),
        "labels": rows["labels"].masked_fill(~rows["labels_mask"], -100),
        "decoder_attention_mask": rows["labels_mask"].long(),
    }


def test_an_encoder_decoder_s_label_counts_and_masks_are_its_own():
    targets = r"decoder\.block\.0\.layer\.\d\.(SelfAttention\.q|DenseReluDense\.wo)"
    model = stir(fl.adapt(tiny_t5(), fl.LoRA(2, penalties=(fl.Laplace(), fl.SourceDeviation())), targets), 0.2)
    given = t5_batch((5, 3), (4, 2))
    with pytest.raises(ValueError, match="padding but no decoder_attention_mask"):
        fl.calibrate(model, [{k: v for k, v in given.items() if k != "decoder_attention_mask"}])
    fl.calibrate(model, [given])
    trained = [p for p in model.parameters() if p.requires_grad]
    rows = [{k: v[i : i + 1] for k, v in given.items()} for i in range(2)]
    each = [torch.autograd.grad(model(**row).loss, trained) for row in rows]
    for name, layer in fl.adapters(model).items():
        laplace, source = layer.adapter.penalty_states()
        index = next(i for i, p in enumerate(trained) if p is layer.adapter.up)
        wanted = sum(grads[index].square() for grads in each) / 2
        torch.testing.assert_close(laplace.fisher_up, wanted, rtol=1e-6, atol=1e-12, msg=name)
        assert source.tokens == 4 + 2
