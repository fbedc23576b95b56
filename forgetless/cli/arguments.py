"""The command line of ``forgetless``: commands, options, help and errors. Importing it needs argparse only."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

#: Texts that are built in (``forgetless.study.data.BUILTIN``): named in the help without importing the study.
TEXTS = (
    "django-de", "django-es", "django-fi", "django-fr", "django-pl", "tool-calls",
    "news", "python", "python-docs", "shakespeare", "wikipedia",
)  # fmt: skip
ROWS = ".jsonl, .json, .csv, .parquet (messages, prompt and completion, Alpaca, ShareGPT, text), .txt or a folder"
METHOD = "NAME[+PART]...[:FIELD=VALUE,...], e.g. clora, lora+source=0.03, clora:k=512,lr=1e-3, lora+retain=0.3, full"


def fail(message: str) -> int:
    """Print one line on standard error; returns the exit code of bad input."""
    print("error: " + " ".join(message.split()), file=sys.stderr)
    return 2


class Parser(argparse.ArgumentParser):
    """Errors are one line, options cannot be abbreviated, and what is not given is not in the result."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, argument_default=argparse.SUPPRESS, **options)

    def options(self, words: Sequence[str]) -> dict[str, Any]:
        """What was given on a command line, by the names of the options' fields.

        Raises:
            SystemExit: the help was printed, or an error.
        """
        # argparse reads --flag=A B as one value and a stray word
        split = (word.split("=", 1) if word.startswith("--") else [word] for word in words)
        return vars(self.parse_args([part for parts in split for part in parts]))

    def error(self, message: str) -> NoReturn:
        raise SystemExit(fail(message))

    def values(self, flags: str, help: str, type: Callable[[str], Any] = str, **options: Any) -> None:
        """An option that takes several values and can be repeated; ``flags`` are separated by spaces."""
        names = flags.split()
        shown = names[0].strip("-").replace("-", "_").upper()
        self.add_argument(
            *names, nargs="+", action="extend", type=type, help=f"{help} Repeatable.", metavar=shown, **options
        )

    def value(self, flag: str, help: str, type: Callable[[str], Any] = str, **options: Any) -> None:
        """An option with one value."""
        self.add_argument(flag, type=type, help=help, **options)

    def switch(self, flag: str, help: str) -> None:
        """An option without a value."""
        self.add_argument(flag, action="store_true", help=help)


def parser(tools: Mapping[str, str], version: str) -> Parser:
    """The whole command line.

    Args:
        tools: name -> help of the commands that parse their own arguments.
        version: of the package.
    """
    top = Parser(
        prog="forgetless",
        description="Fine-tune with low-rank adapters that do not forget, and measure that they do not.",
    )
    top.add_argument("--version", action="version", version=f"forgetless {version}")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", dest="command")
    for name, (text, add) in COMMANDS.items():
        add(commands.add_parser(name, help=text, description=text))
    for name, text in tools.items():
        commands.add_parser(name, help=text)
    return top


def add_compare(to: Parser) -> None:
    to.value("--out", "Folder to write into; made if it is not there. Default: runs/compare.", Path)
    to.value(
        "--preset", "demo (the defaults, minutes); study or study-tools (the two of the page about forgetting, hours)."
    )
    to.values("--task --tasks", f"What to learn, in this order: {', '.join(TEXTS)}, or {ROWS}.", dest="tasks")
    to.values("--keep --keeps", "What must not be forgotten: texts as above, or facts.", dest="keep")
    to.values("--source", "Texts that methods calibrate on. Default: all of --keep.")
    to.values("--method --methods", f"{METHOD}.", dest="methods")
    add_common(to)
    to.value("--lr", "Learning rate of every method. Default: 2e-3, tuned.", float)
    to.value("--steps", "Optimizer steps per task. Default: 16.", int)
    to.value("--batch-size", "Examples a batch. Default: 6.", int)
    to.value("--max-length", "Tokens of an example. Default: 96.", int)
    to.value("--eval-tokens", "Held-out tokens per domain. Default: 1024.", int)
    to.value("--calibration", "Sequences to calibrate on. Default: 16.", int)
    to.value("--evals", "Evaluations per task; from 2 on, equal learning is compared. Default: 1.", int)
    to.values("--seed --seeds", "A row per method and seed. Default: 0.", int, dest="seeds")
    to.switch("--sweep", "Also other weights of every penalty: Pareto front.")
    to.values("--sweep-factor", "What a sweep multiplies weights with. Default: 1/3 and 3.", float)
    to.values("--sweep-seed", "Seeds of the sweep. Default: all of --seed.", int, dest="sweep_seeds")
    to.values("--sweep-method", "Methods to sweep, as given to --method. Default: all.", dest="sweep_methods")
    to.switch("--fresh", "Do not reuse runs that were finished earlier.")
    to.switch("--any-commit", "Go on from runs of another commit of this source tree too.")
    to.switch("--smoke", "Tiny sizes: shows that it runs, measures nothing.")


def add_finetune(to: Parser) -> None:
    to.value("--config", "YAML file with these options (batch_size: 8); options given win.", Path)
    to.value("--data", f"Examples: {ROWS}.")
    to.value("--out", "Folder to write into; made if it is not there.", Path)
    to.value("--method", f"{METHOD}. Default: clora.")
    to.values("--source", "Text not to forget, for methods that calibrate on it: as --data. Default: news, python.")
    to.values("--keep", "Measured before and after: texts, or facts. Default: python, python-docs, facts.")
    add_common(to, default_model=False)
    to.value("--lr", "Learning rate (CURLoRA takes a multiple of it). Default: 3e-4.", float)
    to.value("--epochs", "Passes over the data. Default: 1.", float)
    to.value("--steps", "Optimizer steps, instead of epochs.", int)
    to.value("--batch-size", "Examples a batch, of all processes that torchrun starts together. Default: 8.", int)
    to.value("--max-length", "Tokens of an example; what is longer is cut. Default: 512.", int)
    to.value("--template", "Prompts and chats through the chat template: auto (if there is one), chat or none.")
    to.value("--calibration", "Sequences to calibrate on. Default: 32.", int)
    to.value("--seed", "Of the adapter's start and the order of the data. Default: 0.", int)
    to.switch("--load-in-4bit", "Pack the base model's weights into 4 bits (NF4 of bitsandbytes).")
    to.switch("--gradient-checkpointing", "Recompute activations in the backward pass: less memory, more time.")
    to.value("--save-every", "Steps between checkpoints; a stopped run goes on by the same command. Default: 100.", int)
    to.value("--report", "Also report to tensorboard or wandb. Default: none.")
    to.switch("--overwrite", "Replace what is in --out, a finished adapter or a stopped run of other options.")
    to.switch("--dry-run", "Load and check everything, show what would be trained, write nothing.")


def add_common(to: Parser, default_model: bool = True) -> None:
    models = "smollm2, a folder with a Hugging Face model, a .gguf file or a hub name."
    to.value("--model", models + (" Default: smollm2." if default_model else ""))
    to.values("--targets", "Layers to adapt: a name suffix. Default: every linear layer but the head.")
    to.value("--rank", "Rank of every method. Default: 16.", int)
    to.value("--alpha", "Scale of the update times rank (CURLoRA: the scale itself).", float)
    to.value("--weight", "Weight of the methods' own penalties.", float)
    to.value("--accumulate", "Batches per optimizer step. Default: 1.", int)
    to.value("--dtype", "Of the base model: bfloat16, float16 or float32. Default: bfloat16.")
    to.value("--device", "auto, cpu, cuda, cuda:1, ... Default: auto.")


def add_adapter(to: Parser) -> None:
    to.value("--model", "Base model, as of finetune. Default: the one that the adapter's finetune.yaml names.")
    to.value("--dtype", "Of the base model. Default: that of finetune.yaml, else bfloat16.")
    to.value("--device", "auto, cpu, cuda, ... Default: auto.")


def add_chat(to: Parser) -> None:
    to.add_argument(
        "folder", type=Path, nargs="?", default=None, help="Output folder of finetune; else the base model alone."
    )
    add_adapter(to)
    to.value("--max-tokens", "Tokens of an answer, at most. Default: 256.", int)


def add_merge(to: Parser) -> None:
    to.add_argument("folder", type=Path, help="Output folder of finetune, or of fl.save.")
    to.value("--out", "Folder to write into; must not exist.", Path, required=True)
    add_adapter(to)


def add_report(to: Parser) -> None:
    to.add_argument("folder", type=Path, help="Output folder of an earlier compare.")
    to.value("--markdown", "Also a page for documentation, and its picture.", Path)
    to.value("--json", "Also the results in a smaller file, to be committed.", Path)


def add_frontier(to: Parser) -> None:
    to.add_argument("results", type=Path, nargs="+", help="results.json of compare, or what report --json wrote.")
    to.value("--markdown", "The page; its picture is written beside it.", Path, required=True)


#: Name -> help, and the function that adds the options.
COMMANDS: dict[str, tuple[str, Callable[[Parser], None]]] = {
    "compare": (
        "Teach one base model new tasks with each method; show what each learnt and what it made it forget.",
        add_compare,
    ),
    "finetune": (
        "Train one adapter on your examples, save it, and print how to load it. With torchrun, in several processes.",
        add_finetune,
    ),
    "chat": ("Ask a fine-tuned model, a line at a time; the most likely answer is printed.", add_chat),
    "merge": ("Write the base model with an adapter merged into its weights, in full precision.", add_merge),
    "export": ("Write an adapter of any method as a LoRA checkpoint that PEFT loads.", add_merge),
    "report": ("Make the tables, the plots and the page again from results.json.", add_report),
    "frontier": ("Compare methods at equal learning over several comparisons, on a page with a picture.", add_frontier),
}
