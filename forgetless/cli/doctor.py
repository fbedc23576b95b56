"""Check that forgetless works on this machine, say which path runs, and say what to do about a failure.

    forgetless doctor            # one line per check; exit code 0 if every check passes, else 1
    forgetless doctor --json     # the same as JSON

The op is compared with float64 on every device and in every dtype, and so is every fused plan: y and all gradients.
Without a CUDA device the kernels run in Triton's interpreter, in a separate process. Nothing is timed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import forgetless as fl
from forgetless.files import write_json
from forgetless.ops import dispatch, plans, reference
from forgetless.ops.table import PLANS, check_table, table_path
from forgetless.study.machine import machine
from forgetless.study.machine import versions as package_versions

from .arguments import fail

SCHEMA = 2
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FUSED = tuple(plan for plan in PLANS if plan != "blas")
#: (M, N, K, R, dropout): no dimension a multiple of a tile, one token, no token.
SIZES = ((34, 70, 66, 8, 0.1), (1, 20, 33, 3, 0.0), (0, 16, 16, 4, 0.1))
RESULTS = ("y", "dx", "ddown", "dup")
TORCH = "install torch with CUDA, for this machine: https://pytorch.org/get-started"
AVOID = "set FORGETLESS_PLAN=blas to train without the fused kernels, and report this with the output of --json"


class Failure(Exception):
    """A check that fails, and what to do about it."""

    def __init__(self, detail: str, advice: str) -> None:
        super().__init__(detail)
        self.advice = advice


class Finding(NamedTuple):
    """One line of the report."""

    name: str
    ok: bool
    detail: str
    advice: str
    seconds: float


#: Name, a function that returns the detail or raises, and the advice if it raises anything but ``Failure``.
Check = tuple[str, Callable[[], str], str]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the checks and print the results; returns 0 if all pass, 1 if one fails, 2 if none has the given name."""
    parser = argparse.ArgumentParser(prog="forgetless doctor", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")
    parser.add_argument("--kernels", action="store_true", help=argparse.SUPPRESS)  # in the separate process
    parser.add_argument("--only", default="", help="only the checks whose names begin with this")
    options = parser.parse_args(arguments)
    begin = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parts = [] if options.kernels else [run_checks(checks(device), options.only)]
    if options.kernels or not needs_interpreter(device):
        parts.append(run_checks(kernel_checks(device), options.only))
    elif any(name.startswith(options.only) for name, _, _ in kernel_checks(device)):
        parts.append(run_in_interpreter(options.only))
    findings: list[Finding] = []
    for finding in itertools.chain(*parts):
        findings.append(finding)
        if not options.json:
            advice = "" if finding.ok else f"\n{'':31} what to do: {finding.advice}"
            print(f"{'ok    ' if finding.ok else 'FAILED'}  {finding.name:<23} {finding.detail}{advice}", flush=True)
    if not findings:
        return fail(f"no check begins with {options.only!r}")
    failed = sum(not finding.ok for finding in findings)
    report = {
        "schema": SCHEMA,
        "ok": not failed,
        "seconds": round(time.perf_counter() - begin, 1),
        "machine": machine(device),
        "versions": package_versions(),
        "checks": [finding._asdict() for finding in findings],
    }
    outcome = f"{len(findings)} checks in {report['seconds']} s: " + (f"{failed} failed" if failed else "all passed")
    print(json.dumps(report, indent=1) if options.json else outcome)
    if options.out is not None:
        write_json(options.out, report)
    return 1 if failed else 0


def run_checks(todo: Iterable[Check], only: str) -> Iterator[Finding]:
    for name, check, advice in todo:
        if not name.startswith(only):
            continue
        begin, ok = time.perf_counter(), False
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                detail = check()
            ours = [str(w.message) for w in caught if str(w.message).startswith("forgetless")]
            if ours:  # a plan was dropped, or a table was ignored
                raise Failure("; ".join(ours), advice)
            ok = True
        except Failure as failure:
            detail, advice = str(failure), failure.advice
        except Exception as error:  # whatever a compiler or a driver can raise
            detail = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
        yield Finding(name, ok, detail, "" if ok else advice, round(time.perf_counter() - begin, 2))


def needs_interpreter(device: torch.device) -> bool:
    """Whether the kernels need another process: Triton reads TRITON_INTERPRET when the kernels are imported."""
    return device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1"


def run_in_interpreter(only: str) -> Iterator[Finding]:
    begin = time.perf_counter()
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", f"{__package__}.doctor", "--kernels", "--json", "--only", only]
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
        error = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()[-1]
        rows = json.loads(done.stdout)["checks"]
    except (OSError, subprocess.SubprocessError) as failure:
        rows, error = [], str(failure)
    except (ValueError, KeyError, TypeError):
        rows = []
    yield from (Finding(**row) for row in rows)
    if not rows:
        detail = f"the kernels could not be run in the interpreter: {error}"
        yield Finding("kernels", False, detail, "reinstall triton", round(time.perf_counter() - begin, 2))


# -------------------------------------------------------------------------------------------- checks


def checks(device: torch.device) -> list[Check]:
    """The checks of the installation and of the path that runs on this machine."""
    places = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    return [
        ("versions", versions, "pip install -U forgetless"),
        ("devices", devices, TORCH),
        ("plan table", plan_table, "forgetless tune writes a new one"),
        ("path", partial(path, device), AVOID),
        *((f"op on {place}", partial(compare, torch.device(place)), AVOID) for place in places),
    ]


def kernel_checks(device: torch.device) -> list[Check]:
    """The checks of the Triton kernels: one per fused plan."""
    if dispatch.kernels is None:
        return [("kernels", no_triton, "pip install triton; without it everything runs on BLAS")]
    where = "interpreter" if device.type == "cpu" else "native"
    return [(f"plan {plan}, {where}", partial(compare_plan, plan, device), AVOID) for plan in FUSED]


def no_triton() -> str:
    if sys.platform == "linux":
        raise RuntimeError(dispatch.NO_KERNELS)
    return "no Triton on this platform; everything runs on BLAS"


def versions() -> str:
    """Every dependency is installed and new enough."""

    def numbers(text: str) -> list[int]:
        return [int(part) for part in re.findall(r"\d+", text.split("+")[0])[:3]]

    parts = [f"Python {sys.version.split()[0]}", f"forgetless {fl.__version__}"]
    try:
        requirements = requires("forgetless") or []
    except PackageNotFoundError:
        parts.append("not installed as a package")
        requirements = []
    for text in requirements:
        match = re.match(r"([\w-]+)\s*>=\s*([\d.]+)", text)
        if match is None or "extra ==" in text or ("Linux" in text and sys.platform != "linux"):
            continue
        name, least = match.groups()
        try:
            installed = version(name)
        except PackageNotFoundError:
            raise Failure(f"{name} is not installed", f"pip install '{name}>={least}'") from None
        if numbers(installed) < numbers(least):
            raise Failure(f"{name} is {installed}, wants {least} or later", f"pip install -U '{name}>={least}'")
        parts.append(f"{name} {installed}")
    return ", ".join(parts)


def devices() -> str:
    """The CUDA devices, or why there are none."""
    rows = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        card = torch.cuda.get_device_properties(index)
        name = f"cuda:{index} {card.name} sm_{card.major}{card.minor}"
        if card.major < 8:
            advice = "use another card, or FORGETLESS_PLAN=blas"
            raise Failure(f"{name}: the kernels need sm_80 or later", advice)
        rows.append(f"{name} {card.total_memory / 2**30:.0f} GiB")
    if not rows and Path("/proc/driver/nvidia/version").exists():
        if torch.version.cuda is None:
            raise Failure("there is an NVIDIA driver, but this torch was built without CUDA", TORCH)
        raise Failure(
            f"torch was built for CUDA {torch.version.cuda}, there is an NVIDIA driver, but no device can be used",
            "look at nvidia-smi and CUDA_VISIBLE_DEVICES; the driver may be too old for this torch",
        )
    return ", ".join(rows) or f"no CUDA device; CPU, {torch.get_num_threads()} threads"


def plan_table() -> str:
    """The tuning table and the environment variables that choose plans can be read."""
    try:
        plan, strict = plans.forced()
    except ValueError as error:
        raise Failure(str(error), "unset FORGETLESS_PLAN, or set it to one of these") from None
    parts = [f"FORGETLESS_PLAN {os.environ['FORGETLESS_PLAN']!r}"] if plan or strict else []
    file = table_path()
    try:
        rows = check_table(json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return ", ".join([*parts, "none yet: the first use of each shape decides"])
    except (OSError, ValueError, RecursionError) as error:
        raise Failure(f"{file} cannot be used: {error}", f"delete {file}, then run forgetless tune") from None
    return ", ".join([*parts, *(f"{len(of)} rows for {name}" for name, of in rows.items())]) or "empty"


def path(device: torch.device) -> str:
    """The plan of a common layer after its first use, and the reason."""
    N = K = 4096 if device.type == "cuda" else 64
    rows: dict[str, list[str]] = {}
    for dtype in DTYPES:
        if device.type == "cuda":
            outcomes(4096, N, K, 16, 0.0, dtype, device)
        rows.setdefault("{} ({})".format(*dispatch.explain_path(device, dtype, N, K, 16)), []).append(short(dtype))
    return "; ".join(f"{', '.join(names)}: {plan}" for plan, names in rows.items())


# --------------------------------------------------------------------------- the op against float64


def compare_plan(plan: str, device: torch.device) -> str:
    """``compare`` on the kernels by one plan; a fallback is an error."""
    before = os.environ.get("FORGETLESS_PLAN")
    os.environ["FORGETLESS_PLAN"] = f"{plan},strict"
    try:
        with dispatch.backend("triton"):
            return compare(device)
    finally:
        del os.environ["FORGETLESS_PLAN"]
        if before is not None:
            os.environ["FORGETLESS_PLAN"] = before


def compare(device: torch.device) -> str:
    """y and every gradient of the op against float64, in every dtype and size.

    Raises:
        Failure: an element is wrong by more than twice what eager PyTorch in the same dtype is, or is NaN.
    """
    count, share = 0, 0.0
    for dtype in DTYPES:
        for size in SIZES:
            for name, ours, eager, exact in zip(RESULTS, *outcomes(*size, dtype, device), strict=True):
                error = worst(ours - exact) if ours.shape == exact.shape else math.inf
                limit = 2 * worst(eager - exact) + 4 * torch.finfo(torch.float32).eps * worst(exact)
                if not error <= limit:  # NaN is not
                    title = f"{name} {short(dtype)} M,N,K,R,dropout={size}"
                    raise Failure(f"{title}: error {error:.3e} against float64, limit {limit:.3e}", AVOID)
                count, share = count + 1, max(share, error / limit if limit else 0.0)
    return f"{count} comparisons with float64, the worst at {share:.2f} of its limit"


def worst(t: Tensor) -> float:
    return t.abs().max().item() if t.numel() else 0.0


def outcomes(
    M: int, N: int, K: int, R: int, p: float, dtype: torch.dtype, device: torch.device
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """y (M, N), dx, ddown and dup by the op, by eager PyTorch in ``dtype``, and in float64."""
    generator = torch.Generator().manual_seed(M + N + K + R)
    seed = torch.tensor([12, -34], dtype=torch.int32, device=device)
    shapes = ((M, K), (N, K), (R, K), (N, R), (M, N))
    tensors = [(torch.randn(shape, generator=generator) / shape[-1] ** 0.5).to(device, dtype) for shape in shapes]
    keep = reference.keep_mask(seed, p, M, K) if p and M else torch.ones(M, K, dtype=torch.bool, device=device)
    rate = reference.drop_threshold(p) / reference.LEVELS

    def step(layer: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        x, weight, down, up, dy = (t.to(dtype) for t in tensors)
        leaves = [t.detach().requires_grad_(True) for t in (x, down, up)]
        y = layer(leaves[0], weight, *leaves[1:])
        return [y.detach(), *torch.autograd.grad(y, leaves, dy)]

    def op(x: Tensor, weight: Tensor, down: Tensor, up: Tensor) -> Tensor:
        return fl.ops.lowrank_linear(x, weight, down, up, None, 0.5, p, seed)

    def formula(x: Tensor, weight: Tensor, down: Tensor, up: Tensor) -> Tensor:
        return x @ weight.T + 0.5 * ((x * keep / (1.0 - rate)) @ down.T @ up.T)

    return step(op, dtype), step(formula, dtype), step(formula, torch.float64)


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


if __name__ == "__main__":
    raise SystemExit(main())
