"""Writing files so that a reader sees all of a file or none of it, and so that a killed process loses nothing."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

#: Prefix of a folder with the complete files of a save that has not moved all of them to their places.
COMPLETE = ".saved-"
#: Prefix of a folder with the files of a save that has not written all of them.
PARTIAL = ".saving-"
#: Age in seconds from which a ``PARTIAL`` folder belongs to no running process.
STALE = 3600


def write_atomically(path: Path, data: str | bytes) -> None:
    """Write ``data`` (text as UTF-8) to a temporary file in the same folder, then rename it to ``path``.

    Raises:
        OSError: the file cannot be written. An earlier file of that name is unchanged then.
    """
    temporary = path.with_name(f".writing-{os.getpid()}-{path.name}")
    try:
        _write(temporary, data.encode() if isinstance(data, str) else data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any, sort_keys: bool = False) -> None:
    """Write ``value`` as JSON with ``write_atomically``.

    Raises:
        OSError: the file cannot be written.
        ValueError: ``value`` holds NaN or Inf, which JSON does not have.
    """
    write_atomically(path, json.dumps(value, indent=1, sort_keys=sort_keys, allow_nan=False) + "\n")


@contextmanager
def folder_atomically(folder: Path) -> Iterator[Path]:
    """Yields a temporary folder beside ``folder`` to write into, which is renamed to ``folder`` at the end.

    If another process has made ``folder`` meanwhile, that one stays.

    Raises:
        OSError: the folder cannot be made.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield partial
        try:
            os.rename(partial, folder)
        except OSError:
            if not folder.exists():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a regular file, not JSON, or not an object.
    """
    if path.exists() and not path.is_file():  # reading a pipe would block
        raise ValueError(f"{path}: wants a file")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing; is {path.parent} a folder with a saved adapter?") from None
    except (ValueError, RecursionError) as error:  # includes numbers with thousands of digits
        raise ValueError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path}: holds a {type(data).__name__}, wants an object")
    return data


def write_together(folder: Path, files: Mapping[str, bytes], names: Iterable[str]) -> None:
    """Write several files of which a reader with ``newest`` sees all or none.

    All are written into a temporary folder. They count from the moment when that folder is renamed to ``COMPLETE``;
    then they move to their places.

    Args:
        folder: created if it is missing.
        files: name -> content.
        names: every name such a set can have. Files of these names that are not in ``files`` are deleted.

    Raises:
        OSError: a file cannot be written. The earlier files are in their places then.
    """
    names = list(names)
    folder.mkdir(parents=True, exist_ok=True)
    finish_killed(folder, names)
    partial = Path(tempfile.mkdtemp(prefix=f"{PARTIAL}{os.getpid()}-", dir=folder))
    complete = folder / partial.name.replace(PARTIAL, COMPLETE)
    try:
        for name, data in files.items():
            _write(partial / name, data)
            if (folder / name).exists():
                shutil.copyfile(folder / name, partial / f"{name}.old")
        os.rename(partial, complete)
        try:
            for name in files:
                with suppress(FileNotFoundError):  # a concurrent save has moved it
                    os.replace(complete / name, folder / name)
        except BaseException:  # files of two saves do not fit together
            os.rename(complete, partial)
            _restore(folder, partial, files)
            raise
        for name in names:
            if name not in files:
                (folder / name).unlink(missing_ok=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(complete, ignore_errors=True)


def _restore(folder: Path, partial: Path, names: Iterable[str]) -> None:
    """Put back the old file of every new file that has left ``partial``."""
    for name in names:
        if (partial / name).exists():
            continue
        if (partial / f"{name}.old").exists():
            os.replace(partial / f"{name}.old", folder / name)
        else:
            (folder / name).unlink(missing_ok=True)


def newest(folder: Path, name: str) -> Path:
    """The newest file of this name, in its place or in a ``COMPLETE`` folder that a killed save left."""
    times: dict[Path, int] = {}
    for path in (*folder.glob(f"{COMPLETE}*/{name}"), folder / name):
        with suppress(OSError):  # moved meanwhile, or a dangling link
            times[path] = path.stat().st_mtime_ns
    return max(times, key=lambda path: times[path], default=folder / name)


def finish_killed(folder: Path, names: Iterable[str]) -> None:
    """Move the complete files of killed saves to their places; delete the partial ones older than ``STALE``."""
    for left in folder.glob(f"{PARTIAL}*"):
        with suppress(OSError):
            if time.time() - left.lstat().st_mtime > STALE:
                shutil.rmtree(left)
    for left in folder.glob(f"{COMPLETE}*"):
        if left.is_symlink() or not left.is_dir():
            continue
        for name in names:
            if newest(folder, name) == left / name:
                with suppress(FileNotFoundError):
                    os.replace(left / name, folder / name)
        shutil.rmtree(left, ignore_errors=True)


def half_written(folder: Path) -> list[Path]:
    """Temporary files and folders in a folder of results whose process has ended."""
    paths = (path for pattern in (".*", "runs/.*", "stopped/*/.*") for path in folder.glob(pattern))
    marks = ((path, re.fullmatch(r"\.(?:writing|saving|probe)-(\d+)-.+", path.name)) for path in paths)
    return [path for path, mark in marks if mark is not None and not alive(int(mark[1]))]


def alive(pid: int) -> bool:
    """Whether a process of that number runs here."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # another user's process, or a number that no process has
        return True
    return True


def _write(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
