"""The how-tos for other people's packages: every Python block runs, in order."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import stir, tiny_llama, token_batch
from torch import nn

import forgetless as fl
from forgetless import versions
from forgetless.layers import quantized as packed

DOCS = Path(__file__).resolve().parents[2] / "docs"


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), flags=re.S)


def test_quantised(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class MyInt8Linear(nn.Module):
        def __init__(self, inner: nn.Linear):
            super().__init__()
            self.in_features, self.out_features, self.bias = inner.in_features, inner.out_features, inner.bias
            self.register_buffer("scale", inner.weight.detach().abs().amax(1, keepdim=True) / 127)
            self.register_buffer("packed", (inner.weight.detach() / self.scale).round().to(torch.int8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(x, self.packed.to(x.dtype) * self.scale.to(x.dtype), self.bias)

    train, merge, register = blocks("quantised.md")
    model = tiny_llama(1)
    for name, module in list(model.model.named_modules()):
        if isinstance(module, nn.Linear):
            model.model.set_submodule(name, MyInt8Linear(module))
    space: dict[str, Any] = {
        "torch": torch, "fl": fl, "model": model, "batches": [token_batch(seed=i) for i in range(2)],
        "folder": str(tmp_path), "MyInt8Linear": MyInt8Linear,
    }  # fmt: skip
    try:
        exec(register, space)  # noqa: S102
        exec(train, space)  # noqa: S102
        assert "onto" in capsys.readouterr().out and (tmp_path / "adapter_model.safetensors").exists()
        want = model(**token_batch()).logits
        exec(merge, space)  # noqa: S102
        torch.testing.assert_close(model(**token_batch()).logits, want, rtol=1e-4, atol=1e-5)
    finally:
        packed.KINDS.pop(packed._full_name(MyInt8Linear), None)


def test_surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = stir(
        fl.adapt(nn.Sequential(nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 7)), fl.CLoRA(rank=3, k=2), ["0", "2"])
    )
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **named: compiler(model, backend="aot_eager", **named))
    space: dict[str, Any] = {"torch": torch, "fl": fl, "model": model, "x": torch.randn(5, 9)}
    found = []
    for block in blocks("surroundings.md"):
        model.zero_grad()
        exec(block, space)  # noqa: S102
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    torch.testing.assert_close(found[0], found[1])
    mean = space["model"](space["x"]).square().mean()
    want = torch.autograd.grad(mean, [p for p in model.parameters() if p.requires_grad])
    torch.testing.assert_close([g.mean(0) for g in space["per_sample"].values()], list(want))


@pytest.mark.parametrize(
    "page, package",
    [("quantised.md", "bitsandbytes"), ("quantised.md", "torchao"), ("quantised.md", "transformers"),
     ("lightning.md", "lightning")],
)  # fmt: skip
def test_the_versions_that_are_stated_are_those_of_the_list(page: str, package: str) -> None:
    high = ".".join(map(str, versions.TESTED[package][1]))
    assert high in (DOCS / page).read_text(encoding="utf-8")
