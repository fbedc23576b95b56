"""What ``fl.explain`` returns."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerReport:
    """How one adapted layer runs.

    Attributes:
        method: its name, "lora".
        in_features: K.
        out_features: N.
        rank: R.
        trainable: numbers that are trained.
        path: "blas", "split", "full", "once", "reference", or as ``explain`` says "onto", "base", "peft".
        reason: why, in words.
    """

    method: str
    in_features: int
    out_features: int
    rank: int
    trainable: int
    path: str
    reason: str


class Report(dict[str, LayerReport]):
    """Layer name -> LayerReport; prints as a table with like layers in one row."""

    def __str__(self) -> str:
        rows: dict[tuple[str, LayerReport], int] = {}
        for name, report in self.items():
            key = (name.rpartition(".")[2], report)
            rows[key] = rows.get(key, 0) + 1
        lines = [f"{'layers':>6}  {'name':<14} {'method':<9} {'in -> out':<15} {'rank':>4}  path   why"]
        for (name, r), count in rows.items():
            shape = f"{r.in_features} -> {r.out_features}"
            lines.append(f"{count:>6}  {name:<14} {r.method:<9} {shape:<15} {r.rank:>4}  {r.path:<6} {r.reason}")
        return "\n".join(lines)
