"""What is measured: our layers and models, PEFT's own code, and the schedules of others, rewritten by us.

Every layer here is y = x W^T + b + scale * (drop(x) A^T) B^T with A = down (R, K) and B = up (N, R), or CURLoRA's
dense form of it. ``tests/benchmarks`` proves each equal to ``forgetless.ops.reference``. "-style" means: the order of
operations and what is saved are the named project's, the code is ours.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import forgetless as fl

from .harness import FROZEN, OURS, PEFT

#: The rank of the whole models, alpha, and the width of CLoRA's subspace.
RANK, ALPHA, K = 16, 32, 256


def have_peft() -> bool:
    return find_spec("peft") is not None


#: The note of a comparison without PEFT's rows.
NO_PEFT = [] if have_peft() else ["PEFT is not installed: its rows are missing; pip install 'forgetless[bench]'"]


# ---------------------------------------------------------------------------------------- one layer


class Baseline(nn.Module):
    """A frozen linear layer and two factors in the dtype that ours and PEFT's are trained in, float32 at least."""

    def __init__(self, base: nn.Linear, down: Tensor, up: Tensor, scale: float, dropout: float = 0.0):
        super().__init__()
        self.weight, self.bias = base.weight, base.bias  # (N, K), (N,) or None
        self.down = nn.Parameter(down.detach().clone())  # (R, K)
        self.up = nn.Parameter(up.detach().clone())  # (N, R)
        self.scale, self.dropout = scale, dropout


class Eager(Baseline):
    def forward(self, x: Tensor) -> Tensor:
        y = functional.linear(x, self.weight, self.bias)
        h = functional.linear(functional.dropout(x, self.dropout, self.training), self.down.to(x.dtype))
        return y + functional.linear(h, self.up.to(x.dtype)) * self.scale


class SplitFunction(torch.autograd.Function):
    """The graph cut at S = drop(x) A^T: the big product accumulates onto S B^T, and dx onto dS A.

    Factors that are wider than x are cast once for both passes, and get gradients of their own dtype, as ours do.
    Saved: the dropped copy of x, the mask in bytes, S, the factors as they were cast.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float, p: float
    ) -> Tensor:
        mask = None
        dropped = x
        if p > 0.0:
            dropped, mask = torch.native_dropout(x, p, True)
        ctx.rest = scale, p, down.dtype, up.dtype
        down, up = down.to(x.dtype), up.to(x.dtype)
        S = (dropped @ down.T).mul_(scale)
        y = (S @ up.T).addmm_(x, weight.T)
        if bias is not None:
            y += bias
        ctx.save_for_backward(dropped, mask, weight, down, up, S)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dropped, mask, weight, down, up, S = ctx.saved_tensors
        scale, p, down_dtype, up_dtype = ctx.rest
        dS = (dy @ up).mul_(scale)
        dup = dy.T @ S
        dx = dS @ down
        if mask is not None:
            dx.mul_(mask).mul_(1.0 / (1.0 - p))
        dx.addmm_(dy, weight)
        return dx, None, None, (dS.T @ dropped).to(down_dtype), dup.to(up_dtype), None, None


class Split(Baseline):
    """LoRAFusion's split in some twenty lines of PyTorch."""

    def forward(self, x: Tensor) -> Tensor:
        p = self.dropout if self.training else 0.0
        return SplitFunction.apply(x, self.weight, self.bias, self.down, self.up, self.scale, p)


class CurloraAuthors(nn.Module):
    """The authors' forward: C U R as a dense (N, K) matrix, every time. U has the layer's dtype (theirs: float32)."""

    C: Tensor
    R: Tensor

    def __init__(self, base: nn.Linear, rows: Tensor, columns: Tensor, alpha: float = 1.0):
        super().__init__()
        self.base = base
        self.register_buffer("C", base.weight.detach()[:, columns])  # (N, R)
        self.register_buffer("R", base.weight.detach()[rows])  # (R, K)
        self.U = nn.Parameter(base.weight.new_zeros(rows.numel(), rows.numel()))
        self.alpha = alpha

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.alpha * (x @ (self.C @ self.U @ self.R).t())


def frozen_linear(N: int, K: int, bias: bool, dtype: torch.dtype, device: torch.device) -> nn.Linear:
    base = nn.Linear(K, N, bias, device=device, dtype=torch.promote_types(dtype, torch.float32))
    return base.to(dtype).requires_grad_(False)


def random_factors(base: nn.Linear, R: int) -> tuple[Tensor, Tensor]:
    """down (R, K) and up (N, R) in float32 or float64, both away from zero: products of zeros cost some chips less."""
    options: Any = {"device": base.weight.device, "dtype": torch.promote_types(base.weight.dtype, torch.float32)}
    down = torch.randn(R, base.in_features, **options) / base.in_features**0.5
    return down, torch.randn(base.out_features, R, **options) / R**0.5


def peft_layer(base: nn.Linear, down: Tensor, up: Tensor, scale: float, dropout: float, autocast: bool) -> nn.Module:
    """PEFT's own layer. ``autocast``: its default, float32 adapters; else in the layer's dtype."""
    import peft

    R = down.shape[0]
    alpha: Any = scale * R  # PEFT's annotation says int
    config = peft.LoraConfig(r=R, lora_alpha=alpha, lora_dropout=dropout, target_modules=["layer"])
    model: Any = peft.PeftModel(nn.ModuleDict({"layer": base}), config, autocast_adapter_dtype=autocast)
    result = model.base_model.model["layer"]
    with torch.no_grad():
        result.lora_A["default"].weight.copy_(down)
        result.lora_B["default"].weight.copy_(up)
    return result.train()


def lora_layer(base: nn.Linear, down: Tensor, up: Tensor, scale: float, dropout: float) -> nn.Module:
    """Our layer as ``fl.adapt`` makes it."""
    R = down.shape[0]
    method = fl.LoRA(R, scale * R, dropout)
    layer: Any = fl.adapt(nn.ModuleDict({"layer": base}), method, ["layer"]).get_submodule("layer")
    with torch.no_grad():
        layer.adapter.down.copy_(down)
        layer.adapter.up.copy_(up)
    return layer.train()


def lora_layers(
    base: nn.Linear, down: Tensor, up: Tensor, scale: float, dropout: float, compiled: bool = False
) -> dict[str, Callable[[], nn.Module]]:
    """How each provider makes one LoRA layer; the frozen layer first."""
    factors = (base, down, up, scale, dropout)
    layers: dict[str, Callable[[], Any]] = {
        FROZEN: lambda: base,
        OURS: lambda: lora_layer(*factors),
        "eager PyTorch": lambda: Eager(*factors),
        "LoRAFusion-style": lambda: Split(*factors),
    }
    if compiled:
        layers["torch.compile"] = lambda: torch.compile(Eager(*factors))
    if have_peft():
        layers[PEFT] = lambda: peft_layer(*factors, autocast=True)
        dtype = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(base.weight.dtype)
        if dtype:
            layers[f"PEFT, {dtype} adapters"] = lambda: peft_layer(*factors, autocast=False)
    return layers


def curlora_layers(base: nn.Linear, R: int) -> dict[str, Callable[[], nn.Module]]:
    """The frozen layer, ours and the authors', on the same rows and columns with the same U."""
    wide = torch.promote_types(base.weight.dtype, torch.float32)
    core = torch.randn(R, R, dtype=wide, device=base.weight.device) / R
    ours: Any = fl.adapt(nn.ModuleDict({"layer": base}), fl.CURLoRA(R), ["layer"]).get_submodule("layer")
    theirs = CurloraAuthors(base, ours.adapter.rows, ours.adapter.columns)
    with torch.no_grad():
        ours.adapter.core.copy_(core)
        theirs.U.copy_(core)
    return {FROZEN: lambda: base, OURS: lambda: ours.train(), "authors' CURLoRA": lambda: theirs.train()}


# -------------------------------------------------------------------------------------- whole models


class CloraAuthors:
    """The authors' penalty: module by module, 1/2 ||A v||^2 + 1/2 ||B^T u||^2, with stored u and v, by autograd.

    Their products run under autocast where the bases are half precision: the factors are cast, the squares are float32.
    """

    def __init__(
        self, factors: Sequence[tuple[Tensor, Tensor]], bases: Sequence[tuple[Tensor, Tensor]], weight: float = 1.0
    ):
        self.factors, self.bases, self.weight = factors, bases, weight

    @classmethod
    def drawn(cls, factors: Sequence[tuple[Tensor, Tensor]], k: int, dtype: torch.dtype) -> CloraAuthors:
        def basis(n: int) -> Tensor:
            return nn.init.orthogonal_(torch.empty(n, k)).to(factors[0][0].device, dtype)

        return cls(factors, [(basis(down.shape[1]), basis(up.shape[0])) for down, up in factors])

    def __call__(self) -> Tensor:
        total = self.factors[0][0].new_zeros(())
        for (down, up), (v, u) in zip(self.factors, self.bases, strict=True):
            for product in (down.to(v.dtype) @ v, up.to(u.dtype).T @ u):
                wide = torch.promote_types(product.dtype, torch.float32)
                total = total + 0.5 * product.to(wide).pow(2).sum()
        return self.weight * total

    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for pair in self.bases for t in pair)


def smollm2(device: torch.device, smoke: bool = False) -> tuple[Any, str]:
    """SmolLM2-135M in bfloat16, frozen, and what it is; without its package, the same sizes and random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: Any = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads: Any = {"num_attention_heads": 2, "num_key_value_heads": 1}
    name = "a toy model"
    if not smoke:
        from forgetless.study.models import load_model
        from forgetless.study.packages import MissingPackage

        try:
            return load_model(device=device)[0].requires_grad_(False), "SmolLM2-135M"
        except MissingPackage:
            sizes = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
            heads = {"num_attention_heads": 9, "num_key_value_heads": 3}
            name = "SmolLM2-135M's sizes, random weights"
    config: Any = LlamaConfig(**sizes, **heads, tie_word_embeddings=True, bos_token_id=None, eos_token_id=0)
    config._attn_implementation = "eager"
    model: Any = LlamaForCausalLM(config)
    return model.to(device, torch.bfloat16).requires_grad_(False).eval(), name


def twin(base: nn.Module) -> Any:
    """Another module tree over the same weights, to be adapted on its own."""
    shared: dict[int, Any] = {id(t): t for t in (*base.parameters(), *base.buffers())}
    return copy.deepcopy(base, shared)


def adapted(base: nn.Module, method: Any) -> Any:
    return fl.adapt(twin(base), method).train()


def lora_model(base: nn.Module, dropout: float, penalties: tuple[Any, ...] = (), rank: int = RANK) -> Any:
    return adapted(base, fl.LoRA(rank, ALPHA, dropout, penalties=penalties))


def peft_model(base: nn.Module, dropout: float, autocast: bool = True) -> Any:
    """PEFT's LoRA with its defaults, float32 adapters beside a bfloat16 base, or with adapters in bfloat16."""
    import peft

    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=dropout, target_modules="all-linear")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft and transformers about each other
        return peft.PeftModel(twin(base), config, autocast_adapter_dtype=autocast).train()


def authors_clora(model: nn.Module, k: int = K) -> CloraAuthors:
    """The authors' penalty on a PEFT model."""
    layers: list[Any] = [m for m in model.modules() if isinstance(getattr(m, "lora_A", None), nn.ModuleDict)]
    pairs = [(m.lora_A["default"].weight, m.lora_B["default"].weight) for m in layers]
    return CloraAuthors.drawn(pairs, k, torch.bfloat16)


def authors_curlora(base: nn.Module) -> Any:
    """The authors' layers, on the rows and columns that ours drew."""
    model = adapted(base, fl.CURLoRA(RANK))
    layers: dict[str, Any] = fl.adapters(model)
    for name, layer in layers.items():
        model.set_submodule(name, CurloraAuthors(layer.base, layer.adapter.rows, layer.adapter.columns))
    return model.train()


def models(dropouts: Sequence[float], curlora: bool = True) -> dict[str, Callable[[Any], Any]]:
    """name -> base model to adapted model, for LoRA with each dropout and for CURLoRA; the frozen model first."""
    result: dict[str, Callable[[Any], Any]] = {FROZEN: lambda base: twin(base).train()}
    for p in dropouts:
        result[f"{OURS}, dropout {p:g}"] = partial(lora_model, dropout=p)
        if have_peft():
            result[f"{PEFT}, dropout {p:g}"] = partial(peft_model, dropout=p)
            result[f"{PEFT} bf16 adapters, dropout {p:g}"] = partial(peft_model, dropout=p, autocast=False)
    if curlora:
        result |= {f"{OURS} CURLoRA": lambda base: adapted(base, fl.CURLoRA(RANK)), "authors' CURLoRA": authors_curlora}
    return result


def step(model: Any, inputs: Tensor, labels: Tensor, penalty: Callable[[], Tensor] | None = None) -> Callable[[], None]:
    """Forward and backward, input gradients included, as in the middle of a deeper model."""

    def run() -> None:
        x = inputs.detach().requires_grad_(True)
        loss = model(inputs_embeds=x, labels=labels).loss
        if penalty is not None:
            loss = loss + penalty()
        loss.backward()
        model.zero_grad(set_to_none=True)

    return run


def batch(base: Any, sequences: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Input embeddings and token ids of random text."""
    device = next(base.parameters()).device
    ids = torch.randint(0, base.config.vocab_size, (sequences, tokens), device=device)
    return base.get_input_embeddings()(ids).detach(), ids
