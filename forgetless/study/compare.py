"""The main job: teach one base model new tasks with each method, and measure what each made it forget.

One adapter goes through all tasks in a row, as in real use; after each task everything is evaluated, with ``evals``
above 1 also on the way. Between runs the base is put back and proved to be the same, bit by bit. A finished run, one
method with one seed, is a JSON file under ``runs/`` of the output folder: a comparison that was killed goes on after
the last one.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from transformers import set_seed

import forgetless as fl

from ..cli.console import Ui
from . import results as book
from .baselines import KL, examples_of, finish, scaling, source_batches, task_batches
from .data import Collator, Domain
from .evaluate import facts, log_probs, nll
from .machine import commit, machine, versions
from .metrics import continual, summary
from .models import describe
from .plans import Plan
from .runs import Store, put_aside, slug
from .samples import answers
from .session import CompareOptions, Session, checksum, needs_calibration, prepare
from .stats import mean
from .train import DIVERGED, FINISHED, INTERRUPTED, Step, TrainConfig, train, trainable


class Stopped(Exception):
    """Ctrl-C: what is finished is written; the message says what was kept."""


def evaluate(session: Session, plan: Plan | None, after: int = -1, midway: bool = False) -> dict[str, Any]:
    """Losses of everything held out, fact probes, and the drift on each kept text.

    Midway through task number ``after`` only what a curve needs: that task, the earlier ones and the kept texts.
    """
    model, collate = session.model, Collator(session.tokenizer)
    domains = (session.tasks[: after + 1] if midway else session.tasks) + session.kept
    matches: dict[str, Any] = {"losses": {}, "accuracies": {}, "drift": {}, "divergence": {}}
    layers: dict[str, float] = {}
    watched = session.original.watching() if plan is not None and plan.full and session.original else nullcontext()
    with watched:
        for domain in domains:
            score = nll(model, session.held_out[domain.name], collate, reference=session.reference.get(domain.name))
            matches["losses"][domain.name] = score.loss
            matches["accuracies"][domain.name] = score.accuracy
            if score.divergence is not None:
                matches["divergence"][domain.name] = score.divergence
            if plan is not None and domain in session.kept:
                layers = drift(session, plan)
                if layers:
                    matches["drift"][domain.name] = statistics.fmean(layers.values())
    if midway:
        return matches
    if plan is not None:
        matches["drift_layers"] = layers or drift(session, plan)
    if session.facts:
        matches["facts"] = list(facts(model, session.tokenizer))
    return matches


def samples(session: Session) -> dict[str, list[dict[str, str]]]:
    """Answers to a few held-out prompts of each task."""
    held_out = {task.name: session.held_out[task.name] for task in session.tasks}
    return {name: answers(session.model, session.tokenizer, rows) for name, rows in held_out.items()}


def drift(session: Session, plan: Plan) -> dict[str, float]:
    """Per layer the relative change of the output since the untouched base, on the last text that was read."""
    if plan.alters and session.original is not None:
        return session.original.drift(fl.adapters(session.model))
    return fl.drift(session.model)


def run_row(session: Session, plan: Plan, seed: int, row: dict[str, Any], ui: Ui) -> None:
    """Adapt, calibrate, learn every task in a row and evaluate on the way; fills ``row`` as it goes."""
    options, model = session.options, session.model
    started = time.perf_counter()
    set_seed(seed)
    row |= {"label": plan.label, "seed": seed, "settings": plan.settings, "family": plan.family}
    row |= {"stages": [], "points": [], "tasks": [], "extra_forwards": 0}
    if plan.full:
        model.requires_grad_(True)
    else:
        fl.adapt(model, plan.seeded(seed), targets=options.targets)
    row["trainable"] = sum(p.numel() for p in trainable(model))
    if needs_calibration(model):
        began = time.perf_counter()
        counts = fl.calibrate(model, source_batches(session))
        row["calibrate_seconds"] = time.perf_counter() - began
        row["extra_forwards"] += counts["batches"]
    config = TrainConfig.of(options, options.steps, plan.lr, seed)
    extra = KL(plan.extras.kl, source_batches(session, options.batch_size)) if plan.extras.kl else None
    for i, task in enumerate(session.tasks):
        with ui.training(f"{plan.label}, seed {seed}: {task.name}", options.steps) as on_step:
            watched = watching(session, plan, i, row, on_step)
            result = train(
                model, session.tokenizer, examples_of(session, plan, task, seed, row), config, watched, extra=extra
            )
        row["tasks"].append({"task": task.name, **dataclasses.asdict(result)})
        if result.stopped == INTERRUPTED:
            raise KeyboardInterrupt
        factor = finish(session, plan, task, row) if result.stopped == FINISHED else 1.0
        with scaling(model, factor):
            row["stages"].append({"after": task.name, "factor": factor, **evaluate(session, plan)})
            if task is session.tasks[-1]:
                row["stages"][-1]["samples"] = samples(session)
        if result.stopped != FINISHED:
            break
        if plan.extras.folds and i < len(session.tasks) - 1:
            consolidate(session, task, row, factor)
    row["extra_forwards"] += 2 * extra.calls if extra else 0
    row["stopped"] = row["tasks"][-1]["stopped"]
    row["seconds_per_step"] = statistics.median(t["seconds_per_step"] for t in row["tasks"])
    row["peak_mib"] = max(t["peak_mib"] for t in row["tasks"])
    row["seconds"] = time.perf_counter() - started
    row["drift"] = mean(row["stages"][-1]["drift"].values())
    book.derive(row, session.results["base"], *session.names)
    row["continual"] = continual(row, session.results["base"], session.names[0])


def watching(
    session: Session, plan: Plan, i: int, row: dict[str, Any], on_step: Callable[[Step], None]
) -> Callable[[Step], None]:
    """``on_step`` that also evaluates on the way through task ``i``; the end of the task is evaluated anyway."""
    options = session.options
    due = {round(options.steps * k / options.evals) for k in range(1, options.evals)} - {0, options.steps}

    def stepped(step: Step) -> None:
        on_step(step)
        if step.number in due:
            matches = evaluate(session, plan, i, midway=True)
            row["points"].append({"task": session.tasks[i].name, "step": step.number, **matches})

    return stepped


def consolidate(session: Session, task: Domain, row: dict[str, Any], factor: float) -> None:
    """Fold a learnt task into the base; its own text joins what the penalties protect."""
    began = time.perf_counter()
    expected = task_batches(session, task) if needs_calibration(session.model) else None
    lost = fl.consolidate(session.model, expected, scale=factor).rounding
    row.setdefault("consolidated", []).append(
        {"after": task.name, "rounding": statistics.fmean(lost.values()), "seconds": time.perf_counter() - began}
    )


def put_back(session: Session, plan: Plan) -> None:
    """Take the adapters off and prove that the base is what it was."""
    if fl.adapters(session.model):
        fl.remove(session.model)
    if plan.alters and session.original is not None:
        session.original.restore()
    if checksum(session.model) != session.checksum:
        raise RuntimeError(f"the base model was changed by {plan.label}: later rows would mean nothing")


def base_row(session: Session, store: Store, ui: Ui) -> dict[str, Any]:
    """The untouched model, evaluated once."""
    path, mark, row = store.find(None, None)
    if row is None:
        ui.say("base: evaluating")
        row = {
            "fingerprint": mark,
            "commit": commit(),
            "label": "base",
            **evaluate(session, None),
            "samples": samples(session),
        }
        store.keep(path, row)
    return row


def open_book(session: Session) -> dict[str, Any]:
    """results.json without its rows."""
    options = dataclasses.asdict(session.options)
    for name in ("out", "command", "fresh", "any_commit"):
        del options[name]
    roles = [("task", d) for d in session.tasks] + [("kept", d) for d in session.kept]
    return {
        "kind": book.KIND,
        "schema": book.SCHEMA,
        "created": book.now(),
        "command": session.options.command,
        "commit": commit(),
        "machine": machine(session.model.device),
        "versions": versions(),
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


def schedule(session: Session) -> list[tuple[Plan, int]]:
    """All runs in their order: every method before the next seed, the sweep at the end."""
    options = session.options
    seeds = options.seeds if options.sweep_seeds is None else options.sweep_seeds
    return [(plan, seed) for seed in options.seeds for plan in session.plans] + [
        (plan, seed) for seed in seeds for plan in session.swept
    ]


def compare(options: CompareOptions, ui: Ui) -> dict[str, Any]:
    """Run what is not yet done, writing results.json after every row.

    Raises:
        BadInput: before any work.
        Stopped: on Ctrl-C; finished rows, the unfinished one and its adapter are written.
    """
    session = prepare(options)
    session.results = results = open_book(session)
    ui.say(f"{results['model']['name']}: {results['model']['parameters']:,} parameters, {options.dtype}")
    path = options.out / book.FILE
    put_aside(session, results, ui)
    try:
        run_all(session, path, ui)
    except KeyboardInterrupt:
        results["stopped"] = INTERRUPTED
        kept = "nothing was in training"
        if results.get("unfinished", {}).get("label"):
            kept = keep_adapter(session, results["unfinished"], ui)
        else:
            results.pop("unfinished", None)
        book.dump(path, results)
        done = f"{len(results['rows'])} finished rows are in {path}"
        raise Stopped(f"interrupted: {done}; {kept}; the same command goes on from here") from None
    results["complete"] = True
    results["commits"] = sorted({r["commit"] for r in results["rows"] if r.get("commit")})
    results["summary"] = book.plain(summary(results))
    book.dump(path, results)
    return results


def run_all(session: Session, path: Path, ui: Ui) -> None:
    """Fill ``session.results`` with the base and every row; what is in training is its "unfinished"."""
    results, store = session.results, Store(session)
    runs = [(plan, seed, *store.find(plan, seed)) for plan, seed in schedule(session)]
    results["base"] = base_row(session, store, ui)
    store.tell_others(ui)
    missing = sum(known is None for *_, known in runs)
    seconds: list[float] = []
    for number, (plan, seed, where, mark, known) in enumerate(runs, start=1):
        if known is not None:
            ui.say(f"{plan.label}, seed {seed}: finished earlier, reused")
            results["rows"].append(known)
            continue
        if not session.reference:  # of the base model, whose row may be an earlier run's
            collate = Collator(session.tokenizer)
            session.reference = {
                t.name: log_probs(session.model, session.held_out[t.name], collate) for t in session.tasks
            }
        row = results["unfinished"] = {"fingerprint": mark, "commit": commit()}
        run_row(session, plan, seed, row, ui)
        if row["stopped"] == DIVERGED:
            keep_adapter(session, row, ui)
        put_back(session, plan)
        row = book.plain(results.pop("unfinished"))
        store.keep(where, row)
        results["rows"].append(row)
        book.dump(path, results)
        ui.say(told(row))
        seconds.append(row["seconds"])
        if left := missing - len(seconds):
            time_left = lasting(left * statistics.fmean(seconds))
            ui.say(f"run {number} of {len(runs)} done, about {time_left} left")


def lasting(seconds: float) -> str:
    """A duration in words."""
    if seconds < 90:
        return f"{math.ceil(seconds)} s"
    minutes = math.ceil(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def keep_adapter(session: Session, row: dict[str, Any], ui: Ui) -> str:
    """Save the adapter of a row that was stopped; says where. Full fine-tuning leaves none."""
    note = row["tasks"][-1]["note"] if row["tasks"] else "interrupted before training"
    kept = f"{row['label']}, seed {row['seed']}: {note}"
    if fl.adapters(session.model):
        folder = session.options.out / "stopped" / f"{slug(row['label'])}-seed{row['seed']}"
        fl.save(session.model, folder)
        row["adapter"] = str(folder.relative_to(session.options.out))
        kept += f"; adapter saved in {folder}"
    if row.get("stopped") == DIVERGED:
        ui.say(kept)
    return kept


def told(row: dict[str, Any]) -> str:
    """A finished row in one line."""
    learnt = ", ".join(f"{k} {v:+.2f}" for k, v in row["learnt"].items() if v is not None)
    lost = ", ".join(f"{k} {v:+.3f}" for k, v in row["forgotten"].items() if v is not None)
    return f"{row['label']}, seed {row['seed']}: learnt {learnt}; forgot {lost} (nats per token)"
