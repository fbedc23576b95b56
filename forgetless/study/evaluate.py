"""What a model knows: the loss on held-out examples, and plain facts it still completes."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from .data import FACTS, IGNORED, Collator, FactProbe, padding_id, start_tokens, text_tokens


@dataclass(frozen=True)
class Score:
    """Mean negative log-likelihood in nats per label token, how many those are, the share that is the likeliest."""

    loss: float
    tokens: int
    accuracy: float = 0.0


def nll(
    model: torch.nn.Module,
    encoded: Sequence[dict[str, list[int]]],
    collate: Collator,
    batch_size: int = 8,
) -> Score:
    """The mean loss over all label tokens of `encoded` (every token weighs the same, not every row).

    Rows are sorted by length so that little is padded; the head runs only on positions that some row of
    the batch has a label for, where the model can do that (`logits_to_keep`); the logits become float32
    at label positions only. The mode (train or eval) of every module is as before afterwards.
    """
    if not encoded:
        raise ValueError("nothing to evaluate: encoded is empty")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, wanted 1 or more")
    keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
    device = next(model.parameters()).device
    rows = sorted(encoded, key=lambda row: len(row["input_ids"]))
    total, tokens, right = 0.0, 0, 0
    with _evaluating(model), torch.inference_mode():
        for start in range(0, len(rows), batch_size):
            batch = {k: v.to(device) for k, v in collate(rows[start : start + batch_size]).items()}
            # The logits at position t predict token t + 1.
            labels = batch.pop("labels")[:, 1:]  # (B, T-1)
            if not (labels != IGNORED).any():
                continue
            extra: dict[str, Any] = {}
            if keeps:
                positions = (labels != IGNORED).any(dim=0).nonzero().squeeze(1)  # (P,)
                labels = labels[:, positions]
                extra["logits_to_keep"] = positions
            logits = model(**batch, use_cache=False, **extra).logits  # (B, P, V) or (B, T, V)
            if not keeps:
                logits = logits[:, :-1]
            wanted = labels != IGNORED
            logits, labels = logits[wanted].float(), labels[wanted]
            losses = F.cross_entropy(logits, labels, reduction="none")
            total += losses.double().sum().item()
            right += int((logits.argmax(-1) == labels).sum())
            tokens += labels.numel()
    if not tokens:
        raise ValueError("nothing to evaluate: no example has a label after its first token")
    return Score(total / tokens, tokens, right / tokens)


def facts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    probes: Sequence[FactProbe] = FACTS,
) -> tuple[int, int]:
    """(right, asked): a probe is right when the model's greedy continuation starts with the answer.

    The answer must be followed by a word boundary ("80" is not "8"); upper and lower case are the same.
    """
    if not probes:
        return 0, 0
    continuations = complete(model, tokenizer, probes)
    right = sum(_starts_with(text, p.answer) for text, p in zip(continuations, probes, strict=True))
    return right, len(probes)


def complete(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, probes: Sequence[FactProbe]) -> list[str]:
    """The greedy continuation of every probe, one token longer than the longest answer."""
    longest = max(len(text_tokens(" " + probe.answer, tokenizer)) for probe in probes)
    start = start_tokens(tokenizer)
    prompts = [start + text_tokens(probe.prompt, tokenizer) for probe in probes]
    width, pad = max(map(len, prompts)), padding_id(tokenizer)
    device = next(model.parameters()).device
    # Padded on the left, by hand: the tokenizer's own setting stays as the caller has it.
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    config = GenerationConfig(
        max_new_tokens=longest + 1,
        do_sample=False,
        num_beams=1,
        pad_token_id=pad,
        eos_token_id=tokenizer.eos_token_id,
    )
    with _evaluating(model), torch.no_grad():
        generate: Any = model.generate
        out = generate(input_ids=ids, attention_mask=mask, generation_config=config)
    return [str(tokenizer.decode(row, skip_special_tokens=True)) for row in out[:, width:].tolist()]


def _starts_with(text: str, answer: str) -> bool:
    return re.match(rf"\s*{re.escape(answer)}(?!\w)", text, re.IGNORECASE) is not None


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards each module is in the mode it was in."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training
