"""What can be said of the kernels' speed without a GPU: bytes, FLOPs, and a time PREDICTED from them.

    python -m bench.static            a table of the kernels and one of whole designs, at M=8192, N=K=4096, R=16 on H100
    python -m bench.static --write    for every card we know; writes docs/static.md and bench/results/static.json

The bytes (``bench/traffic.py``) are exact: tests count those that the kernels load and store in Triton's interpreter,
and compare. The times are predictions, max(FLOPs / rate, bytes / bandwidth) for each kernel with nothing for launches
and tails. No GPU was used for any of them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from forgetless_kernels import tiles
from forgetless_kernels.tl_utils import pad_rank

from .traffic import TRAFFIC, Sizes, flops, memory

ROOT = Path(__file__).resolve().parent.parent

# Assumed, not measured: what a good bfloat16 GEMM and a good copy reach on each card, FLOP/s and bytes/s.
CARDS = {
    80: ("A100 SXM 80 GB", 270e12, 1.8e12),
    86: ("RTX 3090", 68e12, 0.85e12),
    89: ("RTX 4090", 160e12, 0.93e12),
    90: ("H100 SXM", 800e12, 3.0e12),
    100: ("B200", 1900e12, 7.0e12),
    120: ("RTX 5090", 200e12, 1.6e12),
}


def on_card(kernel: str, arch: int, R: int, transposed: bool = False) -> tuple[str, tiles.Tile]:
    """The kernel that the launcher takes on that card for aligned bfloat16, descriptors or not, and its tile"""
    row = kernel + "_t" if transposed else kernel
    if kernel == "matmul_lowrank" and (arch, 2) in tiles.TABLE[row + "_descriptor"]:
        kernel, row = kernel + "_descriptor", row + "_descriptor"
    return kernel, tiles.fit(row, tiles.row(row, arch, 2), pad_rank(R), 2, arch)


@dataclasses.dataclass(frozen=True)
class Rate:
    """A card as two numbers, and the predicted time of a kernel on it"""

    flops: float
    bandwidth: float

    def time(self, flops: float, moved: float) -> float:
        return max(flops / self.flops, moved / self.bandwidth)


def designs(s: Sizes, arch: int) -> dict[str, tuple[float, float]]:
    """Predicted seconds (forward, backward) of the layer by design; frozen is the layer's two GEMMs alone"""
    _, speed, bandwidth = CARDS[arch]
    rate = Rate(speed, bandwidth)
    M, N, K, R, E = s.M, s.N, s.K, s.R, s.element
    back = dataclasses.replace(s, N=K, K=N)  # the backward pass of the same layer: dy is its x

    def moved(*elements: int) -> float:
        return rate.time(0, E * sum(elements))

    def run(kernel: str, sizes: Sizes, transposed: bool = False) -> float:
        kernel, tile = on_card(kernel, arch, R, transposed)
        return rate.time(flops(kernel, sizes, tile), memory(kernel, sizes, tile))

    gemm = rate.time(2 * M * N * K, E * (M * K + N * K + M * N))
    read_x, read_dy = moved(M * K, K * R, M * R), moved(M * N, N * R, M * R)
    add_y, scale_y, add_x = moved(3 * M * N), moved(2 * M * N), moved(3 * M * K)
    write_y, write_x = moved(M * N, M * R), moved(M * K, M * R)
    update_y, update_x = moved(2 * M * N), moved(2 * M * K)
    forward = (2 * M * N * R) / speed  # the low-rank product inside a GEMM
    backward = (2 * M * K * R) / speed
    cast, mask = moved(3 * M * K), rate.time(0, M * K)  # to float32 and back; one byte an element
    sweep, ddown = run("project_outer", back), run("outer", s)
    h = run("project", s)
    wide = 128 if arch in (80, 86, 89, 120) else 256
    extra = 2 * M * N * K * max(R, 16) / wide
    makers = 2 * M * K * max(R, 16) / speed
    drop = moved(2 * M * K) + mask
    return {
        "frozen layer": (gemm, gemm),
        "PEFT default (float32 adapters)": (
            gemm + 2 * cast + read_x + write_y + scale_y + add_y,
            gemm + 2 * cast + scale_y + 2 * read_dy + write_x + read_x + add_x,
        ),
        "eager bfloat16": (
            gemm + read_x + write_y + scale_y + add_y,
            gemm + scale_y + 2 * read_dy + write_x + read_x + add_x,
        ),
        "addmm_ after, h recomputed (Unsloth-style)": (
            gemm + read_x + update_y,
            gemm + 3 * read_dy + 2 * read_x + update_x,
        ),
        "blas: small product first, beta=1": (
            gemm + read_x + write_y,
            gemm + 2 * read_dy + write_x + read_x,
        ),
        "LoRAFusion's split, dropout 0": (gemm + read_x + forward, gemm + read_dy + read_x + backward),
        "LoRAFusion's split, dropout as shipped": (
            gemm + drop + read_x + forward,
            gemm + read_dy + read_x + backward + mask,
        ),
        "one kernel, h in every tile, forward only": (
            rate.time(2 * M * N * K + extra, E * (M * K + N * K + M * N)) + forward,
            gemm + sweep + ddown + backward,
        ),
        "forgetless split": (gemm + h + forward, gemm + sweep + ddown + backward),
        "forgetless split, 3 siblings share x": (
            gemm + h / 3 + forward,
            gemm + sweep + ddown / 3 + backward,
        ),
        "forgetless once": (gemm + makers + forward, gemm + sweep + ddown + backward),
        "FLOPs alone": (gemm + makers + forward, gemm + 2 * (makers + backward)),
    }


def overhead(s: Sizes, arch: int) -> dict[str, float]:
    """Predicted time over the frozen layer's, in percent"""
    table = designs(s, arch)
    frozen = sum(table["frozen layer"])
    return {name: 100 * (sum(times) / frozen - 1) for name, times in table.items()}


def kernel_rows(s: Sizes, arch: int) -> list[dict]:
    """Every kernel of a step: its tile, exact traffic, predicted time, and what it compiles to on that card"""
    from forgetless_bench import targets

    _, speed, bandwidth = CARDS[arch]
    rate, back = Rate(speed, bandwidth), dataclasses.replace(s, N=s.K, K=s.N)
    rows = []
    for case, kernel, sizes, transposed in (
        ("project", "project", s, False),
        ("forward", "matmul_lowrank", s, False),
        ("full", "full", s, False),
        ("once", "once", s, False),
        ("sweep", "project_outer", back, False),
        ("dx", "matmul_lowrank", back, True),
        ("outer", "outer", s, False),
        ("project dropout", "project", s, False),
        ("full dropout", "full", s, False),
        ("once dropout", "once", s, False),
        ("dx dropout", "matmul_lowrank", back, True),
        ("outer dropout", "outer", s, False),
    ):
        sizes = dataclasses.replace(sizes, dropout=case.endswith("dropout"))
        kernel, tile = on_card(kernel, arch, s.R, transposed)
        loads, stores = TRAFFIC[kernel](sizes, tile)
        work, moved = flops(kernel, sizes, tile), memory(kernel, sizes, tile)
        compiled = targets.attempt(targets.Case(case, s.R), arch)[0]
        rows.append(
            {
                "call": case,
                "tile": [tile.BLOCK_M, tile.BLOCK_N, tile.BLOCK_K, tile.num_warps, tile.num_stages],
                "flops": work,
                "loads": loads,
                "stores": stores,
                "memory": moved,
                "predicted_us": 1e6 * rate.time(work, moved),
                **{name: compiled.get(name) for name in ("registers", "stack", "shared", "blocks_per_sm", "mmas")},
            }
        )
    return rows


def render(s: Sizes, arch: int, rows: list[dict]) -> str:
    """The designs of one card, and the rows of its kernels, as Markdown"""
    name, speed, bandwidth = CARDS[arch]
    lines = [
        f"## {name} (sm_{arch}): predicted",
        "",
        f"M={s.M}, N={s.N}, K={s.K}, R={s.R}, bfloat16. Assumed: {speed / 1e12:.0f} TFLOP/s in GEMMs, "
        f"{bandwidth / 1e12:.2f} TB/s;",
        "a kernel takes the longer of its FLOPs and its bytes; launches and tails take nothing; partial sums are",
        "written to memory and read back from L2; every matrix crosses the bus once; cuBLAS is no faster.",
        "",
        "| design | forward µs | backward µs | over the frozen layer |",
        "|---|---|---|---|",
    ]
    over = overhead(s, arch)
    for design, (forward, backward) in designs(s, arch).items():
        lines.append(f"| {design} | {forward * 1e6:.0f} | {backward * 1e6:.0f} | +{over[design]:.1f} % |")
    if rows:
        head = "call | tile M/N/K warps stages | GFLOP | MB loaded by programs | MB over the bus | µs predicted"
        lines += ["", f"| {head} | registers | spills | shared | blocks/SM | MMAs |", "|" + "---|" * 11]
        for r in rows:
            M, N, K, warps, stages = r["tile"]
            lines.append(
                f"| {r['call']} | {M}/{N or '–'}/{K} w{warps} s{stages} | {r['flops'] / 1e9:.1f} "
                f"| {sum(r['loads'].values()) / 1e6:.0f} | {r['memory'] / 1e6:.0f} | {r['predicted_us']:.0f} "
                f"| {r['registers']} | {r['stack']} B | {r['shared']} | {r['blocks_per_sm']} | {r['mmas']} |"
            )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.static", description=__doc__.splitlines()[0])
    for size, value in (("M", 8192), ("N", 4096), ("K", 4096), ("R", 16)):
        parser.add_argument(f"-{size}", type=int, default=value)
    parser.add_argument("--arch", type=int, choices=CARDS, default=90)
    parser.add_argument("--no-compile", action="store_true", help="leave out what the kernels compile to")
    parser.add_argument("--write", action="store_true", help="every card; writes docs/static.md and its JSON")
    options = parser.parse_args(arguments)
    s = Sizes(options.M, options.N, options.K, options.R)
    if not options.write:
        print(render(s, options.arch, [] if options.no_compile else kernel_rows(s, options.arch)))
        return 0
    text = ["# Predicted, not measured", "", "Generated by `python -m bench.static --write`. No GPU was used."]
    results = {}
    for arch in CARDS:
        rows = kernel_rows(s, arch)
        text += ["", render(s, arch, rows)]
        results[f"sm_{arch}"] = {
            "assumed": CARDS[arch],
            "predicted_overhead_percent": overhead(s, arch),
            "kernels": rows,
        }
    for path, content in (
        (ROOT / "docs" / "static.md", "\n".join(text) + "\n"),
        (ROOT / "bench" / "results" / "static.json", json.dumps(results, indent=1) + "\n"),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return 0


if __name__ == "__main__":
    sys.exit(main())
