"""The checkpoints of a run: written every so many steps, and the one that a stopped run goes on from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from ..files import write_json
from . import processes
from .options import BadInput

#: The last file of a checkpoint to be written and the first to go: a checkpoint without it is not whole.
RECORD = "run.json"


class Checkpoints(TrainerCallback):
    """The Trainer's checkpoints in a folder, each with the curves of its run; the newest alone is kept.

    Args:
        folder: to write into.
        every: steps between two of them. The last step has one, too.
        origin: says what the run is made of. What began otherwise does not go on.
    """

    def __init__(self, folder: Path, every: int, origin: str) -> None:
        self.folder, self.every, self.origin = folder, every, origin
        #: The checkpoint to go on from, and its record, if there is one.
        self.begun: Path | None = None
        self.saved: dict[str, Any] = {}
        #: Steps of the newest one.
        self.step = 0
        #: What goes into a record beside the origin.
        self.record: Callable[[], dict[str, Any]] = dict

    def start(self, overwrite: bool) -> None:
        """Look for the newest checkpoint that is whole; a training goes on from it. Writes nothing.

        Raises:
            BadInput: it is of another origin, and it is not to be overwritten.
        """
        whole = {int(path.parent.name.rpartition("-")[2]): path for path in self.folder.glob(f"checkpoint-*/{RECORD}")}
        if not whole:
            return
        step = max(whole)
        path = whole[step]
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["origin"] == self.origin:
            self.begun, self.saved, self.step = path.parent, record, step
        elif not overwrite:
            raise BadInput(
                f"{self.folder.parent} holds an unfinished run of another model, other data, options or number of "
                "processes; --overwrite starts afresh"
            )

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        if processes.number() == 0:  # all processes have started
            self.clear(but=self.begun)

    def on_save(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        processes.mean([0.0])  # every process has written its part
        if processes.number() == 0:
            current = self.folder / f"checkpoint-{state.global_step}"
            write_json(current / RECORD, {"origin": self.origin, **self.record()})
            self.clear(but=current)
        self.step = state.global_step

    def clear(self, but: Path | None = None) -> None:
        """Delete the checkpoints, all or all but one."""
        for path in self.folder.glob("checkpoint-*"):
            if path != but:
                (path / RECORD).unlink(missing_ok=True)
                shutil.rmtree(path)

    def end(self) -> None:
        """Delete the folder: nothing is left to go on with."""
        self.clear()
        shutil.rmtree(self.folder)
