"""What can be said of the kernels' speed without a GPU: bytes, FLOPs, and a time PREDICTED from them.

    python -m bench static            M=8192, N=K=4096, R=16 on every card we know; writes bench/results/static.json
    python -m bench static --no-compile -M 4096 --out elsewhere.json

The bytes are exact: tests count those that the kernels load and store in Triton's interpreter, and compare. The times
are predictions, max(FLOPs / rate, bytes / bandwidth) for each kernel with nothing for launches and tails. No GPU was
used for any of them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from forgetless_kernels import tiles
from forgetless_kernels.sums import strips_of
from forgetless_kernels.tl_utils import pad_rank, parts_of

from .harness import RESULTS, Row, parse, row, start, write_json

# ---------------------------------------------------------------- bytes and FLOPs of one launch, exact


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """A layer and its element sizes, activations and factors"""

    M: int
    N: int
    K: int
    R: int
    element: int = 2
    factor: int = 4
    bias: bool = False
    dropout: bool = False
    arch: int = 0


Bytes = dict[str, int]  # by tensor: what one launch loads or stores of it
SEED = 4  # bytes of the one number that each block of rows, or of columns, reads of the dropout's seed


def project_traffic(s: Sizes, tile: tiles.Tile) -> tuple[Bytes, Bytes]:
    """Loads and stores of project; x comes once for each block of ranks, down once for each block of rows"""
    R = pad_rank(s.R)
    rows, blocks_r = cdiv(s.M, tile.BLOCK_M), cdiv(s.R, R)
    x = rows * tile.BLOCK_M * s.K * s.element * blocks_r
    loads = {"x": x, "down": rows * blocks_r * R * s.K * s.factor}
    if s.dropout:
        loads["seed"] = rows * blocks_r * (1 + cdiv(s.K, tile.BLOCK_K)) * SEED
    return loads, {"h": s.M * s.R * s.element}


def matmul_lowrank_traffic(s: Sizes, tile: tiles.Tile) -> tuple[Bytes, Bytes]:
    """Loads and stores of matmul_lowrank: x for each column of tiles, weight for each row of tiles"""
    rows, columns = cdiv(s.M, tile.BLOCK_M), cdiv(s.N, tile.BLOCK_N)
    M, N, parts = rows * tile.BLOCK_M, columns * tile.BLOCK_N, parts_of(tile.BLOCK_N, s.dropout, s.arch)
    loads = {
        "x": columns * M * s.K * s.element,
        "weight": rows * N * s.K * s.element,
        "h": parts * columns * M * s.R * s.element,
        "up": rows * N * s.R * s.factor,
    }
    if s.bias:
        loads["bias"] = rows * N * s.element
    if s.dropout:
        loads["seed"] = rows * columns * parts * 2 * SEED
    return loads, {"y": s.M * s.N * s.element}


def matmul_lowrank_descriptor_traffic(s: Sizes, tile: tiles.Tile) -> tuple[Bytes, Bytes]:
    """Loads and stores of matmul_lowrank on descriptors: they cut off what is past the end of x and weight"""
    rows, columns = cdiv(s.M, tile.BLOCK_M), cdiv(s.N, tile.BLOCK_N)
    loads, stores = matmul_lowrank_traffic(s, tile)
    loads["x"] = columns * s.M * s.K * s.element
    loads["weight"] = rows * s.N * s.K * s.element
    return loads, stores


def outer_traffic(s: Sizes, tile: tiles.Tile) -> tuple[Bytes, Bytes]:
    """Loads and stores of outer: the last program of a block of columns adds up its strips"""
    R = pad_rank(s.R, most=32 if s.element == 4 else 128)
    columns, blocks_r = cdiv(s.K, tile.BLOCK_K), cdiv(s.R, R)
    strips, steps = strips_of(s.M, tile.BLOCK_M, columns * blocks_r)
    loads = {"g": columns * blocks_r * R * s.M * s.element, "x": columns * tile.BLOCK_K * s.M * s.element * blocks_r}
    if s.dropout:
        loads["seed"] = columns * blocks_r * strips * (1 + steps) * SEED
    stores = {"out": s.R * s.K * s.factor}
    if strips > 1:
        loads["part"] = stores["part"] = 4 * strips * s.R * s.K
        # a ticket for each program, and the counter set back; an atomic operation loads and stores
        loads["tickets"] = 4 * columns * blocks_r * strips
        stores["tickets"] = loads["tickets"] + 4 * columns * blocks_r
    return loads, stores


def project_outer_traffic(s: Sizes, tile: tiles.Tile) -> tuple[Bytes, Bytes]:
    """Loads and stores of the one sweep over x (M, K) of project_outer: the last programs add up both sums"""
    R = pad_rank(s.R, most=64)
    columns = cdiv(s.K, tile.BLOCK_K)
    strips, _ = strips_of(s.M, tile.BLOCK_M, columns, programs=128)
    part = {"g_part": 4 * columns * s.M * s.R, "out_part": 4 * strips * s.K * s.R}
    loads = {
        "x": s.M * s.K * s.element,
        "down": strips * s.K * R * s.factor,
        "h": columns * s.M * R * s.element,
        **part,
        "tickets": 2 * 4 * columns * strips,
    }
    tickets = loads["tickets"] + 4 * (columns + strips)  # counters are set back
    return loads, {"g": s.M * s.R * s.element, "out": s.K * s.R * s.factor, **part, "tickets": tickets}


def full_traffic(s: Sizes, tile: tiles.Tile, drop_output: bool = False) -> tuple[Bytes, Bytes]:
    """Loads and stores of the plan full: every tile makes h for itself, the first of each row of tiles stores it"""
    rows, columns = cdiv(s.M, tile.BLOCK_M), cdiv(s.N, tile.BLOCK_N)
    loads, stores = matmul_lowrank_traffic(s, tile)
    del loads["h"]
    loads["down"] = rows * columns * pad_rank(s.R) * s.K * s.factor
    if s.dropout:
        keys = 2 * parts_of(tile.BLOCK_N, True, s.arch) if drop_output else 1 + cdiv(s.K, tile.BLOCK_K)  # of y, or of x
        loads["seed"] = rows * columns * keys * SEED
    return loads, {**stores, "h": s.M * s.R * s.element}


def once_traffic(s: Sizes, tile: tiles.Tile, drop_output: bool = False) -> tuple[Bytes, Bytes]:
    """Loads and stores of the plan once: one column of tiles makes h, the others load it; where no tile has to wait"""
    rows, columns = cdiv(s.M, tile.BLOCK_M), cdiv(s.N, tile.BLOCK_N)
    loads, stores = full_traffic(s, tile, drop_output)
    loads["down"] = rows * pad_rank(s.R) * s.K * s.factor
    if columns > 1:
        loads["h"] = (columns - 1) * s.M * s.R * s.element
    if s.dropout and not drop_output:
        loads["seed"] //= columns  # the makers alone drop x
    # a ticket for each tile, then a flag raised or looked at; an atomic operation loads and stores
    loads["flags"] = stores["flags"] = 2 * 4 * rows * columns
    return loads, stores


KERNELS: tuple[Any, ...] = (
    project_traffic, matmul_lowrank_traffic, matmul_lowrank_descriptor_traffic, outer_traffic, project_outer_traffic,
    full_traffic, once_traffic,
)  # fmt: skip
TRAFFIC = {kernel.__name__.removesuffix("_traffic"): kernel for kernel in KERNELS}


def flops(kernel: str, s: Sizes, tile: tiles.Tile) -> int:
    """What the kernel's products take, padding not counted"""
    gemm, skinny = 2 * s.M * s.N * (s.K + s.R), 2 * s.M * s.K * s.R
    full = gemm + cdiv(s.N, tile.BLOCK_N or s.N) * skinny
    of = {"project": skinny, "outer": skinny, "project_outer": 2 * skinny, "full": full, "once": gemm + skinny}
    return of.get(kernel, gemm)


def memory(kernel: str, s: Sizes, tile: tiles.Tile) -> int:
    """Bytes over the memory bus: every matrix once; partial sums are written, their reads left to L2"""
    loads, stores = TRAFFIC[kernel](s, tile)
    once = {"x": s.M * s.K * s.element, "weight": s.N * s.K * s.element, "h": s.M * s.R * s.element}
    once |= {"g": s.M * s.R * s.element, "down": s.R * s.K * s.factor, "up": s.N * s.R * s.factor}
    return sum(size for name, size in once.items() if name in loads and name not in stores) + sum(stores.values())


# ------------------------------------------------------------------------------ predicted times

# What the vendor's bfloat16 GEMM and a good copy reach on each card, FLOP/s and bytes/s: assumed, but for the products
# of H100 and B200, which cuBLAS reached at K = 4096 in Triton's Gluon tutorial 07-persistence. Triton's own GEMM
# reached 0.98 and 0.72 of them there.
CARDS = {
    80: ("A100 SXM 80 GB", 270e12, 1.8e12),
    86: ("RTX 3090", 68e12, 0.85e12),
    89: ("RTX 4090", 160e12, 0.93e12),
    90: ("H100 SXM", 646e12, 3.0e12),
    100: ("B200", 1564e12, 7.0e12),
    120: ("RTX 5090", 200e12, 1.6e12),
}


def on_card(kernel: str, arch: int, R: int, transposed: bool = False) -> tuple[str, tiles.Tile]:
    """The kernel that the launcher takes on that card for aligned bfloat16, descriptors or not, and its tile"""
    row = kernel + "_t" if transposed else kernel
    if kernel == "matmul_lowrank" and (arch, 2) in tiles.TABLE[row + "_descriptor"]:
        kernel, row = kernel + "_descriptor", row + "_descriptor"
    return kernel, tiles.fit(row, tiles.row(row, arch, 2), pad_rank(R), 2, arch)


def seconds(arch: int, flops: float, moved: float) -> float:
    """Predicted time on that card."""
    _, speed, bandwidth = CARDS[arch]
    return max(flops / speed, moved / bandwidth)


def designs(s: Sizes, arch: int) -> dict[str, tuple[float, float]]:
    """Predicted seconds (forward, backward) of the layer by design; frozen is the layer's two GEMMs alone"""
    M, N, K, R, E = s.M, s.N, s.K, s.R, s.element
    back = dataclasses.replace(s, N=K, K=N)  # the backward pass of the same layer: dy is its x

    def moved(*elements: int) -> float:
        return seconds(arch, 0, E * sum(elements))

    def products(flops: float) -> float:
        return seconds(arch, flops, 0)

    def run(kernel: str, sizes: Sizes, transposed: bool = False) -> float:
        kernel, tile = on_card(kernel, arch, R, transposed)
        return seconds(arch, flops(kernel, sizes, tile), memory(kernel, sizes, tile))

    gemm = seconds(arch, 2 * M * N * K, E * (M * K + N * K + M * N))
    read_x, read_dy = moved(M * K, K * R, M * R), moved(M * N, N * R, M * R)
    add_y, scale_y, add_x = moved(3 * M * N), moved(2 * M * N), moved(3 * M * K)
    write_y, write_x = moved(M * N, M * R), moved(M * K, M * R)
    forward, backward = products(2 * M * N * R), products(2 * M * K * R)  # the low-rank products inside GEMMs
    cast, mask = 2 * moved(3 * M * K), seconds(arch, 0, M * K)  # to float32 and back; one byte an element
    drop = moved(2 * M * K) + mask
    h, sweep, ddown = run("project", s), run("project_outer", back), run("outer", s)
    extra = 2 * M * N * K * max(R, 16) / (128 if arch in (80, 86, 89, 120) else 256)
    every_tile = seconds(arch, 2 * M * N * K + extra, E * (M * K + N * K + M * N)) - gemm
    makers = products(2 * M * K * max(R, 16))
    eager = read_x + write_y + scale_y + add_y, scale_y + 2 * read_dy + write_x + read_x + add_x
    split, ours = (read_x + forward, read_dy + read_x + backward), sweep + ddown + backward
    beyond = {
        "frozen layer": (0.0, 0.0),
        "PEFT default (float32 adapters)": (cast + eager[0], cast + eager[1]),
        "eager bfloat16": eager,
        "addmm_ after, h recomputed (Unsloth-style)": (
            read_x + moved(2 * M * N),
            3 * read_dy + 2 * read_x + moved(2 * M * K),
        ),
        "blas: small product first, beta=1": (read_x + write_y, 2 * read_dy + write_x + read_x),
        "LoRAFusion's split, dropout 0": split,
        "LoRAFusion's split, dropout as shipped": (drop + split[0], split[1] + mask),
        "one kernel, h in every tile, forward only": (every_tile + forward, ours),
        "forgetless hybrid": (h + write_y, sweep + ddown + write_x),
        "forgetless split": (h + forward, ours),
        **{
            f"forgetless split, its GEMM at {part:.2f} of cuBLAS": (
                h + (gemm + forward) / part - gemm,
                sweep + ddown + (gemm + backward) / part - gemm,
            )
            for part in (0.95, 0.9)
        },
        "forgetless split, 3 siblings share x": (h / 3 + forward, sweep + ddown / 3 + backward),
        "forgetless once": (makers + forward, ours),
        "FLOPs alone": (makers + forward, 2 * (makers + backward)),
    }
    return {name: (gemm + there, gemm + back) for name, (there, back) in beyond.items()}


def kernel_rows(s: Sizes, arch: int, compiled: bool) -> list[Row]:
    """Every kernel of a step: exact traffic, predicted time, and what it compiles to on that card"""
    s = dataclasses.replace(s, arch=arch)
    back = dataclasses.replace(s, N=s.K, K=s.N)
    units = {"flops": "FLOP", "predicted": "s", "loaded": "B", "memory": "B", "stack": "B", "shared": "B"}
    plain = {
        "project": ("project", s), "forward": ("matmul_lowrank", s), "full": ("full", s), "once": ("once", s),
        "sweep": ("project_outer", back), "dx": ("matmul_lowrank", back), "outer": ("outer", s),
    }  # fmt: skip
    rows = []
    for call in (*plain, "project dropout", "full dropout", "once dropout", "dx dropout", "outer dropout"):
        name, _, dropped = call.partition(" ")
        kernel, sizes = plain[name]
        sizes = dataclasses.replace(sizes, dropout=bool(dropped))
        kernel, tile = on_card(kernel, arch, s.R, name == "dx")
        loads, stores = TRAFFIC[kernel](sizes, tile)
        work, moved = flops(kernel, sizes, tile), memory(kernel, sizes, tile)
        values: dict[str, float] = {"flops": work, "loaded": sum(loads.values()), "stored": sum(stores.values())}
        values |= {"memory": moved, "predicted": seconds(arch, work, moved)}
        if compiled:
            from . import targets

            record = targets.attempt(targets.Case(call, s.R), arch)[0]
            names = ("registers", "stack", "shared", "blocks_per_sm", "mmas")
            values |= {name: record[name] for name in names if name in record}
        phase = f"{tile.BLOCK_M}/{tile.BLOCK_N or '–'}/{tile.BLOCK_K} w{tile.num_warps} s{tile.num_stages}"
        rows += [row(call, f"sm_{arch}", phase, key, value, units.get(key, "1")) for key, value in values.items()]
    return rows


def main(arguments: list[str] | None = None) -> None:
    sizes = {"M": 8192, "N": 4096, "K": 4096, "R": 16}
    options = parse(__doc__, "static", arguments, **sizes, no_compile=False, out=RESULTS / "static.json")
    s, results = Sizes(options.M, options.N, options.K, options.R), start("static", arguments)
    for arch, (name, *rates) in CARDS.items():
        results["cases"][name] = {**dataclasses.asdict(s), "dtype": "bfloat16"}
        for what, value, unit in zip(("products", "memory"), rates, ("FLOP/s", "B/s"), strict=True):
            results["rows"].append(row(name, f"sm_{arch}", "assumed", what, value, unit))
        for design, times in designs(s, arch).items():
            both = zip(("forward", "backward"), times, strict=True)
            results["rows"] += [row(design, f"sm_{arch}", phase, "predicted time", t, "s") for phase, t in both]
        results["rows"] += kernel_rows(s, arch, not options.no_compile)
    write_json(options.out, results)
    print(f"written to {options.out}")
