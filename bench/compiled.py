"""What a compiled kernel holds (registers, stack, shared memory, tensor cores, stores), and what is wrong with it."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

import triton

from forgetless_kernels import tiles

BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
REGISTERS = 65536  # of a multiprocessor
STORE = re.compile(r"\bst(?:\.\w+)*?\.global(?:\.[A-Za-z:_]+)*?(?:\.v(\d))?\.[bfu](\d+)")
BULK_STORE = re.compile(r"cp\.async\.bulk\.tensor\.\S*global\.shared")


def usage(kernel, launch: dict) -> dict:
    """Registers, stack, shared memory and the instructions that matter of one compiled kernel"""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()

        def dump(option: str) -> str:
            return subprocess.run([BIN / "cuobjdump", option, file.name], capture_output=True, text=True).stdout

        resources, sass = dump("-res-usage"), dump("-sass")
    ptx = kernel.asm["ptx"]
    mma = re.findall(r"^[^/\n]*?\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)\.([^\s;]+)", ptx, re.M)
    warps = launch.get("num_warps", kernel.metadata.num_warps)
    macs = 0
    for kind, rest in mma:
        shape = re.search(r"m(\d+)n(\d+)k(\d+)", rest)
        m, n, k = map(int, shape.groups()) if shape else (128, launch.get("BLOCK_N", 256), 16)
        macs += m * n * k * {"mma.sync": warps, "wgmma.mma_async": warps // 4}.get(kind, 1)
    written = sum(int(v or 1) * int(bits) // 8 * 32 * warps for v, bits in STORE.findall(ptx))
    registers = int(re.search(r"REG:(\d+)", resources)[1])
    shared = kernel.metadata.shared
    block = {k.removeprefix("BLOCK_"): v for k, v in launch.items() if k.startswith("BLOCK")}
    all_warps = kernel.metadata.num_warps
    return {
        "kernel": kernel.metadata.name.strip("_").removesuffix("_kernel"),
        "block": block,
        "stages": launch.get("num_stages", 0),
        "warps": all_warps,
        "registers": registers,
        "stack": int(re.search(r"STACK:(\d+)", resources)[1]),
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", sass)),
        "shared": shared,
        "blocks_per_sm": occupancy(registers, shared, all_warps, kernel.metadata.target.arch),
        "mma": sorted({kind for kind, _ in mma}),
        "mmas": len(mma),
        "macs": macs,
        "fma": len(re.findall(r"\bfma\.rn\.f32", ptx)),
        "written": written,
        "bulk_stores": len(BULK_STORE.findall(ptx)),
        "instructions": len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s", sass, re.M)),
    }


def occupancy(registers: int, shared: int, warps: int, arch: int) -> int:
    """Blocks of a multiprocessor, as registers (in units of 8 a thread), shared memory and warps allow"""
    by_registers = REGISTERS // (32 * warps * (registers + 7 & ~7))
    room = {80: 167936, 90: 233472, 100: 233472}.get(arch, 102400)
    limit = {80: 64, 90: 64, 100: 64}.get(arch, 48)
    return min(by_registers, room // (shared + 1024), limit // warps)


def macs_a_step(record: dict) -> int:
    """Multiply-adds that one step of the kernel's main loop, and what surrounds it, must hold"""
    block, name = record["block"], record["kernel"]
    M, K, R, N = (block.get(axis, 0) for axis in "MKRN")
    if name == "project":
        return M * K * R
    if name == "outer":
        return M * K * R
    if name == "project_outer":
        return 2 * M * K * R
    if name.startswith("matmul_lowrank"):
        return M * N * K + M * N * R
    if name == "linear_lowrank":
        return M * N * K + M * K * R + M * N * R
    return 0


def bytes_a_tile(record: dict) -> int:
    """Bytes that a program must store at least, whatever it stores them with"""
    block, name = record["block"], record["kernel"]
    size = 4 if record["dtype"] == "float32" else 2
    if name == "project":
        return block["M"] * block["R"] * size
    if name == "outer":
        return block["R"] * block["K"] * 4
    if name == "project_outer":
        return (block["M"] + block["K"]) * block["R"] * 4
    if name in ("matmul_lowrank", "linear_lowrank"):
        return block["M"] * block["N"] * size
    return 0


def problems(record: dict) -> list[str]:
    """What is wrong with a compiled kernel; nothing, if all is well"""
    found = []
    limit = tiles.SHARED[record["arch"]]
    if record["shared"] > limit:
        found.append(f"{record['shared']} bytes of shared memory, the card has {limit}")
    if record["stack"] or record["spills"]:
        found.append(f"spills: STACK:{record['stack']}, {record['spills']} local loads and stores")
    wanted = macs_a_step(record)
    if record["dtype"] == "float32":
        if wanted and not record["fma"]:
            found.append("no FMA")
    elif record["macs"] < wanted:
        found.append(f"{record['macs']} multiply-adds on tensor cores, a step holds {wanted}")
    best = {90: "wgmma.mma_async", 100: "tcgen05.mma"}.get(record["arch"])
    wide = record["kernel"].startswith(("matmul", "linear")) and record["block"]["M"] >= 64
    if best and wide and record["dtype"] != "float32" and best not in record["mma"]:
        found.append(f"{record['mma']} where the card has {best}")
    if record["kernel"].endswith("descriptor"):
        if record["bulk_stores"] < 2:
            found.append(f"{record['bulk_stores']} bulk stores of 2")
    elif record["written"] < bytes_a_tile(record) or not record["written"]:
        found.append(f"{record['written']} bytes stored of {bytes_a_tile(record)}")
    if not record["blocks_per_sm"]:
        found.append("not one block fits a multiprocessor")
    return found
