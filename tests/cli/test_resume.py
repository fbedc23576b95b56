"""A ``forgetless finetune`` that was stopped goes on by the same command, to the numbers of one that was not."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from kills import Fork, essence
from tiny_study import write_model, write_texts

from forgetless.cli.console import Ui
from forgetless.cli.main import main
from forgetless.study import checkpoints
from forgetless.study.finetune import UNFINISHED
from forgetless.study.train import Step

#: With what must come back: masks of dropout, statistics of a calibration, batches of several micro-batches.
METHODS = {
    "dropout": ["--method", "lora+source:dropout=0.3", "--accumulate", "2"],
    "checkpointing": ["--method", "lalora", "--gradient-checkpointing"],
    "curlora": ["--method", "curlora+decay"],
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    return {"model": write_model(folder / "model"), **write_texts(folder)}


def command(inputs: dict[str, Path], out: Path, *more: str) -> list[str]:
    words = ["finetune", "--model", str(inputs["model"]), "--data", str(inputs["upper"]), "--out", str(out)]
    words += ["--source", str(inputs["prose"]), "--keep", str(inputs["prose"]), "--dtype", "float32"]
    words += ["--device", "cpu", "--steps", "7", "--batch-size", "4", "--max-length", "32", "--rank", "4"]
    return [*words, "--lr", "2e-2", "--save-every", "2", *more]


def outcome(out: Path) -> dict[str, Any]:
    """All that a run leaves: the adapter's bytes, and what training.json says but for times."""
    files = {path.name: path.read_bytes() for path in out.iterdir() if path.suffix in (".safetensors", ".json")}
    return {**files, "training.json": essence(json.loads(files["training.json"]))}


@contextmanager
def at_step(number: int, act: Callable[[], None]) -> Iterator[None]:
    """Have this done after a step, before its checkpoint."""

    @contextmanager
    def training(self: Ui, title: str, steps: int) -> Iterator[Callable[[Step], None]]:
        yield lambda step: act() if step.number == number else None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Ui, "training", training)
        yield


def killed(words: list[str], log: Path) -> None:
    """The command in a process of its own, which ends with the signal that it sends itself."""
    with open(log, "w") as output:
        assert Fork(words, output).wait() == -signal.SIGKILL, log.read_text()


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("method", METHODS)
def test_a_killed_run_goes_on_bit_for_bit(
    method: str, inputs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = command(inputs, tmp_path / "killed", *METHODS[method])
    for step, saved in ((5, 4), (7, 6)):  # then before its first new checkpoint
        with at_step(step, kill):
            killed(words, tmp_path / "log")
        assert [path.name for path in (tmp_path / "killed" / UNFINISHED).iterdir()] == [f"checkpoint-{saved}"]
    assert main(words) == 0
    assert "going on from checkpoint-6 of 7" in capsys.readouterr().out
    assert not (tmp_path / "killed" / UNFINISHED).exists()
    assert main(command(inputs, tmp_path / "whole", *METHODS[method])) == 0
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")
    assert main(words) == 2 and "holds an adapter already" in capsys.readouterr().err


def test_after_ctrl_c_the_adapter_is_saved_and_the_run_goes_on(
    inputs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = command(inputs, tmp_path / "stopped", "--method", "clora")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job starts without one
    try:
        with at_step(5, lambda: signal.raise_signal(signal.SIGINT)):
            assert main(words) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    said = capsys.readouterr().out
    assert "kept the adapter of step 5 of 7" in said and "goes on after step 4" in said
    assert (tmp_path / "stopped" / "adapter_config.json").exists()
    assert main([*words, "--rank", "2"]) == 2
    assert "holds an unfinished run with another rank; give --overwrite" in capsys.readouterr().err
    assert main([*words, "--save-every", "3"]) == 0, "where checkpoints are written changes no number"
    assert main(command(inputs, tmp_path / "whole", "--method", "clora")) == 0
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "whole")


def stop_at(step: int, words: list[str]) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    with at_step(step, stop):
        assert main(words) == 130


def test_other_data_starts_afresh_where_it_may(
    inputs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_bytes(inputs["upper"].read_bytes())
    words = command(inputs, tmp_path / "out", "--method", "lora", "--data", str(data))
    stop_at(5, words)
    data.write_bytes(inputs["swap"].read_bytes())
    assert main(words) == 2
    assert "an unfinished run of another model, other data" in capsys.readouterr().err
    assert main([*words, "--overwrite"]) == 0 and "going on" not in capsys.readouterr().out
    whole = command(inputs, tmp_path / "whole", "--method", "lora", "--data", str(data))
    assert main(whole) == 0 and outcome(tmp_path / "out") == outcome(tmp_path / "whole")


def test_a_checkpoint_that_is_not_whole_does_not_count(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed while the second one was being written: the first is there, and is gone on from."""
    words = command(inputs, tmp_path / "out", "--method", "lora")
    write = checkpoints.write_json

    def stop(path: Path, value: dict[str, Any]) -> None:
        if path.parent.name == "checkpoint-4":
            raise KeyboardInterrupt
        write(path, value)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "write_json", stop)
        assert main(words) == 130
    (tmp_path / "out" / UNFINISHED / "checkpoint-4" / "optimizer.pt").write_bytes(b"half")
    assert main(words) == 0 and "going on from checkpoint-2 of 7" in capsys.readouterr().out
    assert main(command(inputs, tmp_path / "whole", "--method", "lora")) == 0
    assert outcome(tmp_path / "out") == outcome(tmp_path / "whole")


def test_a_run_that_was_stopped_after_its_last_step_only_measures(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = command(inputs, tmp_path / "out", "--method", "lora")
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="no space"):
        patch.setattr("forgetless.study.finetune.changes", no_space)
        main(words)
    assert main(words) == 0 and "going on from checkpoint-7 of 7" in capsys.readouterr().out
    assert main(command(inputs, tmp_path / "whole", "--method", "lora")) == 0
    assert outcome(tmp_path / "out") == outcome(tmp_path / "whole")


def no_space(*_: Any) -> None:
    raise RuntimeError("no space")
