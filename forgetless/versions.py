"""Which versions of packages were tested, for code that uses more than their documented interface."""

from __future__ import annotations

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


def missing_error(package: str, what: str, missing: str) -> RuntimeError:
    """The error if the installed version has no ``missing``, which ``what`` needs."""
    return RuntimeError(f"{what} finds no {missing} in {package} {installed(package)}; tested with {tested(package)}")
