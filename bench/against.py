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
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from .harness import FROZEN, HERE, OURS, ROOT, BadInput, Clock, Provider, Results

PARTS = ("forgetless", "kernels")


class Measured(Protocol):
    """One provider: what is timed, and the bytes that it saves and needs at its peak, by name."""

    @property
    def runs(self) -> Provider: ...
    def sizes(self) -> dict[str, int]: ...


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
        library = Path(self.ask(library=True)).resolve()
        if not library.is_relative_to(checkout.resolve()):
            raise RuntimeError(f"the worker imports {library}, not the checkout in {checkout}")

    def ask(self, **request: Any) -> Any:
        """Raises RuntimeError with the worker's own words if it fails."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"a worker ended with exit code {self.process.wait()}")
        reply = json.loads(line)
        if "error" in reply:
            raise RuntimeError(reply["error"])
        return reply["result"]

    def close(self) -> None:
        self.process.communicate()


@dataclass
class Remote:
    """A provider in a worker; it times itself there."""

    worker: Worker
    name: str

    @property
    def runs(self) -> Provider:
        return self

    def times(self) -> list[float]:
        return self.worker.ask(times=self.name)

    def sizes(self) -> dict[str, int]:
        return self.worker.ask(sizes=self.name)


class Both:
    """Workers for this checkout and for another commit.

    Raises:
        BadInput: the commit is not known to git, or this is no git checkout.
    """

    def __init__(self, commit: str):
        with ExitStack() as stack:
            self.commit = resolve(commit)
            folders = [Path(stack.enter_context(tempfile.TemporaryDirectory())) for _ in range(3)]
            extract(self.commit, folders[0])
            self.workers: list[Worker] = []
            for checkout, folder in ((ROOT, folders[1]), (folders[0], folders[2])):
                self.workers.append(Worker(checkout, folder))
                stack.callback(self.workers[-1].close)
            self.stack = stack.pop_all()

    def __enter__(self) -> Both:
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def make(self, bench: str, spec: Mapping[str, Any]) -> tuple[dict[str, Measured], list[str]]:
        """The providers of ``bench``, and notes: this checkout's all, of the other commit the frozen one and ours."""
        here, other = self.workers
        ours, theirs = (worker.ask(make=bench, spec=spec) for worker in self.workers)
        result: dict[str, Measured] = {name: Remote(here, name) for name in ours["names"]}
        for name in theirs["names"]:
            if name == FROZEN or name.startswith(OURS):
                result[f"{name} @ {self.commit[:8]}"] = Remote(other, name)
        return result, list(dict.fromkeys(ours["notes"] + theirs["notes"]))


def providers(both: Both | None, bench: str, spec: Mapping[str, Any], results: Results) -> Mapping[str, Measured]:
    """Those of this process, or of two workers; what cannot be run becomes a note."""
    if both is None:
        made, notes = importlib.import_module(f".{bench}", __package__).make(**spec)
    else:
        made, notes = both.make(bench, spec)
        results["against"] = both.commit
    results["notes"] += [note for note in notes if note not in results["notes"]]
    return made


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
    run = ["git", "-C", str(ROOT), "archive", "--format=tar", commit, *PARTS]
    archive = subprocess.run(run, capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(folder, filter="data")


# ----------------------------------------------------------------------------------------- worker


def serve(requests: Sequence[str] | Any, reply: Any) -> None:
    """Answer one request a line: library, make, times, sizes."""
    made: dict[str, Any] = {}
    clock = Clock()
    for line in requests:
        request = json.loads(line)
        try:
            if "library" in request:
                import forgetless

                assert forgetless.LoRA is not None  # its modules are imported with the first name that is asked for
                result: Any = forgetless.__file__
            elif "make" in request:
                made.clear()
                gc.collect()
                clock = Clock(request["spec"]["device"])
                made, notes = importlib.import_module(f".{request['make']}", __package__).make(**request["spec"])
                result = {"names": list(made), "notes": notes}
            elif "times" in request:
                result = clock.times(request["times"], made[request["times"]].runs)
            else:
                result = made[request["sizes"]].sizes()
            answer = {"result": result}
        except Exception as error:  # the main process says it in one line
            text = str(error).splitlines() or [""]
            answer = {"error": f"{type(error).__name__}: {text[0]}"}
        reply.write(json.dumps(answer) + "\n")
        reply.flush()


if __name__ == "__main__":
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no reply
    gc.disable()  # as interleave does
    serve(sys.stdin, replies)
