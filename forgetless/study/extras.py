"""What a row of a comparison does beside its method. These parts need no penalty and compose with every method."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar


@dataclass(frozen=True)
class Extras:
    """The parts of a row that are no penalties; each is 0 or False where it was not asked for.

    Args:
        consolidate: fold each finished task into the base model (``fl.consolidate``).
        retain: weight of ``fl.retain``, with which each finished task is turned away from kept text.
        scaled: factor of the update of each finished task, in (0, 1]; folds it too.
        budget: instead of ``scaled``: the largest factor with which the loss on the source text rises by at most so
            many nats per token (``fl.fit_budget``); folds too.
        replay: share of the training rows that are source text, in [0, 1).
        self_replay: share of the training rows that are text which the base model has written.
        kl: weight of KL(base || tuned) per token of source text, added to every step's loss (the base model is the
            model with its adapters off).

    Raises:
        ValueError: a value is out of range, or two exclude each other.
    """

    consolidate: bool = False
    retain: float = 0.0
    scaled: float = 0.0
    budget: float = 0.0
    replay: float = 0.0
    self_replay: float = 0.0
    kl: float = 0.0

    #: Parts that change a finished update; ``finetune`` does these too.
    AFTERWARDS: ClassVar[tuple[str, ...]] = ("retain", "scaled", "budget")
    #: Value of a part that is written without one.
    DEFAULTS: ClassVar[dict[str, float]] = {
        "consolidate": True,
        "retain": 0.1,
        "scaled": 0.8,
        "budget": 0.02,
        "replay": 0.15,
        "self-replay": 0.15,
        "kl": 1.0,
    }

    def __post_init__(self) -> None:
        for name in ("retain", "scaled", "budget", "replay", "self_replay", "kl"):
            value = getattr(self, name)
            most = {"scaled": 1.0, "replay": 0.9, "self_replay": 0.9}.get(name, float("inf"))
            if isinstance(value, bool) or not 0.0 <= value <= most:
                raise ValueError(f"{name.replace('_', '-')} is {value}, wants a number from 0 to {most:g}")
        if self.scaled and self.budget:
            raise ValueError("scaled and budget exclude each other: a budget chooses the scale")
        if self.replay + self.self_replay > 0.9:
            raise ValueError(
                f"replay and self-replay are {self.replay + self.self_replay:g} together, wants 0.9 at most"
            )

    @property
    def folds(self) -> bool:
        """Whether each finished task is folded into the base model."""
        return bool(self.consolidate or self.retain or self.scaled or self.budget)

    @property
    def needs_source(self) -> bool:
        """Whether source text is asked for."""
        return bool(self.retain or self.budget or self.replay or self.kl)

    def to_json(self) -> dict[str, Any]:
        """What was asked for."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name)}
