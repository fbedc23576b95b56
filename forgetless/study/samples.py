"""Answers to a few held-out prompts, greedy, so that one can read what training has changed."""

from __future__ import annotations

from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from .data import padding_id
from .encoding import IGNORED, Encoded

#: Prompts of a text, and tokens of an answer at most.
COUNT, LENGTH = 2, 48
#: Plain text has no prompt: so many tokens of it at most are given.
GIVEN = 32


def border(row: dict[str, list[int]]) -> int:
    """Where the last answer of an encoded example begins; of plain text, the middle."""
    labels = row["labels"]
    starts = [i for i in range(1, len(labels)) if labels[i - 1] == IGNORED != labels[i]]
    at = starts[-1] if starts else 0
    return at if at > 1 else max(1, min(GIVEN, len(labels) // 2))


@torch.no_grad()
def answers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, encoded: Encoded) -> list[dict[str, str]]:
    """``prompt``, ``expected`` and the model's ``answer`` for the first examples; evaluation mode for the moment."""
    modes = [(module, module.training) for module in model.modules()]
    device = next(model.parameters()).device
    config = GenerationConfig(
        max_new_tokens=LENGTH, do_sample=False, num_beams=1, pad_token_id=padding_id(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    generate: Any = model.eval().generate
    result = []
    for row in encoded[:COUNT]:
        at = border(row)
        ids = torch.tensor([row["input_ids"][:at]], device=device)
        out = generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
        texts = {"prompt": row["input_ids"][:at], "expected": row["input_ids"][at:], "answer": out[0, at:].tolist()}
        result.append({k: str(tokenizer.decode(v, skip_special_tokens=True)).strip() for k, v in texts.items()})
    for module, training in modes:
        module.training = training
    return result


def before_and_after(before: list[dict[str, str]], after: list[dict[str, str]]) -> str:
    """Each prompt with its answers, for the terminal."""
    lines = []
    for old, new in zip(before, after, strict=True):
        parts = ("prompt", old["prompt"]), ("expected", old["expected"]), ("before", old["answer"])
        lines += [f"  {name:9} {_short(text)}" for name, text in (*parts, ("after", new["answer"]))] + [""]
    return "\n".join(lines)


def _short(text: str, most: int = 160) -> str:
    """One line; of a long text its end, where the question is."""
    text = " ".join(text.split())
    return text if len(text) <= most else f".. {text[-most:]}"
