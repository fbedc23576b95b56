"""From examples to the rows of training, in the order of training."""

from __future__ import annotations

import random
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from .data import Example, encode_domain
from .options import BadInput

Encoded = list[dict[str, list[int]]]


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
        wanted = min(pool, count - len(ordered)) * size
        while len(stream) < wanted:
            stream += draw.sample(range(len(encoded)), len(encoded))
        rows, stream = stream[:wanted], stream[wanted:]
        if pool > 1:
            rows.sort(key=lambda i: len(encoded[i]["input_ids"]))
        batches = [rows[i : i + size] for i in range(0, wanted, size)]
        draw.shuffle(batches)
        ordered += batches
    return [encoded[i] for batch in ordered for i in batch]
