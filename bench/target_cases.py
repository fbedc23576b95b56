"""What ``bench targets`` compiles: every launcher on operands of every kind that a kernel has code for.

The layer has M=8192, N=K=4096, bfloat16 activations and float32 factors unless a case says otherwise. Tensors have no
storage.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import torch

from forgetless.ops import grouped
from forgetless.ops.rows import More, Rows, Term
from forgetless_kernels import fused, launcher

M, N, K = 8192, 4096, 4096


@dataclasses.dataclass(frozen=True)
class Case:
    """One call to compile: a launcher with operands of some kind"""

    name: str
    R: int
    dtype: str = "bfloat16"
    default_tile: bool = False

    def __str__(self) -> str:
        return f"{self.name} R={self.R} {self.dtype}" + (" default tile" if self.default_tile else "")


def calls(R: int, dtype: torch.dtype) -> dict[str, tuple[str, Callable[[], object]]]:
    """Name: (the kernel's tile row, the call), on operands without storage and factors in float32"""

    def on(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    factor = torch.float32
    x, dy, weight, h = on(M, K), on(M, N), on(N, K), on(M, R)
    down, up, seed = on(R, K, dtype=factor), on(N, R, dtype=factor), on(2, dtype=torch.int32)
    small, narrow = on(M, N // 4), on(N // 4, K)  # of k and v beside q
    odd_x, odd_weight = on(M, K + 4)[:, 1 : K - 3], on(N, K + 4)[:, 1 : K - 3]  # not 16-byte aligned, K not even
    odd_down, bias = on(R, K - 4, dtype=factor), on(N)
    return {
        "project": ("project", lambda: fused.project(x, down)),
        "project dropout": ("project", lambda: fused.project(x, down, 1.0, 0.1, seed)),
        "project ragged": ("project", lambda: fused.project(odd_x, odd_down)),
        "project dy": ("project", lambda: fused.project(dy, up.T)),
        "forward": ("matmul_lowrank", lambda: fused.matmul_lowrank(x, weight, h, up)),
        "forward by columns": (
            "matmul_lowrank", lambda: fused.matmul_lowrank(x, weight, h, on(R, N, dtype=factor).T),
        ),
        "forward bias": ("matmul_lowrank", lambda: fused.matmul_lowrank(x, weight, h, up, bias)),
        "forward ragged": ("matmul_lowrank", lambda: fused.matmul_lowrank(odd_x, odd_weight, h, up)),
        "dx": ("matmul_lowrank_t", lambda: fused.matmul_lowrank(dy, weight.T, h, down.T)),
        "dx dropout": ("matmul_lowrank_t", lambda: fused.matmul_lowrank(dy, weight.T, h, down.T, None, 0.1, seed)),
        "dx ragged": ("matmul_lowrank_t", lambda: fused.matmul_lowrank(dy, odd_weight.T, h, odd_down.T)),
        "dx siblings": (
            "matmul_lowrank_t",
            lambda: fused.dx_and_ddown([dy, small, small], [weight, narrow, narrow], on(M, 3 * R), [down] * 3, None),
        ),
        **alike(x, dy, weight, h),
        **cored(x, dy, weight, h, odd_x),
        # where Triton compiles no such rows (3.6), fl.penalty computes its terms apart and nothing launches these
        **(penalised(x, dy, h, down, up) if launcher.TAKES_ROWS else {}),
        **experts(R, dtype),
        "mask": ("mask", lambda: fused.keep_bits(seed, 0.1, M, K)),
        "outer": ("outer", lambda: fused.outer(h, x, dtype=factor)),
        "outer dropout": ("outer", lambda: fused.outer(h, x, 0.1, seed, factor)),
        "sweep": ("project_outer", lambda: fused.project_outer(dy, up, h, 1.0, factor)),
        **{
            f"{plan}{' dropout' if p else ''}": (
                plan,
                functools.partial(fused.linear_lowrank, x, weight, down, up, None, 1.0, p, seed, plan=plan),
            )
            for plan in ("full", "once")
            for p in (0.0, 0.1)
        },
        **{
            f"{plan} dx dropout": (
                plan,
                functools.partial(
                    fused.linear_lowrank, dy, weight.T, up.T, down.T, None, 1.0, 0.1, seed, drop_output=True, plan=plan
                ),
            )
            for plan in ("full", "once")
        },
    }  # fmt: skip


def cored(
    x: torch.Tensor, dy: torch.Tensor, weight: torch.Tensor, h: torch.Tensor, odd_x: torch.Tensor
) -> dict[str, tuple[str, Callable[[], object]]]:
    """CURLoRA's passes: frozen factors in the activations' dtype, and a core in float32"""

    def on(*shape: int, dtype: torch.dtype = x.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    R, row = h.shape[1], "project"
    down, up, core, seed = on(R, K), on(R, N).T, on(R, R, dtype=torch.float32), on(2, dtype=torch.int32)
    project, back = fused.project_core, fused.project_core_outer
    return {
        "core": (row, lambda: project(x, [down], [core])),
        "core dropout": (row, lambda: project(x, [down], [core], 1.0, 0.1, seed)),
        "core ragged": (row, lambda: project(odd_x, [on(R, K - 4)], [core])),
        "core siblings": (row, lambda: project(x, [down] * 3, [core] * 3)),
        "core forward": ("matmul_lowrank", lambda: fused.matmul_lowrank(x, weight, h, up)),
        "core backward": (row, lambda: back(dy, up, core, h, 1.0, torch.float32)),
        "core backward frozen": (row, lambda: back(dy, up, core, None)),
    }


def alike(
    x: torch.Tensor, dy: torch.Tensor, weight: torch.Tensor, h: torch.Tensor
) -> dict[str, tuple[str, Callable[[], object]]]:
    """The passes of a layer whose factors have the activations' dtype, as in a model that is bfloat16 throughout"""
    R, seed = h.shape[1], torch.empty(2, dtype=torch.int32, device="meta")
    down, up = x.new_empty(R, K), x.new_empty(N, R)
    made: dict[str, tuple[str, Callable[[], object]]] = {
        "project": ("project", lambda: fused.project(x, down)),
        "project dropout": ("project", lambda: fused.project(x, down, 1.0, 0.1, seed)),
        "forward": ("matmul_lowrank", lambda: fused.matmul_lowrank(x, weight, h, up)),
        "dx": ("matmul_lowrank_t", lambda: fused.matmul_lowrank(dy, weight.T, h, down.T)),
        "dx dropout": ("matmul_lowrank_t", lambda: fused.matmul_lowrank(dy, weight.T, h, down.T, None, 0.1, seed)),
        "outer": ("outer", lambda: fused.outer(h, x)),
        "outer dropout": ("outer", lambda: fused.outer(h, x, 0.1, seed)),
        "sweep": ("project_outer", lambda: fused.project_outer(dy, up, h)),
    }
    return {f"{name} same dtype": call for name, call in made.items()}


def rows_of(dtype: torch.dtype, K: int, N: int, k: int) -> dict[str, tuple[Rows, ...]]:
    """What penalties want of a layer, by penalty, of bases with k columns"""

    def on(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    factor, byte, index = torch.float32, torch.int8, torch.int64
    return {
        "null space": (Rows("down", on(K, k)), Rows("up", on(N, k))),
        "shared": (Rows("down", on(K, k), on(K, dtype=byte)), Rows("up", on(N, k), on(N, dtype=byte))),
        "hadamard": tuple(
            Rows(of, None, on(dim, dtype=byte), on(k, dtype=index)) for of, dim in (("down", K), ("up", N))
        ),
        "source": (
            Rows("up"),
            Rows("down", None, on(K, dtype=factor)),
            Rows("down", on(K, 32, dtype=factor)),
        ),
        "output": (Rows("up"), Rows("hidden")),
    }


def penalised(
    x: torch.Tensor, dy: torch.Tensor, h: torch.Tensor, down: torch.Tensor, up: torch.Tensor
) -> dict[str, tuple[str, Callable[[], object]]]:
    """The skinny passes with what penalties want of a layer, and of one three times and a half as wide as x"""
    factor, (N, R), K, k = torch.float32, up.shape, down.shape[1], 256
    terms, wide_N = rows_of(x.dtype, K, N, k), 7 * K // 2
    wide_terms, wide_up = rows_of(x.dtype, K, wide_N, k), up.new_empty(wide_N, R)
    project = functools.partial(functools.partial, fused.project_terms, x)
    made: dict[str, tuple[str, Callable[[], object]]] = {}
    for name, rows in terms.items():
        d = [up.new_empty(one.length(R), R, dtype=factor) for one in rows]
        ups = [More(one, up, part) for one, part in zip(rows, d, strict=True) if one.of == "up"]
        downs = [More(one, down, part) for one, part in zip(rows, d, strict=True) if one.of == "down"]
        start = d[-1] if name == "output" else None
        made[f"project {name}"] = "project", project([down], [up], [Term(0, rows)])
        made[f"project {name} wide"] = "project", project([down], [wide_up], [Term(0, wide_terms[name])])
        made[f"sweep {name}"] = (
            "project_outer",
            functools.partial(fused.project_outer, dy, up, h, 1.0, factor, ups, start),
        )
        made[f"outer {name}"] = "outer", functools.partial(fused.outer, h, x, 0.0, None, factor, downs)
    many = [Term(i, terms["null space"]) for i in range(3)]
    made["project siblings"] = "project", project([down] * 3, [up] * 3, many)
    many = [Term(i, wide_terms["null space"]) for i in range(2)]
    made["project siblings wide"] = "project", project([down] * 2, [wide_up] * 2, many)
    return made


def experts(R: int, dtype: torch.dtype) -> dict[str, tuple[str, Callable[[], object]]]:
    """The products of a stack of 128 experts, 8 a token, as Qwen3-MoE has it"""

    def on(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    E, T, S, N, K, factor = 128, M, 8 * M, 1536, 2048, torch.float32
    index, ends = on(S, dtype=torch.int64), on(E, dtype=torch.int32)
    rows = grouped.Rows(index, index, ends, T)
    rows.__dict__["places"] = index
    x, dy, h, weight, bias = on(T, K), on(S, N), on(S, R), on(E, N, K), on(E, N)
    down, up, seeds = on(E, R, K, dtype=factor), on(E, N, R, dtype=factor), on(E, 2, dtype=torch.int32)
    odd_x, odd_weight, odd_down = on(T, K + 4)[:, 1 : K - 3], on(E, N, K + 4)[..., 1 : K - 3], down[..., : K - 4]
    project, outer = (functools.partial(f, by_token=True) for f in (fused.grouped_project, fused.grouped_outer))
    matmul = functools.partial(fused.grouped_matmul_lowrank, by_token=True)
    dx = functools.partial(fused.grouped_matmul_lowrank, h=h, up=down.mT, rows=rows, p=0.1, seeds=seeds)
    calls: dict[str, tuple[str, Callable[[], object]]] = {
        "project": ("project", lambda: project(x, down, rows)),
        "project dropout": ("project", lambda: project(x, down, rows, 1.0, 0.1, seeds)),
        "project ragged": ("project", lambda: project(odd_x, odd_down, rows)),
        "forward": ("matmul", lambda: matmul(x, weight, h, up, rows)),
        "forward bias": ("matmul", lambda: matmul(x, weight, h, up, rows, bias)),
        "forward by columns": ("matmul", lambda: matmul(x, on(E, K, N).mT, h, up, rows, bias)),
        "forward autocast": ("matmul", lambda: matmul(x, weight.float(), h, up, rows)),
        "forward ragged": ("matmul", lambda: matmul(odd_x, odd_weight, h, up, rows)),
        "dx dropout": ("matmul", lambda: dx(dy, weight.mT)),
        "dx alone": ("matmul", lambda: dx(h[:, :0], on(E, K, 0))),
        "frozen": ("matmul", lambda: fused.grouped_matmul_lowrank(dy, weight.mT, h[:, :0], on(E, K, 0), rows)),
        "outer": ("outer", lambda: fused.grouped_outer(h, dy, rows, dtype=factor)),
        "outer dropout": ("outer", lambda: outer(h, x, rows, 0.1, seeds, factor)),
        "sum": ("sum", lambda: fused.grouped_sum(dy, rows, on(S))),
    }
    return {f"experts {name}": (f"grouped_{row}", call) for name, (row, call) in calls.items()}


PENALISED = [
    f"{kernel} {name}" for name in ("null space", "hadamard", "source", "output") for kernel in ("project", "sweep")
]
PENALISED += ["outer null space", "outer hadamard", "outer source", "project siblings", "project shared"]
WIDE = [f"project {name} wide" for name in ("null space", "hadamard", "source", "output", "siblings", "shared")]
ALIKE = [f"{name} same dtype" for name in ("project", "forward", "dx", "outer", "sweep")]
ALIKE += [f"{name} dropout same dtype" for name in ("project", "dx", "outer")]
CORED = ["core dropout", "core siblings", "core forward", "core backward"]


def subset() -> list[Case]:
    """What the tests compile on every card"""
    names = ["project dropout", "forward", "dx dropout", "dx siblings", "mask", "outer dropout", "sweep", "once"]
    names += ["core siblings", "core backward"]
    names += [f"experts {name}" for name in ("project dropout", "forward", "dx dropout", "outer dropout", "sum")]
    return [Case(name, 16) for name in names]


def everything() -> list[Case]:
    """Every call at R=16, and the hardest of them at other ranks, dtypes and on the default tiles"""
    hard = ["project dropout", "forward", "dx dropout", "outer dropout", "sweep", "full", "once"]
    ragged = ["project ragged", "forward ragged", "dx ragged"]
    names = list(calls(16, torch.bfloat16))
    cases = [Case(name, 16) for name in names]
    cases += [Case(name, R) for name in [*PENALISED, *WIDE, *ALIKE] for R in (64, 128)]
    cases += [Case(name, 16, default_tile=True) for name in PENALISED if name != "project source"]
    cases += [Case("dx siblings", R) for R in (32, 40, 64)]
    cases += [Case(name, 64) for name in ("core", "core dropout", "core forward", "core backward")]
    cases += [
        Case("core", 128),
        Case("core forward", 128),
        Case("core siblings", 21),
        Case("core siblings", 10, "float32"),
    ]
    cases += [Case(name, 8, "float16") for name in CORED] + [Case(name, 16, default_tile=True) for name in CORED]
    cases += [Case(name, R, "float32") for name in ("core", "core backward") for R in (16, 32)]
    cases += [Case(name, 64) for name in [*hard, *ragged, "dx", "once dropout", "full dx dropout"]]
    cases += [Case(name, 128) for name in [*hard[:4], *ragged, "dx"]]
    cases += [Case(name, 200) for name in [*hard[:4], "forward ragged"]]
    cases += [Case(name, 8, "float16") for name in hard]
    cases += [Case(name, 16, "float32") for name in hard[:5]] + [Case("outer dropout", 64, "float32")]
    cases += [Case("forward by columns", 32, "float32")]
    cases += [Case(name, 16, default_tile=True) for name in hard]
    cases += [Case(f"experts {name}", 64) for name in ("forward ragged", "forward by columns", "forward autocast")]
    most = [f"experts {name}" for name in ("project dropout", "forward bias", "dx dropout", "dx alone", "outer")]
    cases += [Case(name, R) for name in most for R in (64, 128, 200)]
    cases += [Case(name, 8, "float16") for name in most] + [Case(name, 16, "float32") for name in most]
    cases += [Case(name, 16, default_tile=True) for name in most]
    return [case for case in cases if case.name in names]  # without the penalties' where there are none
