"""The compile gate: every kernel for every card we know, without one; what fits, what spills, what uses tensor cores.

    python -m bench targets         a subset, as the tests run it; --only NAME: cases whose name has this in it
    python -m bench targets --all   everything; adds this Triton's part to bench/results/targets.json
    make targets TRITON=3.9.0       with another Triton, installed beside this one under .cache/

The launchers themselves run, on tensors without storage and under a driver that names a card but has none: what is
compiled is what a real call would compile, arguments, tiles, divisibility and all. Nothing is executed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from forgetless_kernels import launcher, matmul_lowrank, sums, tiles

from .harness import RESULTS, Results, parse, read, row, start, write_json
from .host import NoCard
from .target_cases import Case, calls, everything, subset

# ---------------------------------------------------------------------------------- what is compiled

Record = dict[str, Any]
ARCHS = (80, 86, 89, 90, 100, 120)
PROCESSORS = {80: 108, 86: 82, 89: 128, 90: 132, 100: 148, 120: 170}


@contextlib.contextmanager
def compiling_for(arch: int) -> Iterator[list[Any]]:
    """Within the block, launches compile for ``arch`` and run nothing; the list collects (kernel, launch arguments)."""
    launches: list[Any] = []
    run = JITFunction.run

    @functools.wraps(run)
    def warm(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        launches.append((kernel, dict(kwargs)))
        return kernel

    patches: list[tuple[Any, str, Any]] = [
        (JITFunction, "run", warm),
        (tiles, "arch_of", lambda device: arch),
        (matmul_lowrank, "programs_of", lambda device: PROCESSORS[arch]),
        (sums, "sweep_pays", lambda *sizes: True),
        (launcher, "KNOWN", False),  # every launch by the call that is patched here
        (driver, "_active", NoCard(arch, device=arch)),  # each architecture is a device of its own
    ]
    with contextlib.ExitStack() as stack:
        for owner, name, value in patches:
            stack.enter_context(mock.patch.object(owner, name, value))
        yield launches


def attempt(case: Case, arch: int) -> list[Record]:
    """Compile one case for one card: a record for each kernel it launches; a failure to compile is one too."""
    base: Record = {"case": str(case), "arch": arch, "R": case.R, "dtype": case.dtype}
    try:
        row, call = calls(case.R, getattr(torch, case.dtype))[case.name]
        with contextlib.ExitStack() as stack:
            if case.default_tile:
                default = dataclasses.asdict(tiles.TABLE[row][0, getattr(torch, case.dtype).itemsize])
                stack.enter_context(tiles.forced(row, **{k: v for k, v in default.items() if v}))
                stack.enter_context(mock.patch.object(matmul_lowrank, "has_row", lambda kernel, device: False))
            launches = stack.enter_context(compiling_for(arch))
            call()
        # the default tile is that of cards we do not know: sm_90 itself never takes it
        more = {"serialized": ""} if case.default_tile else {}
        records = [{**base, **usage(*one), **more} for one in launches]
    except Exception as error:  # whatever the compiler raises is recorded
        text = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        return [{**base, "problems": [text[:300]]}]
    return [{**record, "problems": problems(record)} for record in records]


def collect(cases: list[Case], archs: tuple[int, ...] = ARCHS, jobs: int = 1, show: bool = False) -> list[Record]:
    """Every case on every card; each kernel is listed once"""
    records: list[Record] = []
    seen: set[str] = set()
    with contextlib.ExitStack() as stack:
        mapped = map if jobs == 1 else stack.enter_context(ProcessPoolExecutor(jobs)).map
        for some in mapped(attempt, cases * len(archs), [arch for arch in archs for _ in cases]):
            for record in some:
                key = json.dumps({k: v for k, v in record.items() if k != "case"}, sort_keys=True)
                if key not in seen:
                    seen.add(key)
                    records.append(record)
                if show and record["problems"]:
                    print(f"sm_{record['arch']} {record['case']}: {'; '.join(record['problems'])}", flush=True)
    return records


# --------------------------------------------------------------------------- what it compiled to

BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
REGISTERS = 65536  # of a multiprocessor
STORE = re.compile(r"\bst(?:\.\w+)*?\.global(?:\.[A-Za-z:_]+)*?(?:\.v(\d))?\.[bfu](\d+)")
# what ptxas says where it makes one wgmma wait for the one before
SERIALIZED = re.compile(r"C75(?:11|15)\b.*")
# a wait for all of them, not for all but the newest
WAIT = re.compile(r"\bWARPGROUP\.DEPBAR\.LE gsb0, 0x0\b")
BULK_STORE = re.compile(r"cp\.async\.bulk\.tensor\.\S*global\.shared")


def usage(kernel: Any, launch: dict[str, Any]) -> Record:
    """Registers, stack, shared memory and the instructions that matter of one compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()

        def dump(option: str) -> str:
            return subprocess.run([BIN / "cuobjdump", option, file.name], capture_output=True, text=True).stdout

        resources, ptx, arch = dump("-res-usage"), kernel.asm["ptx"], kernel.metadata.target.arch
        mma = re.findall(r"^[^/\n]*?\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)\.([^\s;]+)", ptx, re.M)
        stack, wgmma = number(r"STACK:(\d+)", resources), any(kind == "wgmma.mma_async" for kind, _ in mma)
        local = stack or number(r"LOCAL:(\d+)", resources)
        sass = dump("-sass") if local or wgmma else ""  # half a second; else nothing is looked for in it
    warps = launch.get("num_warps", kernel.metadata.num_warps)
    macs = 0
    for kind, rest in mma:
        shape = re.search(r"m(\d+)n(\d+)k(\d+)", rest)
        m, n, k = map(int, shape.groups()) if shape else (128, launch.get("BLOCK_N", 256), 16)
        macs += m * n * k * {"mma.sync": warps, "wgmma.mma_async": warps // 4}.get(kind, 1)
    written = sum(int(v or 1) * int(bits) // 8 * 32 * warps for v, bits in STORE.findall(ptx))
    registers = number(r"REG:(\d+)", resources)
    shared = kernel.metadata.shared
    block = {k.removeprefix("BLOCK_"): v for k, v in launch.items() if k.startswith("BLOCK")}
    block |= {k: 0 for k in "KR" if launch.get(k) == 0}  # without that product
    all_warps = kernel.metadata.num_warps
    return {
        "kernel": kernel.metadata.name.strip("_").removesuffix("_kernel"),
        "block": block,
        "stages": launch.get("num_stages", 0),
        "warps": all_warps,
        "registers": registers,
        "stack": stack,
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", sass)),
        "shared": shared,
        "blocks_per_sm": occupancy(registers, shared, all_warps, arch),
        "serialized": serialized(ptx, sass) if wgmma else "",
        "mma": sorted({kind for kind, _ in mma}),
        "mmas": len(mma),
        "macs": macs,
        "fma": len(re.findall(r"\bfma\.rn\.f32", ptx)),
        "written": written,
        "bulk_stores": len(BULK_STORE.findall(ptx)),
    }


def serialized(ptx: str, sass: str) -> str:
    """How ptxas made each wgmma of sm_90 wait for the one before: in its own words, or as waits in SASS"""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [str(BIN / "ptxas"), "-v", "--gpu-name=sm_90a", str(source), "-o", f"{folder}/kernel.cubin"]
        told = SERIALIZED.search(subprocess.run(command, capture_output=True, text=True).stderr)
    products, waits = len(re.findall(r"\bHGMMA\b", sass)), len(WAIT.findall(sass))
    if told:
        return told[0].strip()
    return f"{waits} waits for {products} wgmma" if 1 < products <= waits else ""


def number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    assert match is not None, f"no {pattern} in what cuobjdump prints"
    return int(match[1])


def occupancy(registers: int, shared: int, warps: int, arch: int) -> int:
    """Blocks of a multiprocessor, as registers (in units of 8 a thread), shared memory and warps allow"""
    by_registers = REGISTERS // (32 * warps * (registers + 7 & ~7))
    room = {80: 167936, 90: 233472, 100: 233472}.get(arch, 102400)
    limit = {80: 64, 90: 64, 100: 64}.get(arch, 48)
    return min(by_registers, room // (shared + 1024), limit // warps)


def macs_a_step(record: Record) -> int:
    """Multiply-adds that one step of the kernel's main loop, and what surrounds it, must hold"""
    M, K, R, N = (record["block"].get(axis, 0) for axis in "MKRN")
    name, skinny = record["kernel"].removeprefix("grouped_"), M * K * R
    whole = {
        "project": skinny,
        "outer": skinny,
        "project_outer": 2 * skinny,
        "linear_lowrank": M * N * (K + R) + skinny,
    }
    return whole.get(name, M * N * (K + R) if name.startswith("matmul") else 0)


def bytes_a_tile(record: Record) -> int:
    """Bytes that a program must store at least, whatever it stores them with"""
    M, K, R, N = (record["block"].get(axis, 0) for axis in "MKRN")
    name, size = record["kernel"].removeprefix("grouped_"), 4 if record["dtype"] == "float32" else 2
    whole = M * N * size if name in ("matmul_lowrank", "linear_lowrank", "matmul", "sum") else 0
    return {"project": M * R * size, "outer": R * K * 4, "project_outer": (M + K) * R * 4}.get(name, whole)


def problems(record: Record) -> list[str]:
    """What is wrong with a compiled kernel; nothing, if all is well"""
    limit, expected, least = tiles.SHARED[record["arch"]], macs_a_step(record), bytes_a_tile(record)
    float32, described = record["dtype"] == "float32", record["kernel"].endswith("descriptor")
    best = {90: "wgmma.mma_async", 100: "tcgen05.mma"}.get(record["arch"])
    wide = record["kernel"].startswith(("matmul", "linear", "grouped_matmul")) and record["block"]["M"] >= 64
    stored = not described and (record["written"] < least or not record["written"])
    spills = f"STACK:{record['stack']}, {record['spills']} local loads and stores"
    checks = [
        (record["shared"] > limit, f"{record['shared']} bytes of shared memory, the card has {limit}"),
        (record["stack"] or record["spills"], f"spills: {spills}"),
        (float32 and expected and not record["fma"], "no FMA"),
        (not float32 and record["macs"] < expected, f"{record['macs']} multiply-adds on tensor cores of {expected}"),
        (best and wide and not float32 and best not in record["mma"], f"{record['mma']} where the card has {best}"),
        (described and record["bulk_stores"] < 2, f"{record['bulk_stores']} bulk stores of 2"),
        (stored, f"{record['written']} bytes stored of {least}"),
        (record["serialized"], f"serialized: {record['serialized']}"),
        (not record["blocks_per_sm"], "not one block fits a multiprocessor"),
    ]
    return [text for wrong, text in checks if wrong]


# ------------------------------------------------------------------------------------ the command


def rows_of(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Of each kernel on each card: how many were compiled, how many have a problem, and the most that one needs."""
    groups: dict[tuple[str, int], list[Record]] = {}
    for record in records:
        groups.setdefault((record.get("kernel", "not compiled"), record["arch"]), []).append(record)
    rows, phase = [], f"Triton {triton.__version__}"
    for (kernel, arch), some in groups.items():
        values = [("compiled", len(some), "kernels"), ("problems", sum(bool(r["problems"]) for r in some), "kernels")]
        if kernel != "not compiled":
            needs = (("registers", "1"), ("stack", "B"), ("shared", "B"))
            values += [(key, max(r[key] for r in some), unit) for key, unit in needs]
        rows += [row(kernel, f"sm_{arch}", phase, *value) for value in values]
    return rows


def write(records: Sequence[Record], results: Results) -> None:
    """bench/results/targets.json: this Triton's rows replaced, the others' kept."""
    path = RESULTS / "targets.json"
    rows = rows_of(records)
    if path.exists():
        results["rows"] = [one for one in read(path)["rows"] if one["phase"] != rows[0]["phase"]]
    results["rows"] = sorted(results["rows"] + rows, key=lambda one: [int(n) for n in re.findall(r"\d+", one["phase"])])
    results["notes"] = [f"sm_{r['arch']} {r['case']}: {'; '.join(r['problems'])}" for r in records if r["problems"]]
    write_json(path, results)


def main(arguments: list[str] | None = None) -> int:
    cards = {"type": lambda text: tuple(map(int, text.split(","))), "default": ARCHS, "help": "as 80,90"}
    own = {"all": False, "archs": cards, "only": "", "jobs": os.cpu_count() or 1}
    options = parse(__doc__, "targets", arguments, **own)
    cases = [case for case in (everything() if options.all else subset()) if options.only in str(case)]
    records = collect(cases, options.archs, options.jobs, show=True)
    if options.all and not options.only and options.archs == ARCHS:
        write(records, start("targets", arguments))
    else:
        for r in records:
            print(json.dumps({key: value for key, value in r.items() if key != "problems"}))
    bad = sum(bool(r["problems"]) for r in records)
    print(f"Triton {triton.__version__}: {len(records)} kernels compiled, {bad} with problems")
    return bool(bad)
