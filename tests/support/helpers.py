"""The numeric contract, stated once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def assert_as_good_as_eager(ours: Tensor, eager: Tensor, truth64: Tensor) -> None:
    """Against float64, ours errs at most twice as much as eager PyTorch in the same dtype: worst element and RMS."""
    assert ours.shape == eager.shape == truth64.shape
    assert ours.dtype == eager.dtype and truth64.dtype == torch.float64
    assert not ours.isnan().any()
    if not truth64.numel():
        return
    ours_error, eager_error = ours.double() - truth64, eager.double() - truth64
    tiny = 4 * torch.finfo(torch.float32).eps
    for size in (lambda t: t.abs().max(), lambda t: t.square().mean().sqrt()):
        limit = 2 * size(eager_error) + tiny * size(truth64)
        assert size(ours_error) <= limit, f"error {size(ours_error):.3e}, limit {limit:.3e}"


def tiny_llama(layers: int = 2, **overrides: int) -> Any:
    """A Llama of a few kilobytes, float32, in eval mode; embeddings and head are two weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 37, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": layers}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **heads, **ends, **overrides})).eval()


def tiny_gpt2(layers: int = 1) -> Any:
    """A GPT-2 (Conv1D layers, a tied head) of a few kilobytes, float32, in eval mode."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    ends = {"bos_token_id": 1, "eos_token_id": 2}
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=37, n_embd=16, n_layer=layers, n_head=2, n_positions=64, **ends)
    ).eval()


def token_batch(lengths: tuple[int, ...] = (9, 9), prompts: tuple[int, ...] = (), seed: int = 0) -> dict[str, Tensor]:
    """Right-padded random sequences; the labels of the first ``prompts[i]`` tokens and of padding are -100."""
    gen = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 37, (len(lengths), max(lengths)), generator=gen)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    labels = ids.masked_fill(~mask, -100)
    for row, prompt in enumerate(prompts):
        labels[row, :prompt] = -100
    return {"input_ids": ids.masked_fill(~mask, 0), "attention_mask": mask.long(), "labels": labels}


def stir(model: nn.Module, size: float = 0.3, seed: int = 0) -> nn.Module:
    """Move every trainable parameter away from its start, as training would."""
    gen = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(size * torch.randn(p.shape, generator=gen, dtype=torch.float64).to(p.device, p.dtype))
    return model
