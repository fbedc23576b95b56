"""The main job: teach one base model new tasks with each method, and measure what each made it forget.

One adapter goes through all tasks in a row, as in real use; after each task everything is evaluated. Between
methods the base is put back and proved to be the same, bit by bit. A finished (method, seed) row is a JSON file under
``rows/`` of the output folder: a run that was killed goes on after the last one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import statistics
import time
from pathlib import Path
from typing import Any

from transformers import set_seed

import forgetless as fl

from . import results as book
from .console import Ui
from .data import Collator
from .evaluate import facts, nll
from .machine import commit
from .models import describe
from .options import Plan
from .session import CompareOptions, Session, checksum, needs_calibration, prepare
from .train import DIVERGED, FINISHED, INTERRUPTED, TrainConfig, mean_drift, train, trainable


class Stopped(Exception):
    """Ctrl-C: what is finished is written; the message says what was kept."""


def evaluate(session: Session, adapted: bool) -> dict[str, Any]:
    """Losses of everything held out, fact probes, and the drift on each kept text."""
    collate = Collator(session.tokenizer)
    losses: dict[str, float] = {}
    drift: dict[str, float] = {}
    for domain in session.tasks + session.kept:
        losses[domain.name] = nll(session.model, session.held_out[domain.name], collate).loss
        if adapted and domain in session.kept:
            drift[domain.name] = mean_drift(session.model)
    found: dict[str, Any] = {"losses": losses, "drift": drift}
    if adapted:
        found["drift_layers"] = fl.drift(session.model)
    if session.facts:
        found["facts"] = list(facts(session.model, session.tokenizer))
    return found


def fingerprint(session: Session, plan: Plan | None, seed: int | None) -> str:
    """What decides a row's numbers: code, machine, the model's bits, the texts, the settings; not the other rows."""
    options = session.options
    names = ["steps", "batch_size", "accumulate", "max_length", "dtype"]
    texts = {
        "tasks": [[dataclasses.astuple(e) for e in task.train] for task in session.tasks],
        "held_out": session.held_out,
        "source": session.source,
        "facts": session.facts,
    }
    about: dict[str, Any] = {
        "schema": book.SCHEMA,
        "versions": book.versions(),
        "commit": (commit() or "").rstrip("+"),
        "machine": book.machine(session.device),
        "model": session.checksum,
        "texts": hashlib.sha256(json.dumps(texts).encode()).hexdigest(),
    }
    if plan is not None:
        about |= {"plan": plan.settings, "seed": seed, "targets": options.targets}
        about |= {name: getattr(options, name) for name in names}
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]


def stored_row(session: Session, name: str, mark: str) -> tuple[Path, dict[str, Any] | None]:
    """Where a row is kept, and the row itself if an earlier run finished it under the same fingerprint."""
    path = session.options.out / "rows" / f"{name}-{mark}.json"
    if session.options.fresh or not path.is_file():
        return path, None
    try:
        row = json.loads(path.read_text())
    except (OSError, ValueError):
        return path, None
    return path, row if isinstance(row, dict) and row.get("fingerprint") == mark else None


def slug(label: str) -> str:
    """A file name out of a label."""
    return re.sub(r"[^a-z0-9.]+", "-", label.lower()).strip("-")


def run_row(session: Session, plan: Plan, seed: int, row: dict[str, Any], ui: Ui) -> None:
    """Adapt, calibrate, learn every task in a row and evaluate after each; fills ``row`` as it goes."""
    options, model = session.options, session.model
    started = time.perf_counter()
    set_seed(seed)
    method = plan.seeded(seed)
    row |= {"label": plan.label, "seed": seed, "settings": plan.settings, "stages": [], "tasks": []}
    fl.adapt(model, method, targets=options.targets)
    row["trainable"] = sum(p.numel() for p in trainable(model))
    if needs_calibration(model):
        began = time.perf_counter()
        collate = Collator(session.tokenizer)
        rows = session.source
        fl.calibrate(model, [collate(rows[i : i + 4]) for i in range(0, len(rows), 4)])
        row["calibrate_seconds"] = time.perf_counter() - began
    config = TrainConfig(
        steps=options.steps,
        batch_size=options.batch_size,
        accumulate=options.accumulate,
        lr=plan.lr,
        max_length=options.max_length,
        seed=seed,
    )
    for task in session.tasks:
        with ui.training(f"{plan.label}, seed {seed}: {task.name}", options.steps) as on_step:
            result = train(model, session.tokenizer, task.train, config, on_step)
        row["tasks"].append({"task": task.name, **dataclasses.asdict(result)})
        if result.stopped == INTERRUPTED:
            raise KeyboardInterrupt
        row["stages"].append({"after": task.name, **evaluate(session, adapted=True)})
        if result.stopped != FINISHED:
            break
    row["stopped"] = row["tasks"][-1]["stopped"]
    row["seconds_per_step"] = statistics.median(t["seconds_per_step"] for t in row["tasks"])
    row["peak_mib"] = max(t["peak_mib"] for t in row["tasks"])
    row["seconds"] = time.perf_counter() - started
    row["drift"] = _mean(row["stages"][-1]["drift"])
    book.derive(row, session.results["base"], *session.names)


def _mean(values: dict[str, float]) -> float | None:
    return statistics.fmean(values.values()) if values else None


def put_back(session: Session, label: str) -> None:
    """Take the adapters off and prove that the base is what it was."""
    fl.remove(session.model)
    if checksum(session.model) != session.checksum:
        raise RuntimeError(f"the base model was changed by {label}: later rows would mean nothing")


def base_row(session: Session, ui: Ui) -> dict[str, Any]:
    """The untouched model, evaluated once."""
    mark = fingerprint(session, None, None)
    path, row = stored_row(session, "base", mark)
    if row is None:
        ui.say("base: evaluating")
        row = {"fingerprint": mark, "label": "base", **evaluate(session, adapted=False)}
        path.parent.mkdir(exist_ok=True)
        book.dump(path, row)
    return row


def open_book(session: Session) -> dict[str, Any]:
    """results.json without its rows."""
    options = dataclasses.asdict(session.options)
    del options["out"], options["command"], options["fresh"]
    roles = [("task", d) for d in session.tasks] + [("kept", d) for d in session.kept]
    return {
        "kind": book.KIND,
        "schema": book.SCHEMA,
        "created": book.now(),
        "command": session.options.command,
        "commit": commit(),
        "machine": book.machine(session.device),
        "versions": book.versions(),
        "options": options,
        "model": {**describe(session.model), "checksum": session.checksum},
        "domains": [
            {
                "name": domain.name,
                "role": role,
                "title": domain.title,
                "train": len(domain.train),
                "held_out": len(session.held_out[domain.name]),
                "source": domain.source,
                "licence": domain.licence,
            }
            for role, domain in roles
        ],
        "complete": False,
        "stopped": None,
        "base": {},
        "rows": [],
    }


def compare(options: CompareOptions, ui: Ui) -> dict[str, Any]:
    """Run what is not yet done, writing results.json after every row.

    Raises:
        BadInput, DataError, ModelError, MissingPackage: before any work.
        Stopped: on Ctrl-C; finished rows, the unfinished one and its adapter are written.
    """
    session = prepare(options)
    session.results = found = open_book(session)
    ui.say(f"{found['model']['name']}: {found['model']['parameters']:,} parameters, {options.dtype}")
    path = options.out / book.FILE
    row: dict[str, Any] = {}
    try:
        found["base"] = base_row(session, ui)
        for seed in options.seeds:
            for plan in session.plans:
                mark = fingerprint(session, plan, seed)
                where, known = stored_row(session, f"{slug(plan.label)}-seed{seed}", mark)
                if known is not None:
                    ui.say(f"{plan.label}, seed {seed}: finished earlier, reused")
                    found["rows"].append(known)
                    continue
                row = {"fingerprint": mark}
                run_row(session, plan, seed, row, ui)
                if row["stopped"] == DIVERGED:
                    keep_adapter(session, row, ui)
                put_back(session, plan.label)
                row = book.plain(row)
                book.dump(where, row)
                found["rows"].append(row)
                book.dump(path, found)
                ui.say(told(row))
                row = {}
        found["complete"] = True
        book.dump(path, found)
    except KeyboardInterrupt:
        found["stopped"] = INTERRUPTED
        kept = "nothing was in training"
        if fl.adapters(session.model):
            found["unfinished"] = row
            kept = keep_adapter(session, row, ui)
        book.dump(path, found)
        raise Stopped(
            f"interrupted: {len(found['rows'])} finished rows are in {path}; {kept}; the same command goes on from here"
        ) from None
    return found


def keep_adapter(session: Session, row: dict[str, Any], ui: Ui) -> str:
    """Save the adapter of a row that was stopped; says where."""
    folder = session.options.out / "stopped" / f"{slug(row['label'])}-seed{row['seed']}"
    fl.save(session.model, folder)
    row["adapter"] = str(folder.relative_to(session.options.out))
    note = row["tasks"][-1]["note"] if row["tasks"] else "interrupted before training"
    kept = f"{row['label']}, seed {row['seed']}: {note}; adapter saved in {folder}"
    if row.get("stopped") == DIVERGED:
        ui.say(kept)
    return kept


def told(row: dict[str, Any]) -> str:
    """A finished row in one line."""
    learnt = ", ".join(f"{k} {v:+.2f}" for k, v in row["learnt"].items() if v is not None)
    lost = ", ".join(f"{k} {v:+.3f}" for k, v in row["forgotten"].items() if v is not None)
    return f"{row['label']}, seed {row['seed']}: learnt {learnt}; forgot {lost} (nats per token)"
