"""The shapes that are timed: projections of real models, and which comparisons of them are made."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from .bytes import available_bytes
from .harness import PEFT

RANKS = (8, 16, 32, 64, 128)
TOKENS = (512, 1024, 2048, 4096, 8192, 16384)
#: More would not finish on a CPU.
CPU_TOKENS = 4096
METHODS = ("lora", "curlora")


@dataclass(frozen=True)
class Shape:
    """y (M, N) = x (M, K) @ weight.T"""

    models: str
    projection: str
    N: int
    K: int


#: From the models' own configurations. GPT-2 stores its weights transposed (Conv1D); N and K are what they mean here.
SHAPES: dict[str, Shape] = {
    "smollm2.q": Shape("SmolLM2-135M", "q/o", 576, 576),
    "smollm2.k": Shape("SmolLM2-135M", "k/v", 192, 576),
    "smollm2.up": Shape("SmolLM2-135M", "gate/up", 1536, 576),
    "smollm2.down": Shape("SmolLM2-135M", "down", 576, 1536),
    "gpt2.qkv": Shape("GPT-2", "qkv", 2304, 768),
    "gpt2.o": Shape("GPT-2", "o", 768, 768),
    "gpt2.up": Shape("GPT-2", "up", 3072, 768),
    "gpt2.down": Shape("GPT-2", "down", 768, 3072),
    "llama3.q": Shape("Llama-3-8B, Mistral-7B", "q/o", 4096, 4096),
    "llama3.k": Shape("Llama-3-8B, Mistral-7B", "k/v", 1024, 4096),
    "llama3.up": Shape("Llama-3-8B, Mistral-7B", "gate/up", 14336, 4096),
    "llama3.down": Shape("Llama-3-8B, Mistral-7B", "down", 4096, 14336),
    "llama1b.q": Shape("Llama-3.2-1B", "q/o", 2048, 2048),
    "llama1b.k": Shape("Llama-3.2-1B", "k/v", 512, 2048),
    "llama1b.up": Shape("Llama-3.2-1B", "gate/up", 8192, 2048),
    "llama1b.down": Shape("Llama-3.2-1B", "down", 2048, 8192),
    "qwen2.5.q": Shape("Qwen2.5-7B", "q/o", 3584, 3584),
    "qwen2.5.k": Shape("Qwen2.5-7B", "k/v", 512, 3584),
    "qwen2.5.up": Shape("Qwen2.5-7B", "gate/up", 18944, 3584),
    "qwen2.5.down": Shape("Qwen2.5-7B", "down", 3584, 18944),
    "tiny": Shape("tiny", "q", 24, 16),
    "tiny.k": Shape("tiny", "k", 12, 16),
}
#: One shape or two of each model that a small CPU gets through.
CPU = ("smollm2.q", "smollm2.up", "gpt2.qkv", "qwen2.5.k", "llama3.q")
#: The most important first: a run that is short of time leaves out the last.
GPU = ("llama3.q", "llama3.up", "llama3.down", "llama3.k", "llama1b.q", "llama1b.up", "llama1b.down", "llama1b.k")


@dataclass(frozen=True)
class Case:
    """One comparison of layers. ``dtype`` is the name of a torch dtype."""

    shape: str
    M: int
    R: int
    dtype: str
    dropout: float
    method: str

    @property
    def name(self) -> str:
        return f"{self.shape} M={self.M} R={self.R} {self.dtype} {self.method} dropout {self.dropout:g}"

    def about(self) -> dict[str, Any]:
        """What a result file says of the case."""
        return {**asdict(self), **asdict(SHAPES[self.shape])}

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


def grid(options: argparse.Namespace) -> list[Case]:
    """Every combination of the options, all shapes of one kind before the next; CURLoRA has no dropout."""
    return [
        Case(shape, M, R, dtype, dropout, method)
        for dtype in options.dtypes
        for method in options.methods
        for dropout in (options.dropout if method == "lora" else [0.0])
        for shape in options.shapes
        for M in options.tokens
        for R in options.ranks
    ]


def sweeps(options: argparse.Namespace, device: torch.device, notes: list[str]) -> list[Case]:
    """One shape by rank and another one by tokens, LoRA without dropout."""
    by_rank, by_tokens = ("smollm2.up" if device.type == "cpu" else "llama3.q"), "llama3.k"
    ranks: Sequence[int] = RANKS
    tokens: Sequence[int] = TOKENS
    if options.smoke:
        by_rank, by_tokens, ranks, tokens = "tiny", "tiny.k", (2, 4), (4, 8)
    elif device.type == "cpu":
        tokens = tuple(M for M in TOKENS if M <= CPU_TOKENS)
        notes.append(f"by tokens: to {CPU_TOKENS} of {TOKENS[-1]}, what a CPU gets through")
    return [
        Case(shape, M, R, dtype, 0.0, "lora")
        for dtype in options.dtypes
        for shape, Ms, Rs in ((by_rank, options.tokens[:1], ranks), (by_tokens, tokens, options.ranks[:1]))
        for M in Ms
        for R in Rs
    ]


def fitting(cases: Sequence[Case], device: torch.device, notes: list[str]) -> list[Case]:
    """The cases that fit the machine, each once; a note for each of the others."""
    result = []
    for case in dict.fromkeys(cases):
        need = bytes_needed(case)
        if need < 0.6 * available_bytes(device):
            result.append(case)
        else:
            notes.append(f"{case.name}: left out, needs about {need / 2**30:.1f} GiB")
    return result


def rival(method: str) -> str:
    """Whose overhead ours is compared with."""
    return PEFT if method == "lora" else "authors' CURLoRA"


def bytes_needed(case: Case) -> int:
    """An upper estimate of what all providers of one case need at once: float32 copies of x, and dense updates."""
    shape, width = SHAPES[case.shape], case.torch_dtype.itemsize
    activations = case.M * (shape.N + shape.K)
    return activations * (4 * width + 4 * 4) + shape.N * shape.K * (width + 4 * 4)


def work(case: Case, frozen: bool = False) -> tuple[float, float]:
    """FLOPs and bytes that forward and backward of a layer need at least, whatever a provider does.

    Backward is that of x and of the adapter; each matrix is read or written once.
    """
    N, K, M, R = SHAPES[case.shape].N, SHAPES[case.shape].K, case.M, case.R
    e = case.torch_dtype.itemsize
    flops, size = 4.0 * M * N * K, 2.0 * e * (M * K + N * K + M * N)
    if frozen:
        return flops, size
    if case.method == "lora":
        flops += 6.0 * M * R * (N + K)
        return flops, size + e * R * (M + N + K) + e * (M * R + 2 * R * (N + K)) + e * M * K
    # curlora: x R^T and dy C are columns of the frozen layer's own products; only (R, R) is trained
    return flops + 2.0 * M * R * (N + R) + 2.0 * M * R * (K + 2 * R), size + e * R * (2 * M + N + K)
