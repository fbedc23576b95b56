"""How much of a model is adapted is said, by parameter; what is left out by name, by wish or by its parent too."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from helpers import stir, tiny_llama, token_batch
from torch import nn
from torch.nn.utils import parametrizations, prune, weight_norm

import forgetless as fl
from forgetless.targets import find_layers

METHODS = {
    "lora": fl.LoRA(rank=8),
    "clora": fl.CLoRA(rank=8, k=4),
    "curlora": fl.CURLoRA(rank=8),
    "lalora": fl.LaLoRA(rank=8, curvature="kfac"),
}


class Experts(nn.Module):
    """Most of its weights are one three-dimensional parameter, as transformers keeps experts."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 8)
        self.layers = nn.ModuleList(nn.ModuleDict({"q_proj": nn.Linear(8, 8), "gate": nn.Linear(8, 1)}) for _ in "ab")
        for layer in self.layers:
            layer.experts = nn.Parameter(torch.randn(4, 8, 16))
        self.lm_head = nn.Linear(8, 50)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = x + layer["gate"](x).sigmoid() * layer["q_proj"](x) @ layer.experts.sum((0, 2)).diag()
        return self.lm_head(x)


def seen_warnings(call: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(warning.message) for warning in caught]


# ---------------------------------------------------------------------------------------- coverage


def test_adapt_names_what_all_linear_passed_over():
    (message,) = seen_warnings(lambda: fl.adapt(Experts(), fl.LoRA(4)))
    # 2 * (64 + 8) of 800 + 2 * (72 + 512)
    assert "reached 7% of the weights of Experts; passed over: layers.*.experts 52.0%;" in message
    model = Experts()
    assert not seen_warnings(lambda: fl.adapt(model, fl.LoRA(4), ["q_proj"]))  # the user's own choice
    assert not seen_warnings(lambda: fl.adapt(tiny_llama(), fl.LoRA(4)))


@pytest.mark.parametrize("exclude", [["layers.0", "layers.1"], r"layers\.\d"], ids=["list", "expression"])
def test_what_is_excluded_is_not_complained_of(exclude):
    model = Experts()
    model.more = nn.Linear(8, 8)
    assert not seen_warnings(lambda: fl.adapt(model, fl.LoRA(4), exclude=exclude))
    assert list(fl.adapters(model)) == ["more"]


def test_explain_lists_them_with_their_shares():
    model = fl.adapt(Experts(), fl.LoRA(4), ["q_proj"])
    report = fl.explain(model)
    assert list(report.passed_over) == ["layers.*.experts", "embed.weight", "lm_head.weight", "layers.*.gate.weight"]
    assert sum(report.passed_over.values()) == pytest.approx(1 - 128 / 1968)
    assert str(report).splitlines()[-1].startswith("not adapted, 93.5% of the weights: layers.*.experts 52.0%, embed")


def test_exclude_takes_names_suffixes_and_whole_modules():
    model = tiny_llama()
    assert all("mlp" not in name for name in find_layers(model, "all-linear", ["mlp"]))
    assert list(find_layers(model, ["q_proj", "k_proj"], r"layers\.0\..*|k_proj")) == [
        "model.layers.1.self_attn.q_proj"
    ]
    with pytest.raises(ValueError, match="exclude: nothing is named 'q_porj'; near names: .*q_proj"):
        find_layers(model, "all-linear", ["q_porj"])
    with pytest.raises(ValueError, match="exclude names every layer that targets names"):
        find_layers(model, ["q_proj"], ["self_attn"])


# ------------------------------------------------------------------------------------ narrow layers


@pytest.mark.parametrize("name", METHODS)
def test_a_layer_narrower_than_the_rank_is_adapted_like_the_others(name, tmp_path):
    torch.manual_seed(0)
    model = Experts()
    base = {key: value.clone() for key, value in model.state_dict().items()}
    fl.adapt(model, METHODS[name], ["gate", "q_proj"])
    ids = torch.arange(12).reshape(2, 6)
    if name == "lalora":
        fl.calibrate(model, [ids], lambda model, ids: model(ids).square().mean())
    stir(model, 0.1)
    wanted = model(ids)
    (wanted.square().mean() + fl.penalty(model)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    fl.save(model, tmp_path)
    other = Experts()
    other.load_state_dict(base)
    torch.testing.assert_close(fl.load(other, tmp_path)(ids), wanted)
    torch.testing.assert_close(fl.merge(model)(ids), wanted, rtol=1e-4, atol=1e-5)


def test_a_checkpoint_of_peft_with_a_narrow_layer_loads(tmp_path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = Experts()
    base = {key: value.clone() for key, value in model.state_dict().items()}
    theirs = stir(peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules=["gate", "q_proj"])), 0.1)
    theirs.save_pretrained(tmp_path)
    ours = Experts()
    ours.load_state_dict(base)
    ids = torch.arange(12).reshape(2, 6)
    torch.testing.assert_close(fl.load(ours, tmp_path)(ids), theirs(ids))


# ------------------------------------------------------------------------------ who calls the layers


class Idle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(x)


def test_layers_that_no_pass_calls_are_named(tmp_path):
    model = fl.adapt(Idle(), fl.CLoRA(2, k=2))
    assert not seen_warnings(lambda: fl.penalty(model))  # no pass yet
    model(torch.randn(3, 6))
    (message,) = seen_warnings(lambda: [fl.penalty(model) for _ in range(3)])
    assert "no forward pass has called b:" in message
    assert fl.explain(model)["b"].reason.endswith("no forward pass has called it")
    assert "called" not in fl.explain(model)["a"].reason
    assert "called b:" in seen_warnings(lambda: fl.save(model, tmp_path))[0]
    assert "called b:" in seen_warnings(lambda: fl.merge(model))[0]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_torch_s_fused_encoder_has_the_update(padded):
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 24, batch_first=True, dropout=0.0), 2)
    fl.adapt(encoder, fl.LoRA(4))
    stir(encoder, 0.3)
    x = torch.randn(2, 5, 16)
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2]) if padded else None
    wanted = encoder.train()(x, src_key_padding_mask=mask)
    with torch.no_grad():
        ours = encoder.eval()(x, src_key_padding_mask=mask)
    real = slice(None) if mask is None else ~mask
    torch.testing.assert_close(ours[real], wanted[real])


def tiny_mamba() -> Any:
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 37, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4, "time_step_rank": 4}
    return MambaForCausalLM(MambaConfig(**sizes)).eval()


def test_a_parent_that_computes_with_the_weight_has_the_update_and_its_gradient():
    """Mamba multiplies by dt_proj's weight itself."""
    model = stir(fl.adapt(tiny_mamba(), fl.LoRA(4)), 0.1)
    batch = {k: v for k, v in token_batch().items() if k != "attention_mask"}
    layer = model.backbone.layers[0].mixer.dt_proj
    out = model(**batch)
    out.loss.backward()
    assert "called" not in fl.explain(model)["backbone.layers.0.mixer.dt_proj"].reason
    assert layer.weight is layer.base.weight  # outside of a pass
    merged = fl.merge(stir(fl.adapt(tiny_mamba(), fl.LoRA(4)), 0.1))
    torch.testing.assert_close(merged(**batch).logits, out.logits)
    dense = merged.backbone.layers[0].mixer.dt_proj.weight.requires_grad_()
    (grad,) = torch.autograd.grad(merged(**batch).loss, dense)
    down, up = layer.adapter.factors()
    torch.testing.assert_close(up.grad, layer.adapter.scale * grad @ down.T, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(down.grad, layer.adapter.scale * up.T @ grad, rtol=1e-4, atol=1e-6)


def test_what_cannot_be_measured_on_such_a_layer_is_refused():
    batch = {k: v for k, v in token_batch().items() if k != "attention_mask"}
    for penalty in (fl.Laplace(), fl.SourceDeviation()):
        model = fl.adapt(tiny_mamba(), fl.LoRA(4, penalties=(penalty,)))
        with pytest.raises(ValueError, match="the parent of .*dt_proj reads its weight"):
            fl.calibrate(model, [batch])
    model = fl.adapt(tiny_mamba(), fl.LoRA(4, penalties=(fl.OutputDeviation(),)))
    with pytest.raises(ValueError, match=r"cannot see what .*dt_proj does: .*exclude="):
        model(**batch)


def test_asking_for_a_weight_s_dtype_in_a_pass_makes_nothing(monkeypatch):
    class Asking(Idle):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            weight = self.a.weight
            assert isinstance(weight, torch.Tensor) and weight.shape == (6, 6) and weight.size(0) == 6
            return self.a(x.to(weight.device, weight.dtype))

    model = fl.adapt(Asking(), fl.LoRA(2), ["a"])
    monkeypatch.setattr(type(model.a), "applied", None)
    model(torch.randn(3, 6).double())


# ------------------------------------------------------------------------------- weights made of others


@pytest.mark.parametrize("how", ["weight norm", "parametrised", "pruned"])
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
def test_merging_into_a_weight_that_is_computed_is_refused(how):
    model = Idle()
    if how == "parametrised":  # after adapting: before, it is no nn.Linear
        fl.adapt(model, fl.LoRA(2), ["a"])
        parametrizations.weight_norm(model.a.base)
    else:
        weight_norm(model.a) if how == "weight norm" else prune.l1_unstructured(model.a, "weight", 0.5)
        fl.adapt(model, fl.LoRA(2), ["a"])
    stir(model, 0.3)
    x = torch.randn(3, 6)
    before = model(x)
    for fold in (fl.merge, fl.consolidate):
        with pytest.raises(ValueError, match="the weight of a is computed from others"):
            fold(model)
    torch.testing.assert_close(model(x), before)
