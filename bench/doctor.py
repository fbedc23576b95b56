"""Does forgetless work on this machine, which path runs here and why, and what to do where it does not.

    forgetless doctor            # a line a check; exit code 0 only if all hold
    forgetless doctor --json     # the same for machines

Every kernel and the whole op are compared with float64 over a spread of shapes, dtypes and strides, with NaN around
what is read and a sentinel around what is written, and run twice for the same bits. Without a CUDA device the kernels
run in Triton's interpreter, in a process of their own; nothing is timed.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import forgetless as fl
from forgetless import blas, ops, plans, reference

from . import gpu
from .harness import available_bytes, machine, short, write_json

SCHEMA = 1
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LAYOUTS = ("contiguous", "transposed", "sliced")
FUSED = tuple(plan for plan in plans.PLANS if plan != "blas")
FUNCTIONS = ("project", "matmul_lowrank", "outer", "project_outer", "linear_lowrank")
#: (M, N, K, R): ragged, aligned, a single row, many ranks, no row.
SIZES = ((33, 50, 65, 24), (64, 64, 64, 16), (1, 17, 33, 1), (18, 24, 40, 130), (0, 20, 33, 8))
#: What an interpreter can do of ``gpu.CHECKS``.
SMALL = ((34, 70, 66, 8, 0.1), (1, 20, 33, 3, 0.0), (0, 16, 16, 4, 0.1))
SCALE, P = 0.5, 0.25
SEED = (-1234567, 89)
LEAST_BYTES = 1 << 30
#: Elements before and after a guarded tensor, more than any tile has; a multiple of 16 bytes.
GUARD = 1 << 14
AVOID = "set FORGETLESS_PLAN=blas to train without the fused kernels, and report this with the output of --json"


class Trouble(Exception):
    """A check that does not hold, and what to do about it."""

    def __init__(self, detail: str, advice: str):
        super().__init__(detail)
        self.advice = advice


@dataclass
class Finding:
    """One line of the report."""

    name: str
    ok: bool
    detail: str
    advice: str
    seconds: float


#: What looks: returns a line for the report, or raises. And what to do if it raises anything but Trouble.
Check = tuple[str, Callable[[], str], str]


def main(arguments: Sequence[str] | None = None) -> int:
    """Examine this machine and print what was found; 0 if all is well, 1 if not."""
    parser = argparse.ArgumentParser(prog="forgetless doctor", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    parser.add_argument("--kernels", action="store_true", help=argparse.SUPPRESS)  # the process of its own
    parser.add_argument("--only", default="", help="the checks whose names begin so")
    options = parser.parse_args(arguments)
    begin = time.perf_counter()
    findings: list[Finding] = []
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parts = [] if options.kernels else [_examined(checks(device), options.only)]
    if options.kernels or not _elsewhere(device):
        parts.append(_examined(kernel_checks(device), options.only))
    elif any(name.startswith(options.only) for name, _, _ in kernel_checks(device)):
        parts.append(_kernels_elsewhere(options.only))
    for finding in itertools.chain(*parts):
        findings.append(finding)
        if not options.json:
            print(_line(finding), flush=True)
    if not findings:
        print(f"error: no check begins with {options.only!r}", file=sys.stderr)
        return 2
    ok = all(finding.ok for finding in findings)
    seconds = round(time.perf_counter() - begin, 1)
    report = {"schema": SCHEMA, "ok": ok, "seconds": seconds, "checks": [asdict(finding) for finding in findings]}
    if not options.kernels:
        report["machine"] = machine()
    if options.json:
        print(json.dumps(report, indent=1))
    else:
        bad = sum(not finding.ok for finding in findings)
        print(f"{len(findings)} checks in {seconds} s: " + (f"{bad} failed" if bad else "all hold"))
    if options.out is not None:
        write_json(options.out, report)
    return 0 if ok else 1


def _line(finding: Finding) -> str:
    text = f"{'ok    ' if finding.ok else 'FAILED'}  {finding.name:<27} {finding.detail}"
    return text if finding.ok else f"{text}\n        {'':<27} what to do: {finding.advice}"


def _examined(todo: Iterable[Check], only: str = "") -> Iterator[Finding]:
    for name, check, advice in todo:
        if not name.startswith(only):
            continue
        begin, ok = time.perf_counter(), False
        try:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                detail = check()
            ours = [str(w.message) for w in said if str(w.message).startswith("forgetless")]
            if ours:  # a plan that gave way, a table that was ignored
                raise Trouble("; ".join(ours), advice)
            ok = True
        except Trouble as trouble:
            detail, advice = str(trouble), trouble.advice
        except Exception as error:  # whatever a compiler, a driver or a disk can raise
            detail = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
        yield Finding(name, ok, detail, "" if ok else advice, round(time.perf_counter() - begin, 2))


# --------------------------------------------------------------------------------------- machine


def checks(device: torch.device) -> list[Check]:
    """What is asked of the machine and of the path that runs on it."""
    return [
        ("versions", versions, "pip install -U forgetless"),
        ("devices", devices, "reinstall torch for this machine: https://pytorch.org/get-started"),
        ("memory", lambda: memory(device), "free some"),
        ("plan table", plan_table, "forgetless tune writes a new one"),
        ("path", lambda: path(device), AVOID),
        ("blas launchers", lambda: launchers(blas, FUNCTIONS, device, (*DTYPES, torch.float64)), "reinstall torch"),
        *(
            (f"op on {place}", lambda place=place: op(torch.device(place)), AVOID)  # type: ignore[misc]
            for place in ("cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count())))
        ),
        ("same bits", lambda: same_bits(device), AVOID),
        (
            "save, load, merge",
            lambda: round_trip(device),
            "look at the free space and the rights of the temporary folder",
        ),
    ]


def versions() -> str:
    """Every dependency is there and new enough."""
    found = [f"Python {sys.version.split()[0]}", f"forgetless {fl.__version__}"]
    try:
        wanted = requires("forgetless") or []
    except PackageNotFoundError:
        found.append("not installed as a package")
        wanted = []
    for text in wanted:
        match = re.match(r"([\w-]+)\s*>=\s*([\d.]+)", text)
        if match is None or "extra ==" in text or ("Linux" in text and sys.platform != "linux"):
            continue
        name, least = match.groups()
        try:
            have = version(name)
        except PackageNotFoundError:
            raise Trouble(f"{name} is not installed", f"pip install '{name}>={least}'") from None
        if _numbers(have) < _numbers(least):
            raise Trouble(f"{name} is {have}, wants {least} or later", f"pip install -U '{name}>={least}'")
        found.append(f"{name} {have}")
    return ", ".join(found)


def _numbers(text: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", text.split("+")[0])[:3]]


def devices() -> str:
    """The cards, or why there are none."""
    if not torch.cuda.is_available():
        if torch.version.cuda is None and Path("/proc/driver/nvidia/version").exists():
            raise Trouble(
                "there is an NVIDIA driver, but this torch was built without CUDA",
                "install torch with CUDA: https://pytorch.org/get-started",
            )
        if torch.version.cuda is not None and Path("/proc/driver/nvidia/version").exists():
            raise Trouble(
                f"torch was built for CUDA {torch.version.cuda}, there is an NVIDIA driver, but no device can be used",
                "look at nvidia-smi and CUDA_VISIBLE_DEVICES; the driver may be too old for this torch",
            )
        return f"no CUDA device; CPU, {torch.get_num_threads()} threads"
    rows = []
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        if facts.major < 8:
            raise Trouble(
                f"cuda:{index} {facts.name} is sm_{facts.major}{facts.minor}, the kernels want sm_80 or later",
                "use another card, or FORGETLESS_PLAN=blas",
            )
        rows.append(f"cuda:{index} {facts.name} sm_{facts.major}{facts.minor} {facts.total_memory / 2**30:.0f} GiB")
    return ", ".join(rows)


def memory(device: torch.device) -> str:
    """There is room to train something small."""
    found = []
    for place in {torch.device("cpu"), device}:
        free = available_bytes(place)
        found.append(f"{free / 2**30:.1f} GiB free on {place.type}")
        if free < LEAST_BYTES:
            raise Trouble(found[-1], f"end other programs on it; at least {LEAST_BYTES >> 30} GiB are wanted")
    return ", ".join(sorted(found))


def plan_table() -> str:
    """The tuning table and the environment variables that choose plans can be read."""
    try:
        plan, strict = plans.forced()
    except ValueError as error:
        raise Trouble(str(error), "unset FORGETLESS_PLAN, or set it to one of these") from None
    where = plans.table_path()
    said = [f"FORGETLESS_PLAN {os.environ['FORGETLESS_PLAN']!r}"] if plan or strict else []
    try:
        rows = plans.check_table(json.loads(where.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return ", ".join([*said, "none yet: the first use of each shape decides"])
    except (OSError, ValueError, RecursionError) as error:
        raise Trouble(f"{where} cannot be used: {error}", f"delete {where}, then run forgetless tune") from None
    counts = [f"{len(of)} rows for {name}" for name, of in rows.items()]
    return ", ".join([*said, *counts]) or "empty"


def path(device: torch.device) -> str:
    """The plan of a common layer, after a first use of it, and the reason."""
    N = K = 4096 if device.type == "cuda" else 64
    found = []
    for dtype in DTYPES:
        if device.type == "cuda":
            one_step(draw_layer(4096, N, K, 16, dtype, device), 0.0)
        plan, reason = ops.explain_path(device, dtype, N, K, 16)
        found.append(f"{short(dtype)}: {plan} ({reason})")
    alike = {row.partition(": ")[2] for row in found}
    return f"every dtype: {alike.pop()}" if len(alike) == 1 else "; ".join(found)


def op(device: torch.device) -> str:
    """y and every gradient of the op, by the path that runs there, against float64."""
    return _within(gpu.comparisons(device))


def _within(rows: Iterable[tuple[str, float, float]], advice: str = AVOID) -> str:
    count, worst = 0, 0.0
    for title, error, limit in rows:
        count += 1
        if not error <= limit:  # NaN is not
            raise Trouble(f"{title}: error {error:.3e} against float64, limit {limit:.3e}", advice)
        worst = max(worst, error / limit if limit else 0.0)
    return f"{count} comparisons with float64, the worst at {worst:.2f} of its limit"


def draw(*shape: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
    gen = torch.Generator().manual_seed(seed + sum(i * n for i, n in enumerate(shape, 1)))
    return torch.randn(shape, generator=gen).to(device, dtype)


def draw_layer(M: int, N: int, K: int, R: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """x, weight, down, up; the factors in float32 beside a half type"""
    factors = torch.promote_types(dtype, torch.float32)
    x, weight = draw(M, K, dtype=dtype, device=device), draw(N, K, dtype=dtype, device=device, seed=1)
    down, up = (draw(*s, dtype=factors, device=device, seed=2) for s in ((R, K), (N, R)))
    return [t.requires_grad_(t is not weight) for t in (x, weight.div_(max(K, 1) ** 0.5), down, up)]


def one_step(tensors: list[Tensor], dropout: float) -> list[Tensor]:
    """y and the gradients of x, down and up."""
    x, weight, down, up = tensors
    seed = torch.tensor(SEED, dtype=torch.int32, device=x.device)
    y = ops.lowrank_linear(x, weight, down, up, None, SCALE, dropout, seed)
    return [y.detach(), *torch.autograd.grad(y.float().square().sum(), [x, down, up])]


def same_bits(device: torch.device, M: int = 130, dtypes: Sequence[torch.dtype] = DTYPES) -> str:
    """Two runs, dropout and several blocks of rows included."""
    for dtype in dtypes:
        tensors = draw_layer(M, 50, 66, 8, dtype, device)
        for name, a, b in zip(gpu.NAMES, one_step(tensors, P), one_step(tensors, P), strict=True):
            if not torch.equal(a, b):
                raise Trouble(f"{name} in {short(dtype)} differs from run to run", AVOID)
    return f"{len(gpu.NAMES) * len(dtypes)} results, twice the same"


def round_trip(device: torch.device) -> str:
    """Every method: adapt, one step, save, load, merge; the function stays the same."""
    methods = [fl.LoRA(rank=2), fl.CLoRA(rank=2, k=4), fl.CURLoRA(rank=2), fl.LaLoRA(rank=2)]
    x = draw(5, 8, dtype=torch.float32, device=device)

    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8)).to(device)

    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Laplace has no statistics")
        for method in methods:
            trained = fl.adapt(model(), method)
            optimizer = torch.optim.SGD([p for p in trained.parameters() if p.requires_grad], 0.1)
            (trained(x).square().mean() + fl.penalty(trained)).backward()
            optimizer.step()
            with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
                y = trained(x)
                fl.save(trained, folder)
                loaded = fl.load(model(), folder)(x)
                merged = fl.merge(trained)(x)
            if not torch.equal(loaded, y):
                raise Trouble(f"{method.name}: what was saved and loaded computes something else", "report this")
            if not (merged - y).abs().max() <= 1e-5 * y.abs().max():
                raise Trouble(f"{method.name}: merged it computes something else", "report this")
    return f"{len(methods)} methods"


# --------------------------------------------------------------------------------------- kernels


def _elsewhere(device: torch.device) -> bool:
    """Whether the kernels must run in another process: the interpreter is chosen when they are imported."""
    return device.type == "cpu" and not os.environ.get("TRITON_INTERPRET") == "1"


def _kernels_elsewhere(only: str) -> Iterator[Finding]:
    begin = time.perf_counter()
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    run = [sys.executable, "-m", f"{__package__}.doctor", "--kernels", "--json", "--only", only]
    try:
        done = subprocess.run(run, capture_output=True, text=True, env=environment, timeout=600)
    except (OSError, subprocess.SubprocessError) as error:
        rows, said = [], str(error)
    else:
        said = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()[-1]
        try:
            rows = json.loads(done.stdout)["checks"]
        except (ValueError, KeyError, TypeError):
            rows = []
    yield from (Finding(**row) for row in rows)
    if not rows:
        detail = f"the kernels could not be run in the interpreter: {said}"
        yield Finding("kernels", False, detail, "reinstall triton", round(time.perf_counter() - begin, 2))


def kernel_checks(device: torch.device) -> list[Check]:
    """What is asked of the Triton kernels."""
    if ops._kernels is None:
        return [("kernels", _no_triton, "pip install triton")]
    where = "interpreter" if device.type == "cpu" else "native"
    return [
        *(
            (f"{name}, {where}", lambda name=name: launchers(ops._kernels, [name], device), AVOID)  # type: ignore[misc]
            for name in FUNCTIONS
        ),
        (f"descriptors, {where}", lambda: descriptors(device), AVOID),
        *((f"plan {plan}, {where}", lambda plan=plan: by_plan(plan, device), AVOID) for plan in FUSED),  # type: ignore[misc]
        (f"guard pages, {where}", lambda: guard_pages(device), AVOID),
        (f"masks, {where}", lambda: masks(device), AVOID),
    ]


def _no_triton() -> str:
    if sys.platform == "linux":
        raise Trouble("Triton is not installed", "pip install triton; without it everything runs on BLAS")
    return "no Triton on this platform; everything runs on BLAS"


def arrange(t: Tensor, layout: str, around: float) -> Tensor:
    """The same values with other strides; ``around`` lies between and beside them"""
    if layout == "contiguous":
        return t
    if layout == "transposed":
        return t.t().contiguous().t()
    grid = [(2 * n + 3, slice(2, 2 + 2 * n, 2)) for n in t.shape]
    wide = torch.full([size for size, _ in grid], around, dtype=t.dtype, device=t.device)
    view = wide[tuple(part for _, part in grid)]
    view.copy_(t)
    return view


def operands(function: str, M: int, N: int, K: int, R: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    def tensor(*shape: int, seed: int, of: torch.dtype = dtype) -> Tensor:
        return draw(*shape, dtype=of, device=device, seed=seed)

    wide = torch.promote_types(dtype, torch.float32)
    x, h, up = tensor(M, K, seed=0), tensor(M, R, seed=2), tensor(N, R, seed=3, of=wide)
    down = tensor(R, K, seed=5, of=wide) / max(K, 1) ** 0.5
    weight, bias = tensor(N, K, seed=1), tensor(N, seed=4)
    return {
        "project": [x, down],
        "matmul_lowrank": [x, weight, h, up, bias],
        "outer": [h, x],
        "project_outer": [x, down, h],
        "linear_lowrank": [x, weight, down, up, bias],
    }[function]


def formula(function: str, tensors: list[Tensor], keep: Tensor | None) -> list[Tensor]:
    """What people write, in the dtype of the first tensor: eager PyTorch, or the truth if that is float64"""
    t = [each.to(tensors[0].dtype) for each in tensors]

    def dropped(x: Tensor) -> Tensor:
        return x if keep is None else x * keep

    if function == "project":
        return [SCALE * (dropped(t[0]) @ t[1].T)]
    if function == "matmul_lowrank":
        return [nn.functional.linear(t[0], t[1], t[4]) + dropped(t[2] @ t[3].T)]
    if function == "outer":
        return [t[0].T @ dropped(t[1])]
    if function == "project_outer":
        return [SCALE * (t[0] @ t[1].T), t[2].T @ t[0]]
    h = SCALE * (dropped(t[0]) @ t[2].T)
    return [nn.functional.linear(t[0], t[1], t[4]) + h @ t[3].T, h]


def call(
    module: Any, function: str, tensors: list[Tensor], p: float, seed: Tensor, plan: str = "split"
) -> list[Tensor]:
    drop = {"p": p, "seed": seed if p else None} if function != "project_outer" else {}
    scale = {"scale": SCALE} if function in ("project", "project_outer", "linear_lowrank") else {}
    by = {"plan": plan} if function == "linear_lowrank" else {}
    found = getattr(module, function)(*tensors, **drop, **scale, **by)
    return list(found) if isinstance(found, tuple) else [found]


def launchers(
    module: Any, functions: Sequence[str], device: torch.device, dtypes: Sequence[torch.dtype] = DTYPES
) -> str:
    """Launchers of one backend over sizes, dtypes, strides and dropout, against float64."""
    advice = AVOID if module is ops._kernels else "reinstall torch: its matrix products are wrong here"
    return _within((row for function in functions for row in _launched(module, function, device, dtypes)), advice)


def _launched(
    module: Any, function: str, device: torch.device, dtypes: Sequence[torch.dtype]
) -> Iterator[tuple[str, float, float]]:
    seed = torch.tensor(SEED, dtype=torch.int32, device=device)
    around = math.nan if module is ops._kernels else 7.0  # a vendor's GEMM may multiply its padding by zero
    whole = function == "linear_lowrank"
    with _one_sweep():
        for turn, (size, dtype) in enumerate(itertools.product(SIZES, dtypes)):
            plainly = operands(function, *size, dtype, device)
            for index, layout in enumerate(LAYOUTS):
                if whole and index != (turn + turn // 3) % 3:
                    continue  # made of the same loads as the others: each size and dtype in one layout
                p = P if index % 2 == 0 and function != "project_outer" else 0.0
                like = plainly[1 if function == "outer" else 0]
                shape = (like.shape[0], plainly[1].shape[0]) if function == "matmul_lowrank" else tuple(like.shape)
                keep = reference.keep_mask(seed, p, *shape) if p and shape[0] else None
                eager = formula(function, plainly, keep)
                truth = formula(function, [t.double() for t in plainly], keep)
                given = [arrange(t, layout, around) if t.dim() == 2 else t for t in plainly]
                for plan in ("full", "once") if whole else ("split",):
                    ours = call(module, function, given, p, seed, plan)
                    title = f"{function} {plan} {short(dtype)} M,N,K,R={size} {layout} dropout={p}"
                    yield from ((title, *_errors(*row)) for row in zip(ours, eager, truth, strict=True))


def _errors(ours: Tensor, eager: Tensor, truth: Tensor) -> tuple[float, float]:
    """Our worst error, and what is allowed: twice eager's, and what rounding the truth once can cost."""
    if ours.shape != truth.shape:
        return math.inf, 0.0
    if not truth.numel():
        return 0.0, 0.0
    mine, theirs = ((t.double() - truth).abs().max().item() for t in (ours, eager))
    eps = torch.finfo(ours.dtype).eps
    # the truth in float64 is not exact either
    once = 16 * eps if ours.dtype == torch.float64 else eps / 2 + 4 * torch.finfo(torch.float32).eps
    return mine, 2 * theirs + once * truth.abs().max().item()


@contextlib.contextmanager
def _one_sweep() -> Iterator[None]:
    """project_outer in one pass over x wherever it can, not only where that pays"""
    if ops._kernels is None:
        yield
        return
    from forgetless_kernels import backward

    with mock.patch.object(backward, "sweep_pays", lambda *sizes: True):
        yield


def descriptors(device: torch.device) -> str:
    """The GEMM on tensor descriptors, where the card has them or the interpreter pretends to."""
    from forgetless_kernels import tiles

    if device.type == "cuda" and tiles.known_arch(tiles.arch_of(device)) not in (90, 100):
        return "not used on this card"
    small = {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32} if device.type == "cpu" else None
    with contextlib.ExitStack() as stack:
        for row in ("matmul_lowrank_descriptor", "matmul_lowrank_t_descriptor"):
            if small is not None:
                stack.enter_context(tiles.forced(row, **small))
        seed = torch.tensor(SEED, dtype=torch.int32, device=device)

        def rows() -> Iterator[tuple[str, float, float]]:
            for dtype in (torch.float16, torch.bfloat16):
                for size, p in (((34, 56, 40, 24), P), ((33, 40, 64, 128), 0.0)):
                    plainly = operands("matmul_lowrank", *size, dtype, device)
                    keep = reference.keep_mask(seed, p, size[0], size[1]) if p else None
                    eager, truth = (
                        formula("matmul_lowrank", given, keep) for given in (plainly, [t.double() for t in plainly])
                    )
                    for stored in (plainly[1], plainly[1].t().contiguous().t()):
                        given = [plainly[0], stored, *plainly[2:]]
                        ours = call(ops._kernels, "matmul_lowrank", given, p, seed)
                        yield f"{short(dtype)} {size} dropout={p}", *_errors(ours[0], eager[0], truth[0])

        return _within(rows())


@contextlib.contextmanager
def planned(plan: str) -> Iterator[None]:
    """The op on the kernels by this plan; a fallback is an error."""
    with mock.patch.dict(os.environ, {"FORGETLESS_PLAN": f"{plan},strict"}), ops.backend("triton"), _one_sweep():
        yield


def by_plan(plan: str, device: torch.device) -> str:
    """y and every gradient of the op by one plan against float64, then twice for the same bits."""
    with planned(plan):
        if device.type == "cuda":
            return f"{_within(gpu.comparisons(device))}; {same_bits(device)}"
        return f"{_within(gpu.comparisons(device, SMALL))}; {same_bits(device, 70, DTYPES[2:])}"


def guard_pages(device: torch.device) -> str:
    """NaN around what is read, a sentinel around what is written."""
    from forgetless_kernels import tl_utils

    buffers: list[tuple[Tensor, int]] = []

    def padded(shape: Sequence[int], fill: float, dtype: torch.dtype) -> Tensor:
        size = math.prod(shape)
        buffer = torch.full([size + 2 * GUARD], fill, dtype=dtype, device=device)
        buffers.append((buffer, size))
        return buffer[GUARD : GUARD + size].view(*shape)

    seed = torch.tensor(SEED, dtype=torch.int32, device=device)
    count = 0
    with _one_sweep(), mock.patch.object(tl_utils, "empty", lambda shape, dtype, like: padded(shape, -77, dtype)):
        for function in FUNCTIONS:
            for dtype in DTYPES:
                for plan in ("split", "full", "once") if function == "linear_lowrank" else ("split",):
                    plainly = operands(function, 33, 50, 65, 24, dtype, device)
                    given = [padded(t.shape, math.nan, t.dtype).copy_(t) for t in plainly]
                    buffers.clear()
                    results = call(ops._kernels, function, given, 0.0, seed, plan)
                    title = f"{function} {plan} {short(dtype)}"
                    if not all(bool(t.isfinite().all()) for t in results):
                        raise Trouble(f"{title} read beside its operands", AVOID)
                    for buffer, size in buffers:
                        if not bool((buffer[:GUARD] == -77).all() and (buffer[GUARD + size :] == -77).all()):
                            raise Trouble(f"{title} wrote beside its results", AVOID)
                    count += len(buffers)
    if not count:
        raise Trouble("no kernel asked for memory", "report this")
    return f"{count} results with nothing written beside them"


def masks(device: torch.device) -> str:
    """The dropout masks of the kernels are the reference's, bit for bit."""
    assert ops._kernels is not None
    seed = torch.tensor(SEED, dtype=torch.int32, device=device)
    for p in (1e-4, 0.1, 0.5, 0.9):
        want = reference.keep_mask(seed, p, 33, 64).float()
        ones = torch.ones(33, 64, device=device)
        found = ops._kernels.project(ones, torch.eye(64, device=device), p=p, seed=seed)
        if not torch.equal(found, want) or not torch.equal(blas.keep_bits(seed, p, 33, 64) != 0, want != 0):
            raise Trouble(f"dropout {p} drops other elements than the reference does", AVOID)
    return "dropout masks equal the reference's, bit for bit"


if __name__ == "__main__":
    raise SystemExit(main())
