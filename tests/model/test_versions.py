"""Versions that nothing was tested with are said, once; what they lack is an error that says the range."""

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


@pytest.fixture
def other(monkeypatch: pytest.MonkeyPatch) -> Any:
    versions.warn_untested.cache_clear()
    monkeypatch.setattr(versions, "installed", lambda package: "99.1.0rc1")
    yield
    versions.warn_untested.cache_clear()


def loras() -> Any:
    return peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=2, target_modules=["q_proj"]))


def test_an_untested_version_is_said_once(other: None) -> None:
    low, high = versions.TESTED["peft"]
    with pytest.warns(UserWarning, match=rf"fl.swap_in was tested with peft .*{high[0]}\.{high[1]}; 99.1.0rc1 is inst"):
        fl.swap_in(loras())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        fl.swap_in(loras())


def test_tested_ones_are_not_remarked_upon(monkeypatch: pytest.MonkeyPatch) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for package, bounds in versions.TESTED.items():
            for major, minor in bounds:
                versions.warn_untested.cache_clear()
                monkeypatch.setattr(versions, "installed", lambda _, found=f"{major}.{minor}.7": found)
                versions.warn_untested(package, "it")
    assert versions.tested("transformers").startswith("transformers 5.")
    versions.warn_untested.cache_clear()


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
