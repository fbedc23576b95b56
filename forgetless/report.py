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
    """Layer name -> LayerReport; prints as a table with like layers in one row, and what is not adapted below it.

    Attributes:
        passed_over: name of a weight that no adapter sits on -> its share of the model's weights, the largest first;
            like layers under one name. Empty for a model of PEFT.
    """

    passed_over: dict[str, float]

    def __init__(self, layers: dict[str, LayerReport], passed_over: dict[str, float]):
        super().__init__(layers)
        self.passed_over = passed_over

    def __str__(self) -> str:
        rows: dict[tuple[str, LayerReport], int] = {}
        for name, report in self.items():
            key = (name.rpartition(".")[2], report)
            rows[key] = rows.get(key, 0) + 1
        lines = [f"{'layers':>6}  {'name':<14} {'method':<9} {'in -> out':<15} {'rank':>4}  path   why"]
        for (name, r), count in rows.items():
            shape = f"{r.in_features} -> {r.out_features}"
            lines.append(f"{count:>6}  {name:<14} {r.method:<9} {shape:<15} {r.rank:>4}  {r.path:<6} {r.reason}")
        if self.passed_over:
            lines.append(
                f"not adapted, {sum(self.passed_over.values()):.1%} of the weights: {listed(self.passed_over)}"
            )
        return "\n".join(lines)


def listed(shares: dict[str, float], most: int | None = None) -> str:
    """ "model.embed_tokens.weight 25.0%, .. and 3 more"."""
    names = [f"{name} {share:.1%}" for name, share in shares.items()]
    left = len(names[most:]) if most else 0
    return ", ".join(names[:most]) + (f" and {left} more" if left else "")
