"""Processes killed at any moment (SIGKILL) and started again by the same command, until they are done.

Each start is a fork of a process that has imported everything, so that kills hit the work. Half of them come after a
random time, half right after a random change in the output folder: the moments when files are being written are too
short to be hit by chance. After every kill every file in the folder must open; in the end everything must be what it is
without a kill, to the last bit.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

#: One run is killed at most so often; then it may end.
MOST = 4
POLL = 0.001


@dataclass
class Job:
    """A command that writes into a folder, and what of the folder must not depend on kills."""

    command: Callable[[Path], list[str]]
    outcome: Callable[[Path], Any]
    #: Raises if the folder as a kill left it cannot be used; beyond the files, which all must open.
    usable: Callable[[Path], None] = lambda folder: None
    #: Whether there is nothing left to do; a command that refuses to do it again is not started again.
    done: Callable[[Path], bool] = lambda folder: False


@dataclass
class Run:
    code: int
    seconds: float
    changes: int
    first: float  # seconds until the first change of the folder
    said: str


@dataclass
class Tally:
    """What a series has seen."""

    pace: Run  # the last run that was not killed at all
    kills: int = 0
    timed: int = 0
    sighted: int = 0
    runs: int = 0
    finished: int = 0
    files_opened: int = 0
    with_files: int = 0  # kills that found files in the folder
    half_written: int = 0  # kills that left something unfinished beside them
    delays: list[float] = field(default_factory=list)


# ------------------------------------------------------------------------------------------ kills


class Fork:
    """A process that goes on as ``forgetless WORDS``, everything imported: kills fall into its work."""

    def __init__(self, words: list[str], output: Any):
        import matplotlib.pyplot  # noqa: F401
        import torch

        from forgetless.cli import commands  # noqa: F401 - imported once, here
        from forgetless.cli.main import main

        torch.set_num_threads(1)  # a fork has none of the others
        self.code: int | None = None
        sys.stdout.flush()
        self.pid = os.fork()
        if not self.pid:
            code = 70
            try:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
                code = main(words)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)

    def poll(self) -> int | None:
        return self.wait(os.WNOHANG)

    def wait(self, how: int = 0) -> int | None:
        if self.code is None:
            pid, status = os.waitpid(self.pid, how)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)


def started(command: list[str], output: Any) -> Any:
    """The process of a command, as a fork where it is ours."""
    if command[:3] == program():
        return Fork(command[3:], output)
    return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)


def run(command: list[str], folder: Path, seconds: float | None = None, changes: int | None = None) -> Run:
    """Run to the end, or kill after so many seconds, or changes of the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    began, before, count, first = time.perf_counter(), seen(folder), 0, 0.0
    with tempfile.TemporaryFile() as output:
        child = started(command, output)
        while child.poll() is None:
            time.sleep(POLL)
            now = seen(folder)
            past = time.perf_counter() - began
            count, before = count + (now != before), now
            first = past if count and not first else first
            late = seconds is not None and past >= seconds
            if late or changes is not None and count >= changes:
                child.kill()
                break
        code = child.wait()
        output.seek(0)
        said = output.read().decode(errors="replace")
    return Run(code, time.perf_counter() - began, count, first, said)


def series(job: Job, kills: int, seed: int, folder: Path, say: Callable[[str], None] = print) -> dict[str, Any]:
    """At least so many kills, and what came of them.

    Raises:
        Broken: a file that cannot be read, a run that ends otherwise than without kills, or does not end well.
    """
    plain = run(job.command(folder / "plain"), folder / "plain")
    draw, tally = random.Random(seed), Tally(plain)
    if plain.code:
        raise Broken(f"without any kill it ends with {plain.code}: {plain.said[-2000:]}")
    opened(folder / "plain")
    want = job.outcome(folder / "plain")
    while tally.kills < kills:
        out = folder / f"life-{tally.finished}"
        last = _brought_to_its_end(job, out, tally, draw)
        if last.code:
            raise Broken(f"after {tally.kills} kills it ends with {last.code}: {last.said[-2000:]}")
        tally.finished += 1
        tally.files_opened += opened(out)
        if job.outcome(out) != want:
            raise Broken(f"{out.name} did not end as the run that was not killed")
        if left := [path.name for path in out.rglob(".*")]:
            raise Broken(f"{out.name} ended and left {', '.join(left)}")
        say(f"{tally.kills} kills of {kills}, {tally.finished} runs brought to their end")
    share = [round(delay / plain.seconds, 3) for delay in tally.delays]
    about = {name: getattr(tally, name) for name in Tally.__dataclass_fields__ if name not in ("pace", "delays")}
    return {**about, "unreadable": 0, "other_results": 0, "seconds_unkilled": plain.seconds, "killed_at": share}


def _brought_to_its_end(job: Job, out: Path, tally: Tally, draw: random.Random) -> Run:
    """Kill and start again; the run that was not killed."""
    pace = tally.pace
    for turn in range(MOST + 1):
        when: dict[str, Any] = {}
        if turn < MOST:
            timed = draw.random() < 0.5
            when = (
                {"seconds": draw.uniform(0.95 * pace.first, pace.seconds)}
                if timed
                else {"changes": draw.randint(1, max(pace.changes, 1))}
            )
        done = run(job.command(out), out, **when)
        tally.runs += 1
        if done.code != -signal.SIGKILL:
            if not turn:  # as fast as the machine is now
                tally.pace = done
            return done
        tally.kills += 1
        tally.timed += "seconds" in when
        tally.sighted += "changes" in when
        tally.delays.append(done.seconds)
        found = opened(out)
        tally.files_opened += found
        tally.with_files += found > 0
        tally.half_written += any(True for _ in out.rglob(".*"))
        job.usable(out)
        if job.done(out):  # killed after its last write
            return replace(done, code=0)
    raise AssertionError("the last turn is not killed")


# ------------------------------------------------------------------------------------------- jobs


def program(*words: str) -> list[str]:
    return [sys.executable, "-m", "forgetless", *words]


def jobs(model: Path, texts: dict[str, Path]) -> dict[str, Job]:
    """The two commands that train, on a model and texts of a few kilobytes."""
    small = ["--model", str(model), "--rank", "4", "--batch-size", "4", "--max-length", "32"]
    small += ["--dtype", "float32", "--device", "cpu"]

    def finetune(out: Path) -> list[str]:
        words = ["finetune", *small, "--data", str(texts["upper"]), "--source", str(texts["prose"])]
        words += ["--method", "lalora", "--steps", "20", "--save-every", "3", "--lr", "1e-2"]
        return program(*words, "--out", str(out))

    def compare(out: Path) -> list[str]:
        words = ["compare", *small, "--tasks", str(texts["upper"]), str(texts["swap"]), "--keep", str(texts["prose"])]
        words += ["--methods", "lora", "source+consolidate"]
        words += ["--steps", "3", "--evals", "2", "--eval-tokens", "100", "--lr", "1e-2"]
        return program(*words, "--out", str(out))

    def ended(out: Path) -> bool:
        return (out / "training.json").exists() and not (out / ".unfinished").exists()

    return {"finetune": Job(finetune, finetuned, Loads(model), ended), "compare": Job(compare, compared)}


#: Neither depends on when and in how many pieces something was run.
TIMES = {"seconds", "seconds_per_step", "peak_mib", "calibrate_seconds", "created", "command", "commit", "commits"}


def essence(value: Any) -> Any:
    """Everything that must not depend on when and in how many pieces it was run."""
    if isinstance(value, dict):
        return {key: essence(item) for key, item in value.items() if key not in TIMES}
    return [essence(item) for item in value] if isinstance(value, list) else value


def finetuned(out: Path) -> Any:
    """The adapter's bytes, and the losses, penalties and gradients of every step."""
    paths = [path for path in out.iterdir() if path.is_file() and path.suffix != ".yaml"]  # that names the folder
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
    return {**files, "training.json": essence(json.loads((out / "training.json").read_text()))}


def compared(out: Path) -> Any:
    """All that was found, and which files tell it."""
    names = sorted(path.name for path in out.iterdir())
    return names, essence(json.loads((out / "results.json").read_text()))


class Loads:
    """Whatever adapter lies in the folder loads onto the model it was trained on."""

    def __init__(self, model: Path):
        self.folder = model
        self.model: Any = None

    def __call__(self, out: Path) -> None:
        import torch

        import forgetless as fl
        from forgetless.study.models import load_model

        if not any(True for place in (".", ".saved-*") for _ in out.glob(f"{place}/adapter_config.json")):
            return
        if self.model is None:
            self.model = load_model(str(self.folder), torch.float32)[0]
        try:
            fl.load(self.model, out)
        except (ValueError, FileNotFoundError) as error:
            raise Broken(f"the adapter that a kill left does not load: {error}") from error
        fl.remove(self.model)


# ------------------------------------------------------------------------------------- fl.save alone


def saves(kills: int, seed: int, folder: Path) -> dict[str, Any]:
    """A process that does nothing but save two adapters in turn over each other, killed at once or a little later.

    After every kill ``fl.load`` gives one of the two, whole. The next process goes on in the same folder.

    Raises:
        Broken: it gives something else, or nothing.
    """
    import torch
    from torch import nn

    import forgetless as fl

    def base() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 24))

    torch.set_num_threads(1)  # a fork has none of the others
    methods = [fl.LoRA(rank=4, penalties=(fl.SourceDeviation(0.1, "full"),)), fl.CURLoRA(rank=3)]
    models = [fl.adapt(base(), method) for method in methods]
    gen = torch.Generator().manual_seed(0)
    for model in models:
        for p in (p for p in model.parameters() if p.requires_grad):
            p.data.add_(0.1 * torch.randn(p.shape, generator=gen))
    want = [{name: t.clone() for name, t in model.state_dict().items()} for model in models]
    fl.save(models[0], folder)
    draw = random.Random(seed)
    began = time.perf_counter()
    for _ in range(10):
        fl.save(models[0], folder)
    usual = (time.perf_counter() - began) / 10
    found = {"kills": 0, "first": 0, "second": 0, "between_two": 0, "seconds_per_save": usual}
    while found["kills"] < kills:
        child = os.fork()
        if not child:
            with suppress(BaseException):
                while True:
                    for model in reversed(models):
                        fl.save(model, folder)
            os._exit(1)
        time.sleep(draw.uniform(0.0, 4 * usual))
        os.kill(child, signal.SIGKILL)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != -signal.SIGKILL:
            raise Broken("saving failed before the kill")
        found["kills"] += 1
        found["between_two"] += any(folder.glob(".saved-*/*.safetensors"))
        opened(folder)
        try:
            state = fl.load(base(), folder).state_dict()
        except (ValueError, FileNotFoundError) as error:
            raise Broken(f"the adapter that a kill left does not load: {error}") from error
        same = [
            state.keys() == other.keys() and all(torch.equal(state[key], other[key]) for key in other) for other in want
        ]
        if sum(same) != 1:
            raise Broken("what a kill left is neither of the two adapters")
        found["first"] += same[0]
        found["second"] += same[1]
    return found


# ------------------------------------------------------------------------------------------ files


class Broken(AssertionError):
    """A promise that was broken."""


def opened(folder: Path) -> int:
    """How many files the folder shows; each is read to its end.

    Raises:
        Broken: one is not whole.
    """
    count = 0
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if hidden or not path.is_file():
            continue
        try:
            READERS[path.suffix](path)
        except KeyError:
            raise Broken(f"{path.name}: a kind of file that is not known here") from None
        except Exception as error:
            raise Broken(f"{path.name} cannot be read: {error}") from error
        count += 1
    return count


def read_json(path: Path) -> None:
    json.loads(path.read_text(encoding="utf-8"))


def read_yaml(path: Path) -> None:
    import yaml

    yaml.safe_load(path.read_text(encoding="utf-8"))


def read_tensors(path: Path) -> None:
    from safetensors.torch import load_file

    load_file(path)


def read_html(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    HTMLParser().feed(text)
    if not text.rstrip().endswith("</html>"):
        raise ValueError("has no end")


def read_png(path: Path) -> None:
    data = path.read_bytes()
    if not data.startswith(b"\x89PNG") or b"IEND" not in data[-12:]:
        raise ValueError("is cut short")


READERS: dict[str, Callable[[Path], None]] = {
    ".json": read_json, ".safetensors": read_tensors, ".html": read_html, ".png": read_png, ".yaml": read_yaml,
}  # fmt: skip


def seen(folder: Path) -> frozenset[tuple[str, int, int]]:
    """What can be seen of the folder: names, times, sizes."""
    found = set()
    for place, _, names in os.walk(folder):
        for name in [".", *names]:
            with suppress(OSError):
                about = os.stat(os.path.join(place, name))
                found.add((os.path.join(place, name), about.st_mtime_ns, about.st_size))
    return frozenset(found)
