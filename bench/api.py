"""docs/api.md from the docstrings: ``python -m bench api [--check]``, and with ``python -m bench tables``."""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "api.md"
HEAD = """# API reference

Written by `python -m bench api` from the signatures and docstrings; change nothing here by hand.
`fl` is `import forgetless as fl`. Letters of shapes: M tokens, N out_features, K in_features, R rank.
"""
#: Heading -> (module, prefix of its names, the names in order; None: its ``__all__``, else all that it defines).
SECTIONS: dict[str, tuple[str, str, tuple[str, ...] | None]] = {
    "A model": (
        "forgetless",
        "fl.",
        ("adapt", "penalty", "drift", "explain", "calibrate", "consolidate", "merge", "remove", "adapters"),
    ),
    "Files": ("forgetless", "fl.", ("save", "load", "export_lora")),
    "PEFT": ("forgetless", "fl.", ("swap_in", "swap_out")),
    "Training": ("forgetless.training", "fl.training.", None),
    "Methods": ("forgetless.methods", "fl.", ("LoRA", "CLoRA", "CURLoRA", "LaLoRA")),
    "Penalties": (
        "forgetless.penalties",
        "fl.",
        ("NullSpace", "Laplace", "SourceDeviation", "OutputDeviation", "WeightDeviation", "Decay"),
    ),
    "What the calls return": ("forgetless.report", "", ("Report", "LayerReport")),
    "Consolidation": ("forgetless.consolidate", "", ("Consolidation",)),
    "An adapted layer": ("forgetless.layers.linear", "", ("AdaptedLinear",)),
    "Your own method": ("forgetless.methods", "fl.methods.", ("Method", "Adapter", "Site", "register")),
    "Your own penalty": ("forgetless.penalties", "fl.penalties.", ("Penalty", "PenaltyState", "register")),
    "Packed weights": ("forgetless.layers.quantized", "fl.packed.", ("register", "Kind")),
    "The op": ("forgetless.ops", "fl.ops.", ("lowrank_linear", "backend", "explain_path")),
    "Plans": ("forgetless.ops.dispatch", "forgetless.ops.dispatch.", ("plan_for", "Choice", "forget")),
    "Backends": (
        "forgetless.ops.reference",
        "forgetless.ops.reference.",
        ("project", "matmul_lowrank", "outer", "project_outer", "linear_lowrank", "keep_mask"),
    ),
    "Kernels": ("forgetless_kernels.fused", "forgetless_kernels.fused.", None),
    "Tiles": ("forgetless_kernels.tiles", "forgetless_kernels.tiles.", ("Tile", "forced", "tile_for")),
}
#: Modules whose own docstring opens their section.
INTRODUCED = (
    "forgetless.training",
    "forgetless.layers.quantized",
    "forgetless.ops",
    "forgetless.ops.dispatch",
    "forgetless.ops.reference",
    "forgetless_kernels.fused",
)
#: Every environment variable that the sources read: a test compares the names.
SWITCHES = {
    "FORGETLESS_PLAN": "`blas`, `split`, `full` or `once`: the plan of every layer; `strict`: a plan that fails raises "
    "instead of giving way to BLAS; both with a comma, `split,strict`. Anything else: ValueError at the first use.",
    "FORGETLESS_TUNE": "the table that `forgetless tune` writes and every process reads; default `plans.json` in the "
    "cache.",
    "FORGETLESS_CACHE": "folder of that table and of unpacked models; default `~/.cache/forgetless`.",
    "FORGETLESS_EXAMPLES": "tests: examples drawn for each property and kind of damage; 0, the default, takes few.",
    "FORGETLESS_STEPS": "tests: steps of the long run in `tests/triton_kernels/test_faults.py`, default 1000.",
    "FORGETLESS_SWAP": "`tests/support/peft_suite.py`: 0 swaps nothing in, for the outcomes to compare with.",
    "FORGETLESS_SWAP_OUT": "`tests/support/peft_suite.py`: file for the outcome of every test.",
}
BLOCKS = ("Args:", "Returns:", "Raises:", "Attributes:")


def public(module: Any, names: tuple[str, ...] | None) -> list[str]:
    """The names of a section: those given, or ``__all__``, or what the module defines."""
    if names is None:
        names = getattr(module, "__all__", None) or tuple(
            name
            for name, thing in vars(module).items()
            if not name.startswith("_") and getattr(thing, "__module__", None) == module.__name__
        )
    return [name for name in names if callable(getattr(module, name))]


def things() -> Iterator[tuple[str, str, Any]]:
    """(heading, full name, object) of everything on the page, in its order."""
    for heading, (module_name, prefix, names) in SECTIONS.items():
        module = importlib.import_module(module_name)
        for name in public(module, names):
            yield heading, prefix + name, getattr(module, name)


def members(cls: type) -> list[tuple[str, Any]]:
    """The public methods and properties that a class itself documents."""
    found = []
    for name, thing in vars(cls).items():
        bare = getattr(thing, "__func__", getattr(thing, "fget", thing))
        if not name.startswith("_") and inspect.isfunction(bare) and bare.__doc__:
            found.append((name, thing))
    return found


# ------------------------------------------------------------------------------------- signatures


def header(function: Any) -> str:
    """``def name(...) -> ...`` as the source has it: the comments with the shapes are a part of it."""
    lines = textwrap.dedent(inspect.getsource(inspect.unwrap(function))).splitlines()
    node = ast.parse("\n".join(lines)).body[0]
    assert isinstance(node, ast.FunctionDef)
    return "\n".join(lines[node.lineno - 1 : node.body[0].lineno - 1])


def constructor(cls: type) -> str:
    """``class Name(fields)``."""
    if "__init__" in vars(cls) and not hasattr(cls, "__dataclass_fields__"):
        init = header(cls.__init__)  # type: ignore[misc]
        init = re.sub(r"^def __init__\(self(, )?", f"class {cls.__name__}(", init).rstrip(":")
        return init.removesuffix(" -> None")
    try:
        parameters = [p for p in inspect.signature(cls).parameters.values() if not p.name.startswith("_")]
    except ValueError:  # a builtin's
        return f"class {cls.__name__}({', '.join(base.__name__ for base in cls.__bases__)})"
    fields = [str(p).replace("'", "", 2) if isinstance(p.annotation, str) else str(p) for p in parameters]
    fields = [re.sub(r"<function .*>", "...", field) for field in fields]  # an address is another in each process
    line = f"class {cls.__name__}({', '.join(fields)})"
    return line if len(line) <= 100 else f"class {cls.__name__}(\n    " + ",\n    ".join(fields) + ",\n)"


def signature(thing: Any) -> str:
    if inspect.isclass(thing):
        return constructor(thing)
    if isinstance(thing, property):
        return f"@property\n{header(thing.fget)}"
    kind = f"@{type(thing).__name__}\n" if isinstance(thing, (classmethod, staticmethod)) else ""
    return kind + header(getattr(thing, "__func__", thing))


# ------------------------------------------------------------------------------------- docstrings


def prose(text: str) -> str:
    """One paragraph as Markdown: code stays code, nothing else is markup."""
    parts = re.split(r"(``.+?``|\*\*[^*]+\*\*)", " ".join(text.split()))
    plain = [re.sub(r"([*<\[])", r"\\\1", part) for part in parts[::2]]
    marked = [part.replace("``", "`") for part in parts[1::2]]
    return "".join(part for pair in zip(plain, [*marked, ""], strict=True) for part in pair)


def items(lines: list[str], prose_alone: bool = False) -> str:
    """``name: text`` rows, whose further lines are indented, as a list; other text as a paragraph."""
    rows: list[str] = []
    for line in textwrap.dedent("\n".join(lines)).splitlines():
        if line.startswith(" ") and rows:
            rows[-1] += " " + line.strip()
        else:
            rows.append(line)
    if prose_alone or not all(re.match(r"[\w, ]+: ", row) for row in rows):
        return prose(" ".join(rows)) + "\n"
    return "".join(f"- `{name}`: {prose(text)}\n" for name, _, text in (row.partition(": ") for row in rows))


def documented(thing: Any) -> str:
    """A docstring as Markdown; indented text in it is verbatim."""
    text = ""
    for block in re.split(r"\n\s*\n", inspect.getdoc(thing) or ""):
        first, *rest = block.splitlines() or [""]
        if first in BLOCKS:
            text += f"\n**{first}**\n\n{items(rest, first == 'Returns:')}"
        elif block.startswith("    "):
            text += f"\n```\n{textwrap.dedent(block)}\n```\n"
        else:
            indented = next((i for i, line in enumerate([first, *rest]) if line.startswith("    ")), len(rest) + 1)
            lines = [first, *rest]
            text += f"\n{prose(' '.join(lines[:indented]))}\n"
            if indented <= len(rest):
                text += "\n```\n" + textwrap.dedent("\n".join(lines[indented:])) + "\n```\n"
    return text


def place(thing: Any) -> str:
    """Link to the source file."""
    file = Path(inspect.getsourcefile(inspect.unwrap(thing)) or "").resolve().relative_to(ROOT).as_posix()
    return f"[{file}](../{file})"


def described(name: str, thing: Any) -> str:
    text = f"\n### {name}\n\n{place(thing)}\n\n```python\n{signature(thing)}\n```\n{documented(thing)}"
    for member, inner in members(thing) if inspect.isclass(thing) else ():
        bare = getattr(inner, "fget", None) or getattr(inner, "__func__", inner)
        text += f"\n#### {name.rpartition('.')[2]}.{member}\n\n```python\n{signature(inner)}\n```\n{documented(bare)}"
    return text


def contents() -> str:
    """One row for each section: its names as links."""
    rows: dict[str, list[str]] = {}
    for heading, name, _ in things():
        anchor = re.sub(r"[^\w-]", "", name).lower()
        rows.setdefault(heading, []).append(f"[{name.rpartition('.')[2]}](#{anchor})")
    rows["From the shell"] = ["[command line](#command-line)", "[environment variables](#environment-variables)"]
    return "\n" + "".join(f"- {heading}: {', '.join(links)}\n" for heading, links in rows.items())


def library() -> str:
    """The page's part on Python."""
    text, last = "", None
    for heading, name, thing in things():
        if heading != last:
            text += f"\n## {heading}\n"
            module = SECTIONS[heading][0]
            text += documented(importlib.import_module(module)) if module in INTRODUCED else ""
        text += described(name, thing)
        last = heading
    return text


# ------------------------------------------------------------------------------------ command line


class _Found(Exception):
    """Carries a parser out of the ``main`` that made it."""


def parser_of(main: Any) -> argparse.ArgumentParser:
    def parse_args(self: argparse.ArgumentParser, *_: Any) -> None:
        raise _Found(self)

    with mock.patch.object(argparse.ArgumentParser, "parse_args", parse_args):
        try:
            main([])
        except _Found as found:
            return found.args[0]
    raise AssertionError(f"{main.__module__} parses nothing")


def option_rows(parser: argparse.ArgumentParser) -> list[tuple[str, str]]:
    return [
        (
            ", ".join(action.option_strings) or action.dest,
            meaning((action.help or "") % {**vars(action), "prog": parser.prog}, action.default),
        )
        for action in parser._actions
        if action.dest != "help" and action.help != argparse.SUPPRESS
    ]


def meaning(text: str, default: Any) -> str:
    """What an option means, with its default where that is the same everywhere and not said already."""
    values = default if isinstance(default, (list, tuple)) else [default]
    plain = all(isinstance(v, (int, float, str)) and not isinstance(v, bool) and v != "" for v in values)
    if not values or not plain or "efault" in text or "cpu" in values or "cuda" in values:
        return text
    shown = "Default: " + " ".join(map(str, values)) + "."
    return f"{text}{'' if text.endswith('.') else '.'} {shown}" if text else shown


def commands() -> Iterator[tuple[str, str, list[tuple[str, str]]]]:
    """(command line, what it does, its options with their meaning)."""
    import typer

    from forgetless.cli import main as cli
    from forgetless.cli.commands import app

    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        if name not in cli.TOOLS:
            rows = [(", ".join(p.opts), meaning(p.help or "", p.default)) for p in command.params]
            yield f"forgetless {name}", inspect.cleandoc(command.help or ""), rows
    from . import cli as bench

    for tool, (module, does) in cli.TOOLS.items():
        if tool != "bench":
            parser = parser_of(importlib.import_module(module.replace("forgetless_bench", __package__)).main)
            yield f"forgetless {tool}", does, option_rows(parser)
    for name, does in {**bench.BENCHES, **bench.OTHERS}.items():
        main = bench.run_all if name == "all" else importlib.import_module(f".{name}", __package__).main
        yield f"forgetless bench {name}", does, option_rows(parser_of(main))


def command_line() -> str:
    text = "\n## Command line\n\n`python -m forgetless` is `forgetless`, `python -m bench` is `forgetless bench`.\n"
    for line, does, rows in commands():
        text += f"\n### {line}\n\n{prose(does)}\n"
        listed = "".join(f"- `{option}`{f': {prose(means)}' if means else ''}\n" for option, means in rows)
        text += f"\n{listed}" if listed else ""
    return text


def page() -> str:
    switches = "".join(f"- `{name}`: {means}\n" for name, means in SWITCHES.items())
    return HEAD + contents() + library() + command_line() + f"\n## Environment variables\n\n{switches}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="forgetless bench api", description=__doc__)
    parser.add_argument("--check", action="store_true", help="only say whether the page is up to date")
    options = parser.parse_args(arguments)
    fresh = page()
    if PAGE.exists() and PAGE.read_text(encoding="utf-8") == fresh:
        print("docs/api.md is up to date")
        return 0
    if options.check:
        print("docs/api.md is not what python -m bench api writes", file=sys.stderr)
        return 1
    PAGE.write_text(fresh, encoding="utf-8")
    print("written: docs/api.md")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
