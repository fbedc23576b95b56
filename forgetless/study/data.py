"""Texts to learn and texts to keep: built-in domains and files of your own, split, encoded and batched.

Each domain is split by *group* (a source string, a function, a document), never inside one, so that nothing held out
has a twin in the training part.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from .encoding import IGNORED, Encoded
from .rows import READERS, passages, read_rows
from .texts import POOLS, DataError, Example, Pool, distinct, passages_of

FILES = ", ".join([*READERS, ".txt"])


@dataclass(frozen=True)
class Domain:
    """A named body of examples, split once and for all into a training and a held-out part."""

    name: str
    title: str
    train: tuple[Example, ...]
    held_out: tuple[Example, ...]
    source: str
    licence: str


# Domains --------------------------------------------------------------------------------------------


def load_domain(spec: str, held_out: int | float = 0.1, seed: int = 0) -> Domain:
    """A built-in domain by name, or a file or folder (`rows.READERS`, `.txt`), split into training and held-out part.

    `held_out` is a share of the examples (a float below 1) or a number of them (an int). Of the built-in
    domains a share takes at most KEPT_PAIRS examples or KEPT_PASSAGES passages, so that evaluation stays
    a matter of seconds; a number is taken as it is. The split depends on the data, `held_out` and `seed`.
    """
    count = isinstance(held_out, int) and not isinstance(held_out, bool)
    if not (held_out >= 1 if count else isinstance(held_out, float) and 0 < held_out < 1):
        raise DataError(f"held_out is {held_out!r}, wanted 1 example or more, or a share between 0 and 1")
    if spec in POOLS:
        name, pool = spec, POOLS[spec]()
    else:
        path = Path(spec).expanduser()
        if path.suffix not in (*READERS, ".txt") and not (path.is_dir() and any(path.iterdir())):
            if path.exists():
                raise DataError(f"{spec}: wanted a file of {FILES}, or a folder of the datasets package")
            near = get_close_matches(spec, POOLS, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}? " if near else ""
            raise DataError(
                f"unknown domain {spec!r}: {hint}built in are {', '.join(sorted(POOLS))}; or give a file of {FILES}"
            )
        examples = passages(path, passages_of) if path.suffix == ".txt" else read_rows(path)
        name = path.stem
        pool = Pool(path.name, [[example] for example in examples], path.name, "not stated")
    train, kept = _split(pool, held_out, seed, name)
    return Domain(name, pool.title, train, kept, pool.source, pool.licence)


def _split(pool: Pool, held_out: int | float, seed: int, name: str) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    groups = distinct(pool.groups)
    draw = random.Random(seed)
    draw.shuffle(groups)
    # One passage is held out of each document that is drawn; the rest of that document is left out.
    sizes = [1 if pool.documents else len(group) for group in groups]
    total = sum(map(len, groups))
    if isinstance(held_out, int):
        expected = held_out
    else:
        expected = max(1, math.floor(held_out * total + 0.5))
        if pool.most_held_out is not None:
            expected = min(expected, pool.most_held_out)
        expected = max(1, min(expected, sum(sizes) - sizes[-1]))
    kept: list[Example] = []
    count = 0
    while len(kept) < expected and count < len(groups) - 1:
        group = groups[count]
        kept += [draw.choice(group)] if pool.documents else group[: expected - len(kept)]
        count += 1
    if len(kept) < expected:
        what = f"{len(groups)} documents, one passage of each" if pool.documents else f"{total}"
        raise DataError(
            f"{name}: cannot hold out {expected} of {what} (repeated ones counted once) and have some left to train on"
        )
    train = [example for group in groups[count:] for example in group]
    draw.shuffle(train)
    return tuple(train), tuple(kept)


# name -> the domain with its default split (a tenth held out, within the limits above; seed 0).
BUILTIN: dict[str, Callable[[], Domain]] = {name: partial(load_domain, name) for name in POOLS}


# Batching ------------------------------------------------------------------------------------------


class Collator:
    """Rows of different lengths as one batch: padded on the right, int64, each tensor (rows, longest)."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.padding = padding_id(tokenizer)

    def __call__(self, rows: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
        """`input_ids`, `labels` (IGNORED on padding) and `attention_mask` (0 on padding)."""
        if not rows:
            raise ValueError("a batch of no rows")
        for row in rows:
            if len(row["input_ids"]) != len(row["labels"]):
                raise ValueError(f"a row has {len(row['input_ids'])} input_ids and {len(row['labels'])} labels")
        columns = {
            "input_ids": ([row["input_ids"] for row in rows], self.padding),
            "labels": ([row["labels"] for row in rows], IGNORED),
            "attention_mask": ([[1] * len(row["input_ids"]) for row in rows], 0),
        }
        return {
            name: pad_sequence([torch.tensor(row) for row in column], batch_first=True, padding_value=value)
            for name, (column, value) in columns.items()
        }

    def batches(self, rows: Sequence[dict[str, list[int]]], size: int = 4) -> list[dict[str, Tensor]]:
        """Rows as batches of at most ``size``, in their order."""
        return [self(rows[i : i + size]) for i in range(0, len(rows), size)]


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token to pad with: the tokenizer's own, else its end-of-sequence token, else 0 (it is masked)."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


def in_batches(encoded: Encoded, size: int, count: int, seed: int, pool: int = 1) -> Encoded:
    """``count`` batches of ``size`` rows in the order of training: a shuffled stream, epoch after epoch.

    With ``pool`` above 1 that many batches at a time are sorted by length, cut and shuffled: less is padded, but a
    batch of short rows alone has another loss than one of long rows.
    """
    draw = random.Random(seed)
    stream: list[int] = []
    ordered: list[list[int]] = []
    while len(ordered) < count:
        expected = min(pool, count - len(ordered)) * size
        while len(stream) < expected:
            stream += draw.sample(range(len(encoded)), len(encoded))
        rows, stream = stream[:expected], stream[expected:]
        if pool > 1:
            rows.sort(key=lambda i: len(encoded[i]["input_ids"]))
        batches = [rows[i : i + size] for i in range(0, expected, size)]
        draw.shuffle(batches)
        ordered += batches
    return [encoded[i] for batch in ordered for i in batch]
