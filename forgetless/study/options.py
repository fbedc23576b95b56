"""What a user may ask for: options, and numbers in range.

Everything wrong with it is a ``BadInput`` with one line that says so.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


class BadInput(ValueError):
    """What was asked for cannot be done; the message is one line and says why."""


DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

#: Among the texts to keep: the fact probes.
FACTS = "facts"


@dataclass(frozen=True)
class CompareOptions:
    """Everything that can be asked of a comparison; the defaults end in minutes on two cores.

    ``evals`` evaluations per task, the last one at its end; ``source`` texts to calibrate on, all kept ones if None;
    ``sweep`` factors on the weights of ``sweep_methods`` (all if None; a method without a weight: on its learning
    rate), run with ``sweep_seeds``.
    """

    out: Path
    model: str = "smollm2"
    tasks: tuple[str, ...] = ("django-de", "tool-calls")
    keep: tuple[str, ...] = ("news", "python", FACTS)
    methods: tuple[str, ...] = ("lora", "clora", "curlora", "lalora")
    targets: str | list[str] = "all-linear"
    seeds: tuple[int, ...] = (0,)
    rank: int | None = None
    alpha: float | None = None
    weight: float | None = None
    lr: float | None = None
    steps: int = 16
    batch_size: int = 6
    accumulate: int = 1
    max_length: int = 96
    eval_tokens: int = 1024
    eval_length: int = 256
    calibration: int = 16
    evals: int = 1
    source: tuple[str, ...] | None = None
    sweep: tuple[float, ...] = ()
    sweep_seeds: tuple[int, ...] | None = None
    sweep_methods: tuple[str, ...] | None = None
    dtype: str = "bfloat16"
    device: str = "cpu"
    fresh: bool = False
    any_commit: bool = False
    command: str = "forgetless compare"


@dataclass(frozen=True)
class FinetuneOptions:
    """What ``forgetless finetune`` was asked for. Steps win over epochs; ``keep`` is only measured."""

    out: Path
    model: str
    data: str
    method: str = "clora"
    source: tuple[str, ...] = ("news", "python")
    keep: tuple[str, ...] = ("python", "python-docs", FACTS)
    targets: str | list[str] = "all-linear"
    rank: int | None = None
    alpha: float | None = None
    weight: float | None = None
    lr: float = 3e-4
    epochs: float = 1.0
    steps: int | None = None
    batch_size: int = 8
    accumulate: int = 1
    max_length: int = 512
    calibration: int = 32
    template: str = "auto"
    seed: int = 0
    dtype: str = "bfloat16"
    device: str = "cpu"
    load_in_4bit: bool = False
    gradient_checkpointing: bool = False
    save_every: int = 100
    report: str = "none"
    overwrite: bool = False
    dry_run: bool = False


def near(name: str, known: Iterable[str]) -> str:
    """' Did you mean a or b?' and the list of what is known."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=2, cutoff=0.5)
    hint = f" did you mean {' or '.join(repr(c) for c in close)}?" if close else ""
    return f"{hint} known: {', '.join(known)}"


def number(text: str, what: str) -> float | int:
    """A number from text, an integer where it is written as one."""
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    raise BadInput(f"{what} must be a number, got {text!r}")


def at_least(least: float, values: Mapping[str, float | int | None]) -> None:
    """Refuse numbers below ``least``; the keys are the options' names."""
    for name, value in values.items():
        if value is not None and not value >= least:
            raise BadInput(f"--{name} must be at least {least}, got {value}")


def check_numbers(options: Any, *names: str, least: float = 1) -> None:
    """``at_least`` for fields of ``options``, by their names."""
    at_least(least, {name.replace("_", "-"): getattr(options, name) for name in names})


def check_dtype(name: str) -> None:
    """Refuse a dtype that is not in ``DTYPES``."""
    if name not in DTYPES:
        raise BadInput(f"--dtype must be one of {', '.join(DTYPES)}, got {name!r}")


def positive(values: Mapping[str, float | None]) -> None:
    """Refuse numbers that are not above zero."""
    for name, value in values.items():
        if value is not None and not value > 0:
            raise BadInput(f"--{name} must be above zero, got {value}")


def parse_targets(targets: list[str] | None) -> str | list[str]:
    """``all-linear`` by default; one option may be a suffix or a regular expression, several are suffixes."""
    return targets if targets and targets != ["all-linear"] else "all-linear"
