"""Which versions of other people's packages this has been tested with, where it leans on more than their interface."""

from __future__ import annotations

import functools
import re
import warnings
from importlib import metadata

#: Package -> lowest and highest version, (major, minor), that tests have been run with; what is between was not.
TESTED = {
    "bitsandbytes": ((0, 50), (0, 50)),
    "lightning": ((2, 6), (2, 6)),
    "peft": ((0, 18), (0, 21)),
    "torchao": ((0, 18), (0, 18)),
    "transformers": ((5, 0), (5, 23)),
}


def installed(package: str) -> str:
    """Its version, or "unknown"."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"


def tested(package: str) -> str:
    """ "peft 0.19 to 0.21"."""
    low, high = (".".join(map(str, version)) for version in TESTED[package])
    return f"{package} {low}" if low == high else f"{package} {low} to {high}"


@functools.cache
def heed(package: str, what: str) -> None:
    """Warn, once, where ``what`` meets a version that it has not been tested with."""
    found = installed(package)
    numbers = re.match(r"(\d+)\.(\d+)", found)
    low, high = TESTED[package]
    if numbers and not low <= (int(numbers[1]), int(numbers[2])) <= high:
        warnings.warn(f"{what} was tested with {tested(package)}; {found} is installed", stacklevel=3)


def lacking(package: str, what: str, missing: str) -> RuntimeError:
    """The error where a version lacks what ``what`` leans on."""
    return RuntimeError(f"{what} finds no {missing} in {package} {installed(package)}; tested with {tested(package)}")
