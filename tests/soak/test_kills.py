"""Commands and saves that are killed at any moment go on where they were; the series that kill them find what is wrong.

The long series have the marker ``soak``: ``make soak`` runs them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import kills
import pytest
from kills import Broken, opened
from tiny_study import write_model, write_texts

from forgetless.cli.main import main
from forgetless.files import half_written, write_atomically
from forgetless.study import finetune
from forgetless.study.results import writable

ROOT = Path(__file__).resolve().parents[2]


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


# The long series ---------------------------------------------------------------------------------------

KILLS = 30


@pytest.mark.soak
@pytest.mark.parametrize("command", ["finetune", "compare"])
def test_a_command_that_is_killed_ends_as_if_it_were_not(command: str, tmp_path: Path) -> None:
    jobs = kills.jobs(write_model(tmp_path / "model"), write_texts(tmp_path / "texts"))
    counts = kills.series(jobs[command], KILLS, 0, tmp_path / command)
    assert counts["kills"] >= KILLS and counts["files_opened"]


@pytest.mark.soak
def test_a_process_that_saves_is_killed(tmp_path: Path) -> None:
    assert kills.saves(10 * KILLS, 0, tmp_path / "save")["kills"] == 10 * KILLS


#: Tests whose sizes an environment variable sets: part of the suite -> the variable, its value, and a filter.
LONG = {
    "tests/ops/test_properties.py": ("FORGETLESS_EXAMPLES", "2000", ""),
    "tests/checkpoint/test_hostile.py": ("FORGETLESS_EXAMPLES", "2000", ""),
    "tests/triton_kernels/test_faults.py": ("FORGETLESS_STEPS", "10000", "nothing_grows"),
}


@pytest.mark.soak
@pytest.mark.parametrize("path", LONG)
def test_long_runs_of_the_suite(path: str) -> None:
    name, value, words = LONG[path]
    run = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", path, "-k", words]
    done = subprocess.run(run, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", name: os.environ.get(name, value)})
    assert done.returncode == 0
