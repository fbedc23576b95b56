"""What a folder shows, and whether each file of it is whole."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from html.parser import HTMLParser
from pathlib import Path


class Broken(AssertionError):
    """A promise that was not kept."""


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
    ".json": read_json, ".safetensors": read_tensors, ".html": read_html, ".png": read_png,
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
