"""``compare``, ``finetune`` and the other commands of the study: from the options given to files and tables."""

from __future__ import annotations

import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import transformers

from ..study import adapters, processes
from ..study import results as book
from ..study.compare import Stopped
from ..study.compare import compare as run_compare
from ..study.config import read_config
from ..study.finetune import finetune as run_finetune
from ..study.finetune import how_to_load
from ..study.frontier import combined
from ..study.frontier_page import write_page as write_frontiers
from ..study.options import FACTS, BadInput, CompareOptions, FinetuneOptions, at_least, parse_targets
from ..study.page import published, write_page
from ..study.report import write_report
from ..study.tables import further_tables, main_table
from ..study.train import DIVERGED, FINISHED, INTERRUPTED
from .arguments import fail
from .console import Ui

#: Sizes that prove the way works and nothing else.
SMOKE = {"steps": 2, "batch_size": 2, "max_length": 32, "eval_tokens": 64, "eval_length": 32, "calibration": 2}
#: One of the runs that docs/forgetting.md is made from: two tasks in a row, five kinds of knowledge to keep, of which
#: two are calibrated on, and several strengths of the methods that win or are free.
STUDY: dict[str, Any] = {
    "tasks": ("django-fi", "shakespeare"),
    "keep": ("news", "python", "wikipedia", "python-docs", FACTS),
    "source": ("news", "python"),
    "methods": (
        *("lora", "lora+scaled=0.8", "lora+scaled=0.6", "lora+scaled=0.4", "lora:lr=1e-3", "lora+decay"),
        *("lora+retain=0.3", "lora+retain=0.3+scaled=0.8", "lora+retain=0.1+scaled=0.8"),
        *("lora+replay=0.15", "lora+self-replay=0.15", "lora+kl=1", "clora", "lalora"),
        *("source+scaled=0.8:covariance=full,weight=0.01", "source+retain=0.3+scaled=0.8:covariance=full,weight=0.01"),
    ),
    "seeds": (0, 1, 2, 3, 4),
    "steps": 16,
    "max_length": 64,
    "eval_tokens": 512,
}
#: The other one, whose second task is closer to the texts to keep.
STUDY_TOOLS = STUDY | {"tasks": ("django-de", "tool-calls"), "max_length": 96}
PRESETS = {"demo": {}, "study": STUDY, "study-tools": STUDY_TOOLS}
#: What a sweep multiplies weights with unless told otherwise.
FACTORS = (1 / 3, 3.0)


def run(command: str, given: dict[str, Any], line: str) -> int:
    """Run a command; returns the exit code. What a user can cause is one line; anything else shows its traceback.

    Args:
        command: one of ``COMMANDS``.
        given: the options that were given, by the names of the options' fields.
        line: the whole command line, for the report.
    """
    quiet_libraries()
    try:
        with terminating():
            if command == "compare":
                return compare(compare_options(given, line))
            if command == "finetune":
                return finetune(finetune_options(given))
            if command == "report":
                return report(**given)
            if command == "frontier":
                return frontier(**given)
            device = resolve_device(given.pop("device", "auto"))
            return chat(device, **given) if command == "chat" else write(command, device, **given)
    except BadInput as error:
        return fail(str(error))
    except Stopped as error:
        print(error, file=sys.stderr)
    except KeyboardInterrupt:
        print("interrupted; give the same command again", file=sys.stderr)
    return 130


@contextmanager
def terminating() -> Iterator[None]:
    """Take SIGTERM, with which batch systems stop a job, for Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def quiet_libraries() -> None:
    """Only our own lines on the screen."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module=r"(torch|transformers|accelerate)\b")


def resolve_device(name: str) -> str:
    """A device that exists."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise BadInput(f"--device {name}: {str(error).splitlines()[0]}") from None
    return processes.own_device(name)


def compare_options(given: Mapping[str, Any], line: str) -> CompareOptions:
    """The preset, the sizes of ``--smoke`` and what was given, the later winning.

    Raises:
        BadInput: several processes, or an unknown preset or device.
    """
    processes.one_process("compare")
    given = resolved(given)
    preset, smoke = given.pop("preset", "demo"), given.pop("smoke", False)
    if preset not in PRESETS:
        raise BadInput(f"--preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    factors = given.pop("sweep_factor", None) or (FACTORS if given.pop("sweep", False) else None)
    given.pop("sweep", None)
    if factors:
        given["sweep"] = factors
    options: dict[str, Any] = {"out": Path("runs/compare"), "command": line}
    return CompareOptions(**options | PRESETS[preset] | (SMOKE if smoke else {}) | given)


def finetune_options(given: Mapping[str, Any]) -> FinetuneOptions:
    """What was given, and what the ``--config`` has beside it.

    Raises:
        BadInput: the file cannot be read, has an unknown option, or one that is needed is missing.
    """
    given = dict(given)
    path = given.pop("config", None)
    given = resolved((read_config(path) if path else {}) | given)
    for name in ("model", "data", "out"):
        if name not in given:
            raise BadInput(f"--{name} is missing: give it, or a --config that has it")
    return FinetuneOptions(**given | {"out": Path(given["out"])})


def resolved(given: Mapping[str, Any]) -> dict[str, Any]:
    """What was given, lists as tuples, with targets and device resolved."""
    options = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    options["targets"] = parse_targets(given.get("targets"))
    options["device"] = resolve_device(given.get("device", "auto"))
    return options


def compare(options: CompareOptions) -> int:
    """Run a comparison and show it; returns the exit code."""
    ui = Ui()
    try:
        results = run_compare(options, ui)
    except Stopped:
        show(options.out, book.read_results(options.out), ui)
        raise
    show(options.out, results, ui)
    return 1 if any(row["stopped"] != FINISHED for row in results["rows"]) else 0


def show(folder: Path, results: dict[str, Any], ui: Ui) -> None:
    """Print the tables, write the report, and say where everything is."""
    if not results["base"]:
        return
    ui.console.print(main_table(results).rich())
    for title, table in further_tables(results):
        ui.console.print(table.rich(title))
    written = write_report(folder, results)
    ui.say(f"written: {', '.join(str(path) for path in [folder / book.FILE, *written])}")


def finetune(options: FinetuneOptions) -> int:
    """Train one adapter, and say how to load it; returns the exit code."""
    ui = Ui(quiet=processes.number() > 0)
    stopped, text = run_finetune(options, ui)
    ui.say(text)
    if options.dry_run:
        return 0
    ui.say("Load it with:\n\n" + how_to_load(options) + "\n")
    return {INTERRUPTED: 130, DIVERGED: 1}.get(stopped, 0)


def chat(device: str, folder: Path | None = None, max_tokens: int = 256, **given: Any) -> int:
    """Answer each line of the input; returns the exit code."""
    at_least(1, {"max-tokens": max_tokens})
    known = adapters.settings(folder, **given)
    model, tokenizer = adapters.load_adapted(folder, known, device, packed=True)
    talk = adapters.Chat(model, tokenizer, known.get("template", "auto"), max_tokens)
    with suppress(KeyboardInterrupt):
        for text in adapters.lines("> " if sys.stdin.isatty() else ""):
            talk.answer(text)
    return 0


def write(command: str, device: str, folder: Path, out: Path, **given: Any) -> int:
    """Merge or export an adapter; returns the exit code."""
    task = {"merge": adapters.merge, "export": adapters.export}[command]
    task(folder, out, adapters.settings(folder, **given), device)
    Ui().say(f"written: {out}")
    return 0


def report(folder: Path, markdown: Path | None = None, json: Path | None = None) -> int:
    """Make the tables, the plots and the page again; returns the exit code."""
    results = book.read_results(folder)
    ui = Ui()
    show(folder, results, ui)
    small = published(results)
    if markdown is not None:
        written = write_page(markdown, small, None if json is None else json.name)
        ui.say(f"written: {', '.join(map(str, written))}")
    if json is not None:
        book.dump(json, small)
        ui.say(f"written: {json}")
    return 0


def frontier(results: list[Path], markdown: Path) -> int:
    """Make the page about forgetting out of several comparisons; returns the exit code."""
    studies = combined([book.read_results(path) for path in results])
    written = write_frontiers(markdown, studies, [path.name for path in results])
    Ui().say(f"written: {', '.join(map(str, written))}")
    return 0
