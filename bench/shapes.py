"""The shapes that are timed: projections of real models, and which comparisons of them are made."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from .bytes import available_bytes

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
MODELS: dict[str, tuple[str, dict[str, tuple[str, int, int]]]] = {
    "smollm2": ("SmolLM2-135M", {"q": ("q/o", 576, 576), "k": ("k/v", 192, 576), "up": ("gate/up", 1536, 576),
                                 "down": ("down", 576, 1536)}),
    "gpt2": ("GPT-2", {"qkv": ("qkv", 2304, 768), "o": ("o", 768, 768), "up": ("up", 3072, 768),
                       "down": ("down", 768, 3072)}),
    "llama3": ("Llama-3-8B, Mistral-7B", {"q": ("q/o", 4096, 4096), "k": ("k/v", 1024, 4096),
                                          "up": ("gate/up", 14336, 4096), "down": ("down", 4096, 14336)}),
    "llama1b": ("Llama-3.2-1B", {"q": ("q/o", 2048, 2048), "k": ("k/v", 512, 2048), "up": ("gate/up", 8192, 2048),
                                 "down": ("down", 2048, 8192)}),
    "qwen2.5": ("Qwen2.5-7B", {"q": ("q/o", 3584, 3584), "k": ("k/v", 512, 3584), "up": ("gate/up", 18944, 3584),
                               "down": ("down", 3584, 18944)}),
    "tiny": ("tiny", {"q": ("q", 24, 16), "k": ("k", 12, 16)}),
}  # fmt: skip
SHAPES = {
    f"{model}.{name}": Shape(title, *sizes) for model, (title, parts) in MODELS.items() for name, sizes in parts.items()
}
#: One shape or two of each model that a small CPU gets through.
CPU = ("smollm2.q", "smollm2.up", "gpt2.qkv", "qwen2.5.k", "llama3.q")
#: The most important first: a run that is short of time leaves out the last.
GPU = ("llama3.q", "llama3.up", "llama3.down", "llama3.k", "llama1b.q", "llama1b.up", "llama1b.down", "llama1b.k")


def shape_of(name: str) -> Shape:
    """The shape of that name, or of the sizes in it."""
    sizes = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", name)
    return Shape("", "", int(sizes[1]), int(sizes[2])) if sizes else SHAPES[name]


def shape_name(text: str) -> str:
    """The text, if ``shape_of`` knows it."""
    try:
        shape_of(text)
    except KeyError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither NxK nor one of {', '.join(SHAPES)}") from None
    return text


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
        return {**asdict(self), **asdict(shape_of(self.shape))}

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


def grid(options: argparse.Namespace, **others: Any) -> list[Case]:
    """Every combination of the options, all shapes of one kind before the next; CURLoRA has no dropout."""
    of = argparse.Namespace(**{**vars(options), **others})
    return [
        Case(shape, M, R, dtype, dropout, method)
        for dtype in of.dtypes
        for method in of.methods
        for dropout in (of.dropout if method == "lora" else [0.0])
        for shape in of.shapes
        for M in of.tokens
        for R in of.ranks
    ]


def sweeps(options: argparse.Namespace, device: torch.device, notes: list[str]) -> list[Case]:
    """One shape by rank and another one by tokens, LoRA without dropout."""
    cuda, by_rank, by_tokens = device.type == "cuda", list(RANKS), list(TOKENS)
    shapes = "llama3.q" if cuda else "smollm2.up", "llama3.k"
    if options.smoke:
        shapes, by_rank, by_tokens = ("tiny.q", "tiny.k"), [2, 4], [4, 8]
    elif not cuda:
        by_tokens = [tokens for tokens in TOKENS if tokens <= CPU_TOKENS]
        notes.append(f"by tokens: to {CPU_TOKENS} of {TOKENS[-1]}, what a CPU gets through")
    lora: Any = {"methods": ["lora"], "dropout": [0.0], "tokens": options.tokens[:1], "ranks": options.ranks[:1]}
    return [
        case
        for dtype in options.dtypes
        for shape, sizes in zip(shapes, ({"ranks": by_rank}, {"tokens": by_tokens}), strict=True)
        for case in grid(options, **{**lora, **sizes, "dtypes": [dtype], "shapes": [shape]})
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


def bytes_needed(case: Case) -> int:
    """An upper estimate of what all providers of one case need at once: float32 copies of x, and dense updates."""
    shape, width = shape_of(case.shape), case.torch_dtype.itemsize
    activations = case.M * (shape.N + shape.K)
    return activations * (4 * width + 4 * 4) + shape.N * shape.K * (width + 4 * 4)


def work(case: Case, frozen: bool = False) -> tuple[float, float]:
    """FLOPs and bytes that forward and backward of a layer need at least, whatever a provider does.

    Backward is that of x and of the adapter; each matrix is read or written once.
    """
    shape, M, R = shape_of(case.shape), case.M, case.R
    N, K, e = shape.N, shape.K, case.torch_dtype.itemsize
    flops, size = 4.0 * M * N * K, 2.0 * e * (M * K + N * K + M * N)
    if frozen:
        return flops, size
    if case.method == "lora":
        flops += 6.0 * M * R * (N + K)
        return flops, size + e * R * (M + N + K) + e * (M * R + 2 * R * (N + K)) + e * M * K
    # curlora: x R^T and dy C are columns of the frozen layer's own products; only (R, R) is trained
    return flops + 2.0 * M * R * (N + R) + 2.0 * M * R * (K + 2 * R), size + e * R * (2 * M + N + K)
