"""The series of ``python -m bench reliability`` find what they look for; and what they found, mended."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_study import write_model, write_texts

from forgetless.study import finetune
from forgetless.study.cli import main
from forgetless.study.options import half_written, writable, write_atomically


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
