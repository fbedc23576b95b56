"""The options of ``forgetless compare``, ``finetune`` and ``report``."""

from __future__ import annotations

import dataclasses
import shlex
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer

from . import results as book
from .cli import TOOLS, fail, installed
from .compare import CompareOptions, Stopped
from .compare import compare as run_compare
from .console import Ui
from .data import BUILTIN, DataError
from .finetune import FinetuneOptions, how_to_load
from .finetune import finetune as run_finetune
from .models import ModelError
from .options import BadInput, parse_targets
from .packages import MissingPackage
from .report import main_table, rich_table, write_report
from .train import DIVERGED, FINISHED, INTERRUPTED

#: Sizes that prove the way works and nothing else.
SMOKE = {"steps": 2, "batch_size": 2, "max_length": 32, "eval_tokens": 64, "eval_length": 32, "calibration": 2}

app = typer.Typer(
    help="Fine-tune with low-rank adapters that do not forget, and measure that they do not.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
METHOD_HELP = "NAME[+PENALTY[=WEIGHT]][:FIELD=VALUE,...], e.g. clora, lora+source=0.03, clora:k=512,lr=1e-3"

Model = Annotated[str, typer.Option(help="smollm2, a folder with a Hugging Face model, a .gguf file or a hub name.")]
Out = Annotated[Path, typer.Option(help="Folder to write into; made if it is not there.")]
Targets = Annotated[
    list[str] | None,
    typer.Option(help="Layers to adapt: a name suffix, repeatable. Default: every linear layer but the head."),
]
Rank = Annotated[int | None, typer.Option(help="Rank of every method. Default: 16.")]
Alpha = Annotated[float | None, typer.Option(help="Scale of the update times rank (CURLoRA: the scale itself).")]
Weight = Annotated[float | None, typer.Option(help="Weight of the methods' own penalties.")]
Accumulate = Annotated[int, typer.Option(help="Batches per optimizer step.")]
Dtype = Annotated[str, typer.Option(help="Of the base model: bfloat16, float16 or float32.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]


def handled(command: Callable[..., int]) -> Callable[..., None]:
    """Turn what a user can cause into one line and an exit code; anything else is a bug and shows its traceback."""

    @wraps(command)
    def run(**kwargs: Any) -> None:
        quiet_libraries()
        try:
            with terminating():
                code = command(**kwargs)
        except (BadInput, DataError, ModelError, MissingPackage) as error:
            code = fail(str(error))
        except Stopped as error:
            print(error, file=sys.stderr)
            code = 130
        except KeyboardInterrupt:
            print("interrupted before training: nothing was written", file=sys.stderr)
            code = 130
        raise typer.Exit(code)

    return run


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
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise BadInput(f"--device {name}: {str(error).splitlines()[0]}") from None
    return name


def given(**options: Any) -> dict[str, Any]:
    """The options that were given; the others keep their defaults."""
    return {name: value for name, value in options.items() if value is not None}


def shown_defaults(cls: type) -> dict[str, Any]:
    """Field defaults of an options class."""
    return {f.name: f.default for f in dataclasses.fields(cls)}


C: dict[str, Any] = shown_defaults(CompareOptions)
F: dict[str, Any] = shown_defaults(FinetuneOptions)


@app.command()
@handled
def compare(
    out: Out = Path("runs/compare"),
    model: Model = C["model"],
    task: Annotated[
        list[str] | None,
        typer.Option(help=f"What to learn, in this order: {', '.join(BUILTIN)}, or a .jsonl file. Repeatable."),
    ] = None,
    keep: Annotated[
        list[str] | None, typer.Option(help="What must not be forgotten: texts as above, or facts. Repeatable.")
    ] = None,
    method: Annotated[list[str] | None, typer.Option(help=METHOD_HELP + ". Repeatable.")] = None,
    rank: Rank = None,
    alpha: Alpha = None,
    weight: Weight = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate of every method. Default: 2e-3, tuned.")] = None,
    steps: Annotated[int | None, typer.Option(help=f"Optimizer steps per task. Default: {C['steps']}.")] = None,
    batch_size: Annotated[int | None, typer.Option(help=f"Examples a batch. Default: {C['batch_size']}.")] = None,
    accumulate: Accumulate = 1,
    max_length: Annotated[int | None, typer.Option(help=f"Tokens of an example. Default: {C['max_length']}.")] = None,
    eval_tokens: Annotated[
        int | None, typer.Option(help=f"Held-out tokens per domain. Default: {C['eval_tokens']}.")
    ] = None,
    calibration: Annotated[
        int | None, typer.Option(help=f"Sequences to calibrate on. Default: {C['calibration']}.")
    ] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Repeatable: one row per method and seed. Default: 0.")] = None,
    targets: Targets = None,
    dtype: Dtype = C["dtype"],
    device: Device = "auto",
    fresh: Annotated[bool, typer.Option("--fresh", help="Do not reuse rows that an earlier run finished.")] = False,
    smoke: Annotated[bool, typer.Option("--smoke", help="Tiny sizes: shows that it runs, measures nothing.")] = False,
) -> int:
    """Teach one base model new tasks with each method; show what each learnt and what it made it forget."""
    sizes = given(
        steps=steps,
        batch_size=batch_size,
        max_length=max_length,
        eval_tokens=eval_tokens,
        calibration=calibration,
    )
    lists: dict[str, Any] = given(tasks=task, keep=keep, methods=method, seeds=seed)
    options = CompareOptions(
        out=out,
        model=model,
        rank=rank,
        alpha=alpha,
        weight=weight,
        lr=lr,
        accumulate=accumulate,
        targets=parse_targets(targets),
        dtype=dtype,
        device=resolve_device(device),
        fresh=fresh,
        command=shlex.join(["forgetless", *_arguments]),
        **(SMOKE if smoke else {}) | sizes | {name: tuple(values) for name, values in lists.items()},
    )
    ui = Ui()
    try:
        found = run_compare(options, ui)
    except Stopped:
        show(out, book.read_results(out), ui)
        raise
    show(out, found, ui)
    return 1 if any(row["stopped"] != FINISHED for row in found["rows"]) else 0


def show(folder: Path, results: dict[str, Any], ui: Ui) -> None:
    """The table, and where the rest is."""
    if not results["base"]:
        return
    ui.console.print(rich_table(main_table(results)))
    written = write_report(folder, results)
    ui.say(f"written: {', '.join(str(path) for path in [folder / book.FILE, *written])}")


@app.command()
@handled
def finetune(
    model: Annotated[str, typer.Option(help="A folder with a Hugging Face model, smollm2, or a hub name.")],
    data: Annotated[str, typer.Option(help='JSONL with "prompt" and "completion", or "text".')],
    out: Out,
    method: Annotated[str, typer.Option(help=METHOD_HELP)] = F["method"],
    source: Annotated[
        list[str] | None,
        typer.Option(help="Text not to forget, for methods that calibrate on it: as --data. Default: news, python."),
    ] = None,
    rank: Rank = None,
    alpha: Alpha = None,
    weight: Weight = None,
    lr: Annotated[float, typer.Option(help="Learning rate (CURLoRA takes a multiple of it).")] = F["lr"],
    epochs: Annotated[float, typer.Option(help="Passes over the data.")] = F["epochs"],
    steps: Annotated[int | None, typer.Option(help="Optimizer steps, instead of epochs.")] = None,
    batch_size: Annotated[int, typer.Option(help="Examples a batch.")] = F["batch_size"],
    accumulate: Accumulate = 1,
    max_length: Annotated[int, typer.Option(help="Tokens of an example; what is longer is cut.")] = F["max_length"],
    calibration: Annotated[int, typer.Option(help="Sequences to calibrate on.")] = F["calibration"],
    seed: Annotated[int, typer.Option(help="Of the adapter's start and the order of the data.")] = 0,
    targets: Targets = None,
    dtype: Dtype = F["dtype"],
    device: Device = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an adapter in --out.")] = False,
) -> int:
    """Train one adapter on your examples, save it, and print how to load it."""
    options = FinetuneOptions(
        out=out,
        model=model,
        data=data,
        method=method,
        source=tuple(source) if source else F["source"],
        targets=parse_targets(targets),
        rank=rank,
        alpha=alpha,
        weight=weight,
        lr=lr,
        epochs=epochs,
        steps=steps,
        batch_size=batch_size,
        accumulate=accumulate,
        max_length=max_length,
        calibration=calibration,
        seed=seed,
        dtype=dtype,
        device=resolve_device(device),
        overwrite=overwrite,
    )
    ui = Ui()
    stopped, told = run_finetune(options, ui)
    ui.say(told)
    ui.say("Load it with:\n\n" + how_to_load(options) + "\n")
    return {INTERRUPTED: 130, DIVERGED: 1}.get(stopped, 0)


@app.command()
@handled
def report(
    folder: Annotated[Path, typer.Argument(help="Output folder of an earlier compare.")],
) -> int:
    """Make the table, the plot and the page again from results.json."""
    show(folder, book.read_results(folder), Ui())
    return 0


def _tool(name: str) -> Callable[[], None]:
    def listed() -> None:  # run by cli.main before this module is imported
        raise typer.Exit(fail(f"run it as: forgetless {name}"))

    return listed


for _name, (_module, _help) in TOOLS.items():
    if installed(_module):
        app.command(_name, help=_help)(_tool(_name))

#: Of the run in progress: a report shows the command that made it.
_arguments: list[str] = []


def run(arguments: Sequence[str]) -> int:
    """Parse and run; returns the exit code."""
    _arguments[:] = arguments
    try:
        app(args=list(arguments), prog_name="forgetless")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(bool(stop.code))
    return 0
