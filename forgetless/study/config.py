"""The options of finetune in a YAML file: what the run is given, and what it writes beside the adapter."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import yaml

from ..files import write_atomically
from .options import BadInput, FinetuneOptions, near, number

#: The file beside an adapter with the options of its run.
CONFIG = "finetune.yaml"


def read_config(path: Path) -> dict[str, Any]:
    """The options of finetune in a YAML file, by the names of their fields.

    Raises:
        BadInput: no such file, not YAML, or an unknown option.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"--config {path}: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadInput(f"--config {path}: not YAML: {error}") from None
    if not isinstance(data, dict):
        raise BadInput(f"--config {path}: wanted options by their names, as in 'lr: 3e-4'")
    fields = {f.name: f.type for f in dataclasses.fields(FinetuneOptions)}
    for name, value in data.items():
        if name not in fields:
            raise BadInput(f"--config {path}: unknown option {name!r};{near(str(name), fields)}")
        kinds = _KINDS[str(fields[name]).partition(" |")[0]]
        if isinstance(value, str) and float in kinds:  # YAML reads 3e-4 as a string
            data[name] = value = number(value, f"--config {path}: {name}")
        if value is not None and (not isinstance(value, kinds) or isinstance(value, bool) and bool not in kinds):
            raise BadInput(f"--config {path}: {name} is {value!r}, wanted {' or '.join(k.__name__ for k in kinds)}")
        if str(fields[name]).startswith("tuple") and isinstance(value, str):
            data[name] = [value]
    return {name: value for name, value in data.items() if value is not None}


#: What a field of ``FinetuneOptions`` may be in a YAML file, by its annotation.
_KINDS: dict[str, tuple[type, ...]] = {
    "Path": (str,), "str": (str, list), "tuple[str, ...]": (list, str), "bool": (bool,),
    "int": (int,), "float": (float, int),
}  # fmt: skip


def plain(options: FinetuneOptions) -> dict[str, Any]:
    """The options as YAML and JSON can say them, without those that are about one start of a run."""
    data = {name: value for name, value in dataclasses.asdict(options).items() if name not in ("overwrite", "dry_run")}
    data = {name: list(value) if isinstance(value, tuple) else value for name, value in data.items()}
    return data | {"out": str(options.out)}


#: Options that a stopped run may go on with changed: they change no number.
_FREE = ("out", "device", "save_every", "report")


def essential(options: FinetuneOptions) -> dict[str, Any]:
    """The options that a run's numbers depend on."""
    return {name: value for name, value in plain(options).items() if name not in _FREE}


def differing(path: Path, options: FinetuneOptions) -> list[str]:
    """Names of the essential options that differ from those in a file of ``write_config``."""
    other = read_config(path)
    return [name for name, value in essential(options).items() if other.get(name) != value]


def write_config(path: Path, options: FinetuneOptions) -> None:
    """The options as ``read_config`` reads them."""
    write_atomically(path, yaml.safe_dump(plain(options), sort_keys=False))
