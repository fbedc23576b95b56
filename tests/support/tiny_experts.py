"""Mixture models of a few kilobytes, one of each family: experts as one 3-D parameter."""

from __future__ import annotations

from typing import Any

import torch

COMMON = {
    "vocab_size": 37, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
    "num_experts_per_tok": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
#: gated; dense layers beside; transposed, with biases and an interleaved gate of its own; a dense layer and shared MLPs
FAMILIES = {
    "Qwen3Moe": {"intermediate_size": 24, "moe_intermediate_size": 12, "num_experts": 4, "head_dim": 8},
    "Mixtral": {"intermediate_size": 12, "num_local_experts": 4, "head_dim": 8},
    "GptOss": {"intermediate_size": 12, "num_local_experts": 4, "head_dim": 8},
    "DeepseekV3": {
        "num_hidden_layers": 2, "first_k_dense_replace": 1, "intermediate_size": 24, "moe_intermediate_size": 12,
        "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "kv_lora_rank": 8, "q_lora_rank": 8,
        "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    },
}  # fmt: skip
STACKS = ["experts.gate_up_proj", "experts.down_proj"]


def tiny_experts(family: str, dtype: torch.dtype = torch.float32, **overrides: Any) -> Any:
    """A model whose weights are large enough that a wrong expert shows, running its experts one by one."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**COMMON, **FAMILIES[family], **overrides})
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    model.set_experts_implementation("eager")  # transformers' grouped product takes no float64
    with torch.no_grad():
        for p in model.parameters():
            p.data = torch.randn(p.shape, dtype=torch.float64).mul_(0.2).to(dtype)
    return model
