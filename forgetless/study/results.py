"""results.json: what a comparison found, where it ran and with what, readable again years later."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ..files import half_written, write_json
from .options import BadInput
from .stats import mean, minus

#: Raised by one whenever a reader of the old form would misunderstand the new one.
SCHEMA = 1
KIND = "forgetless.compare"
FILE = "results.json"


def writable(folder: Path) -> Path:
    """The folder, made, rid of what killed runs had half written, and proved writable, or ``BadInput``."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in half_written(folder):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=f".probe-{os.getpid()}-"):
            pass
    except OSError as error:
        raise BadInput(f"cannot write into {folder}: {error.strerror or error}") from None
    return folder


def now() -> str:
    """UTC, to the second."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def plain(value: Any) -> Any:
    """The value as JSON can say it: numbers that are not finite become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return value


def dump(path: Path, value: Any) -> None:
    """Write JSON, all of it or nothing."""
    write_json(path, plain(value))


def read_results(folder: Path) -> dict[str, Any]:
    """The results.json of a folder (or the file itself), checked to be one that this version understands."""
    path = folder / FILE if folder.is_dir() else folder
    try:
        results = json.loads(path.read_text())
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise BadInput(f"{path} is not JSON: {error}") from None
    if not isinstance(results, dict) or results.get("kind") != KIND:
        raise BadInput(f"{path} was not written by forgetless compare")
    if results.get("schema") != SCHEMA:
        raise BadInput(f"{path} has schema {results.get('schema')}, this version reads {SCHEMA}")
    return results


def derive(row: dict[str, Any], base: dict[str, Any], tasks: list[str], kept: list[str]) -> None:
    """Fill in what follows from a row's stages: learnt, forgotten, in nats per token.

    A kept text is forgotten against the base; a task against the moment when it had just been learnt. The last
    task has had no time to be forgotten.
    """
    stages = row["stages"]
    final = stages[-1]["losses"] if stages else base["losses"]
    row["final"] = dict(final)
    row["when_learnt"] = {task: stages[i]["losses"][task] for i, task in enumerate(tasks) if i < len(stages)}
    row["learnt"] = {task: minus(base["losses"][task], loss) for task, loss in row["when_learnt"].items()}
    forgotten = {name: minus(final[name], base["losses"][name]) for name in kept}
    for i, task in enumerate(tasks):
        if i < len(stages) - 1:
            forgotten[task] = minus(final[task], row["when_learnt"][task])
    row["forgotten"] = forgotten
    row["forgotten_mean"] = mean(forgotten[name] for name in kept)


def by_label(results: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The rows of each method that was asked for, in the order of the file: one per seed; none of a sweep."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in results["rows"]:
        if row.get("family"):
            continue
        groups.setdefault(row["label"], []).append(row)
    return groups
