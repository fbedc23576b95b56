"""CURLoRA: delta = alpha * C @ U @ R, C and R frozen columns and rows of the weight (Fawi, arXiv 2408.14572)."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..adapter import Adapter, Site, adapter_dtype, generator_of, whole
from ..penalties import Penalty
from .base import Method, register


@register
@dataclass(frozen=True)
class CURLoRA(Method):
    """Only U (rank, rank), zero at the start, is trained; the update stays in the span of weak columns and rows.

    Fawi, arXiv 2408.14572: delta = alpha * C U R with C (N, rank) columns and R (rank, K) rows of the frozen weight.
    The norm of U in its Eq. 11 is not a term of the loss, here as in the author's code: ``Decay`` is one.

    Conventions of the author's code: columns, then rows, are drawn with replacement, with probability proportional
    to 1 / (p + smoothing), p their share of the squared Frobenius norm; duplicates stay as they are; ``alpha`` is the
    factor itself, not divided by the rank. The paper's text has smoothing 0. Unlike there, columns and rows of zeros,
    through which nothing could be learnt, are never drawn.

    Args:
        rank: columns and rows drawn.
        alpha: factor of the update.
        smoothing: 1e-3 in the author's code; 0 is the paper's formula.
        seed: draws are a function of (seed, layer name) and the weight.
        penalties: what else to add to the loss.

    Raises:
        ValueError: a field is of another type or out of range.
    """

    rank: int = 16
    alpha: float = 1.0
    smoothing: float = 1e-3
    seed: int = 0
    penalties: tuple[Penalty, ...] = ()

    name: ClassVar[str] = "curlora"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.smoothing < float("inf"):
            raise ValueError(f"CURLoRA.smoothing is {self.smoothing!r}, wants a number >= 0")

    def build(self, site: Site) -> Adapter:
        if site.weight.is_meta:
            raise ValueError(
                f"weight of {site.name} is on the meta device; CURLoRA is drawn from its values: load them first"
            )
        if not torch.isfinite(site.weight).all():
            raise ValueError(f"the weight of {site.name} holds NaN or Inf; CURLoRA cannot be drawn from it")
        if not site.weight.any():
            raise ValueError(f"the weight of {site.name} is all zeros: CURLoRA could learn nothing there; exclude it")
        stored = site.weight.T if site.transposed else site.weight
        generator = generator_of(self.seed, site.name)
        columns = draw(stored.detach(), self.rank, self.smoothing, generator)
        rows = draw(stored.detach().T, self.rank, self.smoothing, generator)
        return CURLoRAAdapter(site, rows, columns, self.alpha)


def draw(
    weight: Tensor,  # (rows, columns)
    rank: int,
    smoothing: float,
    generator: torch.Generator,
) -> Tensor:  # (rank,) int64
    """Column indices of ``weight``, with replacement, the weaker the likelier; none of zeros."""
    columns = weight.cpu().to(torch.float64)
    squares = columns.square().sum(0)
    share = squares / squares.sum().clamp(min=torch.finfo(torch.float64).tiny)
    odds = 1.0 / (share + smoothing).clamp(min=1e-12)  # a column of next to nothing is likeliest, not infinite
    odds *= columns.any(0)
    return torch.multinomial(odds / odds.sum(), rank, replacement=True, generator=generator)


class CURLoRAAdapter(Adapter):
    """``core`` is U. ``rows`` and ``columns`` index the weight as the layer stores it (Conv1D: transposed).

    C and R are copies of the weight of the start: they are rebuilt from the indices, never saved, and survive
    ``fl.merge``. For a Conv1D, which stores W^T, delta^T = alpha * C U R, so that here up = R^T U^T, down = C^T.
    """

    has_core = True
    rows: Tensor
    columns: Tensor
    down: Tensor
    lift: Tensor

    def __init__(self, site: Site, rows: Tensor, columns: Tensor, alpha: float):
        super().__init__()
        self.scale = float(alpha)
        self.transposed = site.transposed
        weight = site.weight.detach()
        device = weight.device
        rank = rows.numel()
        self.core = nn.Parameter(torch.zeros(rank, rank, dtype=adapter_dtype(weight), device=device))
        self.register_buffer("rows", rows.to(device))
        self.register_buffer("columns", columns.to(device))
        self.register_buffer("down", torch.empty(0), persistent=False)
        self.register_buffer("lift", torch.empty(0), persistent=False)
        #: of the weight C and R were taken from, once that has been changed by folding
        self.weight_sha256: str | None = None
        self.gather(weight)

    def gather(self, weight: Tensor) -> None:
        """Copy C and R out of ``weight`` (N, K)."""
        self.down = weight[self.into].contiguous()  # (R, K)
        self.lift = weight[:, self.out_of].t().contiguous().t()  # (N, R), of which every product reads the transpose

    @property
    def into(self) -> Tensor:
        """Indices of ``down`` among the rows of the weight as (N, K)."""
        return self.columns if self.transposed else self.rows

    @property
    def out_of(self) -> Tensor:
        """Indices of ``lift`` among its columns."""
        return self.rows if self.transposed else self.columns

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        for name in ("rows", "columns"):
            theirs = state_dict.get(prefix + name)
            if theirs is not None and not torch.equal(theirs.cpu(), getattr(self, name).cpu()):
                args[-1].append(
                    f"{prefix}{name}: other {name} than this adapter's; draw with the same seed, or fl.load"
                )
                return
        super()._load_from_state_dict(state_dict, prefix, *args)

    @torch.no_grad()
    def restart(self, site: Site) -> None:
        self.core.zero_()  # C and R stay those of the first weight

    def factors(self) -> tuple[Tensor, Tensor]:
        down, up, core = self.parts()
        return down, up.to(core.dtype) @ core

    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        core = whole(self.core)
        return self.down, self.lift, core.T if self.transposed else core

    def pullback(self, ddown: Tensor, dup: Tensor) -> dict[str, Tensor]:
        core = self.lift.to(dup.dtype).T @ dup
        return {"core": core.transpose(-1, -2) if self.transposed else core}


def weight_hash(weight: Tensor) -> str:
    """SHA-256 of a weight's dtype, shape and bytes, row-major: C and R only mean something on the same weight."""
    data = weight.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{data.dtype} {tuple(data.shape)}".encode())
    digest.update(data.view(torch.uint8).numpy().tobytes() if data.numel() else b"")
    return digest.hexdigest()
