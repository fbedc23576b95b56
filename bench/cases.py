"""Which comparisons of one layer are made: the grid of options, or the two sweeps."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .bytes import available_bytes
from .harness import short
from .shapes import RANKS, SHAPES, TOKENS, bytes_needed

METHODS = ("lora", "curlora")
#: More would not finish on a CPU.
CPU_TOKENS = 4096


@dataclass(frozen=True)
class Case:
    """One comparison."""

    shape: str
    M: int
    R: int
    dtype: torch.dtype
    dropout: float
    method: str

    def title(self) -> str:
        s = SHAPES[self.shape]
        return (
            f"{s.name}  M={self.M} N={s.N} K={s.K} R={self.R}  {short(self.dtype)}  {self.method}"
            f"  dropout {self.dropout:g}"
        )


def grid(options: argparse.Namespace) -> list[Case]:
    """Every combination of the options; CURLoRA has no dropout."""
    return [
        Case(shape, M, R, getattr(torch, dtype), dropout, method)
        for shape in options.shapes
        for dtype in options.dtypes
        for method in options.methods
        for dropout in (options.dropout if method == "lora" else [0.0])
        for M in options.tokens
        for R in options.ranks
    ]


def sweeps(options: argparse.Namespace, device: torch.device, notes: list[str]) -> list[dict[str, Any]]:
    """What is varied ("by": R or M) over which "values", of which shape ("case"), the other of the two as given."""
    few, many = ("smollm2.up" if device.type == "cpu" else "llama3.q"), "llama3.k"
    ranks, tokens = RANKS, TOKENS
    if options.smoke:
        few, many, ranks, tokens = "tiny", "tiny", (2, 4), (4, 8)
    elif device.type == "cpu":
        tokens = tuple(M for M in TOKENS if M <= CPU_TOKENS)
        notes.append(f"by tokens: to {CPU_TOKENS} of {TOKENS[-1]}, what a CPU gets through")
    return [
        {"by": "R", "values": list(ranks), "case": few, "M": options.tokens[0]},
        {"by": "M", "values": list(tokens), "case": many, "R": options.ranks[0]},
    ]


def swept(sweep: dict[str, Any], dtypes: Sequence[str]) -> list[Case]:
    points = [{**_fixed(sweep), sweep["by"]: value} for value in sweep["values"]]
    return [
        Case(sweep["case"], dtype=getattr(torch, dtype), dropout=0.0, method="lora", **point)
        for dtype in dtypes
        for point in points
    ]


def rows_of(sweep: dict[str, Any], rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of a result that belong to a sweep, CUDA graphs left out."""
    fixed = {"case": sweep["case"], **_fixed(sweep)}
    return [
        row
        for row in rows
        if not row["graph"] and row[sweep["by"]] in sweep["values"] and all(row[k] == v for k, v in fixed.items())
    ]


def _fixed(sweep: dict[str, Any]) -> dict[str, int]:
    return {key: sweep[key] for key in ("M", "R") if key in sweep}


def fitting(found: Sequence[Case], device: torch.device, notes: list[str]) -> list[Case]:
    """What fits the machine, each once; the rest is said to be left out."""
    kept = []
    for case in dict.fromkeys(found):
        need = bytes_needed(SHAPES[case.shape], case.M, case.dtype)
        if need < 0.6 * available_bytes(device):
            kept.append(case)
        else:
            notes.append(f"{case.title()}: left out, wants about {need / 2**30:.1f} GiB")
    return kept
