"""Compile every kernel for every card we know, without one: what fits, what spills, what uses tensor cores.

    python -m bench.targets                  a subset, as the tests run it
    python -m bench.targets --all            everything; writes docs/targets.md and bench/results/targets.json
    python -m bench.targets --triton 3.9.0   with another Triton, installed beside this one under .cache/

The launchers themselves are run, on tensors without storage and under a driver that names a card but has none: what is
compiled is what a real call would compile, arguments, tiles, divisibility and all. Nothing is executed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def beside(version: str) -> Path:
    """A folder that holds that Triton alone, installed by pip on first use; half an installation leaves none"""
    folder = ROOT / ".cache" / f"triton-{version}"
    if not folder.exists():
        folder.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as place:
            pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-q", "--no-deps"]
            subprocess.run([*pip, "--target", f"{place}/triton", f"triton=={version}"], check=True)
            os.replace(f"{place}/triton", folder)
    return folder


if (
    __name__ == "__main__" and "--triton" in sys.argv
):  # before Triton is imported: go on in a process that finds that one
    place = sys.argv.index("--triton")
    path = [str(beside(sys.argv[place + 1])), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(path)
    os.execv(sys.executable, [sys.executable, "-m", "bench.targets", *sys.argv[1:place], *sys.argv[place + 2 :]])

import torch  # noqa: E402
import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime.driver import driver  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from forgetless_kernels import fused, matmul_lowrank, project, tiles  # noqa: E402

from .compiled import problems, usage  # noqa: E402

ARCHS = (80, 86, 89, 90, 100, 120)
PROCESSORS = {80: 108, 86: 82, 89: 128, 90: 132, 100: 148, 120: 170}
M, N, K = 8192, 4096, 4096


class _NoDriver:
    """Answers what the compiler asks of a driver; each architecture is a device of its own."""

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


@contextlib.contextmanager
def compiling_for(arch: int) -> Iterator[list]:
    """Within the block, launches compile for ``arch`` and run nothing; the list collects (kernel, launch arguments)."""
    launches: list = []
    run = JITFunction.run

    @functools.wraps(run)
    def warm(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        launches.append((kernel, dict(kwargs)))
        return kernel

    patches = [
        (JITFunction, "run", warm),
        (tiles, "arch_of", lambda device: arch),
        (matmul_lowrank, "programs_of", lambda device: PROCESSORS[arch]),
        (project, "sweep_pays", lambda *sizes: True),
    ]
    before = [getattr(where, name) for where, name, _ in patches]
    active = driver._active
    driver.set_active(_NoDriver(arch))
    for where, name, value in patches:
        setattr(where, name, value)
    try:
        yield launches
    finally:
        driver._active = active
        for (where, name, _), value in zip(patches, before, strict=True):
            setattr(where, name, value)


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
    odd_x, odd_weight = on(M, K + 4)[:, 1 : K - 3], on(N, K + 4)[:, 1 : K - 3]  # not 16-byte aligned, K not even
    odd_down, bias = on(R, K - 4, dtype=factor), on(N)
    return {
        "project": ("project", lambda: fused.project(x, down)),
        "project dropout": ("project", lambda: fused.project(x, down, 1.0, 0.1, seed)),
        "project ragged": ("project", lambda: fused.project(odd_x, odd_down)),
        "project dy": ("project", lambda: fused.project(dy, up.T)),
        "forward": ("matmul_lowrank", lambda: fused.matmul_lowrank(x, weight, h, up)),
        "forward bias": ("matmul_lowrank", lambda: fused.matmul_lowrank(x, weight, h, up, bias)),
        "forward ragged": ("matmul_lowrank", lambda: fused.matmul_lowrank(odd_x, odd_weight, h, up)),
        "dx": ("matmul_lowrank_t", lambda: fused.matmul_lowrank(dy, weight.T, h, down.T)),
        "dx dropout": ("matmul_lowrank_t", lambda: fused.matmul_lowrank(dy, weight.T, h, down.T, None, 0.1, seed)),
        "dx ragged": ("matmul_lowrank_t", lambda: fused.matmul_lowrank(dy, odd_weight.T, h, odd_down.T)),
        "outer": ("outer", lambda: fused.outer(h, x, dtype=factor)),
        "outer dropout": ("outer", lambda: fused.outer(h, x, 0.1, seed, factor)),
        "sweep": ("project_outer", lambda: fused.project_outer(dy, up.T, h, 1.0, factor)),
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


def subset() -> list[Case]:
    """What the tests compile on every card"""
    names = ("project dropout", "forward", "dx dropout", "outer dropout", "sweep", "once")
    return [Case(name, 16) for name in names]


def everything() -> list[Case]:
    """Every call at R=16, and the hardest of them at other ranks, dtypes and on the default tiles"""
    hard = ["project dropout", "forward", "dx dropout", "outer dropout", "sweep", "full", "once"]
    ragged = ["project ragged", "forward ragged", "dx ragged"]
    cases = [Case(name, 16) for name in calls(16, torch.bfloat16)]
    cases += [Case(name, 64) for name in [*hard, *ragged, "once dropout", "full dx dropout"]]
    cases += [Case(name, 128) for name in [*hard[:4], *ragged]]
    cases += [Case(name, 200) for name in [*hard[:4], "forward ragged"]]
    cases += [Case(name, 8, "float16") for name in hard]
    cases += [Case(name, 16, "float32") for name in hard[:5]]
    cases += [Case(name, 16, default_tile=True) for name in hard]
    return cases


def measure(case: Case, arch: int) -> list[dict]:
    """Compile one case for one card: a record for each kernel it launches"""
    row, call = calls(case.R, getattr(torch, case.dtype))[case.name]
    with contextlib.ExitStack() as stack:
        if case.default_tile:
            default = dataclasses.asdict(tiles.TABLE[row][0, getattr(torch, case.dtype).itemsize])
            stack.enter_context(tiles.forced(row, **{k: v for k, v in default.items() if v}))
            stack.enter_context(_without_descriptors())
        launches = stack.enter_context(compiling_for(arch))
        call()
    return [{"case": str(case), "arch": arch, "R": case.R, "dtype": case.dtype, **usage(*one)} for one in launches]


@contextlib.contextmanager
def _without_descriptors() -> Iterator[None]:
    before, matmul_lowrank.has_row = matmul_lowrank.has_row, lambda kernel, device: False
    try:
        yield
    finally:
        matmul_lowrank.has_row = before


def attempt(case: Case, arch: int) -> list[dict]:
    """measure, with a failure to compile as a record"""
    try:
        records = measure(case, arch)
    except Exception as error:  # whatever the compiler raises is the finding
        text = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        return [{"case": str(case), "arch": arch, "R": case.R, "dtype": case.dtype, "problems": [text[:300]]}]
    return [{**record, "problems": problems(record)} for record in records]


def _one(job: tuple[Case, int]) -> list[dict]:
    return attempt(*job)


def collect(cases: list[Case], archs: tuple[int, ...] = ARCHS, jobs: int = 1, show: bool = False) -> list[dict]:
    """Every case on every card; a kernel met again is listed once"""
    work = [(case, arch) for arch in archs for case in cases]
    records, seen = [], set()
    with contextlib.ExitStack() as stack:
        done = map(_one, work) if jobs == 1 else stack.enter_context(ProcessPoolExecutor(jobs)).map(_one, work)
        for index, found in enumerate(done):
            for record in found:
                key = json.dumps({k: v for k, v in record.items() if k != "case"}, sort_keys=True)
                if key not in seen:
                    seen.add(key)
                    records.append(record)
                if show and record["problems"]:
                    print(f"sm_{record['arch']} {record['case']}: {'; '.join(record['problems'])}", flush=True)
            if show and sys.stderr.isatty():
                print(f"\r{index + 1}/{len(work)}", end="", file=sys.stderr, flush=True)
    return records


def table(records: list[dict]) -> str:
    head = "| case | kernel | blocks | warps | stages | registers | spills | shared | blocks/SM | MMA | instructions |"
    lines = []
    for arch in sorted({r["arch"] for r in records}):
        lines += [f"\n### sm_{arch}\n", head, "|" + "---|" * 11]
        for r in records:
            if r["arch"] != arch:
                continue
            if "kernel" not in r:
                lines.append(f"| {r['case']} | {'; '.join(r['problems'])} |" + " |" * 9)
                continue
            block = " ".join(f"{k}{v}" for k, v in r["block"].items() if k)
            kinds = ", ".join(f"{kind.split('.')[0]}" for kind in r["mma"])
            lines.append(
                f"| {r['case']} | {r['kernel']} | {block} | {r['warps']} | {r['stages']} | {r['registers']} "
                f"| {r['stack']} B | {r['shared']} | {r['blocks_per_sm']} | {r['mmas']} {kinds} | {r['instructions']} |"
            )
    return "\n".join(lines)


def write(records: list[dict]) -> None:
    """bench/results/targets.json, by Triton version, and docs/targets.md from it"""
    path = ROOT / "bench" / "results" / "targets.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    results = json.loads(path.read_text()) if path.exists() else {}
    results[triton.__version__] = records
    parts = (
        f"{json.dumps(version)}: [\n" + ",\n".join(json.dumps(record) for record in results[version]) + "\n]"
        for version in sorted(results)
    )
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n")  # a kernel a line
    pins = (ROOT / "constraints.txt").read_text()
    pinned = re.search(r"^triton==(\S+)", pins, re.M)[1]
    lines = [
        "# What the kernels compile to",
        "",
        "Generated by `python -m bench.targets --all`: real compilations for real cards; no card was used, nothing was",
        f"timed. Layer of M={M}, N={N}, K={K}; bfloat16 activations and float32 factors unless the row says otherwise.",
        "Spills is the stack the assembler reports; MMA counts instructions in the PTX.",
        "",
        "Kernels compiled, by Triton version and card, and how many of them have a problem: too much shared memory, a",
        "spill, products off the tensor cores, multiply-adds or stores missing, or a failure to compile.",
        "",
        "| Triton | " + " | ".join(f"sm_{arch}" for arch in ARCHS) + " | problems |",
        "|" + "---|" * (len(ARCHS) + 2),
    ]
    for version, found in sorted(results.items(), key=lambda item: [int(n) for n in re.findall(r"\d+", item[0])]):
        compiled = [sum(r["arch"] == arch and "kernel" in r for r in found) for arch in ARCHS]
        bad = sum(bool(r["problems"]) for r in found)
        lines.append(f"| {version} | {' | '.join(map(str, compiled))} | {bad} |")
    lines += [f"\n## Triton {pinned}", table(results.get(pinned, []))]
    docs = ROOT / "docs" / "targets.md"
    docs.parent.mkdir(exist_ok=True)
    docs.write_text("\n".join(lines) + "\n")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.targets", description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="every case; writes docs/targets.md and its JSON")
    parser.add_argument("--archs", type=lambda s: tuple(map(int, s.split(","))), default=ARCHS)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--triton", help="another version of Triton")
    options = parser.parse_args(arguments)
    cases = [case for case in (everything() if options.all else subset()) if options.only in str(case)]
    records = collect(cases, options.archs, options.jobs, show=True)
    bad = [r for r in records if r["problems"]]
    if options.all and not options.only and options.archs == ARCHS:
        write(records)
    else:
        print(table(records))
    print(f"Triton {triton.__version__}: {len(records)} kernels compiled, {len(bad)} with problems")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
