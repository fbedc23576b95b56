"""Does forgetless work on this machine, which path runs here and why, and what to do where it does not.

    forgetless doctor            # a line a check; exit code 0 only if all hold
    forgetless doctor --json     # the same for machines

Every kernel and the whole op are compared with float64 over a spread of shapes, dtypes and strides, with NaN around
what is read and a sentinel around what is written, and run twice for the same bits. Without a CUDA device the kernels
run in Triton's interpreter, in a process of their own; nothing is timed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from forgetless_bench.harness import machine, versions, write_json

from .checks import checks, kernel_checks
from .launched import Check, Trouble

SCHEMA = 1


@dataclass
class Finding:
    """One line of the report."""

    name: str
    ok: bool
    detail: str
    advice: str
    seconds: float


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
        report["machine"] = {**machine(), "packages": versions()}
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


if __name__ == "__main__":
    raise SystemExit(main())
