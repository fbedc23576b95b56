"""docs/walkthrough.md: its blocks run in order, on a tiny model; the notebook beside it is the same text."""

import json
import re

import pytest

pytest.importorskip("peft")
pytest.importorskip("forgetless_bench.walkthrough")

from tiny_study import tiny_model, tiny_tokenizer  # noqa: E402

from forgetless.study import data, models  # noqa: E402
from forgetless_bench import walkthrough  # noqa: E402

if not walkthrough.PAGE.exists():
    pytest.skip("outside of a source checkout", allow_module_level=True)
PAGE = walkthrough.PAGE.read_text(encoding="utf-8")


def tiny_domain(name):
    examples = tuple(data.Example(f"{i}:", f" {i}{i}") for i in range(16))
    return data.Domain(name, name, examples, examples[:4], "here", "none")


def test_the_blocks_run_in_order(monkeypatch):
    monkeypatch.setattr(models, "load_model", lambda name: (tiny_model(), tiny_tokenizer()))
    monkeypatch.setattr(data, "load_domain", tiny_domain)
    space = {"__name__": "__main__"}
    printed = [walkthrough.run(found["code"], space) for found in walkthrough.BLOCK.finditer(PAGE)]
    text = "".join(printed)
    assert "same logits: True" in text and "as before: True" in text and "unchanged: True" in text
    for name in ("LoRA", "CLoRA", "LaLoRA", "CURLoRA", "Source"):
        assert re.search(rf"^{name} +task .* drift 0\.\d+$", text, flags=re.M), name
    # what is printed on the tiny model stands where the page has an output, and nowhere else
    assert [bool(output) for output in printed] == [bool(f["output"]) for f in walkthrough.BLOCK.finditer(PAGE)]


def test_the_notebook_is_the_page():
    made = json.loads(walkthrough.PAGE.with_suffix(".ipynb").read_text(encoding="utf-8"))
    assert made == walkthrough.notebook(PAGE), "run python -m bench walkthrough --notebook"


def test_outputs_are_written_below_their_blocks():
    page = "# T\n\n```python\nx = 2\nx + 1\n```\n\n```text\nold\n```\n\nand\n\n```python\ny = x\n```\n"
    space: dict = {}
    outputs = [walkthrough.run(found["code"], space) for found in walkthrough.BLOCK.finditer(page)]
    assert outputs == ["3\n", ""]
    new = walkthrough.written(page, outputs)
    assert new == page.replace("old", "3") and walkthrough.written(new, outputs) == new
    cells = walkthrough.notebook(new)["cells"]
    assert [cell["cell_type"] for cell in cells] == ["markdown", "code", "markdown", "code"]
    assert cells[1]["outputs"][0]["text"] == ["3\n"] and cells[3]["outputs"] == []
