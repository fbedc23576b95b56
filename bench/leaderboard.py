"""PEFT's method comparison on MetaMathQA with this library's methods, on a machine that has the model and the data.

    python -m bench leaderboard --model meta-llama/Llama-3.2-3B --train metamath.jsonl --test gsm8k.jsonl \
        --wiki wikipedia.jsonl --method lora lora+retain=0.3 clora:k=256

The setting is PEFT's (method_comparison/MetaMathQA, default_training_params.json): 5,000 steps of 4 rows, AdamW 1e-4
with weight decay 0.1, cosine with a tenth of warm-up, clipping at 1, rank 32 and alpha 64 on q_proj and v_proj, greedy
answers. Its columns: test accuracy; forgetting, the rise of the loss per token on Wikipedia; the highest reserved
memory; seconds of training without evaluation. Two things differ: the rows of ``--train`` are taken in their order
after a shuffle with the seed, not PEFT's own split; the loss is that of the next token.

Files are JSONL: ``query`` and ``response`` for training; ``query`` and ``response`` with "The answer is: .." for the
test; ``text`` for Wikipedia.
"""

from __future__ import annotations

import json
import random
import re
import time
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, get_cosine_schedule_with_warmup

import forgetless as fl
from forgetless.study.baselines import scaling
from forgetless.study.data import Collator
from forgetless.study.encoding import Encoded
from forgetless.study.evaluate import nll
from forgetless.study.extras import Extras
from forgetless.study.machine import Peak
from forgetless.study.models import load_model
from forgetless.study.options import DTYPES
from forgetless.study.options import BadInput as StudyError
from forgetless.study.plans import Plan, parse_method
from forgetless.study.session import needs_calibration

from .harness import BadInput, Results, Row, begin, row, save

TEMPLATE = "Question: {query} Think step by step.\nAnswer:"
ANSWER = re.compile(r"answer is:?\s*\$?\s*(-?[\d,]*\.?\d+)", re.IGNORECASE)
KEPT_ROWS = 64  # of the Wikipedia rows that are not measured, to calibrate on


def lines(path: Path, *fields: str) -> list[dict[str, str]]:
    """The rows of a JSONL file; BadInput names the line that lacks a field."""
    try:
        rows = [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines() if text.strip()]
    except (OSError, ValueError) as error:
        raise BadInput(f"cannot read {path}: {error}") from None
    for number, entry in enumerate(rows, start=1):
        missing = [name for name in fields if not isinstance(entry, dict) or not isinstance(entry.get(name), str)]
        if missing:
            raise BadInput(f"{path}:{number}: wants the text {', '.join(missing)}")
    if not rows:
        raise BadInput(f"{path} has no rows")
    return rows


def parse_answer(text: str) -> str | None:
    """The number after the last "The answer is:"; None without one."""
    results = ANSWER.findall(text)
    return results[-1].replace(",", "").rstrip(".") if results else None


def tokens(texts: list[str], tokenizer: Any, length: int, end: bool = False) -> Encoded:
    """Each text, at most ``length`` tokens, all of them labels; with ``end`` the end-of-sequence token follows."""
    last = [tokenizer.eos_token_id] if end else []
    ids = [[*tokenizer(text)["input_ids"], *last][:length] for text in texts]
    return [{"input_ids": row, "labels": row} for row in ids]


@torch.no_grad()
def accuracy(model: Any, tokenizer: Any, test: list[dict[str, str]], size: int, longest: int) -> float:
    """The share of the test rows whose greedy answer has the right number."""
    right, end, left = 0, tokenizer.eos_token_id, {"padding": True, "padding_side": "left"}
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    config = GenerationConfig(max_length=longest, do_sample=False, pad_token_id=end, eos_token_id=end)
    for i in range(0, len(test), size):
        part = test[i : i + size]
        prompts = [TEMPLATE.format(query=entry["query"]) for entry in part]
        asked = tokenizer(prompts, return_tensors="pt", truncation=True, max_length=longest, **left).to(model.device)
        ids = asked["input_ids"]
        made = model.generate(ids, attention_mask=asked["attention_mask"], generation_config=config)
        answers = tokenizer.batch_decode(made[:, ids.shape[1] :], skip_special_tokens=True)
        expected = [parse_answer(entry["response"]) for entry in part]
        right += sum(e is not None and parse_answer(a) == e for a, e in zip(answers, expected, strict=True))
    return right / len(test)


def train(model: Any, rows: Encoded, collate: Collator, lr: float, options: Any) -> float:
    """Train the adapters; returns seconds."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.1)
    schedule = get_cosine_schedule_with_warmup(optimizer, options.steps // 10, options.steps)
    model.train()
    began = time.perf_counter()
    for step in range(options.steps):
        at = step * options.batch % max(1, len(rows) - options.batch + 1)
        batch = {name: t.to(model.device) for name, t in collate(rows[at : at + options.batch]).items()}
        loss = model(**batch).loss + fl.penalty(model)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    seconds = time.perf_counter() - began
    model.eval()
    return seconds


def run(plan: Plan, options: Any, data: dict[str, Any]) -> list[Row]:
    """All figures of one method."""
    torch.manual_seed(options.seed)
    model, tokenizer = load_model(options.model, DTYPES[options.dtype], options.device)
    wiki = tokens(data["wiki"], tokenizer, options.max_length)
    kept, measured = wiki[:KEPT_ROWS], wiki[KEPT_ROWS:] or wiki
    texts = [TEMPLATE.format(query=e["query"]) + " " + e["response"] for e in data["train"]]
    rows = tokens(texts, tokenizer, options.max_length, end=True)
    collate = Collator(tokenizer)
    before = nll(model, measured, collate, options.batch).loss
    fl.adapt(model, plan.seeded(options.seed), targets=options.targets)
    peak = Peak(model.device)
    if needs_calibration(model):
        fl.calibrate(model, collate.batches(kept))
    seconds = train(model, rows, collate, plan.lr, options)
    if plan.extras.retain:
        fl.retain(model, collate.batches(rows[:KEPT_ROWS]), plan.extras.retain)
    mib = peak.mib()
    with scaling(model, plan.extras.scaled or 1.0):
        right = accuracy(model, tokenizer, data["test"], options.eval_batch, options.max_length)
        rise = nll(model, measured, collate, options.batch).loss - before
    figures = ("accuracy", right, "share"), ("forgetting", rise, "nats"), ("memory", mib, "MiB"), ("time", seconds, "s")
    return [row("metamath", plan.label, "train", *figure) for figure in figures]


def main(arguments: list[str] | None = None) -> Results:
    file: dict[str, Any] = {"type": Path, "required": True}
    options, _, results = begin(
        __doc__, "leaderboard", arguments, 1,
        model={"required": True, "help": "a folder, or a model of the hub that is at hand"},
        train=file, test=file, wiki=file,
        method=["lora", "lora+retain=0.3", "clora:k=256", "lalora"], targets=["q_proj", "v_proj"],
        steps=5000, batch=4, eval_batch=51, max_length=768, rank=32, seed=0,
        dtype={"default": "bfloat16", "choices": sorted(DTYPES)},
    )  # fmt: skip
    for name in ("steps", "batch", "eval_batch", "rank"):
        if getattr(options, name) < 1:
            raise BadInput(f"--{name.replace('_', '-')} is {getattr(options, name)}, wants 1 or more")
    data: dict[str, Any] = {name: lines(getattr(options, name), "query", "response") for name in ("train", "test")}
    data["wiki"] = [entry["text"] for entry in lines(options.wiki, "text")]
    random.Random(options.seed).shuffle(data["train"])
    try:
        plans = [parse_method(text, lr=1e-4, rank=options.rank) for text in options.method]
    except StudyError as error:
        raise BadInput(str(error)) from None
    for plan in plans:
        if plan.full or plan.extras != Extras(retain=plan.extras.retain, scaled=plan.extras.scaled):
            raise BadInput(f"{plan.label}: the leaderboard runs adapters, with retain and scaled; see compare")
    for plan in plans:
        results["rows"] += run(plan, options, data)
        figures = ", ".join(f"{r['metric']} {r['value']:.4g} {r['unit']}" for r in results["rows"][-4:])
        print(f"{plan.label}: {figures}", flush=True)
        save(results, options)
    return results
