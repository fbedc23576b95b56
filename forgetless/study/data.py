"""Texts to learn and texts to keep: built-in domains and files of your own, split, encoded and batched.

Each domain is split by *group* (a source string, a function, a document), never inside one, so that nothing held out
has a twin in the training part.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from .options import BadInput
from .texts import POOLS, DataError, Example, Pool, distinct, passages_of

IGNORED = -100  # the label of a position that no loss is taken on
Encoded = list[dict[str, list[int]]]


@dataclass(frozen=True)
class Domain:
    """A named body of examples, split once and for all into a training and a held-out part."""

    name: str
    title: str
    train: tuple[Example, ...]
    held_out: tuple[Example, ...]
    source: str
    licence: str


# Reading --------------------------------------------------------------------------------------------


def read_jsonl(path: str | Path) -> list[Example]:
    """The rows of a JSONL file: {"prompt": ..., "completion": ...} or {"text": ...}, UTF-8.

    Other keys are passed over, blank lines too. The first fault in the file is a DataError.
    """
    path = Path(path)
    examples = []
    for number, line in enumerate(_read_bytes(path).split(b"\n"), start=1):
        try:
            example = _parse_row(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path}:{number}: not UTF-8: byte {line[error.start]:#04x} at column {error.start + 1}"
            ) from None
        except DataError as error:
            raise DataError(f"{path}:{number}: {error}") from None
        if example is not None:
            examples.append(example)
    if not examples:
        raise DataError(f"{path}: the file is empty")
    return examples


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None


def _parse_row(line: str) -> Example | None:
    if not line.strip():
        return None
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"not JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"not JSON: {error}") from None
    if not isinstance(row, dict):
        raise DataError(f"a row is an object, this is {_json_type(row)}")
    plain = "text" in row
    if plain and ("prompt" in row or "completion" in row):
        raise DataError('a row has either "text" or "prompt" and "completion", this has both')
    keys = ("text",) if plain else ("prompt", "completion")
    for key in keys:
        if key not in row:
            if len(row.keys() & set(keys)) == 0:
                result = ", ".join(map(repr, row)) or "none"
                raise DataError(f'wanted "text", or "prompt" and "completion"; keys here: {result}')
            raise DataError(f'"{key}" is missing')
        if not isinstance(row[key], str):
            raise DataError(f'"{key}" is {_json_type(row[key])}, wanted a string')
        try:
            row[key].encode()
        except UnicodeEncodeError:
            raise DataError(f'"{key}" holds half a surrogate pair, which is no character') from None
    if not row[keys[-1]].strip():
        raise DataError(f'"{keys[-1]}" is empty')
    return Example("" if plain else row["prompt"], row[keys[-1]])


def _json_type(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    names: dict[type, str] = {dict: "an object", list: "a list", str: "a string"}
    return names.get(type(value), "a number")


def _read_text(path: Path) -> list[Example]:
    """A text file as passages of about PASSAGE characters."""
    raw = _read_bytes(path)
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}:{line}: not UTF-8: byte {raw[error.start]:#04x}") from None
    if not text.strip():
        raise DataError(f"{path}: the file is empty")
    return [Example("", passage) for passage in passages_of(text)]


# Domains --------------------------------------------------------------------------------------------


def load_domain(spec: str, held_out: int | float = 0.1, seed: int = 0) -> Domain:
    """A built-in domain by name, or a `.jsonl` or `.txt` file, split into training and held-out part.

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
        if path.suffix not in (".jsonl", ".txt"):
            if path.exists():
                raise DataError(f"{spec}: wanted a .jsonl or a .txt file")
            near = get_close_matches(spec, POOLS, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}? " if near else ""
            raise DataError(
                f"unknown domain {spec!r}: {hint}built in are {', '.join(sorted(POOLS))}; or give a .jsonl or .txt file"
            )
        examples = read_jsonl(path) if path.suffix == ".jsonl" else _read_text(path)
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


# Encoding -------------------------------------------------------------------------------------------


def encode(example: Example, tokenizer: PreTrainedTokenizerBase, max_length: int) -> dict[str, list[int]]:
    """`input_ids` and `labels` of one example, at most `max_length` tokens; labels are IGNORED on the prompt.

    Prompt and completion are tokenised apart, so the border between them is exact. The completion ends
    with the end-of-sequence token where the tokenizer has one. Too long an example loses the beginning of
    its prompt first, then the end of its completion. Plain text is cut at `max_length` (see `windows`).
    """
    if max_length < 2:
        raise ValueError(f"max_length is {max_length}, wanted 2 or more")
    start = start_tokens(tokenizer)
    completion = text_tokens(example.completion, tokenizer)
    if not example.prompt:
        ids = (start + completion)[:max_length]
        return {"input_ids": ids, "labels": ([IGNORED] * len(start) + completion)[:max_length]}
    if tokenizer.eos_token_id is not None:
        completion.append(int(tokenizer.eos_token_id))
    prompt = text_tokens(example.prompt, tokenizer)
    # At least one token goes before the completion: its first token is predicted from something.
    completion = completion[: max_length - max(1, len(start))]
    room = max_length - len(start) - len(completion)
    prompt = start + (prompt[-room:] if room > 0 else [])
    return {"input_ids": prompt + completion, "labels": [IGNORED] * len(prompt) + completion}


def windows(text: str, tokenizer: PreTrainedTokenizerBase, length: int) -> list[dict[str, list[int]]]:
    """Plain text as windows of at most `length` tokens in which every token but the first has one label.

    Each window begins with the last token of the one before it (or with the beginning-of-sequence token,
    where the tokenizer uses one), without a label. A text of one token has nothing to predict: no window.
    """
    if length < 2:
        raise ValueError(f"length is {length}, wanted 2 or more")
    start = start_tokens(tokenizer)
    ids = text_tokens(text, tokenizer)
    cut = []
    step = length - 1
    for at in range(0, len(ids), step) if start else range(1, len(ids), step):
        before = start or ids[at - 1 : at]
        cut.append({"input_ids": before[-1:] + ids[at : at + step], "labels": [IGNORED] + ids[at : at + step]})
    return cut


def encode_domain(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[dict[str, list[int]]]:
    """Every example encoded; plain texts become as many windows of `max_length` tokens as they need."""
    rows: list[dict[str, list[int]]] = []
    for example in examples:
        if example.prompt:
            rows.append(encode(example, tokenizer, max_length))
        else:
            rows += windows(example.completion, tokenizer, max_length)
    return rows


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


def start_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """[the beginning-of-sequence token] where this tokenizer puts one before a text, else []."""
    ids = tokenizer("")["input_ids"]
    return [int(ids[0])] if ids and ids[0] == tokenizer.bos_token_id else []


def text_tokens(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens of a text alone, nothing put before or after it."""
    # verbose=False: a text longer than the model's context is cut here, it needs no warning.
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def encode_for_training(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int) -> Encoded:
    """Encoded examples that have something to learn within ``max_length`` tokens; refuses an empty rest."""
    encoded = encode_domain(examples, tokenizer, max_length)
    encoded = [e for e in encoded if any(label != -100 for label in e["labels"][1:])]
    if not encoded:
        raise BadInput(f"no example has anything to learn within {max_length} tokens")
    return encoded


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
