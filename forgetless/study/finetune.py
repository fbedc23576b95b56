"""One model, one method, your examples: train, save, and say how to load the result."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

import forgetless as fl

from ..cli.console import Ui
from . import processes
from . import results as book
from .data import Collator, Domain, load_domain
from .encoding import CHAT, Encoded, encode_domain, encode_for_training, template_for
from .evaluate import nll
from .machine import machine, versions
from .models import load_model
from .options import (
    DTYPES,
    BadInput,
    FinetuneOptions,
    Plan,
    check_dtype,
    check_numbers,
    parse_method,
    positive,
    writable,
)
from .session import calibrates, check_fit, source_rows, take_tokens
from .train import DIVERGED, INTERRUPTED, TrainConfig, train

LOG = "training.json"
#: Lies in the output folder from the first step until the log is written: what a killed run left may be replaced.
UNFINISHED = ".unfinished"
#: Enough held-out text to see the loss fall; it is not a benchmark.
EVAL_TOKENS = 4096


@dataclass
class Work:
    """All inputs, loaded and checked."""

    plan: Plan
    domain: Domain
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: Encoded
    held_out: Encoded
    steps: int
    template: str


def prepare(options: FinetuneOptions) -> Work:
    """Everything that can go wrong before training goes wrong here."""
    check_numbers(options, "steps", "batch_size", "accumulate", "rank", "calibration")
    check_numbers(options, "max_length", least=2)
    if options.batch_size % processes.count():
        raise BadInput(f"--batch-size {options.batch_size} cannot be divided over {processes.count()} processes")
    check_numbers(options, "seed", "weight", least=0)
    positive({"lr": options.lr, "epochs": options.epochs, "alpha": options.alpha})
    check_dtype(options.dtype)
    plan = parse_method(options.method, lr=options.lr, rank=options.rank, alpha=options.alpha, weight=options.weight)
    if plan.alters:
        raise BadInput(f"{plan.label}: finetune trains one adapter; full and consolidate are rows of compare")
    unfinished = (options.out / UNFINISHED).exists()
    if (options.out / "adapter_config.json").exists() and not (options.overwrite or unfinished):
        raise BadInput(f"{options.out} holds an adapter already; give --overwrite or another --out")
    writable(options.out)
    domain = load_domain(options.data)
    kept = [load_domain(spec) for spec in options.source] if calibrates(plan) else []
    if calibrates(plan) and not kept:
        raise BadInput(f"{plan.label} is calibrated on text to keep: give --source")
    model, tokenizer = load_model(options.model, DTYPES[options.dtype], options.device)
    template = template_for(options.template, tokenizer)
    encoded = encode_for_training(domain.train, tokenizer, options.max_length, template)
    source = source_rows(kept, tokenizer, options.calibration, min(options.max_length, 256)) if kept else []
    check_fit(model, [plan], options.targets)
    per_step = options.batch_size * options.accumulate
    steps = options.steps or max(1, math.ceil(options.epochs * len(encoded) / per_step))
    held_out = take_tokens(encode_domain(domain.held_out, tokenizer, options.max_length, template), EVAL_TOKENS)
    return Work(plan, domain, model, tokenizer, source, held_out, steps, template)


def finetune(options: FinetuneOptions, ui: Ui) -> tuple[str, str]:
    """Train and save; returns how it ended and what to tell the user about it.

    Several processes (torchrun) divide each batch, so that the run is that of one; the first of them writes.
    """
    work = prepare(options)
    model, tokenizer, plan = work.model, work.tokenizer, work.plan
    set_seed(options.seed)
    fl.adapt(model, plan.seeded(options.seed), targets=options.targets)
    collate = Collator(tokenizer)
    if work.source:
        ui.say(f"calibrating on {len(work.source)} sequences of {', '.join(options.source)}")
        fl.calibrate(model, collate.batches(work.source))
    config = dataclasses.replace(TrainConfig.of(options, work.steps, plan.lr, options.seed), template=work.template)
    if any(example.prompt for example in work.domain.train):
        way = "through the chat template of the tokenizer" if work.template == CHAT else "as they are, no chat template"
        ui.say(f"prompts and completions: {way}")
    before = nll(model, work.held_out, collate).loss
    if processes.number() == 0:
        (options.out / UNFINISHED).touch()
    with processes.stopping_together() as stop:
        with ui.training(f"{plan.label}: {work.domain.name}", work.steps) as on_step:
            result = train(model, tokenizer, work.domain.train, config, on_step, stop)
        if processes.number() == 0:
            fl.save(model, options.out)
        log: dict[str, Any] = {
            "created": book.now(),
            "versions": versions(),
            "machine": machine(next(model.parameters()).device),
            "processes": processes.count(),
            "settings": plan.settings,
            "config": dataclasses.asdict(config),
            "held_out_before": before,
            **dataclasses.asdict(result),
        }
        told = f"adapter saved in {options.out}"
        if result.stopped == INTERRUPTED:
            told = f"{result.note}; {told}"
        else:
            log["held_out_after"] = after = nll(model, work.held_out, collate).loss
            learnt = f"held-out loss {before:.3f} -> {after:.3f} nats per token"
            told = f"{result.note}; {told}" if result.stopped == DIVERGED else f"{learnt}; {told}"
        if processes.number() == 0:
            book.dump(options.out / LOG, log)
            (options.out / UNFINISHED).unlink()
        return result.stopped, told


def how_to_load(options: FinetuneOptions) -> str:
    """A few lines of Python that load what was saved, runnable as they are."""
    text = f"""import torch
import forgetless as fl
from forgetless.study.models import load_model

model, tokenizer = load_model({options.model!r}, torch.{options.dtype})
fl.load(model, {str(options.out)!r})"""
    if options.method.lower().startswith("curlora"):
        return text
    return f"""{text}

# or with PEFT, without forgetless:
from peft import PeftModel
model = PeftModel.from_pretrained(base_model, {str(options.out)!r})"""
