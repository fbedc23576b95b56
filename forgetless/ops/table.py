"""The table that ``forgetless tune`` writes: for each card and problem, the plan and tile that ran fastest.

``FORGETLESS_TUNE`` names its file, by default plans.json in ``FORGETLESS_CACHE`` or ~/.cache/forgetless.
"""

from __future__ import annotations

import functools
import json
import os
import warnings
from pathlib import Path
from typing import Any

PLANS = ("blas", "hybrid", "split", "full", "once")
TILE = ("BLOCK_K", "BLOCK_M", "BLOCK_N", "num_stages", "num_warps")
FORMAT = 1


def table_path() -> Path:
    """Where ``forgetless tune`` keeps what it measured."""
    named = os.environ.get("FORGETLESS_TUNE")
    if named:
        return Path(named)
    cache = os.environ.get("FORGETLESS_CACHE")
    return (Path(cache) if cache else Path.home() / ".cache" / "forgetless") / "plans.json"


def measured() -> dict[str, dict[str, Any]]:
    """GPU name -> key -> row of the user's table; empty if there is none. Read once; a broken one is ignored loudly."""
    return read(str(table_path()))


@functools.cache
def read(path: str) -> dict[str, dict[str, Any]]:
    """The rows of the table in that file, from memory after the first time."""
    try:
        return check_table(json.loads(Path(path).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        warnings.warn(f"forgetless: ignoring the tuning table {path}: {error}", stacklevel=4)
        return {}


def check_table(data: Any) -> dict[str, dict[str, Any]]:
    """The rows of a table.

    Raises:
        ValueError: it is not one.
    """
    if not isinstance(data, dict) or data.get("format") != FORMAT or not isinstance(data.get("gpus"), dict):
        raise ValueError(f"not a forgetless tuning table of format {FORMAT}")
    for gpu, rows in data["gpus"].items():
        if not isinstance(rows, dict):
            raise ValueError(f"the rows of {gpu!r} are not an object")
        for key, row in rows.items():
            if not isinstance(row, dict) or row.get("plan") not in PLANS:
                raise ValueError(f"{gpu!r}, {key!r}: wants a plan out of {', '.join(PLANS)}")
            tile = row.get("tile", {})
            if not isinstance(tile, dict) or not all(k in TILE and type(v) is int and v > 0 for k, v in tile.items()):
                raise ValueError(f"{gpu!r}, {key!r}: a tile has positive integers for {', '.join(TILE)}")
    return data["gpus"]
