"""What ``forgetless doctor`` asks of the machine, of the path that runs on it, and of the Triton kernels."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn

import forgetless as fl
from forgetless.ops import autograd as ops
from forgetless.ops import blas, reference
from forgetless.ops import dispatch as plans
from forgetless_bench.bytes import available_bytes
from forgetless_bench.harness import short

from .launched import (
    AVOID,
    DTYPES,
    FUNCTIONS,
    SEED,
    Check,
    P,
    Trouble,
    call,
    comparisons,
    draw,
    draw_layer,
    errors,
    formula,
    launchers,
    one_step,
    one_sweep,
    operands,
    same_bits,
    within,
)

FUSED = tuple(plan for plan in plans.PLANS if plan != "blas")
#: What an interpreter can do of ``CHECKS``.
SMALL = ((34, 70, 66, 8, 0.1), (1, 20, 33, 3, 0.0), (0, 16, 16, 4, 0.1))
LEAST_BYTES = 1 << 30
#: Elements before and after a guarded tensor, more than any tile has; a multiple of 16 bytes.
GUARD = 1 << 14


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
            (f"op on {place}", lambda place=place: op(torch.device(place)), AVOID)
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
    return within(comparisons(device))


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


def kernel_checks(device: torch.device) -> list[Check]:
    """What is asked of the Triton kernels."""
    if ops._kernels is None:
        return [("kernels", _no_triton, "pip install triton")]
    where = "interpreter" if device.type == "cpu" else "native"
    return [
        *((f"{name}, {where}", lambda name=name: launchers(ops._kernels, [name], device), AVOID) for name in FUNCTIONS),
        (f"descriptors, {where}", lambda: descriptors(device), AVOID),
        *((f"plan {plan}, {where}", lambda plan=plan: by_plan(plan, device), AVOID) for plan in FUSED),
        (f"guard pages, {where}", lambda: guard_pages(device), AVOID),
        (f"masks, {where}", lambda: masks(device), AVOID),
    ]


def _no_triton() -> str:
    if sys.platform == "linux":
        raise Trouble("Triton is not installed", "pip install triton; without it everything runs on BLAS")
    return "no Triton on this platform; everything runs on BLAS"


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
                        yield f"{short(dtype)} {size} dropout={p}", *errors(ours[0], eager[0], truth[0])

        return within(rows())


@contextlib.contextmanager
def planned(plan: str) -> Iterator[None]:
    """The op on the kernels by this plan; a fallback is an error."""
    with mock.patch.dict(os.environ, {"FORGETLESS_PLAN": f"{plan},strict"}), ops.backend("triton"), one_sweep():
        yield


def by_plan(plan: str, device: torch.device) -> str:
    """y and every gradient of the op by one plan against float64, then twice for the same bits."""
    with planned(plan):
        if device.type == "cuda":
            return f"{within(comparisons(device))}; {same_bits(device)}"
        return f"{within(comparisons(device, SMALL))}; {same_bits(device, 70, DTYPES[2:])}"


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
    with one_sweep(), mock.patch.object(tl_utils, "empty", lambda shape, dtype, like: padded(shape, -77, dtype)):
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
