"""Baselines that need no penalty: replay of source text, text that the model wrote itself, KL to the base model."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

import forgetless as fl
from forgetless.switch import evaluating

from .data import Collator, Domain, padding_id
from .encoding import IGNORED, encode_domain, start_tokens
from .plans import Plan
from .session import Session
from .texts import Example


def drawn(examples: Sequence[Example], count: int, seed: int) -> list[Example]:
    """``count`` of the examples, 1 at least, in drawn order; all of them again where they are too few."""
    draw = random.Random(seed)
    chosen: list[Example] = []
    while len(chosen) < max(1, count):
        chosen += draw.sample(list(examples), min(len(examples), max(1, count) - len(chosen)))
    return chosen


@torch.no_grad()
def write(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, count: int, length: int, seed: int
) -> list[Example]:
    """``count`` texts of at most ``length`` tokens that the model writes by itself, drawn at temperature 1."""
    start = start_tokens(tokenizer) or [padding_id(tokenizer)]
    device = next(model.parameters()).device
    config = GenerationConfig(
        max_new_tokens=length,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        pad_token_id=padding_id(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
    )
    generate: Any = model.generate
    with evaluating(model), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        ids = torch.tensor([start] * count, device=device)
        out = generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
    texts = [str(tokenizer.decode(row, skip_special_tokens=True)).strip() for row in out[:, len(start) :].tolist()]
    return [Example("", text) for text in texts if text]


class KL:
    """``weight`` times the mean over tokens of KL(base || tuned) on batches of source text, one batch a call."""

    def __init__(self, weight: float, batches: Sequence[dict[str, Tensor]]):
        self.weight, self.batches = weight, batches
        self.calls = 0

    def __call__(self, model: nn.Module) -> Tensor:
        """The term for the next batch; two forward passes, one of them with the adapters off."""
        batch = self.batches[self.calls % len(self.batches)]
        self.calls += 1
        device = next(model.parameters()).device
        labels = batch["labels"].to(device)[:, 1:]
        inputs = {name: t.to(device) for name, t in batch.items() if name != "labels"}
        expected = labels != IGNORED

        def log_probs() -> Tensor:
            logits = model(**inputs, use_cache=False).logits[:, :-1]
            return log_softmax(logits[expected].float(), dim=-1)

        with fl.disabled(model), torch.no_grad():
            reference = log_probs()
        return self.weight * kl_div(log_probs(), reference, reduction="batchmean", log_target=True)


def scaling(model: nn.Module, factor: float) -> Any:
    """``fl.scaled`` as a context; without a factor nothing is changed."""
    return fl.scaled(model, factor) if factor != 1.0 else nullcontext()


def source_batches(session: Session, size: int = 4) -> list[dict[str, Tensor]]:
    """The source text to calibrate on."""
    return Collator(session.tokenizer).batches(session.source, size)


def examples_of(session: Session, plan: Plan, task: Domain, seed: int, row: dict[str, Any]) -> list[Example]:
    """The task's examples with those that are replayed or written by the model as it is before the task."""
    extras, options = plan.extras, session.options
    task_share = 1 - extras.replay - extras.self_replay
    examples = list(task.train)
    if extras.replay:
        source = [example for domain in session.protected for example in domain.train]
        examples += drawn(source, round(len(task.train) * extras.replay / task_share), seed)
    if extras.self_replay:
        began = time.perf_counter()
        rows = options.steps * options.batch_size * options.accumulate
        written = write(
            session.model, session.tokenizer, max(4, round(rows * extras.self_replay)), options.max_length, seed
        )
        row["write_seconds"] = row.get("write_seconds", 0.0) + time.perf_counter() - began
        row["extra_forwards"] += options.max_length  # of one token each, for all texts at once
        examples += drawn(written, round(len(task.train) * extras.self_replay / task_share), seed)
    return examples


def task_batches(session: Session, task: Domain) -> list[dict[str, Tensor]]:
    """Of the task's training text, as much as of the source text."""
    encoded = encode_domain(task.train, session.tokenizer, session.options.max_length)
    return Collator(session.tokenizer).batches(encoded[: session.options.calibration])


def finish(session: Session, plan: Plan, task: Domain, row: dict[str, Any]) -> float:
    """``fl.retain`` after a task, and what its update is to be scaled by."""
    if plan.extras.retain:
        began = time.perf_counter()
        batches = task_batches(session, task)
        fl.retain(session.model, batches, plan.extras.retain)
        row["retain_seconds"] = row.get("retain_seconds", 0.0) + time.perf_counter() - began
        row["extra_forwards"] += len(batches)
    if not plan.extras.budget:
        return plan.extras.scaled or 1.0
    began = time.perf_counter()
    batches = source_batches(session)
    factor = fl.fit_budget(session.model, batches, plan.extras.budget)
    row["extra_forwards"] += len(batches) * (2 if factor == 1 else 7)  # what fit_budget runs
    row["budget_seconds"] = row.get("budget_seconds", 0.0) + time.perf_counter() - began
    return max(factor, 1 / 32)  # 0 would fold nothing
