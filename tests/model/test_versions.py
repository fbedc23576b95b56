"""Another version of a package is used without a word; what it lacks is an error that says the tested range."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from helpers import tiny_llama
from torch import nn

import forgetless as fl
from forgetless import versions
from forgetless.training import PenaltyMixin

peft = pytest.importorskip("peft")


def loras() -> Any:
    return peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=2, target_modules=["q_proj"]))


def test_another_version_is_no_reason_to_warn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "installed", lambda package: "99.1.0rc1")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        fl.swap_in(loras())
    assert versions.tested("transformers").startswith("transformers 5.")


def test_what_a_version_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model = loras()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    del layer.scaling
    with pytest.raises(RuntimeError, match=r"fl.swap_in finds no LoraLayer.scaling in peft .*; tested with peft"):
        fl.swap_in(model)

    class Trainer:
        def compute_loss(self, model: nn.Module, *_: Any) -> Any:
            return model.weight.sum(), None

    class Mixed(PenaltyMixin, Trainer):
        pass

    with pytest.raises(RuntimeError, match="PenaltyMixin finds no Trainer.accelerator in transformers .*tested with"):
        Mixed().compute_loss(nn.Linear(2, 2).train(), {})


def test_a_package_that_is_not_there_has_no_version() -> None:
    assert versions.installed("no-such-package-of-ours") == "unknown" and torch.__version__
