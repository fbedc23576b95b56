"""Run docs/walkthrough.md: every block in order, and what it prints written below it; the same as a notebook.

python -m bench walkthrough
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import io
import json
import re
import warnings
from pathlib import Path
from typing import Any

from .harness import machine
from .texts import where

PAGE = Path(__file__).parent.parent / "docs" / "walkthrough.md"
BLOCK = re.compile(r"```python\n(?P<code>.*?)```\n(?:\n```text\n(?P<output>.*?)```\n)?", flags=re.S)
BEGIN, END = "<!-- run: begin -->\n", "<!-- run: end -->\n"


def run(code: str, space: dict[str, Any]) -> str:
    """What the block prints, and its last expression's value, as a notebook shows them."""
    tree = ast.parse(code)
    last = tree.body[-1] if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    if last is not None:
        tree.body.pop()
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft and transformers about each other
        exec(compile(tree, PAGE.name, "exec"), space)
        value = eval(compile(ast.Expression(last.value), PAGE.name, "eval"), space) if last is not None else None
        if value is not None:
            print(repr(value))
    return printed.getvalue()


def written(page: str, outputs: list[str]) -> str:
    """The page with these outputs below its blocks."""
    rest = iter(outputs)

    def replaced(found: re.Match[str]) -> str:
        output = next(rest)
        block = f"```python\n{found['code']}```\n"
        return f"{block}\n```text\n{output}```\n" if output else block

    return BLOCK.sub(replaced, page)


def notebook(page: str) -> dict[str, Any]:
    """The page as a notebook of format 4.4."""
    cells: list[dict[str, Any]] = []

    def words(text: str) -> None:
        if text.strip():
            cells.append({"cell_type": "markdown", "metadata": {}, "source": text.strip().splitlines(keepends=True)})

    at, count = 0, 0
    for found in BLOCK.finditer(page):
        words(page[at : found.start()])
        at, count = found.end(), count + 1
        shown = found["output"]
        outputs = (
            [{"name": "stdout", "output_type": "stream", "text": shown.splitlines(keepends=True)}] if shown else []
        )
        code = found["code"].rstrip("\n").splitlines(keepends=True)
        cell = {"cell_type": "code", "execution_count": count, "metadata": {}, "outputs": outputs, "source": code}
        cells.append(cell)
    words(page[at:])
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 4}


def write_notebook(page: str) -> None:
    text = json.dumps(notebook(page), indent=1, ensure_ascii=False) + "\n"
    PAGE.with_suffix(".ipynb").write_text(text, encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="forgetless bench walkthrough", description=__doc__)
    parser.add_argument("--notebook", action="store_true", help="only make the notebook from the page as it is")
    options = parser.parse_args(arguments)
    page = PAGE.read_text(encoding="utf-8")
    if not options.notebook:
        space: dict[str, Any] = {"__name__": "__main__"}
        outputs: list[str] = []
        for found in BLOCK.finditer(page):
            outputs.append(run(found["code"], space))
            print(f">>> {found['code'].splitlines()[0]}\n{outputs[-1]}", flush=True)
        text = f"Run on: {where({'machine': machine()})}.\n"
        head, _, rest = written(page, outputs).partition(BEGIN)
        page = head + BEGIN + text + END + rest.partition(END)[2]
        PAGE.write_text(page, encoding="utf-8")
    write_notebook(page)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
