"""The series of ``python -m bench reliability`` find what they look for; and what they found, mended."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_study import write_model, write_texts

from forgetless.cli.main import main
from forgetless.files import half_written, write_atomically
from forgetless.study import finetune
from forgetless.study.options import writable
from forgetless_bench import kept, kills, reliability, tables
from forgetless_bench.whole import Broken, opened


def dead_process() -> int:
    """The number of a process that has ended."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def test_half_written_files_of_the_dead_are_swept_and_nothing_else(tmp_path: Path) -> None:
    dead, living = dead_process(), os.getpid()
    (tmp_path / "runs").mkdir()
    (tmp_path / f".saving-{dead}-abc").mkdir()
    gone = [f".writing-{dead}-results.json", f"runs/.writing-{dead}-base.json", f".probe-{dead}-x"]
    kept = [
        f".writing-{living}-results.json",
        ".bashrc",
        f".notes.{dead}",
        f"writing-{dead}-x",
        ".saving-99999999999999-x",
    ]
    for name in (f".saving-{dead}-abc/half", *gone, *kept):
        (tmp_path / name).write_text("{")
    assert len(half_written(tmp_path)) == 4
    assert writable(tmp_path) == tmp_path
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert left == sorted(kept)


def test_a_write_that_fails_leaves_nothing_half_written(tmp_path: Path) -> None:
    (tmp_path / "results.json").mkdir()
    with pytest.raises(OSError):
        write_atomically(tmp_path / "results.json", "{}")
    assert os.listdir(tmp_path) == ["results.json"]


class Killed(BaseException):
    """What no code handles."""


def test_a_finetune_killed_after_its_save_starts_again_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The adapter in the folder is its own, not one to be guarded; it was refused until --overwrite was given."""
    texts = write_texts(tmp_path / "texts")
    out = tmp_path / "out"
    words = [
        "finetune",
        "--model",
        str(write_model(tmp_path / "model")),
        "--data",
        str(texts["upper"]),
        "--out",
        str(out),
    ]
    words += ["--method", "lora", "--rank", "2", "--steps", "2", "--batch-size", "2", "--max-length", "16"]
    words += ["--dtype", "float32", "--device", "cpu"]

    def killed(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(finetune.book, "dump", killed)
        main(words)
    assert (out / "adapter_config.json").exists() and not (out / "training.json").exists()
    assert main(words) == 0
    assert json.loads((out / "training.json").read_text())["stopped"] == "finished"
    assert not [name for name in os.listdir(out) if name.startswith(".")]
    assert main(words) == 2, "a finished adapter is guarded"


# The series -------------------------------------------------------------------------------------------

#: A program with a fault, or with none: five numbers are worked out, one after the other, and kept on the way.
PROGRAM = """
import json, os, sys, time
out, fault = sys.argv[1:]
path = os.path.join(out, "numbers.json")
numbers = []
if os.path.exists(path):
    if fault == "refuses":
        sys.exit("there is something already")
    if fault != "torn" or os.path.getsize(path):
        numbers = json.load(open(path))
if fault == "counts its starts" and numbers:
    numbers[0] += 1
while len(numbers) < 5:
    time.sleep(0.02)
    numbers.append(len(numbers))
    text = json.dumps(numbers)
    beside = path if fault == "torn" else os.path.join(out, ".writing-%d-numbers.json" % os.getpid())
    with open(beside, "w") as file:
        file.write(text[:-1])
        file.flush()
        time.sleep(0.02)
        file.write(text[-1])
    os.replace(beside, path)
for name in os.listdir(out):
    if name.startswith(".writing") and fault != "leaves":
        os.remove(os.path.join(out, name))
"""


def job(fault: str) -> kills.Job:
    return kills.Job(
        lambda out: [sys.executable, "-S", "-E", "-c", PROGRAM, str(out), fault],
        lambda out: json.loads((out / "numbers.json").read_text()),
    )


def test_a_program_that_keeps_its_promises_survives(tmp_path: Path) -> None:
    said: list[str] = []
    found = kills.series(job("none"), 8, 0, tmp_path, said.append)
    assert found["kills"] >= 8 and found["kills"] == found["timed"] + found["sighted"] == len(found["killed_at"])
    assert found["runs"] >= found["kills"] and found["finished"] == len(said) > 0
    assert found["with_files"] and found["files_opened"] >= found["with_files"] + found["finished"]
    assert found["half_written"] and not found["unreadable"]


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("torn", "numbers.json cannot be read"),
        ("counts its starts", "did not end as the run that was not killed"),
        ("refuses", "it ends with 1: there is something already"),
        ("leaves", "ended and left .writing-"),
    ],
)
def test_a_broken_promise_is_found(fault: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(Broken, match=said):
        kills.series(job(fault), 30, 0, tmp_path, lambda text: None)


@pytest.mark.parametrize(
    ("name", "data", "whole"),
    [
        ("a.json", b'{"a": 1', b'{"a": 1}'),
        ("a.html", b"<html><p>cut", b"<html></html>\n"),
        ("a.png", b"\x89PNG\r\n\x1a\nIHDR", b"\x89PNG\r\n\x1a\nIHDR....IEND\xaeB`\x82"),
        ("a.safetensors", b"\x08\0\0\0\0\0\0\0{", b"\x02\0\0\0\0\0\0\0{}"),
        ("a.bin", b"", None),
    ],
)
def test_every_kind_of_file_is_read_to_its_end(name: str, data: bytes, whole: bytes | None, tmp_path: Path) -> None:
    (tmp_path / ".hidden").mkdir()
    for place in (tmp_path, tmp_path / ".hidden"):
        (place / name).write_bytes(data)
    with pytest.raises(Broken, match=name):
        opened(tmp_path)
    if whole is not None:
        (tmp_path / name).write_bytes(whole)
        assert opened(tmp_path) == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_saves_are_killed_and_one_of_two_adapters_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = kills.saves(6, 0, tmp_path / "a")
    assert found["kills"] == found["first"] + found["second"] == 6
    monkeypatch.setattr(kills.os, "fork", lambda: (tmp_path / "b" / "forgetless.json").unlink() or dead())

    def dead() -> int:
        return subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"]).pid

    with pytest.raises(Broken, match="does not load|neither"):
        kills.saves(1, 0, tmp_path / "b")


# The command ------------------------------------------------------------------------------------------

JUNIT = """<testsuites><testsuite><properties>
<property name="hypothesis-statistics-tests/test_x.py::test_p[blas]" value="{stats}"/></properties>
<testcase name="test_a[1]"><properties><property name="bits flipped" value="5"/></properties></testcase>
<testcase name="test_a[2]"><properties><property name="bits flipped" value="7"/></properties></testcase>
<testcase name="test_b"><failure>no</failure></testcase><testcase name="test_c"><skipped/></testcase>
</testsuite></testsuites>"""
STATS = """tests/test_x.py::test_p[blas]:
  - during reuse phase (0.1 seconds):
    - 1 passing, 0 failing, and 2 invalid test cases
  - during generate phase (0.5 seconds):
    - 5 passing examples, 0 failing examples, 3 invalid examples
"""


def test_outcomes_values_and_examples_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "junit.xml"
    path.write_text(JUNIT.format(stats=base64.b64encode(STATS.encode()).decode()))
    found = reliability.counted(path)
    assert (found["passed"], found["failed"], found["skipped"]) == (2, 1, 1) and found["failures"] == ["test_b"]
    assert found["tests"] == {"test_a": 2} and found["values"] == {"bits flipped": 12}
    assert found["examples"] == {"test_p[blas]": {"passing": 6, "failing": 0, "invalid": 5}}


def test_sections_are_written_one_by_one_into_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def section(**found: Any) -> Any:
        def run(options: Any) -> dict[str, Any]:
            """Something."""
            return {"failed": len(found.get("failures", [])), "failures": [], **found}

        return run

    monkeypatch.setattr(reliability, "SECTIONS", {"files": section(n=1), "steps": section(n=2)})
    out = tmp_path / "reliability-cpu.json"
    assert reliability.main(["--only", "steps", "--out", str(out)]) == 0
    assert list(json.loads(out.read_text())["sections"]) == ["steps"]
    monkeypatch.setattr(reliability, "SECTIONS", {"files": section(n=3, failures=["x"]), "steps": section(n=4)})
    assert reliability.main(["--only", "files", "--out", str(tmp_path)]) == 1
    found = json.loads(out.read_text())["sections"]
    assert {name: row["n"] for name, row in found.items()} == {"files": 3, "steps": 2}
    assert found["files"]["machine"]["packages"]["torch"] and "FAILED x" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        reliability.main(["--only", "liver"])
    assert "unknown section 'liver'" in capsys.readouterr().err


TINY = """
import os
from hypothesis import given, settings, strategies
@settings(max_examples=int(os.environ["FORGETLESS_EXAMPLES"]), database=None)
@given(strategies.integers())
def test_numbers(n): assert n == n
def test_values(record_property): record_property("seen", 3)
def test_broken(): assert False
"""


def test_a_smoke_run_counts_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "test_tiny.py").write_text(TINY)
    seen: list[dict[str, Any]] = []

    def section(options: Any) -> dict[str, Any]:
        """Something."""
        seen.append(reliability.suite(str(tmp_path), FORGETLESS_EXAMPLES=str(options.examples)))
        return seen[0]

    monkeypatch.setattr(reliability, "SECTIONS", {"files": section})
    monkeypatch.setattr(reliability, "write_json", lambda *_: pytest.fail("a smoke run measures nothing"))
    assert reliability.main(["--smoke"]) == 1
    assert (seen[0]["passed"], seen[0]["failures"], seen[0]["values"]) == (2, ["test_broken"], {"seen": 3})
    assert seen[0]["examples"] == {"test_numbers": {"passing": 3, "failing": 0, "invalid": 0}}
    out = capsys.readouterr().out
    assert "FAILED test_broken" in out and "nothing is written" in out


# The page ---------------------------------------------------------------------------------------------


def counts(**found: Any) -> dict[str, Any]:
    machine = {"threads": 1, "gpu": None, "processor": "CPU", "commit": "a" * 40, "date": "2026-01-01"}
    return {"failed": 0, "failures": [], "machine": {**machine, "packages": {"torch": "2.13.0"}}, **found}


def test_the_page_says_what_held_and_what_did_not() -> None:
    series = {"kills": 31, "sighted": 15, "runs": 40, "finished": 9, "files_opened": 1234, "unreadable": 0}
    sections = {
        "kernels": counts(examples={"a": {"passing": 1999, "failing": 1, "invalid": 7}}, failed=1, failures=["test_a"]),
        "steps": counts(values={"steps": 9, "bytes more": -(1 << 19), "handles more": 0, "objects more": 3}),
        "kills-compare": counts(**series),
        "kills-finetune": counts(failed=1, failures=["a.json cannot be read"]),
    }
    text = kept.section({"sections": sections})
    assert "| 2,000 for 1 properties | **1 failed**: test_a |" in text
    assert "| 9 | -0.50 MiB, +0 file handles, +3 Python objects" in text
    assert "| 31 (15 right after a write) in 40 starts | 9 runs brought" in text and "1,234 files opened, 0 un" in text
    assert "**1 failed**: a.json cannot be read" in text
    assert "- Properties of the kernels, Kills of finetune, Kills of compare, Long runs: CPU" in text
    assert "Not counted yet: Properties, Files" in text


def test_the_page_is_that_of_the_committed_counts() -> None:
    if not tables.RELIABILITY.exists():
        pytest.skip("not a source checkout")
    page = tables.RELIABILITY.read_text(encoding="utf-8")
    assert tables.reliability_page(page) == page
