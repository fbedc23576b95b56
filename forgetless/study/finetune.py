"""One model, one method, your examples: train, save, and say how to load the result."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import math
import os
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

import forgetless as fl

from ..cli.console import Ui
from . import processes
from . import results as book
from .checkpoints import Checkpoints
from .config import CONFIG, differing, essential, write_config
from .data import Collator, Domain, load_domain
from .encoding import CHAT, IGNORED, Encoded, encode_domain, encode_for_training, template_for
from .evaluate import facts, nll
from .extras import Extras
from .machine import machine, versions
from .models import load_model
from .options import (
    DTYPES,
    FACTS,
    BadInput,
    FinetuneOptions,
    check_dtype,
    check_numbers,
    positive,
)
from .plans import Plan, parse_method
from .samples import answers, before_and_after
from .session import calibrates, check_distinct, check_fit, checksum, needs_calibration, source_rows, take_tokens
from .tables import Table, figure
from .train import DIVERGED, FINISHED, INTERRUPTED, TrainConfig, train, trainable

LOG = "training.json"
#: A folder in the output folder, from the first step until the run has ended: it has the checkpoints.
UNFINISHED = ".unfinished"
#: What --report may say, and the packages of which one is needed.
REPORTS = {"none": (), "tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",)}
#: Of each text that is measured: enough to see the loss change; it is not a benchmark.
EVAL_TOKENS = 4096
#: Nats per token of a kept text from which a run says what to try.
NOTICEABLE = 0.02


@dataclass
class Work:
    """All inputs, loaded and checked."""

    plan: Plan
    domain: Domain
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: Encoded
    measured: dict[str, Encoded]  # the task's held-out part, and the texts to keep, by their names
    facts: bool
    steps: int
    template: str
    checkpoints: Checkpoints


def check(options: FinetuneOptions) -> Plan:
    """Everything that can be refused without loading anything."""
    check_numbers(options, "steps", "batch_size", "accumulate", "rank", "calibration", "save_every")
    check_numbers(options, "max_length", least=2)
    if options.batch_size % processes.count():
        raise BadInput(f"--batch-size {options.batch_size} cannot be divided over {processes.count()} processes")
    check_numbers(options, "seed", "weight", least=0)
    positive({"lr": options.lr, "epochs": options.epochs, "alpha": options.alpha})
    check_dtype(options.dtype)
    check_report(options.report)
    plan = parse_method(options.method, lr=options.lr, rank=options.rank, alpha=options.alpha, weight=options.weight)
    if plan.full or not plan.extras.to_json().keys() <= set(Extras.AFTERWARDS):
        raise BadInput(
            f"{plan.label}: finetune trains one adapter; full and all parts but retain, scaled and budget are rows of "
            "compare"
        )
    if not options.overwrite and not options.dry_run:
        check_out(options)
    return plan


def check_report(name: str) -> None:
    """Refuse an unknown ``--report``, or one whose package is missing."""
    if name not in REPORTS:
        raise BadInput(f"--report must be one of {', '.join(REPORTS)}, got {name!r}")
    if REPORTS[name] and not any(importlib.util.find_spec(package) for package in REPORTS[name]):
        raise BadInput(f"--report {name}: {name} is not installed; install with: pip install {name}")


def check_out(options: FinetuneOptions) -> None:
    """Refuse a folder with a finished adapter, or with a stopped run of other options."""
    if (options.out / UNFINISHED).exists():
        others = differing(options.out / CONFIG, options)
        if others:
            raise BadInput(
                f"{options.out} holds an unfinished run with another {', '.join(others)}; give --overwrite, another "
                "--out, or the same options to go on with it"
            )
    elif (options.out / "adapter_config.json").exists():
        raise BadInput(f"{options.out} holds an adapter already; give --overwrite or another --out")


def prepare(options: FinetuneOptions) -> Work:
    """Everything that can go wrong before training goes wrong here."""
    plan = check(options)
    if not options.dry_run:
        book.writable(options.out)
    domain = load_domain(options.data)
    needed = calibrates(plan) or plan.extras.needs_source
    source_texts = [load_domain(spec) for spec in options.source] if needed else []
    if needed and not source_texts:
        raise BadInput(f"{plan.label} measures text to keep: give --source")
    kept = [load_domain(spec) for spec in options.keep if spec != FACTS]
    check_distinct([domain.name, *(text.name for text in kept)], "named twice among the data and what to keep")
    model, tokenizer = load_model(options.model, DTYPES[options.dtype], options.device, options.load_in_4bit)
    template = template_for(options.template, tokenizer)
    encoded = encode_for_training(domain.train, tokenizer, options.max_length, template)
    source = source_rows(source_texts, tokenizer, options.calibration, min(options.max_length, 256))
    check_fit(model, [plan], options.targets)
    per_step = options.batch_size * options.accumulate
    steps = options.steps or max(1, math.ceil(options.epochs * len(encoded) / per_step))
    measured = {
        text.name: take_tokens(encode_domain(text.held_out, tokenizer, options.max_length, template), EVAL_TOKENS)
        for text in (domain, *kept)
    }
    origin = [essential(options), encoded, source, checksum(model), processes.count()]
    mark = hashlib.sha256(json.dumps(origin).encode()).hexdigest()
    checkpoints = Checkpoints(options.out / UNFINISHED, options.save_every, mark)
    checkpoints.start(options.overwrite or options.dry_run)
    return Work(plan, domain, model, tokenizer, source, measured, FACTS in options.keep, steps, template, checkpoints)


def finetune(options: FinetuneOptions, ui: Ui) -> tuple[str, str]:
    """Train and save; returns how it ended and what to tell the user about it.

    Several processes (torchrun) divide each batch, so that the run is that of one; the first of them writes.
    """
    work = prepare(options)
    model, tokenizer, plan = work.model, work.tokenizer, work.plan
    if any(example.prompt for example in work.domain.train):
        way = "through the chat template of the tokenizer" if work.template == CHAT else "as they are, no chat template"
        ui.say(f"prompts and completions: {way}")
    set_seed(options.seed)
    try:
        fl.adapt(model, plan.seeded(options.seed), targets=options.targets)
    except ValueError as error:
        raise BadInput(f"{plan.label}: {error}") from None
    config = TrainConfig.of(options, work.steps, plan.lr, options.seed)
    config = dataclasses.replace(config, template=work.template)
    if options.dry_run:
        return FINISHED, shown_plan(work, config)
    collate = Collator(tokenizer)
    if needs_calibration(model):
        ui.say(f"calibrating on {len(work.source)} sequences of {', '.join(options.source)}")
        fl.calibrate(model, collate.batches(work.source))
    before, asked = measure(work, collate), work.measured[work.domain.name]
    samples = {"before": answers(model, tokenizer, asked)}
    checkpoints = work.checkpoints
    if processes.number() == 0:
        write_config(options.out / CONFIG, options)
        checkpoints.folder.mkdir(exist_ok=True)
    if checkpoints.begun is not None:
        ui.say(f"going on from {checkpoints.begun.name} of {work.steps}")
    if options.report == "tensorboard":  # else beside the checkpoints, which are deleted
        os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(options.out / "tensorboard"))
    with processes.stopping_together() as stop:
        with ui.training(f"{plan.label}: {work.domain.name}", work.steps) as on_step:
            result = train(model, tokenizer, work.domain.train, config, on_step, stop, checkpoints)
        if result.stopped != INTERRUPTED:
            weaken(work, config, options, ui)
        if processes.number() == 0:
            fl.save(model, options.out)
        log: dict[str, Any] = {
            "created": book.now(),
            "versions": versions(),
            "machine": machine(next(model.parameters()).device),
            "processes": processes.count(),
            "settings": plan.settings,
            "config": dataclasses.asdict(config),
            "before": before,
            **dataclasses.asdict(result),
        }
        told = f"adapter saved in {options.out}"
        if result.stopped == INTERRUPTED:
            told = f"{result.note}; {told}; the same command goes on after step {checkpoints.step}"
        else:
            log["after"] = after = measure(work, collate)
            log["samples"] = samples | {"after": answers(model, tokenizer, asked)}
            ui.table(changes(before, after))
            ui.say(f"held-out answers:\n{before_and_after(**log['samples'])}")
            name = work.domain.name
            learnt = f"held-out loss {before[name]:.3f} -> {after[name]:.3f} nats per token"
            told = f"{result.note}; {told}" if result.stopped == DIVERGED else f"{learnt}; {told}"
            told += advice(name, before, after)
        if processes.number() == 0:
            book.dump(options.out / LOG, log)
            if result.stopped != INTERRUPTED:
                checkpoints.end()
        return result.stopped, told


def weaken(work: Work, config: TrainConfig, options: FinetuneOptions, ui: Ui) -> None:
    """What the method does to the finished update: ``fl.retain``, then its scale."""
    model, extras, collate = work.model, work.plan.extras, Collator(work.tokenizer)
    if extras.retain:
        ui.say(f"turning the update away from {', '.join(options.source)}: fl.retain, weight {extras.retain:g}")
        rows = encode_for_training(work.domain.train, work.tokenizer, config.max_length, work.template)
        fl.retain(model, collate.batches(rows[: options.calibration]), extras.retain)
    factor = extras.scaled or 1.0
    if extras.budget:  # 0 would leave nothing of it
        factor = max(fl.fit_budget(model, collate.batches(work.source), extras.budget), 1 / 32)
    if factor != 1:
        ui.say(f"scaling the update by {factor:g}")
        fl.scaled(model, factor)


def shown_plan(work: Work, config: TrainConfig) -> str:
    """What a run would do, for ``--dry-run``."""
    trained = sum(p.numel() for p in trainable(work.model))
    example = encode_for_training(work.domain.train[:1], work.tokenizer, config.max_length, work.template)[0]
    learnt = [label for label in example["labels"] if label != IGNORED]
    return "\n".join([
        f"{work.plan.label} on {len(fl.adapters(work.model))} layers: {trained:,} trained numbers",
        f"{len(work.domain.train)} examples to train on, {len(work.domain.held_out)} held out",
        f"{config.steps} steps of {config.batch_size * config.accumulate} examples, learning rate {config.lr:g}",
        f"measured before and after: {', '.join([*work.measured, *(['facts'] if work.facts else [])])}",
        f"the first example:\n{work.tokenizer.decode(example['input_ids'])}",
        f"of which is learnt:\n{work.tokenizer.decode(learnt)}",
        "nothing was written",
    ])  # fmt: skip


def measure(work: Work, collate: Collator) -> dict[str, float]:
    """Nats per token on the task's held-out part and each text to keep, and the share of the facts that are right."""
    values = {name: nll(work.model, encoded, collate).loss for name, encoded in work.measured.items()}
    if work.facts:
        right, asked = facts(work.model, work.tokenizer)
        values[FACTS] = right / asked
    return values


def changes(before: dict[str, float], after: dict[str, float]) -> Table:
    """What was learnt and what was forgotten, in the units of ``measure``."""
    rows = []
    for index, (name, value) in enumerate(before.items()):
        if name == FACTS:
            rows.append([name, f"{value:.0%}", f"{after[name]:.0%}", f"{100 * (after[name] - value):+.0f} points"])
        else:
            title = f"{name} (task)" if index == 0 else name
            rows.append([title, figure(value, 3), figure(after[name], 3), f"{after[name] - value:+.3f}"])
    return Table(["nats per token", "before", "after", "change"], rows)


def advice(task: str, before: dict[str, float], after: dict[str, float]) -> str:
    """What to try where kept text has become less likely by more than ``NOTICEABLE``; else nothing."""
    rises = {name: after[name] - before[name] for name in before if name not in (task, FACTS)}
    worst = max(rises, key=lambda name: rises[name], default=None)
    if worst is None or rises[worst] <= NOTICEABLE:
        return ""
    return (
        f"\n{worst} has become {rises[worst]:.3f} nats per token less likely. To keep more: --method lora+retain=0.3 "
        f"with --source {worst} (the update is turned away from that text), a larger weight of it, or a lower --lr."
    )


def how_to_load(options: FinetuneOptions) -> str:
    """A few lines of Python that load what was saved, runnable as they are."""
    packed = ", load_in_4bit=True" if options.load_in_4bit else ""
    text = f"""import torch
import forgetless as fl
from forgetless.study.models import load_model

model, tokenizer = load_model({options.model!r}, torch.{options.dtype}{packed})
fl.load(model, {str(options.out)!r})"""
    if options.method.lower().startswith("curlora"):
        return text
    return f"""{text}

# or with PEFT, without forgetless.load:
from peft import PeftModel
base, tokenizer = load_model({options.model!r}, torch.{options.dtype}{packed})
model = PeftModel.from_pretrained(base, {str(options.out)!r})"""
