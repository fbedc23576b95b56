"""Finished runs on disk: one JSON each, written atomically, found again by what decided its numbers."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from pathlib import Path
from typing import Any

from ..cli.console import Ui
from . import results as book
from .machine import commit, machine, versions
from .plans import Plan
from .session import Session

FOLDER = "runs"
#: Options that decide a row's numbers, beside the plan and the seed.
DECIDING = ("steps", "batch_size", "accumulate", "max_length", "dtype", "evals", "calibration", "eval_length")


def fingerprint(session: Session, plan: Plan | None, seed: int | None) -> str:
    """What decides a row's numbers: versions, machine, the model's bits, the texts, the settings; not the other rows.

    The commit is no part of it but of the file's name: runs of another commit are never taken unasked.
    """
    options = session.options
    texts = {
        "tasks": [[dataclasses.astuple(e) for e in task.train] for task in session.tasks],
        "held_out": session.held_out,
        "source": session.source,
        "facts": session.facts,
    }
    about: dict[str, Any] = {
        "schema": book.SCHEMA,
        "versions": versions(),
        "machine": machine(session.model.device),
        "model": session.checksum,
        "texts": hashlib.sha256(json.dumps(texts).encode()).hexdigest(),
    }
    if plan is not None:
        about |= {"plan": plan.settings, "seed": seed, "targets": options.targets}
        about |= {name: getattr(options, name) for name in DECIDING}
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]


def slug(label: str) -> str:
    """A file name out of a label."""
    return re.sub(r"[^a-z0-9.]+", "-", label.lower()).strip("-")


class Store:
    """The runs under one output folder, and those of them that may be used now."""

    def __init__(self, session: Session) -> None:
        self.folder = session.options.out / FOLDER
        self.session = session
        self.commit = (commit() or "").rstrip("+")
        self.expected: set[str] = set()

    def find(self, plan: Plan | None, seed: int | None) -> tuple[Path, str, dict[str, Any] | None]:
        """Where the run belongs, its fingerprint, and the run itself if an earlier one finished it."""
        mark = fingerprint(self.session, plan, seed)
        start = f"base-{mark}" if plan is None else f"{slug(plan.label)}-seed{seed}-{mark}"
        path = self.folder / f"{start}-{self.commit[:7] or 'nocommit'}.json"
        self.expected.add(start)
        places = [path]
        if self.session.options.any_commit:
            places += sorted(self.folder.glob(f"{start}-*.json"), key=lambda p: p.stat().st_mtime, reverse=True)
        if not self.session.options.fresh:
            for place in places:
                row = self._read(place)
                if row is not None and row.get("fingerprint") == mark:
                    return path, mark, row
        return path, mark, None

    @staticmethod
    def _read(path: Path) -> dict[str, Any] | None:
        try:
            row = json.loads(path.read_text())
        except (OSError, ValueError):
            return None
        return row if isinstance(row, dict) else None

    def keep(self, path: Path, row: dict[str, Any]) -> None:
        """Write a finished run."""
        path.parent.mkdir(exist_ok=True)
        book.dump(path, row)

    def tell_others(self, ui: Ui) -> None:
        """Say what lies there and is not used; nothing of it is touched."""
        if self.session.options.fresh or self.session.options.any_commit:
            return
        there = [p.stem for p in self.folder.glob("*.json")]
        mine = {stem for stem in there if stem.rpartition("-")[0] in self.expected}
        elsewhere = [stem for stem in mine if stem.rpartition("-")[2] != (self.commit[:7] or "nocommit")]
        have = {stem.rpartition("-")[0] for stem in mine} - {stem.rpartition("-")[0] for stem in elsewhere}
        other_code = {stem.rpartition("-")[0] for stem in elsewhere} - have
        if other_code:
            ui.say(
                f"{len(other_code)} runs in {self.folder} have these settings but another commit: made again, unless "
                "you give --any-commit"
            )
        if len(there) > len(mine):
            ui.say(f"{len(there) - len(mine)} runs in {self.folder} have other settings: they stay there, unused")


def put_aside(session: Session, found: dict[str, Any], ui: Ui) -> None:
    """Rename a results.json of other settings, so that it is not overwritten; the runs it came from stay."""
    path = session.options.out / book.FILE
    try:
        old = json.loads(path.read_text())
        same = all(_deciding(old).get(k) == v for k, v in _deciding(book.plain(found)).items())
    except FileNotFoundError:
        return
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        same, old = False, {}
    if not same:
        created = re.sub(r"\D", "", str(old.get("created", ""))) if isinstance(old, dict) else ""
        place = path.with_name(f"results.{created or 'unknown'}.json")
        path.replace(place)
        ui.say(f"{path} was made with other settings: put aside as {place.name}")


def _deciding(results: dict[str, Any]) -> dict[str, Any]:
    """What must agree between two results.json for one to go on from the other; methods and seeds may differ."""
    options = results["options"]
    names = (*DECIDING, "tasks", "keep", "source", "targets", "eval_tokens", "rank", "alpha", "weight", "lr")
    return {"model": results["model"]["checksum"]} | {name: options.get(name) for name in names}
