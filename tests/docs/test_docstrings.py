"""Every public name has a docstring with the sections that it needs; the reference page names all of them."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import forgetless as fl
from forgetless import report
from forgetless.layers import linear

# the package's function of this name hides the module
consolidation = importlib.import_module("forgetless.consolidate")
PAGE = Path(__file__).resolve().parents[2] / "docs" / "api.md"
MODULES = {"fl": fl, "fl.methods": fl.methods, "fl.penalties": fl.penalties, "fl.ops": fl.ops}
#: Public names of modules without ``__all__``.
MORE: dict[str, Any] = {
    "fl.training.PenaltyMixin": fl.training.PenaltyMixin,
    "fl.packed.register": fl.packed.register,
    "fl.packed.Kind": fl.packed.Kind,
    "Report": report.Report,
    "LayerReport": report.LayerReport,
    "Consolidation": consolidation.Consolidation,
    "AdaptedLinear": linear.AdaptedLinear,
}
#: Not on the reference page, but called across packages.
INNER: dict[str, tuple[str, ...]] = {
    "forgetless.ops.reference": (
        "project", "matmul_lowrank", "outer", "project_outer", "linear_lowrank", "keep_mask",
    ),
    "forgetless.ops.plans": ("choose", "Choice", "forget"),
    "forgetless_kernels.fused": ("project", "matmul_lowrank", "outer", "project_outer", "linear_lowrank"),
    "forgetless_kernels.tiles": ("Tile", "forced", "tile_for"),
}  # fmt: skip
SECTIONS = ("Args", "Attributes", "Returns", "Raises")


def public() -> Iterator[tuple[str, Any]]:
    """Functions, classes and their public methods; a name that several modules export comes once."""
    seen: set[int] = set()
    things = [(f"{prefix}.{name}", getattr(m, name)) for prefix, m in MODULES.items() for name in m.__all__]
    for name, thing in [*things, *MORE.items()]:
        if id(thing) in seen or inspect.ismodule(thing) or isinstance(thing, dict):
            continue
        seen.add(id(thing))
        yield name, thing
        if inspect.isclass(thing):
            for key, member in vars(thing).items():
                function = getattr(member, "__func__", member)
                if not key.startswith("_") and inspect.isfunction(function) and function.__doc__:
                    yield f"{name}.{key}", function


def inner() -> Iterator[tuple[str, Any]]:
    for module, names in INNER.items():
        try:
            home = importlib.import_module(module)
        except ImportError:  # the kernels need Triton
            assert module.startswith("forgetless_kernels")
            continue
        yield from ((f"{module}.{name}", getattr(home, name)) for name in names)


PUBLIC = dict(public())
CASES = {**PUBLIC, **dict(inner())}


def sections(thing: Any) -> dict[str, str]:
    """Section title -> its text, and "" -> what stands before the first one."""
    parts = re.split(rf"^({'|'.join(SECTIONS)}):\n", inspect.getdoc(thing) or "", flags=re.M)
    return {"": parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}


def parameters(thing: Any) -> list[str]:
    if inspect.isclass(thing) and not hasattr(thing, "__dataclass_fields__"):
        return []
    return [name for name in inspect.signature(thing).parameters if name not in ("self", "args", "named", "others")]


def entries(section: str) -> list[str]:
    """Names of ``name: text`` rows, indented once."""
    return re.findall(r"^    ([A-Za-z_]\w*): ", section, flags=re.M)


@pytest.mark.parametrize("name", CASES)
def test_it_has_a_docstring_and_says_what_it_does_first(name: str) -> None:
    text = sections(CASES[name])[""]
    assert text.strip(), name
    assert text.strip()[0].isalnum() or text.strip()[0] in "|`", name


@pytest.mark.parametrize("name", CASES)
def test_every_argument_that_is_explained_exists(name: str) -> None:
    thing = CASES[name]
    if not inspect.isclass(thing) or hasattr(thing, "__dataclass_fields__"):
        assert set(entries(sections(thing).get("Args", ""))) <= set(parameters(thing))


@pytest.mark.parametrize("name", [name for name in CASES if name.count(".") == 1 and name.startswith("fl.")])
def test_a_call_with_several_arguments_explains_each(name: str) -> None:
    """Functions and dataclasses of the top level; a lone ``model`` or ``folder`` needs no words."""
    thing = CASES[name]
    if len(parameters(thing)) > 1:
        text = sections(thing)
        assert set(entries(text.get("Args", "") + text.get("Attributes", ""))) == set(parameters(thing))


@pytest.mark.parametrize("name", CASES)
def test_what_raises_says_what(name: str) -> None:
    thing = CASES[name]
    body = inspect.getsource(thing) if inspect.isfunction(thing) else ""
    if re.search(r"^\s+raise [A-Z](?!otImplementedError)", body, flags=re.M):
        raised = set(re.findall(r"^\s+raise ([A-Z]\w+)\(", body, flags=re.M)) - {"NotImplementedError"}
        assert raised <= set(entries(sections(thing).get("Raises", ""))), name


def test_every_dataclass_that_refuses_a_field_says_so() -> None:
    for name, thing in CASES.items():
        if inspect.isclass(thing) and "__post_init__" in vars(thing):
            assert "ValueError" in entries(sections(thing).get("Raises", "")), name


def test_the_reference_shows_every_public_name() -> None:
    if not PAGE.exists():
        pytest.skip("outside of a source checkout")
    page = PAGE.read_text(encoding="utf-8")
    members = re.findall(r"^::: forgetless(?:\.[\w.]+)?\n    options: \{members: \[(.*?)\]", page, flags=re.M)
    shown = {name for row in members for name in row.split(", ")}
    shown |= {path.rpartition(".")[2] for path in re.findall(r"^::: (\S+)$", page, flags=re.M)}
    names = {getattr(thing, "__name__", name) for name, thing in PUBLIC.items() if "." not in thing.__qualname__}
    assert names <= shown
