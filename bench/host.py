"""What a layer costs the host on the CUDA path, without a GPU: a small Llama, per adapted layer.

    python -m bench host

Triton's driver is one of no card: it binds, specialises and compiles for sm_90 as ever, and a launch does nothing. Left
is the time of Python, of torch's dispatch and of the launchers; of the frozen model and of PEFT, which run on the CPU,
also products of 16 tokens. Times are the thread's own, so that a busy machine does not count.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, TypeVar
from unittest import mock

import torch
from torch import Tensor, nn
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

import forgetless as fl
from forgetless_kernels import tiles

from .harness import FROZEN, OURS, PEFT, BadInput, Results, begin, finish, interleave, one_thread, row, time_rows
from .providers import NO_PEFT, have_peft

ARCH, WIDTH, TOKENS, BLOCKS, RANK = 90, 64, 16, 4, 16
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LAYERS = BLOCKS * len(TARGETS)
CASE = f"Llama of {BLOCKS} blocks, width {WIDTH}, {TOKENS} tokens, bfloat16, rank {RANK}, launches for sm_{ARCH}"
KERNELS, BLAS, CLORA = OURS, f"{OURS}, BLAS", f"{OURS}, CLoRA with its penalty"


class NoCard:
    """A driver of Triton that compiles for a card and launches nothing; it counts the launches."""

    def __init__(self, arch: int = ARCH, device: int = 0) -> None:
        self.arch, self.device, self.launches, self.utils = arch, device, 0, self

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        def launch(*arguments: Any) -> None:
            self.launches += 1

        return launch

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        return 0, 1, 64, 0, 1024  # module, function, registers, spills, most threads

    def unload_module(self, module: int) -> None:
        pass

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": tiles.SHARED[self.arch], "multiprocessor_count": 132, "warpSize": 32}

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0


Card = TypeVar("Card", bound=NoCard)


@contextmanager
def no_card(active: Card) -> Iterator[Card]:
    """Within the block, what Triton launches on tensors of the CPU is compiled for sm_90 and not run."""
    if knobs.runtime.interpret:
        raise BadInput("TRITON_INTERPRET is set: the interpreter has no launch to measure")
    with (
        mock.patch.object(driver, "_active", active),
        mock.patch.object(tiles, "arch_of", lambda device: ARCH),
        mock.patch.dict(os.environ, {"FORGETLESS_PLAN": "split,strict"}),
    ):
        yield active


@dataclasses.dataclass
class Step:
    """A model's forward and backward pass, timed by this thread's clock; seconds per adapted layer."""

    model: nn.Module
    within: Callable[[], AbstractContextManager[Any]] = nullcontext
    penalty: Callable[[nn.Module], Tensor] | None = None

    def times(self) -> list[float]:
        x = torch.randn(1, TOKENS, WIDTH, dtype=torch.bfloat16, requires_grad=True)
        with self.within():
            begin = time.thread_time()
            loss = self.model(inputs_embeds=x).last_hidden_state.sum()
            if self.penalty is not None:
                loss = loss + self.penalty(self.model)
            middle = time.thread_time()
            loss.backward()
            end = time.thread_time()
        return [(middle - begin) / LAYERS, (end - middle) / LAYERS]


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaModel

    sizes: Any = {"vocab_size": 64, "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_attention_heads": 4}
    torch.manual_seed(0)
    model: nn.Module = LlamaModel(LlamaConfig(num_hidden_layers=BLOCKS, **sizes))
    return model.to(torch.bfloat16).train()


def steps() -> dict[str, Step]:
    """The models; factors in bfloat16, as PEFT's beside ours."""
    on_kernels = partial(fl.ops.backend, "triton")

    def adapted(method: Any) -> nn.Module:
        return fl.adapt(llama(), method, targets=TARGETS).to(torch.bfloat16)

    made = {FROZEN: Step(llama().requires_grad_(False))}
    if have_peft():
        from peft import LoraConfig, inject_adapter_in_model

        model = inject_adapter_in_model(LoraConfig(r=RANK, target_modules=TARGETS), llama())
        made[PEFT] = Step(model.to(torch.bfloat16))
    made[KERNELS] = Step(adapted(fl.LoRA(rank=RANK)), on_kernels)
    made[BLAS] = Step(adapted(fl.LoRA(rank=RANK)))
    made[CLORA] = Step(adapted(fl.CLoRA(rank=RANK, k=RANK)), on_kernels, fl.penalty)
    return made


def main(arguments: list[str] | None = None) -> Results:
    options, _, results = begin(__doc__, "host", arguments, 101)
    # a second thread would do the CPU's products, which are not what is measured
    with one_thread(results), no_card(NoCard()) as card:
        runs = steps()
        times = interleave(runs, options.rounds, 2 if options.smoke else 10, "cpu", options.seconds)
        results["rows"] = time_rows(CASE, times, ("forward", "backward"))
        for name in (KERNELS, CLORA):
            card.launches = 0
            runs[name].times()
            results["rows"].append(row(CASE, name, "both", "launches", card.launches / LAYERS, "1"))
    results["notes"] += NO_PEFT
    return finish(results, options)
