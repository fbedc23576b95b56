"""How much was tried to break it, and what held: runs the series and writes the counts for docs/reliability.md.

    python -m bench reliability                            # everything: an hour or two of one core
    python -m bench reliability --only kills,files         # some of it; the rest of the JSON stays as it is

Each section is written as soon as it is done, with the commit and the day. Wants a source checkout: most of it is the
test suite with other numbers. A section in which anything failed says so and makes the exit code 1.
"""

from __future__ import annotations

import base64
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from argparse import Namespace
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from . import kills, whole
from .harness import RESULTS, finish, machine, parser, start, tag, write_json

ROOT = Path(__file__).parent.parent
#: What a test case reports of itself: passing, failing and invalid examples of a property.
EXAMPLES = re.compile(r"(\d+) passing.*?(\d+) failing.*?(\d+) invalid")


def suite(*words: str, **environment: str) -> dict[str, Any]:
    """Run part of the test suite in a process of its own and count what it did."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "junit.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--hypothesis-show-statistics"]
        command += ["-o", "junit_family=xunit1"]  # which has a place for record_property
        began = time.perf_counter()
        subprocess.run(
            [*command, *words, "--junitxml", str(path)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            stdout=2,  # what the tests say is no result
        )
        seconds = time.perf_counter() - began
        if not path.exists():
            raise RuntimeError("pytest did not come to its end")
        return {**counted(path), "seconds": round(seconds, 1)}


def counted(path: Path) -> dict[str, Any]:
    """Outcomes, summed record_property values and hypothesis' examples of a JUnit file."""
    outcomes: Counter[str] = Counter()
    tests: Counter[str] = Counter()
    values: Counter[str] = Counter()
    failures = []
    examples: dict[str, dict[str, int]] = {}
    root = ElementTree.parse(path).getroot()
    for case in root.iter("testcase"):
        kinds = {part.tag for part in case}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        outcomes[outcome] += 1
        if outcome == "passed":
            tests[case.attrib["name"].partition("[")[0]] += 1
        elif outcome == "failed":
            failures.append(case.attrib["name"])
        for prop in case.iter("property"):
            values[prop.attrib["name"]] += int(prop.attrib["value"])
    for prop in root.iterfind("./testsuite/properties/property"):
        if prop.attrib["name"].startswith("hypothesis-statistics-"):
            text = base64.b64decode(prop.attrib["value"]).decode()
            found = [list(map(int, row)) for row in EXAMPLES.findall(text)]
            name = prop.attrib["name"].rpartition("::")[2]
            sums = [sum(column) for column in zip(*found, strict=True)] or [0, 0, 0]
            examples[name] = dict(zip(("passing", "failing", "invalid"), sums, strict=True))
    return {
        **{kind: outcomes[kind] for kind in ("passed", "failed", "skipped")},
        "failures": failures,
        "tests": dict(tests),
        "values": dict(values),
        "examples": examples,
    }


# --------------------------------------------------------------------------------------- sections


def properties(options: Namespace) -> dict[str, Any]:
    """Drawn shapes, strides, dtypes and values, on BLAS and on whole models."""
    return suite("tests/ops/test_properties.py", "-k", "not triton", FORGETLESS_EXAMPLES=str(options.examples))


def kernels(options: Namespace) -> dict[str, Any]:
    """The same for the kernels in Triton's interpreter; a fallback is an error."""
    return suite("tests/ops/test_properties.py", "-k", "triton", FORGETLESS_EXAMPLES=str(options.examples))


def files(options: Namespace) -> dict[str, Any]:
    """Damaged and hostile files."""
    return suite("tests/checkpoint/test_hostile.py", FORGETLESS_EXAMPLES=str(options.examples))


def faults(options: Namespace) -> dict[str, Any]:
    """Faults put into the kernels, threads, forks, copies."""
    more = ["tests/cli/test_doctor.py"] if not options.smoke else []
    return suite("tests/triton_kernels/test_faults.py", *more, "-k", "not nothing_grows and not drift_apart")


def steps(options: Namespace) -> dict[str, Any]:
    """A long run."""
    return suite("tests/triton_kernels/test_faults.py", "-k", "nothing_grows", FORGETLESS_STEPS=str(options.steps))


def _killed(name: str) -> Callable[[Namespace], dict[str, Any]]:
    def section(options: Namespace) -> dict[str, Any]:
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            try:
                if name == "save":
                    found = kills.saves(10 * options.kills, options.seed, folder / name)
                else:
                    study = _tests("tiny_study")
                    jobs = kills.jobs(study.write_model(folder / "model"), study.write_texts(folder / "texts"))
                    found = kills.series(jobs[name], options.kills, options.seed, folder / name)
            except whole.Broken as error:
                return {"failed": 1, "failures": [str(error)]}
        return {**found, "failed": 0, "failures": [], "seconds": round(time.perf_counter() - began, 1)}

    section.__doc__ = f"{name}, killed at any moment and started again."
    return section


def _tests(name: str) -> Any:
    """A module of the test suite."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tests" / "support" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def versions(options: Namespace) -> dict[str, Any]:
    """The oldest and the newest packages, each in an environment of its own."""
    found: dict[str, Any] = {"failed": 0, "failures": []}
    for name in ("oldest", "newest"):
        with tempfile.TemporaryDirectory() as place:
            done = subprocess.run(
                ["bash", str(ROOT / ".ci" / "versions"), name],
                env={**os.environ, "PYTHON": sys.executable, "OUT": place, "OMP_NUM_THREADS": "1"},
                stdout=2,
            )
            path = Path(place) / "junit.xml"
            if not path.exists():
                raise RuntimeError(f".ci/versions {name} ended with {done.returncode} before any test")
            row = counted(path)
            rows = (Path(place) / "packages.txt").read_text().split()
            packages = dict(row.split("==") for row in rows)
        found[name] = {key: row[key] for key in ("passed", "failed", "skipped", "failures")} | {"packages": packages}
        found["failed"] += row["failed"]
        found["failures"] += row["failures"]
    return found


def doctor(options: Namespace) -> dict[str, Any]:
    """``forgetless doctor`` on this machine."""
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    began = time.perf_counter()
    run = [sys.executable, "-m", "forgetless", "doctor", "--json"]
    done = subprocess.run(run, capture_output=True, text=True, env=environment)
    seconds = time.perf_counter() - began
    rows = json.loads(done.stdout)["checks"]
    bad = [row["name"] for row in rows if not row["ok"]]
    return {"checks": len(rows), "failed": len(bad), "failures": bad, "seconds": round(seconds, 1)}


SECTIONS: dict[str, Callable[[Namespace], dict[str, Any]]] = {
    "files": files,
    "faults": faults,
    "properties": properties,
    "steps": steps,
    "kills-finetune": _killed("finetune"),
    "kills-compare": _killed("compare"),
    "kills-save": _killed("save"),
    "kernels": kernels,
    "versions": versions,
    "doctor": doctor,
}


def with_others(path: Path | None, fresh: dict[str, Any]) -> dict[str, Any]:
    """The sections of this run and, of the file as it is by now, those it has not done."""
    there = path is not None and path.suffix == ".json" and path.exists()
    known = json.loads(path.read_text(encoding="utf-8"))["sections"] if there else {}  # type: ignore[union-attr]
    both = {**known, **fresh}
    return {name: both[name] for name in SECTIONS if name in both}


def main(arguments: list[str] | None = None) -> int:
    made = parser(__doc__, "reliability", 1)
    made.add_argument("--only", default=",".join(SECTIONS), help=f"with commas, some of {', '.join(SECTIONS)}")
    made.add_argument("--examples", type=int, default=2000, help="per property, and damaged files per method")
    made.add_argument("--steps", type=int, default=10_000, help="of the long run")
    made.add_argument("--kills", type=int, default=30, help="of each command; ten times as many of fl.save")
    made.add_argument("--seed", type=int, default=0, help="of the kills")
    options = made.parse_args(arguments)
    asked = options.only.split(",")
    wanted = [name for name in SECTIONS if {name, name.partition("-")[0]} & {*asked}]
    if unknown := [word for word in asked if not any(word in (name, name.partition("-")[0]) for name in SECTIONS)]:
        made.error(f"--only: unknown section {unknown[0]!r}, wants some of {', '.join(SECTIONS)}")
    if not (ROOT / "tests").is_dir():
        made.error("it runs the test suite: wants a source checkout")
    if options.smoke:
        options.examples, options.steps, options.kills = 3, 300, 1
    result = start("reliability", options, arguments)
    if not options.smoke:
        path = options.out or RESULTS
        options.out = path if path.suffix == ".json" else path / f"reliability-{tag(torch.device(options.device))}.json"
    fresh: dict[str, Any] = {}
    bad = []
    for name in wanted:
        print(f"== {name}: {SECTIONS[name].__doc__}", flush=True)
        found = SECTIONS[name](options)
        fresh[name] = {**found, "command": result["command"], "machine": machine()}
        shown = {key: value for key, value in found.items() if isinstance(value, int | float)}
        print(json.dumps(shown), flush=True)
        for failure in found["failures"]:
            print(f"FAILED {failure}", flush=True)
        bad += found["failures"]
        result["sections"] = with_others(options.out, fresh)
        if not options.smoke:
            write_json(options.out, result)
    finish(result, options)
    return int(bool(bad))


if __name__ == "__main__":
    raise SystemExit(main())
