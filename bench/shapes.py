"""The shapes that are timed: projections of real models, and how many tokens of them a machine can hold."""

from __future__ import annotations

from dataclasses import dataclass

import torch

RANKS = (8, 16, 32, 64, 128)
TOKENS = (512, 1024, 2048, 4096, 8192, 16384)


@dataclass(frozen=True)
class Shape:
    """y (M, N) = x (M, K) @ weight.T"""

    models: str
    projection: str
    N: int
    K: int

    @property
    def name(self) -> str:
        return f"{self.models} {self.projection}"


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
    "qwen2.5.q": Shape("Qwen2.5-7B", "q/o", 3584, 3584),
    "qwen2.5.k": Shape("Qwen2.5-7B", "k/v", 512, 3584),
    "qwen2.5.up": Shape("Qwen2.5-7B", "gate/up", 18944, 3584),
    "qwen2.5.down": Shape("Qwen2.5-7B", "down", 3584, 18944),
    "tiny": Shape("tiny", "smoke", 24, 16),
}
#: One shape or two of each model that a small CPU gets through.
CPU = ("smollm2.q", "smollm2.up", "gpt2.qkv", "qwen2.5.k", "llama3.q")
GPU = ("llama3.q", "llama3.k", "llama3.up", "llama3.down", "qwen2.5.up")


def bytes_needed(shape: Shape, M: int, dtype: torch.dtype) -> int:
    """A generous guess of what all providers of one case hold at once: float32 copies of x, and dense updates."""
    width = torch.tensor([], dtype=dtype).element_size()
    activations = M * (shape.N + shape.K)
    return activations * (4 * width + 4 * 4) + shape.N * shape.K * (width + 4 * 4)


def work(shape: Shape, M: int, R: int, dtype: torch.dtype, method: str) -> dict[str, tuple[float, float]]:
    """FLOPs and bytes that a layer cannot do without, whatever a provider does: phase -> (FLOPs, bytes).

    Backward is that of x and of the adapter; each matrix is read or written once. ``method``: frozen, lora, curlora.
    """
    N, K = shape.N, shape.K
    e = torch.tensor([], dtype=dtype).element_size()
    base = 2.0 * M * N * K, float(e * (M * K + N * K + M * N))
    if method == "frozen":
        forward = backward = base
    elif method == "lora":
        up_down = 2.0 * M * R * (N + K)
        forward = base[0] + up_down, base[1] + e * R * (M + N + K)
        backward = base[0] + 2 * up_down, base[1] + e * (M * K + M * R + 2 * R * (N + K))
    else:  # curlora: x R^T and dy C are columns of the frozen layer's own products; only (R, R) is trained
        forward = base[0] + 2.0 * M * R * (N + R), base[1] + e * R * (M + N)
        backward = base[0] + 2.0 * M * R * (K + 2 * R), base[1] + e * R * (M + K)
    return {
        "forward": forward,
        "backward": backward,
        "both": (forward[0] + backward[0], forward[1] + backward[1]),
    }
