"""What runs on a phantom card, in a process of its own: ``python -m phantom.steps 90 [scenario ..]`` prints JSON.

Each scenario takes a first step and then looks at two more: nothing may be compiled in them, copied to the card, or
waited for. A scenario that fails is its reason.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

import forgetless as fl
import phantom
from forgetless.layers.quantized import register
from forgetless.ops import plans
from forgetless.ops.table import PLANS
from forgetless_kernels.matmul_lowrank import most_pairs

RANK, WIDTH = 16, 256
CUDA = torch.device("cuda", 0)


def llama(**overrides: Any) -> Any:
    """One block of a Llama, bfloat16, on the card."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 1}
    config: Any = LlamaConfig(
        **{**sizes, "num_attention_heads": 4, "use_cache": False, "attn_implementation": "eager", **overrides}
    )
    return LlamaForCausalLM(config).to(CUDA, torch.bfloat16).train()


def batch(tokens: int = 512) -> dict[str, torch.Tensor]:
    ids = torch.zeros(2, tokens // 2, dtype=torch.long, device=CUDA)
    return {"input_ids": ids, "labels": ids}


def train(model: Any, tokens: int = 512) -> None:
    """Forward, penalty and backward."""
    loss = model(**batch(tokens)).loss + fl.penalty(model)
    loss.backward()
    model.zero_grad(set_to_none=True)


def ours(events: list[str]) -> list[str]:
    """Those that a line of ours caused; what transformers does of its own is its own affair."""
    return [event for event in events if " at forgetless/" in event or " at kernels/" in event]


def steady(card: phantom.Trace, step: Callable[[], Any], most: int | None = None) -> None:
    """After the first step nothing is compiled, copied or waited for; ``most`` launches a step."""
    step()
    for _ in range(2):
        card.clear()
        step()
        events = {"compiled": card.compiled, "copied": ours(card.copies), "waited for": ours(card.waits)}
        for what, some in events.items():
            assert not some, f"{what} in a step: {some}"
    assert card.launches, "nothing was launched"
    assert most is None or len(card.launches) <= most, f"{len(card.launches)} launches a step, {most} at most"


METHODS: dict[str, Any] = {
    "LoRA": fl.LoRA(RANK),
    "LoRA dropout": fl.LoRA(RANK, dropout=0.1),
    "CURLoRA": fl.CURLoRA(RANK),
    **{f"CLoRA {basis}": fl.CLoRA(RANK, k=32, basis=basis) for basis in ("orthogonal", "shared", "hadamard")},
    **{f"LaLoRA {kind}": fl.LaLoRA(RANK, curvature=kind) for kind in ("diag", "kfac", "tri_kfac")},
    **{
        f"SourceDeviation {kind}": fl.LoRA(RANK, penalties=(fl.SourceDeviation(0.1, covariance=kind),))
        for kind in ("diag", 32, "full")
    },
    **{
        kind.__name__: fl.LoRA(RANK, penalties=(kind(0.1),))
        for kind in (fl.OutputDeviation, fl.WeightDeviation, fl.Decay)
    },
}


def method(card: phantom.Trace, spec: Any) -> None:
    model = fl.adapt(llama(), spec)
    if any(state.statistics for layer in fl.adapters(model).values() for state in layer.adapter.penalty_states()):
        fl.calibrate(model, [batch()])
    steady(card, partial(train, model))
    assert "one pass over x with k_proj, v_proj" in str(fl.explain(model))


class Packed(nn.Module):
    """Weight-only int8, as libraries of quantisation have it."""

    def __init__(self, inner: nn.Linear):
        super().__init__()
        self.in_features, self.out_features, self.bias = inner.in_features, inner.out_features, inner.bias
        self.register_buffer("packed", inner.weight.detach().to(torch.int8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.packed.to(x.dtype), self.bias)


register(Packed, lambda base: base.packed.float())


def quantized(card: phantom.Trace, dropout: float) -> None:
    model = llama()
    for name, layer in list(model.named_modules()):
        if type(layer) is nn.Linear and name != "lm_head":
            model.set_submodule(name, Packed(layer))
    steady(card, partial(train, fl.adapt(model, fl.LoRA(RANK, dropout=dropout))))


def checkpointed(card: phantom.Trace, reentrant: bool) -> None:
    model = fl.adapt(llama(), fl.CLoRA(RANK, k=32, dropout=0.1))
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    steady(card, partial(train, model))


def first_use(card: phantom.Trace) -> None:
    """The first step of a bucket measures, every later one runs what won."""
    plans.forget()
    model = fl.adapt(llama(), fl.LoRA(RANK))
    train(model)
    assert any("first_use.py" in wait for wait in card.waits), "nothing was measured"
    assert "first use" in str([choice.reason for choice in plans._measured.values()])
    steady(card, partial(train, model))


def tune(card: phantom.Trace) -> None:
    from forgetless.cli import tune as command

    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder, "plans.json")
        arguments = ["--shape", f"{WIDTH}x{WIDTH}", "--tokens", "512", "--out", str(table)]
        assert command.main(arguments) == 0
        (rows,) = json.loads(table.read_text())["gpus"].values()
    for row in rows.values():
        assert set(row["ms"]) == set(PLANS), f"plans were left out: {row['ms']}"


def token_counts(card: phantom.Trace) -> None:
    """A shape has few kernels: by whether rows are aligned and sums are of one strip, not one for each token count."""
    model = fl.adapt(llama(), fl.LoRA(RANK))
    for tokens in (2, 32, 510, 512, 4096, 4098):
        train(model, tokens)
    card.clear()
    for tokens in (4, 34, 96, 480, 600, 1024, 2048, 2050, 8192):
        train(model, tokens)
    assert not card.compiled, f"compiled again for other token counts: {card.compiled}"


def tf32(card: phantom.Trace) -> None:
    """As transformers sets it for TrainingArguments(tf32=True)."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        steady(card, partial(train, fl.adapt(llama().float(), fl.LoRA(RANK))))
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def layer(card: phantom.Trace) -> None:
    """The kernels of a step by themselves: every card."""
    steady(card, partial(pass_through, adapted_layer(torch.bfloat16), torch.bfloat16))


def autocast(card: phantom.Trace) -> None:
    """A layer in float32 alone: torch has no autocast for the rest of a model that is not there."""
    one = adapted_layer(torch.float32)

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            assert pass_through(one, torch.float32).dtype == torch.bfloat16

    steady(card, step)


def adapted_layer(dtype: torch.dtype) -> Any:
    holder = nn.ModuleDict({"layer": nn.Linear(WIDTH, WIDTH, device=CUDA, dtype=dtype)})
    return fl.adapt(holder, fl.LoRA(RANK, dropout=0.1), ["layer"])["layer"].train()


def pass_through(one: Any, dtype: torch.dtype) -> torch.Tensor:
    """Forward and backward; returns y."""
    y = one(torch.randn(512, WIDTH, device=CUDA, dtype=dtype, requires_grad=True))
    y.sum().backward()
    return y


def launches(card: phantom.Trace, spec: Any) -> None:
    """Of n siblings, forward: project and a GEMM each; backward: a sweep each, dx and ddown. No mask, no penalty.

    CURLoRA has no ddown. Where a launch adds up one product (sm_100), dx takes n.
    """
    groups = (3, 1, 2, 1)  # q, k and v; o; gate and up; down
    model = fl.adapt(llama(), spec)
    model.enable_input_require_grads()  # there are blocks below
    with phantom.environment(FORGETLESS_PLAN="split,strict"):
        steady(card, partial(train, model))
    count = sum((1 + n) + (n + -(-n // most_pairs(CUDA)) + (spec.name != "curlora")) for n in groups)
    names = [launch.kernel for launch in card.launches]
    assert len(names) == count <= 4.5 * sum(groups), f"{len(names)} launches a block, {count} expected: {names}"


def every_plan(card: phantom.Trace) -> None:
    one = adapted_layer(torch.bfloat16)
    for plan in ("hybrid", "split", "full", "once"):
        with phantom.environment(FORGETLESS_PLAN=f"{plan},strict"):
            steady(card, partial(pass_through, one, torch.bfloat16))


def experts(card: phantom.Trace, spec: Any) -> None:
    """A mixture model: the router's choice stays on the card, and every product of all experts is one launch."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": WIDTH, "intermediate_size": WIDTH, "moe_intermediate_size": WIDTH}
    counts = {"num_hidden_layers": 1, "num_attention_heads": 4, "num_experts": 8, "num_experts_per_tok": 2}
    config: Any = Qwen3MoeConfig(**sizes, **counts, use_cache=False, attn_implementation="eager")
    model = Qwen3MoeForCausalLM(config).to(CUDA, torch.bfloat16).train()
    model.enable_input_require_grads()
    with contextlib.ExitStack() as stack:
        stack.enter_context(phantom.environment(FORGETLESS_PLAN="split,strict"))
        for module in ("experts", "stack"):  # how many rows an expert has is a number, and here every number is one
            stack.enter_context(mock.patch(f"forgetless.layers.{module}.verify", lambda *_: True))
        fl.adapt(model, spec, ["experts.gate_up_proj", "experts.down_proj"])
        steady(card, partial(train, model))
    kernels = Counter(launch.kernel.strip("_") for launch in card.launches)
    # forward: h, y of each stack, and a sum; backward: q, dup, ddown and the products of dx
    assert kernels == {
        "grouped_project_kernel": 4, "grouped_matmul_kernel": 5, "grouped_outer_kernel": 4, "grouped_sum_kernel": 2
    }, kernels  # fmt: skip
    assert "each product of all of them in one launch" in str(fl.explain(model))


SCENARIOS: dict[str, Callable[[phantom.Trace], None]] = {
    "a layer": layer,
    "experts": partial(experts, spec=fl.LoRA(RANK)),
    "experts dropout": partial(experts, spec=fl.CLoRA(RANK, k=32, dropout=0.1)),
    **{name: partial(method, spec=spec) for name, spec in METHODS.items()},
    "launches": partial(launches, spec=fl.LoRA(RANK)),
    "launches dropout": partial(launches, spec=fl.LoRA(RANK, dropout=0.1)),
    "launches penalty": partial(launches, spec=fl.CLoRA(RANK, k=32)),
    "launches curlora": partial(launches, spec=fl.CURLoRA(RANK)),
    "every plan": every_plan,
    "quantized": partial(quantized, dropout=0.0),
    "quantized dropout": partial(quantized, dropout=0.1),
    "checkpoint": partial(checkpointed, reentrant=False),
    "checkpoint reentrant": partial(checkpointed, reentrant=True),
    "first use": first_use,
    "tune": tune,
    "autocast": autocast,
    "token counts": token_counts,
    "tf32": tf32,
}


def main(arch: str, *names: str) -> None:
    warnings.simplefilter("error", UserWarning)  # a plan that was dropped is a failure
    outcomes: dict[str, str | None] = {}
    with phantom.card(int(arch)) as card:
        for name in names or SCENARIOS:
            card.clear()
            try:
                SCENARIOS[name](card)
                outcomes[name] = None
            except Exception:
                outcomes[name] = traceback.format_exc()
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main(*sys.argv[1:])
