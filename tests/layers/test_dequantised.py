"""After ``fl.merge(model, dequantise=True)`` nothing packs its weight, and transformers knows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import stir, tiny_llama, token_batch
from torch import Tensor, nn
from torch.nn import functional as F

import forgetless as fl


class Hundredths(nn.Module):
    """A weight in steps of 0.01, of one byte each."""

    def __init__(self, inner: nn.Linear):
        super().__init__()
        self.in_features, self.out_features, self.bias = inner.in_features, inner.out_features, inner.bias
        self.register_buffer("packed", (inner.weight.detach() * 100).round().to(torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.packed / 100, self.bias)


class Unheard(Hundredths):
    """Packed in a way that nobody has explained."""


fl.packed.register(Hundredths, lambda base: base.packed / 100)


def quantised() -> Any:
    """A model as transformers marks one that it has quantised."""
    from transformers.quantizers.base import HfQuantizer

    class Quantiser(HfQuantizer):
        def is_serializable(self) -> bool:
            return True

        is_trainable = True

    model = tiny_llama()
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name != "lm_head":
            model.set_submodule(name, Hundredths(module))
    model.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    quantiser = Quantiser.__new__(Quantiser)
    model.hf_quantizer, model.is_quantized, model.is_loaded_in_4bit = quantiser, True, True
    return model


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj"]], ids=["all", "some"])
def test_it_is_saved_and_read_as_a_plain_model(targets: Any, tmp_path: Path) -> None:
    model = stir(fl.adapt(quantised(), fl.LoRA(rank=4), targets), 0.1)
    want = model(**token_batch()).logits
    fl.merge(model, dequantise=True)
    torch.testing.assert_close(model(**token_batch()).logits, want, rtol=1e-4, atol=1e-5)
    assert not model.is_quantized and not hasattr(model, "hf_quantizer")
    assert not hasattr(model.config, "quantization_config") and not getattr(model, "is_loaded_in_4bit", False)
    model.save_pretrained(tmp_path)
    back = type(model).from_pretrained(tmp_path)
    assert torch.equal(back(**token_batch()).logits, model(**token_batch()).logits)


def test_where_a_layer_stays_packed_the_config_says_so() -> None:
    model = quantised()
    model.model.layers[0].mlp.up_proj = Unheard(tiny_llama().model.layers[0].mlp.up_proj)
    fl.adapt(model, fl.LoRA(rank=4), ["q_proj"])
    with pytest.warns(UserWarning, match="the model's config still says quantised: it has Unheard"):
        fl.merge(model, dequantise=True)
    assert model.config.quantization_config and model.is_quantized
