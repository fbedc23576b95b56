"""A comparison before any work: what was asked for, checked, with the model and the texts loaded."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import forgetless as fl
from forgetless.layers.frozen import site_of
from forgetless.penalties import PenaltyState
from forgetless.targets import find_layers

from .data import Domain, load_domain
from .encoding import Encoded, encode, encode_domain, encode_for_training
from .evaluate import LogProbs, Original
from .models import load_model
from .options import (
    DTYPES,
    FACTS,
    BadInput,
    CompareOptions,
    at_least,
    check_dtype,
    check_numbers,
    positive,
)
from .plans import Plan, parse_method
from .results import writable
from .train import TrainConfig


@dataclass
class Session:
    """All inputs, loaded and checked."""

    options: CompareOptions
    plans: list[Plan]
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    tasks: list[Domain]
    kept: list[Domain]
    held_out: dict[str, Encoded]
    source: Encoded
    facts: bool
    checksum: str
    swept: list[Plan] = field(default_factory=list)
    original: Original | None = None
    protected: list[Domain] = field(default_factory=list)
    reference: dict[str, LogProbs] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)

    @property
    def names(self) -> tuple[list[str], list[str]]:
        """Of the tasks, and of the kept texts."""
        return [d.name for d in self.tasks], [d.name for d in self.kept]


def check(options: CompareOptions) -> list[Plan]:
    """Everything that can be refused without loading anything."""
    check_numbers(options, "steps", "batch_size", "accumulate", "eval_tokens", "calibration", "rank", "evals")
    check_numbers(options, "max_length", "eval_length", least=2)
    at_least(0, {"weight": options.weight, "seed": min(options.seeds, default=0)})
    positive({"lr": options.lr, "alpha": options.alpha, "sweep": min(options.sweep, default=None)})
    if options.evals > options.steps:
        raise BadInput(f"--evals must be at most --steps, {options.steps}, got {options.evals}")
    check_dtype(options.dtype)
    names = [Path(spec).stem if Path(spec).suffix else spec for spec in options.tasks + options.keep]
    check_distinct(names, "named twice among the tasks and what to keep")
    if not options.tasks:
        raise BadInput("no task to learn: give --task")
    if not options.seeds or len(set(options.seeds)) < len(options.seeds):
        raise BadInput(f"--seed wants different numbers, got {list(options.seeds)}")
    strange = sorted(set(options.sweep_seeds or ()) - set(options.seeds))
    if strange:
        raise BadInput(f"--sweep-seed must be one of --seed, got {strange[0]}")
    unknown = sorted(set(options.sweep_methods or ()) - set(options.methods))
    if unknown:
        raise BadInput(f"--sweep-method must be one of --method, got {unknown[0]}")
    if 1.0 in options.sweep or len(set(options.sweep)) < len(options.sweep):
        raise BadInput(f"--sweep wants different factors other than 1, got {list(options.sweep)}")
    common: Any = {"rank": options.rank, "alpha": options.alpha, "weight": options.weight}
    lr, is_default = (TrainConfig.lr, True) if options.lr is None else (options.lr, False)
    specs = [spec for spec in options.methods if spec != "base"]  # which is always there
    plans = [parse_method(spec, lr=lr, lr_is_default=is_default, **common) for spec in specs]
    check_distinct([plan.label for plan in plans], "asked for twice")
    return plans


def check_distinct(names: Sequence[str], text: str) -> None:
    """Refuse names that occur twice."""
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise BadInput(f"{', '.join(twice)}: {text}")


def sweep(plans: Sequence[Plan], factors: Sequence[float]) -> list[Plan]:
    """The plans with other weights; learning rates are only lowered, for a higher one mostly diverges."""
    return [plan.swept(f) for plan in plans for f in sorted(factors) if plan.weight is not None or f < 1]


def take_tokens(encoded: Encoded, budget: int) -> Encoded:
    """The first rows that together have ``budget`` input tokens, one row at least."""
    taken: Encoded = []
    tokens = 0
    for row in encoded:
        if taken and tokens >= budget:
            break
        taken.append(row)
        tokens += len(row["input_ids"])
    return taken


def fitting(domain: Domain, tokenizer: PreTrainedTokenizerBase, options: CompareOptions) -> Domain:
    """The domain with only those training examples that need no cutting, if they are many enough to learn from."""
    long = max(options.max_length + 1, 2)
    fits = tuple(
        example
        for example in domain.train
        if not example.prompt or len(encode(example, tokenizer, long)["input_ids"]) < long
    )
    enough = 4 * options.batch_size * options.accumulate
    return dataclasses.replace(domain, train=fits) if len(fits) >= enough else domain


def prepare(options: CompareOptions) -> Session:
    """Load and check all inputs: after this, only training can fail."""
    plans = check(options)
    writable(options.out)
    unkept = [plan.label for plan in plans if calibrates(plan) or plan.extras.needs_source]
    named = options.keep if options.source is None else options.source
    if unkept and not set(named) - {FACTS}:
        raise BadInput(f"{', '.join(unkept)}: needs source text, and neither --source nor --keep names any")
    tasks = [load_domain(spec) for spec in options.tasks]
    kept = [load_domain(spec) for spec in options.keep if spec != FACTS]
    model, tokenizer = load_model(options.model, DTYPES[options.dtype], options.device)
    tasks = [fitting(task, tokenizer, options) for task in tasks]
    for task in tasks:
        encode_for_training(task.train, tokenizer, options.max_length)
    held_out = {
        domain.name: take_tokens(
            encode_domain(domain.held_out, tokenizer, max(options.max_length, options.eval_length)), options.eval_tokens
        )
        for domain in tasks + kept
    }
    known = {spec: domain for spec, domain in zip((k for k in options.keep if k != FACTS), kept, strict=True)}
    protected = [known.get(spec) or load_domain(spec) for spec in named if spec != FACTS]
    source = source_rows(protected, tokenizer, options.calibration, options.eval_length // 2)
    check_fit(model, plans, options.targets)
    specs = [spec for spec in options.methods if spec != "base"]
    chosen = specs if options.sweep_methods is None else options.sweep_methods
    swept = [plan for spec, plan in zip(specs, plans, strict=True) if spec in chosen]
    altered = any(plan.alters for plan in plans)
    return Session(
        options,
        plans,
        model,
        tokenizer,
        tasks,
        kept,
        held_out,
        source,
        FACTS in options.keep,
        checksum(model),
        sweep(swept, options.sweep),
        Original(model, options.targets) if altered else None,
        protected,
    )


def source_rows(kept: Sequence[Domain], tokenizer: PreTrainedTokenizerBase, count: int, length: int) -> Encoded:
    """``count`` source-domain sequences to calibrate on: of the training part of each text, in equal shares."""
    rows: Encoded = []
    for i, domain in enumerate(kept):
        share = (count + len(kept) - 1 - i) // len(kept)
        # One window of each passage: many passages say more about a domain than all of a few.
        windows = [encode_domain([example], tokenizer, length)[:1] for example in domain.train[:share]]
        rows += [row for result in windows for row in result]
    return rows


def needs_calibration(model: torch.nn.Module) -> bool:
    """Whether a penalty on the adapted model asks for source-domain statistics."""
    return any(isinstance(m, PenaltyState) and m.statistics for m in model.modules())


def calibrates(plan: Plan) -> bool:
    """Whether the plan's method will want source-domain text; tried on one small layer.

    Raises:
        BadInput: a penalty makes no sense with the method.
    """
    if plan.full:
        return False
    probe = torch.nn.ModuleDict({"layer": torch.nn.Linear(2, 2)})
    small = {"rank": 1} if hasattr(plan.method, "rank") else {}
    try:
        fl.adapt(probe, dataclasses.replace(plan.method, **small), targets=["layer"])
    except ValueError as error:
        raise BadInput(f"{plan.label}: {error}") from None
    return needs_calibration(probe)


def check_fit(model: PreTrainedModel, plans: Sequence[Plan], targets: str | list[str]) -> None:
    """Refuse targets that match nothing, and a rank above the sizes of every layer, before anything is allocated."""
    try:
        layers = find_layers(model, targets)
    except ValueError as error:
        raise BadInput(str(error)) from None
    sizes = {name: site_of(name, layer).weight.shape[-2:] for name, layer in layers.items()}
    widest = max(sizes, key=lambda name: min(sizes[name]))
    for plan in plans:
        rank = getattr(plan.method, "rank", 1)
        if rank > min(sizes[widest]):
            raise BadInput(f"{plan.label}: rank is {rank}, but {widest}, the widest layer, is {tuple(sizes[widest])}")


def checksum(model: torch.nn.Module) -> str:
    """SHA-256 over the bytes of every parameter and persistent buffer, by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
