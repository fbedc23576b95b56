"""forgetless.json: what a saved adapter is, and the hashes of what must fit together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..files import read_json
from .peft_format import WEIGHTS

FORMAT = 1
OURS = "forgetless.json"


def json_bytes(data: Any) -> bytes:
    """A JSON file of this."""
    return (json.dumps(data, indent=2, sort_keys=True) + "\n").encode()


def read_description(path: Path) -> dict[str, Any]:
    """The content of a forgetless.json that has the entries that ``fl.load`` reads.

    Returns:
        method (an object), layers (name -> facts), sha256 (file -> digest), consolidated (a count), trained (name of a
        tensor beside the adapters -> whether it is trained).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or of another format.
    """
    ours = read_json(path)
    if ours.get("format") != FORMAT:
        raise ValueError(f"{path}: format {ours.get('format')!r}, this version reads {FORMAT}")
    ours = {"consolidated": 0, "trained": {}, **ours}
    layers, digests, count, trained = (ours.get(key) for key in ("layers", "sha256", "consolidated", "trained"))
    if not (
        isinstance(layers, dict)
        and layers
        and all(isinstance(facts, dict) for facts in layers.values())
        and all(isinstance(facts.get("drawn_as", ""), str) for facts in layers.values())
        and isinstance(digests, dict)
        and isinstance(digests.get(WEIGHTS), str)
        and isinstance(ours.get("method"), dict)
        and isinstance(trained, dict)
        and all(isinstance(value, bool) for value in trained.values())
    ):
        raise ValueError(f"{path}: damaged, wants method, layers and sha256")
    if type(count) is not int or count < 0:
        raise ValueError(f"{path}: consolidated is {count!r}, wants a count")
    return ours
