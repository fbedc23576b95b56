"""The whole models that are timed: SmolLM2-135M, and every way of adapting it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import forgetless as fl

from .baselines import CloraAuthors, CurloraAuthors

RANK, ALPHA = 16, 32
#: Width of CLoRA's subspace.
K = 256


def smollm2(device: torch.device, smoke: bool = False) -> tuple[Any, str]:
    """SmolLM2-135M in bfloat16, frozen, and what it is; without its package, the same sizes and random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    name = "a toy model"
    if not smoke:
        from forgetless.study.models import load_model
        from forgetless.study.packages import MissingPackage

        try:
            return load_model(device=device)[0].requires_grad_(False), "SmolLM2-135M"
        except MissingPackage:
            sizes = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
            heads = {"num_attention_heads": 9, "num_key_value_heads": 3}
            name = "SmolLM2-135M's sizes, random weights"
    config = LlamaConfig(**sizes, **heads, tie_word_embeddings=True, bos_token_id=None, eos_token_id=0)
    config._attn_implementation = "eager"
    return LlamaForCausalLM(config).to(device, torch.bfloat16).requires_grad_(False).eval(), name


def twin(base: nn.Module) -> Any:
    """Another module tree over the same weights, to be adapted on its own."""
    shared = {id(t): t for t in (*base.parameters(), *base.buffers())}
    return copy.deepcopy(base, shared)


def ours(base: nn.Module, method: Any) -> Any:
    return fl.adapt(twin(base), method).train()


def our_lora(base: nn.Module, dropout: float, penalties: tuple[Any, ...] = ()) -> Any:
    return ours(base, fl.LoRA(RANK, ALPHA, dropout, penalties=penalties))


def our_clora(base: nn.Module, basis: str, k: int = K) -> Any:
    return ours(base, fl.CLoRA(RANK, ALPHA, k=k, basis=basis))


def peft_lora(base: nn.Module, dropout: float, autocast: bool = True) -> Any:
    """PEFT's LoRA with its defaults, float32 adapters beside a bfloat16 base, or with adapters in bfloat16."""
    import peft

    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=dropout, target_modules="all-linear")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft and transformers about each other
        return peft.PeftModel(twin(base), config, autocast_adapter_dtype=autocast).train()


def authors_clora(model: nn.Module, k: int = K) -> CloraAuthors:
    """The authors' penalty on a PEFT model."""
    pairs = [
        (module.lora_A["default"].weight, module.lora_B["default"].weight)
        for module in model.modules()
        if isinstance(getattr(module, "lora_A", None), nn.ModuleDict)
    ]
    return CloraAuthors.drawn(pairs, k, torch.bfloat16)


def authors_curlora(base: nn.Module) -> Any:
    """The authors' layers, on the rows and columns that ours drew."""
    model = ours(base, fl.CURLoRA(RANK))
    for name, layer in fl.adapters(model).items():
        adapter: Any = layer.adapter
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, CurloraAuthors(layer.base, adapter.rows, adapter.columns))
    return model.train()


def step(model: nn.Module, inputs: Tensor, labels: Tensor, penalty: Callable[[], Tensor] | None = None) -> Callable:
    """Forward and backward, input gradients included, as in the middle of a deeper model."""

    def run() -> None:
        x = inputs.detach().requires_grad_(True)
        loss = model(inputs_embeds=x, labels=labels).loss
        if penalty is not None:
            loss = loss + penalty()
        loss.backward()
        model.zero_grad(set_to_none=True)

    return run


def batch(base: Any, sequences: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Input embeddings and token ids of random text."""
    device = next(base.parameters()).device
    ids = torch.randint(0, base.config.vocab_size, (sequences, tokens), device=device)
    return base.get_input_embeddings()(ids).detach(), ids
