"""The same measurement with another commit of the library, interleaved in one run: ``--against COMMIT``.

Two worker processes take turns, one with this checkout of ``forgetless`` and ``forgetless_kernels``, one with the
other commit's; both run this checkout's bench. The other one's providers, its frozen layer or model too, are named
``forgetless @ COMMIT`` and ``frozen @ COMMIT``: the two frozen rows show what the process alone changes.
"""

from __future__ import annotations

import gc
import importlib
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from .harness import FROZEN, HERE, OURS, ROOT, BadInput, Clock, Provider, Results


class Measured(Protocol):
    """One provider: what is timed, and the bytes that it saves and needs at its peak, by name."""

    @property
    def runs(self) -> Provider: ...
    def sizes(self) -> dict[str, int]: ...


def make(bench: str, spec: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The providers of a benchmark in this process, and notes."""
    return importlib.import_module(f".{bench}", __package__).make(**spec)


@contextmanager
def providers(commit: str | None, bench: str, results: Results) -> Iterator[Callable[..., dict[str, Measured]]]:
    """``make`` of ``bench``, of this process or of two workers, from its arguments; its notes are put in the results.

    Of the other commit's providers there are the frozen one and ours.

    Raises:
        BadInput: the commit is not known to git, or this is no git checkout.
    """
    workers: dict[str, Worker] = {}
    with ExitStack() as stack:
        if commit is not None:
            results["against"] = commit = resolve(commit)
            folders = [Path(stack.enter_context(tempfile.TemporaryDirectory())) for _ in range(3)]
            extract(commit, folders[0])
            for checkout, folder, mark in ((ROOT, folders[1], ""), (folders[0], folders[2], f" @ {commit[:8]}")):
                workers[mark] = Worker(checkout, folder)
                stack.callback(workers[mark].process.communicate)  # closes its input: it ends

        def made_by(**spec: Any) -> dict[str, Measured]:
            made, notes = make(bench, spec) if commit is None else ({}, [])
            for mark, worker in workers.items():
                names, more = worker.ask("make", bench, spec)
                ours = [name for name in names if not mark or name == FROZEN or name.startswith(OURS)]
                made |= {name + mark: Remote(worker, name) for name in ours}
                notes += more
            results["notes"] += [note for note in dict.fromkeys(notes) if note not in results["notes"]]
            return made

        yield made_by


class Worker:
    """A process whose ``forgetless`` and ``forgetless_kernels`` are those of a checkout, one request at a time."""

    def __init__(self, checkout: Path, folder: Path):
        links = {"forgetless": checkout / "forgetless", "forgetless_kernels": checkout / "kernels"}
        for name, target in {**links, "forgetless_bench": HERE}.items():
            (folder / name).symlink_to(target, target_is_directory=True)
        path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
        command, environment = [sys.executable, "-m", "forgetless_bench.against"], {**os.environ, "PYTHONPATH": path}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=folder, env=environment)
        library = Path(self.ask("library")).resolve()
        if not library.is_relative_to(checkout.resolve()):
            raise RuntimeError(f"the worker imports {library}, not the checkout in {checkout}")

    def ask(self, what: str, *arguments: Any) -> Any:
        """Raises RuntimeError with the worker's own words if it fails."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps([what, *arguments]) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"a worker ended with exit code {self.process.wait()}")
        reply = json.loads(line)
        if "error" in reply:
            raise RuntimeError(reply["error"])
        return reply["result"]


@dataclass
class Remote:
    """A provider in a worker; it times itself there."""

    worker: Worker
    name: str

    @property
    def runs(self) -> Provider:
        return self

    def times(self) -> list[float]:
        return self.worker.ask("times", self.name)

    def sizes(self) -> dict[str, int]:
        return self.worker.ask("sizes", self.name)


def resolve(commit: str) -> str:
    """The full hash."""
    run = ["git", "-C", str(ROOT), "rev-parse", "--verify", "--quiet", "--end-of-options", f"{commit}^{{commit}}"]
    try:
        if not (ROOT / ".git").exists():  # installed: git would find some other checkout above
            raise FileNotFoundError
        return subprocess.run(run, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        raise BadInput(f"--against: {commit!r} is not a commit of a git checkout here") from None


def extract(commit: str, folder: Path) -> None:
    """The library as it was: ``forgetless/`` and ``kernels/`` of that commit."""
    run = ["git", "-C", str(ROOT), "archive", "--format=tar", commit, "forgetless", "kernels"]
    archive = subprocess.run(run, capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(folder, filter="data")


def answer(made: dict[str, Any], what: str, name: str = "", spec: Any = None) -> Any:
    """The library's place, the names of the providers that are made from now on, or the times or sizes of one."""
    if what == "library":
        import forgetless

        assert forgetless.LoRA is not None  # its modules are imported with the first name that is asked for
        return forgetless.__file__
    if what == "make":
        made.clear()
        gc.collect()
        clock, (providers, notes) = Clock(spec["device"]), make(name, spec)
        made.update(providers, clock=clock)
        return list(providers), notes
    return made["clock"].times(name, made[name].runs) if what == "times" else made[name].sizes()


def serve(requests: Iterable[str], reply: Any) -> None:
    """Answer one request a line."""
    made: dict[str, Any] = {}
    for line in requests:
        try:
            result = {"result": answer(made, *json.loads(line))}
        except Exception as error:  # the main process says it in one line
            text = str(error).splitlines() or [""]
            result = {"error": f"{type(error).__name__}: {text[0]}"}
        reply.write(json.dumps(result) + "\n")
        reply.flush()


if __name__ == "__main__":
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no reply
    gc.disable()  # as interleave does
    serve(sys.stdin, replies)
