"""What is known of each card, and what is written down while one is there."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
#: Where a line of ours is looked for.
OURS = tuple(str(ROOT / part) for part in ("forgetless", "kernels", "bench"))


class Card(NamedTuple):
    """A card as its driver describes it."""

    name: str
    processors: int
    shared: int  # bytes that a block may have


CARDS = {
    80: Card("Phantom A100", 108, 166912),
    86: Card("Phantom RTX 3090", 82, 101376),
    89: Card("Phantom RTX 4090", 128, 101376),
    90: Card("Phantom H100", 132, 232448),
    100: Card("Phantom B200", 148, 232448),
    120: Card("Phantom RTX 5090", 170, 101376),
}


class Launch(NamedTuple):
    """One launch of a kernel."""

    kernel: str
    grid: tuple[int, int, int]


@dataclass
class Trace:
    """What a phantom card saw, in order."""

    arch: int
    launches: list[Launch] = field(default_factory=list)
    compiled: list[str] = field(default_factory=list)  # kernels, each time one is new to the process
    copies: list[str] = field(default_factory=list)  # from the host to the card, each with its place
    waits: list[str] = field(default_factory=list)  # of the host for the card, each with its place

    @property
    def card(self) -> Card:
        return CARDS[self.arch]

    def clear(self) -> None:
        for events in (self.launches, self.compiled, self.copies, self.waits):
            events.clear()


def place() -> str:
    """The innermost line of ours that is being run, or of whoever called, as file:line."""
    frame, last = sys._getframe(2), ""
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(OURS):
            return f"{Path(name).relative_to(ROOT)}:{frame.f_lineno}"
        if not last and "phantom" not in name and "torch" not in name:
            last = f"{Path(name).name}:{frame.f_lineno}"
        frame = frame.f_back
    return last
