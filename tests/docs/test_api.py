"""docs/api.md is what ``python -m bench tables`` makes of the docstrings, and the docstrings say what they must."""

import inspect
import re
from pathlib import Path

import pytest

import forgetless as fl

ROOT = Path(__file__).resolve().parents[2]
api = pytest.importorskip("forgetless_bench.api")
if not api.PAGE.exists():
    pytest.skip("outside of a source checkout", allow_module_level=True)
PAGE = api.PAGE.read_text(encoding="utf-8")
PYTHON, SHELL = PAGE.split("\n## Command line\n")
AGAIN = "a docstring or an option has changed: run python -m bench tables"


def test_the_page_is_made_of_the_docstrings():
    pytest.importorskip("triton")
    assert PYTHON == api.HEAD + api.contents() + api.library(), AGAIN


def test_the_page_is_made_of_the_commands():
    pytest.importorskip("typer")
    assert f"\n## Command line\n{SHELL}" == api.page()[len(PYTHON) :], AGAIN


def test_everything_public_is_on_the_page():
    shown = {id(thing) for _, _, thing in api.things()}
    for module in (fl, fl.methods, fl.penalties):
        for name in module.__all__:
            thing = getattr(module, name)
            if inspect.ismodule(thing):
                assert any(section[0] == thing.__name__ for section in api.SECTIONS.values()), name
            else:
                assert id(thing) in shown or isinstance(thing, dict), name


def test_every_switch_that_is_read_is_on_the_page():
    files = [path for folder in ("forgetless", "kernels", "bench", "tests") for path in (ROOT / folder).rglob("*.py")]
    read = re.compile(r"environ(?:\.get\(|\[)\"(FORGETLESS_\w+)")
    found = {name for path in files for name in read.findall(path.read_text(encoding="utf-8"))}
    assert found == set(api.SWITCHES)


@pytest.mark.parametrize("name, thing", [(name, thing) for _, name, thing in api.things()], ids=lambda value: None)
def test_every_argument_that_is_explained_exists(name, thing):
    """And everything has a docstring."""
    text = inspect.getdoc(thing) or ""
    assert text, name
    if not inspect.isclass(thing) or hasattr(thing, "__dataclass_fields__"):
        rows = re.search(r"^Args:\n((?:    .*\n?)+)", text, flags=re.M)
        named = re.findall(r"^    ([a-z_A-Z][\w, ]*): ", rows[1], flags=re.M) if rows else []
        known = set(inspect.signature(thing).parameters)
        assert {part for row in named for part in row.split(", ")} <= known, name


def test_prose_keeps_code_and_escapes_the_rest():
    assert api.prose("a * b\n  and ``x * y`` <z>") == r"a \* b and `x * y` \<z>"
    text = api.documented(type("T", (), {"__doc__": "One.\n\n    a = b\n\nArgs:\n    x: first\n        and more\n"}))
    assert text == "\nOne.\n\n```\na = b\n```\n\n**Args:**\n\n- `x`: first and more\n"
