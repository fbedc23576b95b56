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

from ..study import processes
from ..study import results as book
from ..study.compare import Stopped
from ..study.compare import compare as run_compare
from ..study.data import BUILTIN, DataError
from ..study.finetune import FinetuneOptions, how_to_load
from ..study.finetune import finetune as run_finetune
from ..study.models import ModelError
from ..study.options import BadInput, parse_targets
from ..study.packages import MissingPackage
from ..study.page import published, write_page
from ..study.report import further_tables, main_table, rich_table, write_report
from ..study.session import FACTS, CompareOptions
from ..study.train import DIVERGED, FINISHED, INTERRUPTED
from .console import Ui
from .main import TOOLS, fail, installed

#: Sizes that prove the way works and nothing else.
SMOKE = {"steps": 2, "batch_size": 2, "max_length": 32, "eval_tokens": 64, "eval_length": 32, "calibration": 2}

app = typer.Typer(
    help="Fine-tune with low-rank adapters that do not forget, and measure that they do not.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
#: The run that docs/forgetting.md is made from: three tasks in a row, five kinds of knowledge to keep, of which two
#: are calibrated on, three seeds, and other weights of every penalty with the first seed.
STUDY: dict[str, Any] = {
    "tasks": ("django-de", "tool-calls", "django-fr"),
    "keep": ("news", "python", "wikipedia", "python-docs", FACTS),
    "source": ("news", "python"),
    "methods": (
        "lora",
        "lora+consolidate",
        "lora+decay",
        "clora",
        "curlora",
        "lalora",
        "source",
        "source+consolidate",
        "source+consolidate:covariance=full",
        "full",
    ),
    "seeds": (0, 1, 2),
    "steps": 12,
    "evals": 2,
    "eval_tokens": 512,
    "sweep": (1 / 3, 3.0),
    "sweep_seeds": (0,),
    "sweep_methods": ("lora", "lora+decay", "clora", "lalora", "source+consolidate"),
}
PRESETS = {"demo": {}, "study": STUDY}
#: What a sweep multiplies weights with unless told otherwise.
FACTORS = (1 / 3, 3.0)
#: Options that may be given once with several values: --seeds 0 1 2 is --seed 0 --seed 1 --seed 2.
PLURALS = {"--seeds": "--seed", "--methods": "--method", "--tasks": "--task", "--keeps": "--keep"}
METHOD_HELP = (
    "NAME[+PART]...[:FIELD=VALUE,...], e.g. clora, lora+source=0.03, clora:k=512,lr=1e-3, source+consolidate, full"
)

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
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise BadInput(f"--device {name}: {str(error).splitlines()[0]}") from None
    return processes.own_device(name)


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
    preset: Annotated[
        str, typer.Option(help="demo (the defaults, minutes) or study (3 tasks, 10 methods, 3 seeds, a sweep: hours).")
    ] = "demo",
    task: Annotated[
        list[str] | None,
        typer.Option(help=f"What to learn, in this order: {', '.join(BUILTIN)}, or a .jsonl file. Repeatable."),
    ] = None,
    keep: Annotated[
        list[str] | None, typer.Option(help="What must not be forgotten: texts as above, or facts. Repeatable.")
    ] = None,
    source: Annotated[
        list[str] | None, typer.Option(help="Texts that methods calibrate on. Default: all of --keep. Repeatable.")
    ] = None,
    method: Annotated[list[str] | None, typer.Option(help=METHOD_HELP + ". Repeatable; also --methods A B C.")] = None,
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
    evals: Annotated[
        int | None, typer.Option(help="Evaluations per task; from 2 on, equal learning is compared. Default: 1.")
    ] = None,
    seed: Annotated[
        list[int] | None, typer.Option(help="Repeatable, also --seeds 0 1 2: a row per method and seed. Default: 0.")
    ] = None,
    sweep: Annotated[bool, typer.Option("--sweep", help="Also other weights of every penalty: Pareto front.")] = False,
    sweep_factor: Annotated[
        list[float] | None, typer.Option(help="What a sweep multiplies weights with. Repeatable. Default: 1/3 and 3.")
    ] = None,
    sweep_seed: Annotated[
        list[int] | None, typer.Option(help="Seeds of the sweep. Repeatable. Default: all of --seed.")
    ] = None,
    targets: Targets = None,
    sweep_method: Annotated[
        list[str] | None, typer.Option(help="Methods to sweep, as given to --method. Repeatable. Default: all.")
    ] = None,
    dtype: Dtype = C["dtype"],
    device: Device = "auto",
    fresh: Annotated[bool, typer.Option("--fresh", help="Do not reuse runs that were finished earlier.")] = False,
    any_commit: Annotated[
        bool, typer.Option("--any-commit", help="Go on from runs of another commit of this source tree too.")
    ] = False,
    smoke: Annotated[bool, typer.Option("--smoke", help="Tiny sizes: shows that it runs, measures nothing.")] = False,
) -> int:
    """Teach one base model new tasks with each method; show what each learnt and what it made it forget."""
    processes.one_process("compare")
    sizes = given(
        steps=steps,
        batch_size=batch_size,
        max_length=max_length,
        eval_tokens=eval_tokens,
        calibration=calibration,
        evals=evals,
    )
    if preset not in PRESETS:
        raise BadInput(f"--preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    factors = sweep_factor or (list(FACTORS) if sweep else None)
    lists: dict[str, Any] = given(
        tasks=task,
        keep=keep,
        source=source,
        methods=method,
        seeds=seed,
        sweep=factors,
        sweep_seeds=sweep_seed,
        sweep_methods=sweep_method,
    )
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
        any_commit=any_commit,
        command=shlex.join(["forgetless", *_arguments]),
        **PRESETS[preset] | (SMOKE if smoke else {}) | sizes | {name: tuple(values) for name, values in lists.items()},
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
    """The tables, and where the rest is."""
    if not results["base"]:
        return
    ui.console.print(rich_table(main_table(results)))
    for title, table in further_tables(results):
        ui.console.print(rich_table(table, title))
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
    batch_size: Annotated[
        int, typer.Option(help="Examples a batch, of all processes together where torchrun starts several.")
    ] = F["batch_size"],
    accumulate: Accumulate = 1,
    max_length: Annotated[int, typer.Option(help="Tokens of an example; what is longer is cut.")] = F["max_length"],
    calibration: Annotated[int, typer.Option(help="Sequences to calibrate on.")] = F["calibration"],
    seed: Annotated[int, typer.Option(help="Of the adapter's start and the order of the data.")] = 0,
    targets: Targets = None,
    dtype: Dtype = F["dtype"],
    device: Device = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an adapter in --out.")] = False,
) -> int:
    """Train one adapter on your examples, save it, and print how to load it. With torchrun, in several processes."""
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
    ui = Ui(quiet=processes.number() > 0)
    stopped, told = run_finetune(options, ui)
    ui.say(told)
    ui.say("Load it with:\n\n" + how_to_load(options) + "\n")
    return {INTERRUPTED: 130, DIVERGED: 1}.get(stopped, 0)


@app.command()
@handled
def report(
    folder: Annotated[Path, typer.Argument(help="Output folder of an earlier compare.")],
    markdown: Annotated[Path | None, typer.Option(help="Also a page for documentation, and its picture.")] = None,
    json: Annotated[Path | None, typer.Option(help="Also the results in a smaller file, to be committed.")] = None,
) -> int:
    """Make the tables, the plots and the page again from results.json."""
    found = book.read_results(folder)
    ui = Ui()
    show(folder, found, ui)
    small = published(found)
    if markdown is not None:
        written = write_page(markdown, small, None if json is None else json.name)
        ui.say(f"written: {', '.join(map(str, written))}")
    if json is not None:
        book.dump(json, small)
        ui.say(f"written: {json}")
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


def singular(arguments: Sequence[str]) -> list[str]:
    """``--seeds 0 1 2`` as ``--seed 0 --seed 1 --seed 2``: the values go on to the next option."""
    words: list[str] = []
    option = None
    for word in arguments:
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            option = PLURALS.get(name)
            words += [word] if option is None else [option, value] if equals else []
        else:
            words += [word] if option is None else [option, word]
    return words


def run(arguments: Sequence[str]) -> int:
    """Parse and run; returns the exit code."""
    _arguments[:] = arguments
    try:
        app(args=singular(arguments), prog_name="forgetless")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(bool(stop.code))
    return 0
