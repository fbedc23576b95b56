"""Models of the field, from their configurations: adapted, trained, saved, loaded and merged, and what is reached."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from helpers import stir
from tiny_experts import COMMON, tiny_experts
from tiny_experts import FAMILIES as EXPERTS
from torch import nn

import forgetless as fl

transformers = pytest.importorskip("transformers")

LLAMA = {**COMMON, "intermediate_size": 24, "head_dim": 8}
GEMMA = {**LLAMA, "sliding_window": 8, "query_pre_attn_scalar": 8}
ENCODER = {
    "vocab_size": 37, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_labels": 37,
}  # fmt: skip
MODERN = {**ENCODER, "cls_token_id": 1, "sep_token_id": 2}
IMAGES = {
    "image_size": 8, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 24, "num_labels": 3,
}  # fmt: skip
BART = {
    "vocab_size": 37, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": None,
}  # fmt: skip
T5 = {"vocab_size": 37, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
GPT2 = {"vocab_size": 37, "n_embd": 16, "n_layer": 1, "n_head": 2, "bos_token_id": 1, "eos_token_id": 2}
NEXT = {
    **COMMON, "num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"], "head_dim": 8,
    "intermediate_size": 24, "moe_intermediate_size": 12, "shared_expert_intermediate_size": 12, "num_experts": 4,
    "linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip

#: Model -> its configuration, and the linear layers that stay as they are: heads and routers.
MODELS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "LlamaForCausalLM": (LLAMA, {"lm_head"}),
    "Qwen2ForCausalLM": (LLAMA, {"lm_head"}),
    "Qwen3ForCausalLM": (LLAMA, {"lm_head"}),
    "MistralForCausalLM": (LLAMA, {"lm_head"}),
    "Gemma2ForCausalLM": (GEMMA, {"lm_head"}),
    "Gemma3ForCausalLM": (GEMMA, {"lm_head"}),
    "Phi3ForCausalLM": (LLAMA, {"lm_head"}),
    "GPT2LMHeadModel": (GPT2, {"lm_head"}),
    "GPTNeoXForCausalLM": (LLAMA, {"lm_head"}),
    "OPTForCausalLM": ({**COMMON, "ffn_dim": 24, "word_embed_proj_dim": 8}, {"lm_head"}),
    "BloomForCausalLM": ({"vocab_size": 37, "hidden_size": 16, "n_layer": 1, "n_head": 2}, {"lm_head"}),
    "FalconForCausalLM": ({**COMMON, "ffn_hidden_size": 24}, {"lm_head"}),
    "MambaForCausalLM": ({**COMMON, "state_size": 4, "time_step_rank": 4}, {"lm_head"}),
    "Qwen3NextForCausalLM": (NEXT, {"lm_head", "model.layers.*.mlp.shared_expert_gate"}),
    "T5ForConditionalGeneration": ({**T5, "decoder_start_token_id": 0}, {"lm_head"}),
    "BartForConditionalGeneration": (BART, {"lm_head"}),
    "BertForMaskedLM": (ENCODER, {"cls.predictions.decoder"}),
    "RobertaForTokenClassification": (ENCODER, {"classifier"}),
    "ModernBertForMaskedLM": (MODERN, {"decoder"}),
    "AlbertForMaskedLM": ({**ENCODER, "embedding_size": 8}, {"predictions.decoder"}),
    "ViTForImageClassification": (IMAGES, {"classifier"}),
    "CLIPModel": ({"text_config": ENCODER, "vision_config": IMAGES, "projection_dim": 8}, set()),
    **{f"{family}ForCausalLM": (config, {"lm_head"}) for family, config in EXPERTS.items()},
}


def made(name: str) -> Any:
    family = name.partition("For")[0]
    if family in EXPERTS:
        return tiny_experts(family)
    torch.manual_seed(0)
    cls, config = getattr(transformers, name), MODELS[name][0]
    of = transformers.Gemma3TextConfig if family == "Gemma3" else cls.config_class
    return cls(of(**config)).eval()


def batch_of(name: str) -> dict[str, Any]:
    gen = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 37, (2, 9), generator=gen)
    pixels = torch.randn(2, 3, 8, 8, generator=gen)
    if name == "CLIPModel":
        return {"input_ids": ids, "pixel_values": pixels, "return_loss": True}
    return {"pixel_values": pixels, "labels": torch.tensor([0, 2])} if "Image" in name else {
        "input_ids": ids, "labels": ids
    }  # fmt: skip


def outputs(model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        result = model(**batch)
    logits: torch.Tensor = result["logits_per_image" if "logits_per_image" in result else "logits"]
    return logits


def linear_layers(model: nn.Module) -> set[str]:
    kinds = (nn.Linear, transformers.pytorch_utils.Conv1D)
    return {re.sub(r"\.\d+\.", ".*.", name) for name, module in model.named_modules() if isinstance(module, kinds)}


@pytest.mark.filterwarnings("ignore:targets 'all-linear' reached:UserWarning")
@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_adapted_trained_saved_loaded_and_merged(name, tmp_path):
    model, batch = made(name), batch_of(name)
    before, keys, linear = outputs(model, batch), set(model.state_dict()), linear_layers(model)

    fl.adapt(model, fl.CLoRA(rank=4, k=4))
    torch.testing.assert_close(outputs(model, batch), before)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(2):
        loss = model(**batch).loss + fl.penalty(model)
        loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] != losses[1]

    after = outputs(stir(model, 0.05), batch)
    assert (after - before).abs().max() > 1e-3
    assert set(model.state_dict()) >= keys
    fl.save(model, tmp_path)
    torch.testing.assert_close(outputs(fl.load(made(name), tmp_path), batch), after)

    report = fl.explain(model)
    print(name, report.passed_over)
    passed_over = {key.removesuffix(".weight") for key in report.passed_over}
    assert passed_over & linear <= MODELS[name][1]
    fl.merge(model)
    assert set(model.state_dict()) == keys
    torch.testing.assert_close(outputs(model, batch), after, rtol=1e-4, atol=1e-5)
