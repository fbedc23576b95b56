"""What we are measured against: the peers' own code where it can be installed, else their schedule, rewritten by us.

Every layer here is y = x W^T + b + scale * (drop(x) A^T) B^T with A = down (R, K) and B = up (N, R), or CURLoRA's
dense form of it; ``tests/benchmarks/test_bench.py`` proves each equal to ``forgetless.ops.reference``. "-style" means:
the order of operations and what is saved are the named project's, the code is ours, the products run on this
machine's BLAS.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import forgetless as fl


class Baseline(nn.Module):
    """A frozen linear layer and the two factors, in ``dtype`` (default: that of the layer)."""

    down: nn.Parameter
    up: nn.Parameter

    def __init__(
        self,
        base: nn.Linear,
        down: Tensor,  # (R, K)
        up: Tensor,  # (N, R)
        scale: float,
        dropout: float = 0.0,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.weight = nn.Parameter(base.weight.detach(), requires_grad=False)
        self.bias = None if base.bias is None else nn.Parameter(base.bias.detach(), requires_grad=False)
        self.down = nn.Parameter(down.detach().clone().to(dtype or base.weight.dtype))
        self.up = nn.Parameter(up.detach().clone().to(dtype or base.weight.dtype))
        self.scale, self.dropout = scale, dropout


class Eager(Baseline):
    """LoRA as anyone writes it; the adapter in the layer's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        y = functional.linear(x, self.weight, self.bias)
        h = functional.linear(functional.dropout(x, self.dropout, self.training), self.down)
        return y + functional.linear(h, self.up) * self.scale


class PeftFormula(Baseline):
    """PEFT's LoRA forward with its defaults: float32 adapters, so x is copied to float32. For machines without PEFT."""

    def __init__(self, base: nn.Linear, down: Tensor, up: Tensor, scale: float, dropout: float = 0.0):
        super().__init__(base, down, up, scale, dropout, torch.promote_types(base.weight.dtype, torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        y = functional.linear(x, self.weight, self.bias)
        x = functional.dropout(x.to(self.down.dtype), self.dropout, self.training)
        return (y + functional.linear(functional.linear(x, self.down), self.up) * self.scale).to(y.dtype)


def peft_layer(base: nn.Linear, down: Tensor, up: Tensor, scale: float, dropout: float, autocast: bool) -> nn.Module:
    """PEFT's own layer. ``autocast``: its default, float32 adapters; else in the layer's dtype."""
    import peft

    holder = nn.Module()
    holder.layer = nn.Linear(base.in_features, base.out_features, base.bias is not None, device="meta")
    holder.layer.weight, holder.layer.bias = base.weight, base.bias
    R = down.shape[0]
    config = peft.LoraConfig(r=R, lora_alpha=scale * R, lora_dropout=dropout, target_modules=["layer"])
    layer = peft.PeftModel(holder, config, autocast_adapter_dtype=autocast).base_model.model.layer
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(down)
        layer.lora_B["default"].weight.copy_(up)
    return layer.train()


def have_peft() -> bool:
    return find_spec("peft") is not None


class _Unsloth(torch.autograd.Function):
    """Saves x alone; adds the low-rank term in place after the big product; recomputes x A^T and dy B."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float):
        A, B = down.to(x.dtype), up.to(x.dtype)
        y = functional.linear(x, weight, bias).addmm_(x @ A.T, B.T, alpha=scale)
        ctx.save_for_backward(x, weight, A, B)
        ctx.rest = scale, down.dtype, up.dtype
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor):
        x, weight, A, B = ctx.saved_tensors
        scale, down_dtype, up_dtype = ctx.rest
        ddown = ((dy @ B).T @ x).mul_(scale)
        dup = (dy.T @ (x @ A.T)).mul_(scale)
        dx = (dy @ weight).addmm_(dy @ B, A, alpha=scale)
        return dx, None, None, ddown.to(down_dtype), dup.to(up_dtype), None


class UnslothStyle(Baseline):
    """Unsloth's LoRA_W: its fast path has no dropout, so neither has this."""

    def forward(self, x: Tensor) -> Tensor:
        assert self.dropout == 0.0
        return _Unsloth.apply(x, self.weight, self.bias, self.down, self.up, self.scale)


class _LoRAFusion(torch.autograd.Function):
    """The graph cut at S = drop(x) A^T: the big product accumulates onto S B^T, and dx onto dS A.

    Stored: the dropped copy of x, the mask in bytes, S. Its kernels do (dS, dB) in one pass over dy; BLAS takes two.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float, p: float
    ):
        mask = None
        dropped = x
        if p > 0.0:
            dropped, mask = torch.native_dropout(x, p, True)
        S = (dropped @ down.T).mul_(scale)
        y = (S @ up.T).addmm_(x, weight.T)
        if bias is not None:
            y += bias
        ctx.save_for_backward(dropped, mask, weight, down, up, S)
        ctx.rest = scale, p
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor):
        dropped, mask, weight, down, up, S = ctx.saved_tensors
        scale, p = ctx.rest
        dS = (dy @ up).mul_(scale)
        dup = dy.T @ S
        dx = dS @ down
        if mask is not None:
            dx.mul_(mask).mul_(1.0 / (1.0 - p))
        dx.addmm_(dy, weight)
        return dx, None, None, dS.T @ dropped, dup, None, None


class LoRAFusionStyle(Baseline):
    """LoRAFusion's split; all tensors of one dtype, as there."""

    def forward(self, x: Tensor) -> Tensor:
        p = self.dropout if self.training else 0.0
        return _LoRAFusion.apply(x, self.weight, self.bias, self.down, self.up, self.scale, p)


class Products:
    """The eight matrix products of a LoRA layer's forward and backward and nothing else: no autograd, module or check.

    Straight calls on tensors of the layer's dtype, in the order of our BLAS path; ``scale`` is folded into ``up``
    beforehand, so the last gradient is that of scale * up. Whoever makes these calls on this BLAS takes as long.

    Raises:
        ValueError: the base layer has a bias.
    """

    def __init__(self, base: nn.Linear, down: Tensor, up: Tensor, scale: float, x: Tensor, dy: Tensor):
        if base.bias is not None:
            raise ValueError("base: has a bias, wants a layer without one")
        dtype = base.weight.dtype
        self.x, self.dy, self.weight = x.detach(), dy, base.weight.detach()  # (M, K), (M, N), (N, K)
        self.down, self.up = down.detach().to(dtype), (scale * up.detach()).to(dtype)  # (R, K), (N, R)
        self.weight_t, self.down_t, self.up_t, self.dy_t = (t.t() for t in (self.weight, self.down, self.up, dy))
        self.h: Tensor | None = None
        self.y: Tensor | None = None

    def forward(self) -> None:
        self.h = torch.mm(self.x, self.down_t)
        self.y = torch.mm(self.h, self.up_t).addmm_(self.x, self.weight_t)

    def backward(self) -> tuple[Tensor, Tensor, Tensor]:
        """dx, ddown, and the gradient of scale * up."""
        g = torch.mm(self.dy, self.up)
        dup = torch.mm(self.dy_t, self.h)
        dx = torch.mm(g, self.down).addmm_(self.dy, self.weight)
        ddown = torch.mm(g.t(), self.x)
        self.h = self.y = None
        return dx, ddown, dup

    def both(self) -> tuple[Tensor, Tensor, Tensor]:
        self.forward()
        return self.backward()


class CurloraAuthors(nn.Module):
    """The authors' forward: C U R as a dense (N, K) matrix, every time. U has the layer's dtype (theirs: float32)."""

    def __init__(self, base: nn.Linear, rows: Tensor, columns: Tensor, alpha: float = 1.0):
        super().__init__()
        self.base = base
        self.register_buffer("C", base.weight.detach()[:, columns])  # (N, R)
        self.register_buffer("R", base.weight.detach()[rows])  # (R, K)
        self.U = nn.Parameter(base.weight.new_zeros(rows.numel(), rows.numel()))
        self.alpha = alpha

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.alpha * (x @ (self.C @ self.U @ self.R).t())


class CloraAuthors:
    """The authors' penalty: module by module, 1/2 ||A v||^2 + 1/2 ||B^T u||^2, with stored u and v, by autograd.

    Their products run under autocast where the bases are half precision: the factors are cast, the squares are float32.
    """

    def __init__(self, factors: list[tuple[Tensor, Tensor]], bases: list[tuple[Tensor, Tensor]], weight: float = 1.0):
        self.factors, self.bases, self.weight = factors, bases, weight

    @classmethod
    def drawn(cls, factors: list[tuple[Tensor, Tensor]], k: int, dtype: torch.dtype) -> CloraAuthors:
        bases = []
        for down, up in factors:
            pair = [nn.init.orthogonal_(torch.empty(n, k)) for n in (down.shape[1], up.shape[0])]
            bases.append(tuple(t.to(down.device, dtype) for t in pair))
        return cls(factors, bases)

    def __call__(self) -> Tensor:
        total = self.factors[0][0].new_zeros(())
        for (down, up), (v, u) in zip(self.factors, self.bases, strict=True):
            total = total + 0.5 * _wide(down.to(v.dtype) @ v).pow(2).sum()
            total = total + 0.5 * _wide(up.to(u.dtype).T @ u).pow(2).sum()
        return self.weight * total

    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for pair in self.bases for t in pair)


def _wide(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()


# --------------------------------------------------------------------------------------- providers


def random_factors(base: nn.Linear, R: int) -> tuple[Tensor, Tensor]:
    """down and up in float32 (float64), both away from zero: zeros would be too easy a product for some chips."""
    wide = torch.promote_types(base.weight.dtype, torch.float32)
    K, N = base.in_features, base.out_features
    device = base.weight.device
    down = torch.randn(R, K, device=device, dtype=wide) / K**0.5
    return down, torch.randn(N, R, device=device, dtype=wide) / R**0.5


def frozen_linear(N: int, K: int, bias: bool, dtype: torch.dtype, device: torch.device) -> nn.Linear:
    base = nn.Linear(K, N, bias, device=device, dtype=torch.promote_types(dtype, torch.float32))
    return base.to(dtype).requires_grad_(False)


def our_lora(base: nn.Linear, down: Tensor, up: Tensor, scale: float, dropout: float) -> nn.Module:
    """Our layer as ``fl.adapt`` makes it."""
    R = down.shape[0]
    layer = _adapted(base, fl.LoRA(R, scale * R, dropout))
    with torch.no_grad():
        layer.adapter.down.copy_(down)
        layer.adapter.up.copy_(up)
    return layer.train()


def our_curlora(base: nn.Linear, R: int, core: Tensor) -> nn.Module:
    layer = _adapted(base, fl.CURLoRA(R))
    with torch.no_grad():
        layer.adapter.core.copy_(core)
    return layer.train()


def _adapted(base: nn.Linear, method: Any) -> Any:
    holder = nn.Module()
    holder.layer = base
    return fl.adapt(holder, method, ["layer"]).layer


def lora_layers(
    base: nn.Linear, down: Tensor, up: Tensor, scale: float, dropout: float, compiled: bool = False
) -> dict[str, nn.Module]:
    """Every way of computing one LoRA layer that this machine has; the frozen layer first."""
    half = base.weight.dtype in (torch.bfloat16, torch.float16)
    factors = (base, down, up, scale, dropout)
    layers: dict[str, Callable[[], nn.Module]] = {
        "frozen": lambda: base,
        "forgetless": lambda: our_lora(*factors),
        "eager PyTorch": lambda: Eager(*factors),
    }
    if compiled:
        layers["torch.compile"] = lambda: torch.compile(Eager(*factors))  # type: ignore[return-value]
    if have_peft():
        layers["PEFT"] = lambda: peft_layer(*factors, autocast=True)
        if half:
            layers[f"PEFT, {_short(base.weight.dtype)} adapters"] = lambda: peft_layer(*factors, autocast=False)
    else:
        layers["PEFT's formula"] = lambda: PeftFormula(*factors)
    if dropout == 0.0:
        wide = down.dtype
        layers["Unsloth-style"] = lambda: UnslothStyle(*factors, wide)
    layers["LoRAFusion-style"] = lambda: LoRAFusionStyle(*factors)
    return {name: make().train() for name, make in layers.items()}


def curlora_layers(base: nn.Linear, R: int) -> dict[str, nn.Module]:
    """The frozen layer, ours and the authors', on the same rows and columns with the same U."""
    wide = torch.promote_types(base.weight.dtype, torch.float32)
    core = torch.randn(R, R, dtype=wide, device=base.weight.device) / R
    ours = our_curlora(base, R, core)
    theirs = CurloraAuthors(base, ours.adapter.rows, ours.adapter.columns)
    with torch.no_grad():
        theirs.U.copy_(core)
    return {"frozen": base, "forgetless": ours, "authors' CURLoRA": theirs.train()}


def _short(dtype: torch.dtype) -> str:
    return {"bfloat16": "bf16", "float16": "fp16"}.get(str(dtype).removeprefix("torch."), str(dtype))
