"""Timing and result files that all benchmarks share.

A result file holds where its numbers come from and a flat list of rows::

    {"schema": 3, "kind": "step", "created": .., "command": .., "commit": .., "machine": {..}, "versions": {..},
     "smoke": false, "notes": [..], "cases": {name: {..}},
     "rows": [{"case": .., "provider": .., "phase": .., "metric": .., "value": .., "unit": ..}, ..]}

A time is the median of its rounds: such a row also has "low" (minimum), "spread" (median absolute deviation), "count"
and "rounds" (every round in seconds; empty if there are more than ``MOST_ROUNDS``). Ratios are not stored: ``report``
computes them from the rows. The JSON that pytest-benchmark writes here has the same fields beside its own.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
#: Committed results lie beside this file; outside of a source checkout, in the current folder.
RESULTS = HERE / "results" if (ROOT / "pyproject.toml").exists() else Path("bench-results")
SCHEMA = 3
#: Providers that every bench has.
OURS, FROZEN, PEFT = "forgetless", "frozen", "PEFT"
#: A time budget does not end a comparison before this many rounds; a row lists no more than so many.
MIN_ROUNDS, MOST_ROUNDS = 3, 1000
#: Options that several benchmarks have: sequences and tokens, dropout, another commit.
BATCH, DROPOUT = (4, 128), [0.0, 0.1]
AGAINST = {"metavar": "COMMIT", "help": "measure that commit of the library too"}


class BadInput(ValueError):
    """An option or a file that cannot be used; the command line says it in one line."""


Row = dict[str, Any]
Results = dict[str, Any]
Run = Callable[[], Any]


#: One callable, several that are timed one by one (forward, backward), or an object whose ``times()`` is a call, in
#: seconds of each part.
Provider = Any


# ----------------------------------------------------------------------------------------- timing


class Clock:
    """Seconds of each part of one call. On CUDA between events on the stream, after a write that empties the L2 cache,
    in an NVTX range of the provider's name; else by the host's clock."""

    def __init__(self, device: torch.device | str = "cpu"):
        self.buffer: torch.Tensor | None = None
        if torch.device(device).type == "cuda":
            size = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)
            self.buffer = torch.empty(max(2 * size, 64 << 20), dtype=torch.uint8, device=device)

    def times(self, name: str, runs: Sequence[Run]) -> list[float]:
        if self.buffer is not None:
            self.buffer.zero_()
            return cuda_times(name, runs)
        marks = [time.perf_counter()]
        for run in runs:
            run()
            marks.append(time.perf_counter())
        return [b - a for a, b in zip(marks, marks[1:], strict=False)]


def cuda_times(name: str, runs: Sequence[Run]) -> list[float]:
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(len(runs) + 1)]
    with torch.cuda.nvtx.range(name):
        marks[0].record()
        for run, mark in zip(runs, marks[1:], strict=True):
            run()
            mark.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) * 1e-3 for a, b in zip(marks, marks[1:], strict=False)]


def interleave(
    providers: Mapping[str, Provider],
    rounds: int,
    warmup: int = 1,
    device: torch.device | str = "cpu",
    seconds: float | None = None,
) -> dict[str, list[list[float]]]:
    """Seconds per call of each provider, one call of each per round: a machine that is slow is slow for all of them.

    Every round has its own order, the same in every run: a provider finds caches and the allocator as its predecessor
    left them, and a fixed order would always give it the same one. Python's garbage collector is off meanwhile.

    Args:
        rounds: at most so many, after ``warmup`` rounds that are not counted.
        seconds: stop after this time, but not before ``MIN_ROUNDS`` rounds.

    Returns:
        name -> for each part its rounds: ``{"a": [[round, ..]], "b": [[forward, ..], [backward, ..]]}``.
    """
    clock = Clock(device)
    times: dict[str, list[list[float]]] = {name: [] for name in providers}
    order = [(name, [run] if callable(run) else run) for name, run in providers.items()]
    shuffle, enabled = random.Random(0).shuffle, gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for index in range(-warmup, rounds):
            if index in (-warmup, 0):
                begin = time.perf_counter()
            shuffle(order)
            for name, runs in order:
                one = clock.times(name, runs) if isinstance(runs, Sequence) else runs.times()
                if index >= 0:
                    times[name].append(one)
            late = seconds is not None and time.perf_counter() - begin > seconds
            if late and index + 1 >= min(MIN_ROUNDS, rounds):
                break
    finally:
        if enabled:
            gc.enable()
    return {name: [list(column) for column in zip(*each, strict=True)] for name, each in times.items()}


@contextmanager
def one_thread(results: Results) -> Iterator[None]:
    """Within the block, torch computes on one thread, and the results say so."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    results["machine"]["threads"] = 1
    try:
        yield
    finally:
        torch.set_num_threads(threads)


# ------------------------------------------------------------------------------------------- rows


def row(case: str, provider: str, phase: str, metric: str, value: float | None, unit: str, **more: Any) -> Row:
    return {
        "case": case, "provider": provider, "phase": phase, "metric": metric, "value": value, "unit": unit, **more,
    }  # fmt: skip


def size_rows(case: str, provider: str, phase: str, sizes: Mapping[str, float | None]) -> list[Row]:
    """Bytes by name; those that the system has no count of are left out."""
    return [row(case, provider, phase, name, size, "B") for name, size in sizes.items() if size is not None]


def time_row(case: str, provider: str, phase: str, rounds: Sequence[float], metric: str = "time") -> Row:
    """The median of the rounds, in seconds."""
    middle, spread = median_and_spread(rounds)
    kept = [float(f"{value:.4g}") for value in rounds] if len(rounds) <= MOST_ROUNDS else []
    more = {"low": min(rounds), "spread": spread, "count": len(rounds), "rounds": kept}
    return row(case, provider, phase, metric, middle, "s", **more)


def time_rows(
    case: str, times: Mapping[str, list[list[float]]], phases: Sequence[str], metric: str = "time"
) -> list[Row]:
    """A row for each provider and phase; for several parts also "both", their sum in every round."""
    rows = []
    for provider, parts in times.items():
        sums = [[sum(part) for part in zip(*parts, strict=True)]] if len(parts) > 1 else []
        named = zip([*phases, "both"][: len(parts + sums)], parts + sums, strict=True)
        rows += [time_row(case, provider, phase, part, metric) for phase, part in named]
    return rows


def select(results: Results, **fields: str) -> list[Row]:
    """The rows with these values of case, provider, phase or metric."""
    return [one for one in results["rows"] if all(one[key] == value for key, value in fields.items())]


def median_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """The median, and the median absolute deviation from it."""
    middle = statistics.median(values)
    return middle, statistics.median(abs(value - middle) for value in values)


def overhead(ours: Row, theirs: Row, floor: Row) -> tuple[float, float] | None:
    """Our part of their overhead and its spread, from three time rows of one ``interleave``.

    The share is taken within every round and the median over the rounds is returned: a machine that is slow for a
    while is slow for a whole round. Rounds in which theirs is not above the floor are left out. None where these are
    half of all or more, and where the difference between theirs and the floor is smaller than its spread.
    """
    rounds = list(zip(ours["rounds"], theirs["rounds"], floor["rounds"], strict=True))
    difference, noise = median_and_spread([their - least for _, their, least in rounds])
    values = [(our - least) / (their - least) for our, their, least in rounds if their > least]
    return None if 2 * len(values) <= len(rounds) or difference < noise else median_and_spread(values)


# --------------------------------------------------------------------------------- options, output


class Parser(argparse.ArgumentParser):
    """Refuses a wrong argument in one line, with exit code 2."""

    def error(self, message: str) -> NoReturn:
        print(f"error: {self.prog}: {' '.join(message.split())}", file=sys.stderr)
        raise SystemExit(2)


def parse(doc: str | None, kind: str, arguments: Sequence[str] | None, **options: Any) -> argparse.Namespace:
    """A benchmark's options by name, each with its default, which says the type, or with what argparse is given."""
    made = Parser(
        prog=f"forgetless bench {kind}", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in options.items():
        several, settings = isinstance(default, (list, tuple)), default
        if default is False:
            settings = {"action": "store_true"}
        elif not isinstance(default, Mapping):
            settings = {"type": type(default[0] if several else default), "default": default}
            settings["help"] = f"default {' '.join(map(str, default)) if several else default}"
            if several:
                settings["nargs"] = "+" if isinstance(default, list) else len(default)
        made.add_argument(("--" if name[1:] else "-") + name.replace("_", "-"), **settings)
    return made.parse_args(arguments)


def begin(
    doc: str | None, kind: str, arguments: Sequence[str] | None, rounds: int, smoke: Any = (), **options: Any
) -> tuple[argparse.Namespace, torch.device, Results]:
    """The options, the device and a result without rows; a smoke run has two rounds and the options in ``smoke``."""
    shared: dict[str, Any] = {
        "rounds": rounds,
        "seconds": {"type": float, "help": "stop a comparison after so long, but not before 3 rounds"},
        "smoke": {"action": "store_true", "help": "tiny sizes: shows that it runs, measures nothing"},
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "out": {"type": Path, "help": "folder, or .json file; default bench/results (--smoke: nowhere)"},
    }
    chosen = parse(doc, kind, arguments, **shared, **options)
    if chosen.smoke:
        vars(chosen).update(smoke, rounds=2)
    torch.manual_seed(0)
    return chosen, torch.device(chosen.device), start(kind, arguments, chosen.device, chosen.smoke)


def start(kind: str, arguments: Sequence[str] | None, device: str = "cpu", smoke: bool = False) -> Results:
    """A result without rows."""
    from forgetless.study import machine  # here: a worker imports this module before another library

    given = list(sys.argv[1:] if arguments is None else arguments)
    results: Results = {
        "schema": SCHEMA,
        "kind": kind,
        "created": time.strftime("%Y-%m-%d"),
        "command": shlex.join(["python", "-m", "bench", kind, *without_out(given)]),
        "commit": machine.commit(),
        "machine": machine.machine(torch.device(device)),
        "versions": machine.versions(("torch", "triton", "transformers", "peft", "numpy")),
        "smoke": smoke,
        "notes": [],
        "cases": {},
        "rows": [],
    }
    if torch.device(device).type == "cuda":
        results["machine"]["clocks_before"] = clocks()
    return results


def without_out(arguments: Sequence[str]) -> list[str]:
    """Without ``--out``: a published command names no folder of somebody's machine."""
    text = "\0".join(arguments)
    return [word for word in re.sub(r"(^|\0)--out(=[^\0]*|\0[^\0]*|$)", "", text).split("\0") if word]


def clocks() -> str | None:
    """Clocks, power and temperature of the GPU as its driver reports them now, or None."""
    fields = "clocks.sm,clocks.max.sm,clocks.mem,power.draw,temperature.gpu,clocks_throttle_reasons.active"
    run = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv"]
    try:
        return subprocess.run(run, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def finish(results: Results, options: argparse.Namespace) -> Results:
    """Print the tables and the notes, and write the file."""
    from .tables import section

    if torch.device(options.device).type == "cuda":
        results["machine"]["clocks_after"] = clocks()
    print(section(results))
    path = save(results, options)
    print("smoke run: nothing is written, nothing was measured" if path is None else f"written to {path}")
    return results


def save(results: Results, options: argparse.Namespace) -> Path | None:
    """Write the file, also of a run that is not at its end; a smoke run without ``--out`` has none."""
    if options.out is None and options.smoke:
        return None
    out = options.out or RESULTS
    path = out if out.suffix == ".json" else out / f"{results['kind']}-{tag(torch.device(options.device))}.json"
    write_json(path, results)
    return path


def tag(device: torch.device) -> str:
    """The end of a result file's name: "cpu", or the GPU's name."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def read(path: Path) -> Results:
    """A result file.

    Raises:
        BadInput: it is of a smoke run, or has another schema.
    """
    data = json.loads(path.read_text(encoding="utf-8"))
    if data.get("smoke"):
        raise BadInput(f"{path.name} is of a smoke run, which measures nothing: remove it")
    if data.get("schema") != SCHEMA:
        raise BadInput(f"{path.name} has schema {data.get('schema')}, this version reads {SCHEMA}")
    return data


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write through a temporary file, then rename; a row takes one line.

    Raises:
        ValueError: a number is NaN or infinite.
    """
    from forgetless.files import write_atomically

    head = json.dumps({key: value for key, value in data.items() if key != "rows"}, indent=1, allow_nan=False)
    rows = ",\n".join("  " + json.dumps(one, allow_nan=False) for one in data["rows"])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, f'{head[:-2]},\n "rows": [\n{rows}\n ]\n}}\n')
