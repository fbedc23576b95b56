"""A language model, a tokenizer and texts of a few kilobytes, on disk, for the tests of the study."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, and one end-of-sequence token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<end>": 0, **{letter: i for i, letter in enumerate(alphabet, start=1)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def tiny_model() -> LlamaForCausalLM:
    """Two layers of width 32, random weights, float32."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def write_model(folder: Path) -> Path:
    """The model and its tokenizer, as ``from_pretrained`` reads them."""
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def write_jsonl(path: Path, rows: list[dict[str, str]]) -> Path:
    """One object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_texts(folder: Path) -> dict[str, Path]:
    """Two tasks to learn and two texts to keep."""
    folder.mkdir(parents=True, exist_ok=True)
    words = ["red", "tree", "stone", "river", "cloud", "house", "bird", "salt", "moon", "fire"]
    pairs = [(a, b) for a in words for b in words if a != b]
    return {
        "upper": write_jsonl(
            folder / "upper.jsonl",
            [{"prompt": f"{a} {b}:", "completion": f" {a.upper()}"} for a, b in pairs],
        ),
        "swap": write_jsonl(
            folder / "swap.jsonl", [{"prompt": f"{a} {b}>", "completion": f" {b} {a}"} for a, b in pairs]
        ),
        "prose": write_jsonl(folder / "prose.jsonl", [{"text": f"the {a} is under the {b}. " * 2} for a, b in pairs]),
        "sums": write_jsonl(
            folder / "sums.jsonl", [{"text": f"{a} + {b} = {a + b};"} for a in range(9) for b in range(9)]
        ),
    }
