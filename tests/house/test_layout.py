"""How the house is built: who may import what, what is packaged, what never appears."""

from __future__ import annotations

import ast
import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from forgetless.ops import blas, reference
from forgetless.ops import dispatch as ops

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = [path for path in sorted((ROOT / "forgetless").rglob("*.py")) if path.name != "__main__.py"]
STUDY = [path for path in LIBRARY if {"study", "cli"} & set(path.relative_to(ROOT).parts)]
LIBRARY = [path for path in LIBRARY if path not in STUDY]
#: Modules without torch, which any other module may import.
FOUNDATION = ("files", "versions")
KERNELS = sorted((ROOT / "kernels").rglob("*.py"))
LAUNCHERS = ("project", "matmul_lowrank", "outer", "project_outer", "dx_and_ddown", "linear_lowrank", "project_terms")
LAUNCHERS += ("project_core", "project_core_outer")
LAUNCHERS += ("grouped_project", "grouped_matmul_lowrank", "grouped_outer", "grouped_sum")
LAUNCHERS += ("grouped_rows", "grouped_dx_and_ddown")


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """(absolute module name, level it was written with) of every import, those inside functions too."""
    package = [*path.relative_to(ROOT).parent.parts]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, 0) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *filter(None, [node.module])])
            yield from ((f"{stem}.{alias.name}", node.level) for alias in node.names)


def roots(path: Path) -> set[str]:
    return {name.split(".")[0] for name, level in imports(path) if level == 0}


def short(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", KERNELS, ids=short)
def test_kernels_know_torch_triton_and_each_other_alone(path):
    assert roots(path) <= {"torch", "triton"} | sys.stdlib_module_names
    depth = len(path.relative_to(ROOT).parts) - 1
    assert all(level <= depth for _, level in imports(path))


def test_dispatch_alone_names_the_kernels():
    naming = {short(path) for path in [*LIBRARY, *STUDY] if "forgetless_kernels" in roots(path)}
    assert naming <= {"forgetless/ops/dispatch.py", *map(short, STUDY)}
    assert "forgetless/ops/dispatch.py" in naming


@pytest.mark.parametrize("path", LIBRARY, ids=short)
def test_the_library_needs_torch_and_safetensors_alone_and_never_the_study(path):
    own = {"forgetless_kernels"} if path.name == "dispatch.py" else set()
    assert roots(path) <= {"torch", "safetensors"} | own | sys.stdlib_module_names
    assert not [name for name, _ in imports(path) if f"{name}.".startswith("forgetless.study.")]


def test_methods_and_penalties_reach_no_higher():
    allowed = ("forgetless.methods", "forgetless.penalties", "forgetless.ops", "forgetless.adapter")
    for path in LIBRARY:
        if path.parent.name in ("methods", "penalties"):
            own = [name for name, level in imports(path) if level]
            assert all(name.startswith(allowed) for name in own), short(path)


@pytest.mark.parametrize("name", FOUNDATION)
def test_the_foundation_imports_the_standard_library_alone(name):
    assert roots(ROOT / "forgetless" / f"{name}.py") <= sys.stdlib_module_names
    assert not [name for name, level in imports(ROOT / "forgetless" / f"{name}.py") if level]


def test_peft_s_format_reads_and_writes_and_never_adapts():
    for file in ("peft_format.py", "experts_format.py"):
        names = [name for name, level in imports(ROOT / "forgetless" / "checkpoint" / file) if level]
        assert not [name for name in names if name.startswith(("forgetless.model", "forgetless.checkpoint.io"))]


def test_nothing_imports_the_tests_or_the_bench():
    for path in [*LIBRARY, *STUDY, *KERNELS]:
        assert not roots(path) & {"tests", "helpers", "bench", "forgetless_bench"}, short(path)


def test_one_module_writes_files():
    """All that is written goes through ``forgetless/files.py``: to a temporary place, then renamed."""
    for path in [*LIBRARY, *STUDY]:
        if path.name == "files.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                owner = node.func.value.id if isinstance(node.func.value, ast.Name) else ""
                renames = owner == "os" and node.func.attr in ("replace", "rename")
                assert not renames and node.func.attr not in ("write_text", "write_bytes"), f"{path}:{node.lineno}"


def test_kernels_and_bench_are_namespace_folders():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "bench" / "__init__.py").exists()


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_backends_are_twins(launcher):
    backends = [reference, blas, ops.kernels]
    if backends[-1] is None:
        pytest.skip("Triton is not installed")
    assert len({inspect.signature(getattr(module, launcher)) for module in backends}) == 1


def test_every_package_is_packaged():
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    listed = set(setup["packages"])
    wanted = {".".join(p.parent.relative_to(ROOT).parts) for p in (ROOT / "forgetless").rglob("__init__.py")}
    for folder, name in (("kernels", "forgetless_kernels"), ("bench", "forgetless_bench")):
        assert setup["package-dir"][name] == folder
        parts = {p.parent.relative_to(ROOT / folder).parts for p in (ROOT / folder).rglob("*.py")}
        wanted |= {".".join((name, *part)) for part in parts}
    assert listed == wanted
    for name in listed:
        assert list((ROOT / setup["package-dir"].get(name, name.replace(".", "/"))).glob("*.py")), name


def test_every_module_of_the_library_is_in_a_package():
    for path in [*LIBRARY, *STUDY]:
        assert (path.parent / "__init__.py").exists(), short(path)


@pytest.mark.parametrize("path", [*STUDY, *(ROOT / "forgetless" / "checkpoint").glob("*.py")], ids=short)
def test_modules_are_short(path):
    assert len(path.read_text().splitlines()) <= 350


def test_importing_the_library_is_light():
    code = """
        import json, sys, forgetless
        heavy = [name for name in ("transformers", "peft", "matplotlib", "accelerate") if name in sys.modules]
        runtime = sys.modules.get("triton.runtime.driver")
        driver = getattr(runtime, "driver", None)
        started = any(getattr(driver, name, None) is not None for name in ("_active", "_default"))
        print(json.dumps([heavy, started]))
    """
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    run = [sys.executable, "-c", inspect.cleandoc(code)]
    done = subprocess.run(run, capture_output=True, text=True, env=environment, cwd=ROOT, check=True)
    assert json.loads(done.stdout) == [[], False]


def test_the_public_names_are_there():
    import forgetless as fl

    for name in fl.__all__:
        assert getattr(fl, name).__doc__, name
    assert sorted(fl.__all__) == fl.__all__


@pytest.mark.parametrize("path", [*LIBRARY, *STUDY], ids=short)
def test_nothing_is_pickled(path):
    assert not roots(path) & {"pickle", "cloudpickle", "dill", "shelve", "marshal", "joblib"}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
            assert node.attr not in ("load", "save"), f"{short(path)}:{node.lineno}"


def test_no_file_names_a_machine():
    run = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(run, capture_output=True, text=True, cwd=ROOT, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    machine = re.compile(rf"(?<![\w.]){'/'}(?:work|root|tmp|home){'/'}\w")
    found = []
    for name in filter(None, listed.stdout.split("\0")):
        try:
            text = (ROOT / name).read_text()
        except (UnicodeDecodeError, FileNotFoundError, IsADirectoryError):
            continue
        found += [f"{name}: {line.strip()}" for line in text.splitlines() if machine.search(line)]
    assert not found
